"""The AsyncAPI document of what goes over Redis and over the WebSocket: made of the contract, and of nothing else.

Channel names, schemas and examples come from producers/contract/messages.py. Only what the endpoint adds (its query
string, its errors) is said here again, for a flow runner has none of the worker; tests/unit/test_documents.py holds it
against the OpenAPI document.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from producers.contract.channels import changes_channel, inbox_key, results_channel
from producers.contract.errors import ErrorDetail, ErrorInfo
from producers.contract.messages import (
    MAX_MESSAGE_BYTES,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    add,
    remove,
)
from producers.contract.results import (
    Change,
    ChangeEvent,
    OperationResult,
    Recording,
    Registration,
    ResultRecord,
    StateChange,
    Tag,
    Task,
)
from producers.contract.values import Id, TagName, TagType, TaskName

VERSION: Final = "1.0.0"
"""The same as the OpenAPI document's."""

_ORGANIZATION: Final = UUID("01970000-0000-7000-8000-0000000000a0")
_EXECUTION: Final = UUID("01970000-0000-7000-8000-00000000e001")
_BATCH: Final = UUID("01970000-0000-7000-8000-00000000b001")
_TAG: Final = UUID("01970000-0000-7000-8000-00000000a001")
_REPLY_TO: Final = "runner-7"
_TIME: Final = datetime(2026, 1, 1, 12, 0, 0, 123456, timezone.utc)
_TOKEN: Final = {"token": "header.payload.signature"}


# --- What the contract has not -------------------------------------------------------------------


class Token(BaseModel):
    """A bearer token: a JWT with `sub` (the actor), `org` (the organization's id), `exp` and `scope`."""

    model_config = ConfigDict(extra="forbid")

    token: str


class FeedQuery(BaseModel):
    """What a watcher asks for, in the query string."""

    model_config = ConfigDict(extra="forbid")

    flow_execution_id: Id = Field(description="The flow execution that is asked about.")
    task_name: TaskName | None = Field(None, description="Only what is of this task.")
    tag_type: list[TagType] = Field([], max_length=100, description="Only tags of these types.")
    tag: list[TagName] = Field([], max_length=100, description="Only these tags.")
    after: int = Field(0, ge=0, description="The revision after which changes are wanted.")


class ErrorBody(BaseModel):
    message: str
    code: str
    details: list[ErrorDetail]


class ErrorAnswer(BaseModel):
    """What every error looks like; `request_id` is also in the header X-Request-ID."""

    error: ErrorBody
    request_id: str


# --- The document --------------------------------------------------------------------------------


