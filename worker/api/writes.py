"""The routes that write: they enqueue a message under the caller's token, and wait for its result.

So the endpoint writes in the same way as any producer, and the worker decides every answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID, uuid5

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import to_json

from producers.contract.encoding import parse_body
from producers.contract.errors import ErrorDetail, ErrorInfo, FoundTag, InvalidMessage
from producers.contract.messages import (
    MAX_CLEARED_TYPES,
    MAX_CONDITIONS,
    MAX_MESSAGE_BYTES,
    MAX_OPERATIONS,
    MAX_TASK_NAMES,
    Condition,
    TagOperation,
    TaskState,
)
from producers.contract.results import (
    OperationResult,
    Recording,
    Registration,
    ResultRecord,
)
from producers.contract.values import FlowId, TagType, TaskName, uuid7
from worker.api.auth import ExecutionWriting, TagWriting, bearer_token
from worker.api.errors import (
    EXPIRED,
    TOO_LARGE,
    UNAVAILABLE,
    ApiError,
    documented,
    forbidden,
    invalid_body,
    text_header,
)
from worker.api.params import NoParameters, wait_preference
from worker.api.write_service import CONFLICT, INBOX_FULL, WriteService
from worker.auth import EXECUTIONS_WRITE, WRITE, Principal

WAIT_SECONDS: Final = 10.0
_LARGE_BYTES: Final = 16 * 1024
_KEYS: Final = UUID("0b6c2b55-7f0c-5d0e-8a39-5f2a4c9d6e10")
"""The namespace of the batch ids that are made from Idempotency-Keys."""
_STATUS_OF: Final = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "precondition_failed": 412,
    "too_large": 422,
    "internal_error": 500,
}


# --- Requests ------------------------------------------------------------------------------------

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Requests of one actor with the same key are the same batch, which takes "
        "effect once.",
        json_schema_extra={"maxLength": 200},
    ),
]
Prefer = Annotated[
    list[str],
    WithJsonSchema({"type": "string"}),
    Header(
        alias="Prefer",
        default_factory=list,
        description="`respond-async` does not wait for the result; `wait=5` waits up to 5 seconds "
        "(at most 60).",
    ),
]


def _batch_id(key: str | None, caller: Principal) -> UUID:
    """Return a new batch id, or the one that is made from the actor's Idempotency-Key."""
    if key is None:
        return uuid7()
    if not re.fullmatch(r"[!-~](?:[ -~]{0,198}[!-~])?", key):
        detail = ErrorDetail(field="Idempotency-Key", message="must have 1 to 200 ASCII characters")
        raise ApiError(400, "bad_request", "a header is wrong", [detail])
    return uuid5(_KEYS, f"{caller.organization_id} {len(caller.actor)} {caller.actor} {key}")


def _wait_seconds(prefer: list[str]) -> float:
    """Return how many seconds to wait for the result."""
    seconds, is_async = wait_preference(prefer)
    return (0 if is_async else WAIT_SECONDS) if seconds is None else seconds


@dataclass(frozen=True)
class WriteRequest:
    """A request that writes. Its body is read after the token and all parameters are checked.

    FastAPI itself would read a body before it calls any dependency, and accepts what the contract
    refuses, such as doubled keys (docs/concepts/contract.md#what-is-refused).
    """

    request: Request
    key: str | None
    prefer: list[str]

    async def apply(self, caller: Principal, kind: str, **rest: Any) -> Response:
        """Make a message of the body and the fields in `rest`; answer with its result."""
        service: WriteService = self.request.app.state.write_service
        seconds, batch_id = _wait_seconds(self.prefer), _batch_id(self.key, caller)
        raw = await self._body()
        read = partial(parse_body, kind, raw, batch_id=batch_id, **rest)
        try:
            if len(raw) < _LARGE_BYTES:
                message = read()
            else:
                message = await service.parse_large(caller.organization_id, read)
        except InvalidMessage as error:
            raise invalid_body(error.details) from None
        token = bearer_token(self.request)
        record = await service.apply(caller.organization_id, message, token, seconds)
        return _answer(kind, batch_id, record, is_kept=self.key is not None)

    async def _body(self) -> bytes:
        """Read the body. Raises `ApiError` (413) if it is longer than a message may be."""
        body = b""
        async for chunk in self.request.stream():
            body += chunk
            if len(body) > MAX_MESSAGE_BYTES:
                raise TOO_LARGE
        return body


async def write_request(
    request: Request, parameters: NoParameters, prefer: Prefer, key: IdempotencyKey = None
) -> WriteRequest:
    return WriteRequest(request, key, prefer)


Writing = Annotated[WriteRequest, Depends(write_request)]


def _answer(kind: str, batch_id: UUID, record: ResultRecord | None, *, is_kept: bool) -> Response:
    """Return the answer to a request by the result of its message, or 202 if there is none yet.

    Args:
        is_kept: The request has an Idempotency-Key, so its result is that of each repetition.
    """
    headers = {"Location": f"/task-tags/batches/{batch_id}"}
    if record is None:
        return Response(to_json({"batch_id": batch_id}), 202, headers, "application/json")
    if record.error is not None:
        refused = record.error
        text, is_stored = refused.message, _is_stored(refused)
        if is_kept and is_stored:
            text += "; this answer is stored for the Idempotency-Key: use another key for a retry"
        status = _STATUS_OF.get(refused.code, 422)  # a later worker may have other codes
        raise ApiError(status, refused.code, text, refused.details, headers if is_stored else None)
    body: Any = record.model_dump(include={"tags", "flow_execution", "task_execution"})
    body = {"tags": body["tags"]} if kind == "tag_batch" else body[kind]
    status = 201 if record.statuses == ["registered"] else 200
    return Response(to_json(body), status, headers, "application/json")


