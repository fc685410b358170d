"""The routes that write: they enqueue a message under the caller's token, and wait for its result.

So the endpoint writes in the same way as any producer, and the worker decides every answer.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID, uuid4, uuid5

import psycopg
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from producers.contract.channels import results_channel
from producers.contract.encoding import parse_body
from producers.contract.errors import ErrorDetail, InvalidMessage
from producers.contract.messages import (
    MAX_MESSAGE_BYTES,
    MAX_TASK_NAMES,
    Message,
    TagOperation,
    TaskState,
)
from producers.contract.results import (
    OperationResult,
    RecordingStatus,
    RegistrationStatus,
    ResultRecord,
)
from producers.contract.values import TaskName, uuid7
from producers.enqueuer import Enqueuer
from producers.errors import Unavailable
from producers.pubsub import Listener, PubSubMultiplexer, wait_at_most
from worker.api.auth import bearer_token, require_scope
from worker.api.errors import ERRORS, ApiError, documented_error
from worker.api.params import NoQuery, openapi_parameters, parse_query
from worker.api.queries import Reader
from worker.auth import EXECUTIONS_WRITE, WRITE, Principal
from worker.db.connection import UnsafeRole

router = APIRouter()

WAIT_SECONDS: Final = 10.0
MAX_WAIT_SECONDS: Final = 60
_SUBSCRIBE_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 1.0
_THREADS: Final = 40
_LARGE_BYTES: Final = 64 * 1024
_KEYS: Final = UUID("0b6c2b55-7f0c-5d0e-8a39-5f2a4c9d6e10")
"""The namespace of the batch ids that are made from Idempotency-Keys."""
_STATUS_OF: Final = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "internal_error": 500,
}


class PendingResult(Listener):
    """Waits for the one result that is published for a request."""

    def __init__(self) -> None:
        self.subscribed = asyncio.Event()
        self.record: asyncio.Future[ResultRecord] = asyncio.get_running_loop().create_future()

    def on_subscribed(self) -> None:
        self.subscribed.set()

    def on_event(self, payload: bytes) -> None:
        if not self.record.done():
            self.record.set_result(ResultRecord.decode(payload))


@dataclass(frozen=True)
class WriteService:
    """Enqueues messages and waits for their results."""

    enqueuer: Enqueuer
    pubsub: PubSubMultiplexer
    reader: Reader
    threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_THREADS))
    """Limits the threads that wait for Redis. Reads have others, so these can't hold them up."""

    async def apply(
        self, organization_id: UUID, message: Message, token: str, seconds: float
    ) -> ResultRecord | None:
        """Enqueue a message and return its result; None if there is none in time.

        Each request has its own results channel, because two requests with the same batch id may
        ask for different things, and then have different results.

        Args:
            seconds: How long to wait; 0 does not wait.

        Raises:
            ApiError: 400, 409, 429 or 503.
        """
        if not seconds:
            await self._enqueue(organization_id, message, token)
            return None
        pending, reply_to = PendingResult(), f"endpoint-{uuid4()}"
        with self.pubsub.listening(results_channel(organization_id, reply_to), pending):
            await wait_at_most(_SUBSCRIBE_SECONDS, pending.subscribed.wait())
            named = message.model_copy(update={"reply_to": reply_to})
            await self._enqueue(organization_id, named, token)
            return await self._result(organization_id, message, pending.record, seconds)

    async def _enqueue(self, organization_id: UUID, message: Message, token: str) -> None:
        encoded = _encoded(message)
        try:
            accepted = await to_thread.run_sync(
                self.enqueuer.enqueue, organization_id, [encoded], token, limiter=self.threads
            )
        except Unavailable as error:
            raise ApiError(503, "unavailable", "Redis can't be used; try again later") from error
        if not accepted:
            raise ApiError(429, "inbox_full", "the organization's inbox is full; try again later")

    async def _result(
        self,
        organization_id: UUID,
        message: Message,
        published: asyncio.Future[ResultRecord],
        seconds: float,
    ) -> ResultRecord | None:
        """Wait for the result; read the stored one every second, because pub/sub may lose it."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while (left := end - clock()) > 0:
            await wait_at_most(min(left, _POLL_SECONDS), asyncio.shield(published))
            if published.done():
                return published.result()
            try:
                stored = await self.reader.record(organization_id, message.batch_id)
            except (psycopg.Error, UnsafeRole, TimeoutError):
                continue
            if stored is not None and stored.digest == message.digest():
                return ResultRecord.decode(stored.record)
            if stored is not None:
                raise ApiError(409, "conflict", "this batch id was used for another request")
        return None


def _encoded(message: Message) -> bytes:
    try:
        return message.encode()
    except InvalidMessage as error:
        raise _invalid(error) from None


def _invalid(error: InvalidMessage) -> ApiError:
    return ApiError(400, "bad_request", "the body breaks the contract", error.details)


# --- Requests ------------------------------------------------------------------------------------


async def _body(request: Request) -> bytes:
    """Read the body. Raises `ApiError` (413) if it is longer than a message may be."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_MESSAGE_BYTES:
            limit = f"a body has at most {MAX_MESSAGE_BYTES} bytes"
            raise ApiError(413, "body_too_large", limit)
    return body