def asyncapi_document() -> dict[str, Any]:
    """Return the AsyncAPI 3.0.0 document. The application that it tells of is task tags: workers and endpoint."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "task tags",
            "version": VERSION,
            "description": "Tags on the tasks of flow executions. The application is task tags: `receive` is what "
            "its workers and its endpoint receive, `send` what they send. Flow runners and watchers are "
            "on the other side: they send messages to the inbox, and receive results and changes. What is read "
            "and written over HTTP is in the OpenAPI document of the endpoint.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": _servers(),
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": _messages(),
            "schemas": _schemas(),
            "correlationIds": {
                "batch_id": {
                    "description": "The batch id tells which message a result or a change belongs to.",
                    "location": "$message.payload#/batch_id",
                }
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "In the header `Authorization`, or in the first frame: a browser can't set headers.",
                }
            },
        },
    }


# --- Servers, channels, operations ---------------------------------------------------------------


def _ref(*steps: str) -> dict[str, str]:
    return {"$ref": "/".join(("#", *steps))}


def _servers() -> dict[str, Any]:
    return {
        "redis": {
            "host": "{redis}",
            "protocol": "redis",
            "description": "Redis 7 or Valkey 8 and later; `rediss` where it has TLS.",
            "variables": {
                "redis": {
                    "default": "localhost:6379",
                    "description": "Host and port, as in TASK_TAGS_REDIS_URL.",
                }
            },
        },
        "endpoint": {
            "host": "{endpoint}",
            "protocol": "ws",
            "description": "The endpoint; `wss` where it has TLS.",
            "variables": {
                "endpoint": {
                    "default": "localhost:8080",
                    "description": "Host and port, as in TASK_TAGS_ENDPOINT_URL.",
                }
            },
            "security": [_ref("components", "securitySchemes", "bearer")],
        },
    }


_PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "organization_in_braces": {
        "description": "The organization's id within literal braces. These are part of the name: a Redis Cluster "
        "hash tag, so that all that belongs to an organization lives in one slot.",
        "examples": [f"{{{_ORGANIZATION}}}"],
    },
    "reply_to": {
        "description": "The `reply_to` of the message, or its `batch_id` if it has none: 1 to 200 of the characters "
        "A-Z a-z 0-9 . _ : -",
        "examples": [_REPLY_TO, str(_BATCH)],
    },
    "flow_execution_id": {
        "description": "The flow execution.",
        "examples": [str(_EXECUTION)],
        "location": "$message.payload#/flow_execution_id",
    },
}


def _redis_channel(name: str, messages: list[str], **words: str) -> dict[str, Any]:
    """Describe the key or channel that has this name for the organization, execution and so on of the examples."""
    address = name
    for parameter, described in _PARAMETERS.items():
        address = address.replace(described["examples"][0], f"{{{parameter}}}")
    return {
        "address": address,
        **words,
        "servers": [_ref("servers", "redis")],
        "parameters": {
            parameter: described
            for parameter, described in _PARAMETERS.items()
            if f"{{{parameter}}}" in address
        },
        "messages": _named(messages),
    }


def _named(messages: list[str]) -> dict[str, Any]:
    return {name: _ref("components", "messages", name) for name in messages}


_INBOX: Final = ["tag_batch", "flow_execution", "task_execution"]


def _channels() -> dict[str, Any]:
    return {
        "inbox": _redis_channel(
            inbox_key(_ORGANIZATION),
            _INBOX,
            title="Inbox of an organization",
            description="A Redis stream. An entry has two fields: `message`, which is the payload as JSON in UTF-8, "
            f"{MAX_MESSAGE_BYTES} bytes at most, and `token`, which stands here under headers. Messages of an "
            "organization take effect in the order of the stream, and each `batch_id` once. The SDK appends by a script "
            "that keeps the bound of the inbox, and wakes a worker at once; after a bare XADD beat wakes one, within "
            "5 seconds.",
        ),
        "results": _redis_channel(
            results_channel(_ORGANIZATION, _REPLY_TO),
            ["result"],
            title="Results of messages",
            description="Redis pub/sub: keeps nothing, so subscribe before you enqueue. To hear a result that was "
            "missed, enqueue the same message again: it does not take effect twice, and is answered again.",
        ),
        "changes": _redis_channel(
            changes_channel(_ORGANIZATION, _EXECUTION),
            ["change_event"],
            title="Changes of a flow execution",
            description="Redis pub/sub: keeps nothing. A gap in the revisions tells that an event was missed; it can "
            "be read from the endpoint, at `GET /task-tags/changes`. Events go out before the result of "
            "the message that made them.",
        ),
        "watch": {
            "address": "/task-tags/changes",
            "title": "Changes of a flow execution, without a gap",
            "description": "A WebSocket of the endpoint. It sends first the stored events after a revision, then each "
            "that comes, in the order of the revisions. When the token expires it closes, unless a new one of "
            "the same organization came before.",
            "servers": [_ref("servers", "endpoint")],
            "messages": _named(["token", "change_event", "error"]),
            "bindings": {
                "ws": {
                    "method": "GET",
                    "query": FeedQuery.model_json_schema(),
                    "bindingVersion": "0.1.0",
                }
            },
        },
    }


def _operation(action: str, channel: str, messages: list[str], summary: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": _ref("channels", channel),
        "summary": summary,
        "messages": [_ref("channels", channel, "messages", name) for name in messages],
    }


def _operations() -> dict[str, Any]:
    result = _operation(
        "send",
        "results",
        ["result"],
        "A worker publishes what became of a message; whoever waits for it hears it.",
    )
    return {
        "receive_message": {
            **_operation(
                "receive",
                "inbox",
                _INBOX,
                "A flow runner, or the endpoint, enqueues a message; a worker applies it.",
            ),
            "description": "The reply goes to the `reply_to` of the message. There is none to a message whose "
            "`batch_id` can't be read.",
            "reply": {"channel": result["channel"], "messages": result["messages"]},
        },
        "send_result": result,
        "send_change_event": _operation(
            "send",
            "changes",
            ["change_event"],
            "A worker publishes what a message changed in an execution; its watchers hear it.",
        ),
        "receive_token": _operation(
            "receive",
            "watch",
            ["token"],
            "A watcher sends its token: first, if the header has none, and again before it expires.",
        ),
        "send_watched": _operation(
            "send",
            "watch",
            ["change_event", "error"],
            "The endpoint sends each change event to a watcher; or why it closes, and closes.",
        ),
    }


# --- Messages ------------------------------------------------------------------------------------


def _messages() -> dict[str, Any]:
    return {
        "tag_batch": _message(
            TagBatch,
            "Operations on tags, which take effect together or not at all",
            _batches(),
            headers=_TOKEN,
            description="Its token needs the scope `task-tags:write`.",
        ),
        "flow_execution": _message(
            RegisterExecution,
            "Registers a flow execution, or lets its task names grow",
            _registrations(),
            headers=_TOKEN,
            description="Its token needs the scope `flow-executions:write`.",
        ),
        "task_execution": _message(
            SetTaskState,
            "Records the state of a task",
            _states(),
            headers=_TOKEN,
            description="Its token needs the scope `flow-executions:write`.",
        ),
        "result": _message(
            ResultRecord,
            "What became of a message",
            _results(),
            description="Has exactly one of `tags`, `flow_execution`, `task_execution` and `error`. Fields may be "
            "added later: skip those that you don't know.",
        ),
        "change_event": _message(
            ChangeEvent,
            "What one message changed in one flow execution",
            _events(),
            description="Fields and kinds of changes may be added later: skip those that you don't know.",
        ),
        "token": _message(
            Token,
            "A bearer token, as a text frame",
            {"token": _TOKEN},
            description="It needs the scope `task-tags:read`.",
        ),
        "error": _message(
            ErrorAnswer,
            "Why the endpoint closes, as a text frame",
            _errors(),
            description="The close code that follows is 4000 and the HTTP status of the same error; for 503 it is "
            "1013, try again later. A watcher that is too slow gets 1013 alone.",
        ),
    }


def _message(
    model: type[Any],
    title: str,
    examples: dict[str, Any],
    *,
    description: str,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Describe a message. `examples`: payloads by what they are; `headers`: what stands beside each of them."""
    beside = {} if headers is None else {"headers": headers}
    described: dict[str, Any] = {
        "name": model.__name__,
        "title": title,
        "description": description,
        "payload": _ref("components", "schemas", model.__name__),
    }
    if headers is not None:
        described["headers"] = _ref("components", "schemas", Token.__name__)
    if model not in (Token, ErrorAnswer):
        described["correlationId"] = _ref("components", "correlationIds", "batch_id")
    described["examples"] = [
        {"name": name, **beside, "payload": payload} for name, payload in examples.items()
    ]
    return described