def _is_stored(error: ErrorInfo) -> bool:
    """Whether it is the answer to the same batch again (docs/concepts/contract.md#rule-10)."""
    is_of_flow_id = error.code == "conflict" and bool(error.details)
    return is_of_flow_id or error.code in ("not_found", "precondition_failed", "too_large")


# --- The OpenAPI document ------------------------------------------------------------------------


class TagsBody(BaseModel):
    """The operations of one batch. If all conditions hold, all take effect; otherwise none does."""

    model_config = ConfigDict(extra="forbid")

    tags: list[TagOperation] = Field(min_length=1, max_length=MAX_OPERATIONS)
    conditions: list[Condition] = Field(default=[], max_length=MAX_CONDITIONS)


class RegistrationBody(BaseModel):
    """The task names to register (null allows every task name), and the flow that is executed."""

    model_config = ConfigDict(extra="forbid")

    task_names: Annotated[list[TaskName], Field(max_length=MAX_TASK_NAMES)] | None = None
    flow_id: FlowId | None = None


class StateBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    flow_execution_id: UUID
    task_name: TaskName
    state: TaskState
    clear: Annotated[list[TagType], Field(min_length=1, max_length=MAX_CLEARED_TYPES)] | None = (
        Field(
            None,
            description="Types of tags to remove from the task. It needs the scope "
            "task-tags:write, too.",
        )
    )


BODIES: Final = (TagsBody, RegistrationBody, StateBody)
"""The models of bodies, which FastAPI does not know because it does not read them."""


class TagsResult(BaseModel):
    """A status for each operation, in the same order."""

    tags: list[OperationResult]


class Accepted(BaseModel):
    """The batch is enqueued. Once it is applied, its result can be read at `Location`."""

    batch_id: UUID


_LOCATION: Final = {"headers": text_header("Location", "The path of the stored result.")}
_ACCEPTED: Final = {
    "model": Accepted,
    "description": "Enqueued; there is no result yet.",
    **_LOCATION,
}
_STORED: Final = {"Location": "/task-tags/batches/01974a3e-5b7a-7c4e-9d2b-3f1a6c8e0b5d"}
_FOUND: Final = FoundTag(
    tag_type="review_status",
    tag="approved",
    created_by="ada",
    created_at=datetime(2026, 1, 1, 12, tzinfo=timezone.utc),
)


def _of_body(index: int | None, field: str) -> ApiError:
    detail = ErrorDetail(index=index, field=field, message="must have at least 1 character(s)")
    return invalid_body([detail])


def _unknown(index: int | None) -> ApiError:
    detail = ErrorDetail(index=index, field="flow_execution_id", message="is unknown")
    return ApiError(404, "not_found", "an execution or task is unknown", [detail], _STORED)


def _too_large(index: int | None, field: str | None, message: str) -> ApiError:
    detail = ErrorDetail(index=index, field=field, message=message)
    text = "the message exceeds what one message may change"
    return ApiError(422, "too_large", text, [detail], _STORED)


_PROBLEMS: Final = documented(EXPIRED, CONFLICT, INBOX_FULL, UNAVAILABLE)
_OF_TAGS: Final = documented(
    _of_body(0, "tag"),
    forbidden(WRITE),
    _unknown(0),
    ApiError(
        412,
        "precondition_failed",
        "a condition of the batch does not hold",
        [ErrorDetail(index=0, field="conditions", message="no such tag is active", found=[_FOUND])],
        _STORED,
    ),
    _too_large(0, None, "250 active tags differ in their metadata alone"),
)
_OF_REGISTRATION: Final = documented(
    _of_body(0, "task_names"),
    forbidden(EXECUTIONS_WRITE),
    ApiError(
        409,
        "conflict",
        "this batch id was used for another message, or the execution was registered with another "
        "flow_id, or none",
        [ErrorDetail(field="flow_id", message="is not that of the execution")],
    ),
    _too_large(None, "task_names", f"an execution has at most {MAX_TASK_NAMES} registered names"),
)
_OF_STATE: Final = documented(
    _of_body(None, "task_name"),
    forbidden(EXECUTIONS_WRITE),
    _unknown(None),
    _too_large(None, "clear", "more than 1000 active tags of the type are on the task"),
)


def _body_of(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# --- Paths ---------------------------------------------------------------------------------------

router = APIRouter(responses={200: _LOCATION, 202: _ACCEPTED, **_PROBLEMS})


@router.patch(
    "/task-tags",
    summary="Add, remove and set tags, all or none",
    response_model=TagsResult,
    response_description="Applied: a status for each operation, in the same order.",
    responses=_OF_TAGS,
    openapi_extra=_body_of(TagsBody),
)
async def change_tags(caller: TagWriting, write: Writing) -> Response:
    return await write.apply(caller, "tag_batch")


@router.put(
    "/flow-executions/{flow_execution_id}",
    summary="Register a flow execution, or add task names to it",
    response_model=Registration,
    response_description="The execution was registered before.",
    responses={
        201: {"model": Registration, "description": "The execution is now registered", **_LOCATION},
        **_OF_REGISTRATION,
    },
    openapi_extra=_body_of(RegistrationBody),
)
async def register(caller: ExecutionWriting, write: Writing, flow_execution_id: UUID) -> Response:
    return await write.apply(caller, "flow_execution", flow_execution_id=flow_execution_id)


@router.put(
    "/task-executions",
    summary="Record the state of a task",
    response_model=Recording,
    response_description="Recorded, or unchanged.",
    responses=_OF_STATE,
    openapi_extra=_body_of(StateBody),
)
async def record_state(caller: ExecutionWriting, write: Writing) -> Response:
    return await write.apply(caller, "task_execution")