def _batch_id(request: Request, principal: Principal) -> UUID:
    """Return a new batch id, or the one that is made from the actor's Idempotency-Key."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return uuid7()
    if not re.fullmatch(r"[!-~](?:[ -~]{0,198}[!-~])?", key):
        detail = ErrorDetail(field="Idempotency-Key", message="must have 1 to 200 ASCII characters")
        raise ApiError(400, "bad_request", "a header is wrong", [detail])
    return uuid5(
        _KEYS, f"{principal.organization_id} {len(principal.actor)} {principal.actor} {key}"
    )


def prefer_wait(request: Request) -> float:
    """Return how many seconds to wait for the result, by the header Prefer (RFC 7240).

    `wait` takes precedence over `respond-async`, which means 0.
    """
    headers = ",".join(request.headers.getlist("prefer"))
    wanted = [each.strip().lower() for each in headers.split(",")]
    waits = [found[1] for each in wanted if (found := re.fullmatch(r"wait\s*=\s*(\d{1,9})", each))]
    if waits:
        return min(int(waits[0]), MAX_WAIT_SECONDS)
    return 0 if "respond-async" in wanted else WAIT_SECONDS


async def _write(request: Request, scope: str, kind: str, **rest: Any) -> Response:
    """Make a message from the request, apply it, and answer with its result."""
    principal = await require_scope(request, scope)
    parse_query(request, NoQuery)
    service: WriteService = request.app.state.write_service
    seconds, batch_id = prefer_wait(request), _batch_id(request, principal)
    try:
        raw = await _body(request)
        read = partial(parse_body, kind, raw, batch_id=batch_id, **rest)
        # It may take a second to find what is wrong with a large one.
        message = read() if len(raw) < _LARGE_BYTES else await run_in_threadpool(read)
    except InvalidMessage as error:
        raise _invalid(error) from None
    record = await service.apply(principal.organization_id, message, bearer_token(request), seconds)
    headers = {"Location": f"/task-tags/batches/{batch_id}"}
    if record is None:
        return Response(to_json({"batch_id": batch_id}), 202, headers, "application/json")
    if record.error is not None:
        refused = record.error
        raise ApiError(_STATUS_OF[refused.code], refused.code, refused.message, refused.details)
    statuses = [{"status": status} for status in record.statuses]
    body: Any = {"tags": statuses} if kind == "tag_batch" else statuses[0]
    status = 201 if record.statuses == ["registered"] else 200
    return Response(to_json(body), status, headers, "application/json")


# --- The OpenAPI document ------------------------------------------------------------------------


class TagsBody(BaseModel):
    """The operations of one batch. They take effect together or not at all."""

    model_config = ConfigDict(extra="forbid")

    tags: list[TagOperation] = Field(min_length=1, max_length=100)


class TagsResult(BaseModel):
    """A status for each operation, in the same order."""

    tags: list[OperationResult]


class RegistrationBody(BaseModel):
    """The task names to register; null allows every task name."""

    model_config = ConfigDict(extra="forbid")

    task_names: Annotated[list[TaskName], Field(max_length=MAX_TASK_NAMES)] | None = None


class RegistrationResult(BaseModel):
    status: RegistrationStatus


class StateBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    flow_execution_id: UUID
    task_name: TaskName
    state: TaskState


class StateResult(BaseModel):
    status: RecordingStatus


class Accepted(BaseModel):
    """The batch is enqueued. Once it is applied, its result can be read at `Location`."""

    batch_id: UUID


_LOCATION: Final = {
    "Location": {"description": "The path of the stored result.", "schema": {"type": "string"}},
    "X-Request-ID": {"schema": {"type": "string"}},
}
_HEADERS: Final[tuple[dict[str, Any], ...]] = (
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "The same key of the same actor is the same batch, which takes effect once.",
        "schema": {"type": "string", "maxLength": 200},
    },
    {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async` does not wait for the result; `wait=5` waits up to 5 "
        "seconds (at most 60).",
        "schema": {"type": "string"},
    },
)


def _describe(body: type[BaseModel], scope: str) -> dict[str, Any]:
    """Return the OpenAPI description of a request that the route reads, and of its answers."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    content = {"application/json": {"schema": schema}}
    return {
        "responses": {
            202: _answers(
                Accepted,
                {"batch_id": "01970000-0000-7000-8000-00000000b001"},
                "Enqueued; there is no result yet.",
            ),
            **ERRORS,
            400: documented_error(
                "bad_request",
                "the body breaks the contract",
                [{"index": 0, "field": "tag", "message": "must have at least 1 character(s)"}],
            ),
            403: documented_error("forbidden", f"the token lacks the scope {scope}"),
            404: documented_error(
                "not_found",
                "an execution or task is unknown",
                [{"index": 0, "field": "flow_execution_id", "message": "is unknown"}],
            ),
            409: documented_error("conflict", "this batch id was used for another request"),
            429: documented_error(
                "inbox_full",
                "the organization's inbox is full; try again later",
                None,
                "Retry-After",
            ),
        },
        "openapi_extra": {
            **openapi_parameters(NoQuery, *_HEADERS),
            "requestBody": {"required": True, "content": content},
        },
    }