# --- Examples ------------------------------------------------------------------------------------


def _encoded(
    **examples: TagBatch | RegisterExecution | SetTaskState | ResultRecord | ChangeEvent,
) -> Any:
    """Return examples as they are sent."""
    return {name: json.loads(example.encode()) for name, example in examples.items()}


_TASK: Final = "extract_data"
_TAG_TYPE: Final = "review_status"


def _batches() -> Any:
    return _encoded(
        add_and_remove=TagBatch(
            batch_id=_BATCH,
            reply_to=_REPLY_TO,
            tags=[
                remove(_EXECUTION, _TASK, _TAG_TYPE, "pending"),
                add(_EXECUTION, _TASK, _TAG_TYPE, "reviewed", {"reviewer": "ada"}),
            ],
        ),
        remove_exactly_the_tag_without_metadata=TagBatch(
            batch_id=_BATCH, tags=[remove(_EXECUTION, _TASK, _TAG_TYPE, "pending", None)]
        ),
    )


def _registrations() -> Any:
    return _encoded(
        some_task_names=RegisterExecution(
            batch_id=_BATCH,
            reply_to=_REPLY_TO,
            flow_execution_id=_EXECUTION,
            task_names=[_TASK, "review"],
        ),
        every_task_name=RegisterExecution(batch_id=_BATCH, flow_execution_id=_EXECUTION),
    )


def _states() -> Any:
    return _encoded(
        completed=SetTaskState(
            batch_id=_BATCH,
            reply_to=_REPLY_TO,
            flow_execution_id=_EXECUTION,
            task_name=_TASK,
            state="completed",
        )
    )


def _results() -> Any:
    head: dict[str, Any] = {"batch_id": _BATCH, "organization_id": _ORGANIZATION}
    applied: dict[str, Any] = {**head, "applied_at": _TIME}
    unknown = ErrorDetail(index=1, field="flow_execution_id", message="is unknown")
    return _encoded(
        of_a_tag_batch=ResultRecord(
            **applied, tags=[OperationResult(status="removed"), OperationResult(status="added")]
        ),
        of_a_flow_execution=ResultRecord(
            **applied, flow_execution=Registration(status="registered")
        ),
        of_a_task_execution=ResultRecord(**applied, task_execution=Recording(status="recorded")),
        refused=ResultRecord(
            **head,
            error=ErrorInfo(
                code="not_found", message="an execution or task is unknown", details=[unknown]
            ),
        ),
    )


def _events() -> Any:
    tag = Tag(
        id=_TAG,
        flow_execution_id=_EXECUTION,
        task_name=_TASK,
        tag_type=_TAG_TYPE,
        tag="reviewed",
        tag_metadata={"reviewer": "ada"},
        organization_id=_ORGANIZATION,
        status="active",
        created_at=_TIME,
        created_by="ada",
        updated_at=None,
        modified_by=None,
    )
    task = Task(_EXECUTION, _TASK, "completed", state_changed_at=_TIME, state_changed_by=_REPLY_TO)
    return _encoded(
        of_a_tag=_event(42, "ada", Change("added", tag)),
        of_a_state=_event(43, _REPLY_TO, StateChange("state", task)),
    )


def _event(revision: int, changed_by: str, change: Change | StateChange) -> ChangeEvent:
    return ChangeEvent(
        organization_id=_ORGANIZATION,
        flow_execution_id=_EXECUTION,
        revision=revision,
        batch_id=_BATCH,
        changed_by=changed_by,
        changed_at=_TIME,
        changes=[change],
    )


def _errors() -> Any:
    error = ErrorBody(message="the token has expired", code="unauthorized", details=[])
    answer = ErrorAnswer(error=error, request_id="3f7e1c1e-5a57-4f0c-9a0f-1b1f0c7f5a11")
    return {"expired": answer.model_dump()}


# --- Schemas -------------------------------------------------------------------------------------


class _WithoutDiscriminators(GenerateJsonSchema):
    """AsyncAPI's discriminator is another thing than pydantic's; the constants in the schemas say as much."""

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> dict[str, Any]:
        described = super().tagged_union_schema(schema)
        described.pop("discriminator", None)
        return described


_MODELS: Final = (
    TagBatch,
    RegisterExecution,
    SetTaskState,
    ResultRecord,
    ChangeEvent,
    Token,
    ErrorAnswer,
)


def _schemas() -> dict[str, Any]:
    """Return the schemas of all models, and of those that they are made of, by name."""
    adapters: list[tuple[Any, Any, TypeAdapter[Any]]] = [
        (model.__name__, "validation", TypeAdapter(model)) for model in _MODELS
    ]
    _, described = TypeAdapter.json_schemas(
        adapters,
        ref_template="#/components/schemas/{model}",
        schema_generator=_WithoutDiscriminators,
    )
    schemas: dict[str, Any] = described["$defs"]
    return schemas