def _answers(model: type[BaseModel], example: Any, description: str) -> dict[str, Any]:
    return {
        "model": model,
        "description": description,
        "content": {"application/json": {"example": example}},
        "headers": _LOCATION,
    }


# --- Paths ---------------------------------------------------------------------------------------

_TAGS: Final = _describe(TagsBody, WRITE)
_REGISTRATION: Final = _describe(RegistrationBody, EXECUTIONS_WRITE)
_STATE: Final = _describe(StateBody, EXECUTIONS_WRITE)


@router.patch(
    "/task-tags",
    summary="Add and remove tags, all or none",
    response_model=None,
    responses={
        200: _answers(
            TagsResult,
            {"tags": [{"status": "added"}, {"status": "already_exists"}]},
            "Applied: a status for each operation, in the same order.",
        ),
        **_TAGS["responses"],
    },
    openapi_extra=_TAGS["openapi_extra"],
)
async def change_tags(request: Request) -> Response:
    return await _write(request, WRITE, "tag_batch")


@router.put(
    "/flow-executions/{flow_execution_id}",
    summary="Register a flow execution, or add task names to it",
    response_model=None,
    responses={
        200: _answers(
            RegistrationResult, {"status": "already_exists"}, "It was registered before."
        ),
        201: _answers(RegistrationResult, {"status": "registered"}, "It is registered now."),
        **_REGISTRATION["responses"],
    },
    openapi_extra=_REGISTRATION["openapi_extra"],
)
async def register(request: Request, flow_execution_id: UUID) -> Response:
    return await _write(
        request, EXECUTIONS_WRITE, "flow_execution", flow_execution_id=flow_execution_id
    )


@router.put(
    "/task-executions",
    summary="Record the state of a task",
    response_model=None,
    responses={
        200: _answers(StateResult, {"status": "recorded"}, "Recorded, or unchanged."),
        **_STATE["responses"],
    },
    openapi_extra=_STATE["openapi_extra"],
)
async def record_state(request: Request) -> Response:
    return await _write(request, EXECUTIONS_WRITE, "task_execution")
