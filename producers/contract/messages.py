"""What producers send: tag batches, registrations of executions and task states, with their limits.

The rules are in docs/concepts/contract.md. What a message does is decided in worker/rules.py, and
how it travels is in producers/inbox/protocol.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar
from uuid import UUID

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from producers.contract.errors import ErrorDetail, InvalidMessage, error_details
from producers.contract.values import (
    Id,
    ReplyTo,
    StrictModel,
    TagMetadata,
    TagName,
    TagType,
    TaskName,
    batch_id_for,
    uuid7,
)

SCHEMA_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 1024 * 1024
MAX_OPERATIONS: Final = 100
MAX_TASK_NAMES: Final = 10_000
TOO_LARGE: Final = ErrorDetail(
    message=f"the message must not be larger than {MAX_MESSAGE_BYTES} bytes"
)


Model = TypeVar("Model", bound=StrictModel)


def build(model: type[Model], fields: dict[str, Any]) -> Model:
    """Build a message or a part of one. Raises `InvalidMessage` with every fault."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise InvalidMessage(error_details(error)) from None


# --- Tag batches ---------------------------------------------------------------------------------


class TagOperation(StrictModel):
    """Adds or removes one tag (docs/concepts/contract.md#rule-1 to #rule-4).

    `tag_metadata` is any JSON value of at most 8 KiB and 32 levels. In `remove`, null means exactly
    the tag without metadata, and a field that is left out means every tag of that name.
    """

    operation: Literal["add", "remove"]
    flow_execution_id: Id
    task_name: TaskName
    tag_type: TagType
    tag: TagName
    tag_metadata: TagMetadata = None

    @property
    def any_metadata(self) -> bool:
        """Whether this removes the tag with any metadata (docs/concepts/contract.md#rule-3)."""
        return self.operation == "remove" and "tag_metadata" not in self.model_fields_set


def add(
    flow_execution_id: UUID | str, task_name: str, tag_type: str, tag: str, tag_metadata: Any = None
) -> TagOperation:
    """Build the operation that adds a tag. Raises `InvalidMessage`."""
    fields = {
        "operation": "add",
        "flow_execution_id": flow_execution_id,
        "task_name": task_name,
        "tag_type": tag_type,
        "tag": tag,
        "tag_metadata": tag_metadata,
    }
    return build(TagOperation, fields)


class _Unset:
    def __repr__(self) -> str:
        return "any metadata"


ANY_METADATA: Final = _Unset()


def remove(
    flow_execution_id: UUID | str,
    task_name: str,
    tag_type: str,
    tag: str,
    tag_metadata: Any = ANY_METADATA,
) -> TagOperation:
    """Build the operation that removes a tag. Raises `InvalidMessage`.

    Args:
        tag_metadata: Removes exactly the tag with this metadata (None: without metadata). If it is
            left out, every tag of that name is removed, whatever its metadata.
    """
    fields: dict[str, Any] = {
        "operation": "remove",
        "flow_execution_id": flow_execution_id,
        "task_name": task_name,
        "tag_type": tag_type,
        "tag": tag,
    }
    if tag_metadata is not ANY_METADATA:
        fields["tag_metadata"] = tag_metadata
    return build(TagOperation, fields)


# --- Messages ------------------------------------------------------------------------------------


def _whole_number(value: Any) -> Any:
    if type(value) is not int:  # Literal[1] alone would accept true, which equals 1
        raise PydanticCustomError("literal_error", "must be {expected}", {"expected": "1"})
    return value


class BaseMessage(StrictModel):
    """The fields that all messages have. Defaults are written out when a message is sent."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    schema_version: Annotated[Literal[1], BeforeValidator(_whole_number)] = SCHEMA_VERSION
    batch_id: Id = Field(default_factory=uuid7)
    reply_to: ReplyTo | None = None

    @property
    def reply_channel_name(self) -> str:
        """The last part of the results channel: `reply_to`, or the batch id if there is none."""
        return self.reply_to or str(self.batch_id)

    def encode(self) -> bytes:
        """Serialize for the inbox. Raises `InvalidMessage` if that is over 1 MiB."""
        encoded = self.canonical_bytes()
        if len(encoded) > MAX_MESSAGE_BYTES:
            raise InvalidMessage([TOO_LARGE], batch_id=self.batch_id)
        return encoded

    def canonical_bytes(self) -> bytes:
        """Serialize in canonical form, docs/concepts/contract.md#canonical-form-and-digest."""
        return self.model_dump_json().encode()

    def digest(self) -> bytes:
        """Return 32 bytes that are equal for two messages that ask for the same.

        `reply_to` is no part of it, so another sender may ask for the result of a batch again.
        """
        return digest(self.canonical_bytes())


def digest(canonical: bytes) -> bytes:
    """Return the SHA-256 digest of a message in canonical form, without what precedes `kind`."""
    return hashlib.sha256(canonical[canonical.index(b'"kind":') :]).digest()


class TagBatch(BaseMessage):
    """1 to 100 operations, applied together or not at all (docs/concepts/contract.md#rule-5)."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["schema_version", "kind", "batch_id", "tags"]}
    )

    kind: Literal["tag_batch"] = "tag_batch"
    tags: Annotated[list[TagOperation], Field(min_length=1, max_length=MAX_OPERATIONS)]

    def canonical_bytes(self) -> bytes:
        """Serialize in canonical form; `tag_metadata` stays out where that differs from null."""
        left_out = {
            index: {"tag_metadata"}
            for index, operation in enumerate(self.tags)
            if operation.operation == "remove" and operation.any_metadata
        }
        return self.model_dump_json(exclude={"tags": left_out} if left_out else None).encode()


def split_batches(
    operations: Iterable[TagOperation], batch_id: UUID | None = None
) -> list[TagBatch]:
    """Return batches of at most 100 operations each, in order.

    Each is a batch of its own: it takes effect, or is refused, whatever becomes of the others.

    Args:
        batch_id: The batches' ids are made of it and their places, for runs that may be repeated;
            or else they are new.
    """
    every = list(operations)
    parts = [every[at : at + MAX_OPERATIONS] for at in range(0, len(every), MAX_OPERATIONS)]
    ids = [uuid7() if batch_id is None else batch_id_for(batch_id, at) for at in range(len(parts))]
    fields = zip(parts, ids, strict=True)
    return [build(TagBatch, {"tags": tags, "batch_id": id}) for tags, id in fields]


class RegisterExecution(BaseMessage):
    """Registers a flow execution, or adds to its task names; null allows every task name."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["schema_version", "kind", "batch_id", "flow_execution_id"]}
    )

    kind: Literal["flow_execution"] = "flow_execution"
    flow_execution_id: Id
    task_names: Annotated[list[TaskName], Field(max_length=MAX_TASK_NAMES)] | None = None


TaskState = Literal["queued", "running", "completed", "failed"]


class SetTaskState(BaseMessage):
    """Sets the state of a task in one flow execution. Any state may follow any other."""

    model_config = ConfigDict(
        json_schema_extra={
            "required": [
                *("schema_version", "kind", "batch_id"),
                *("flow_execution_id", "task_name", "state"),
            ]
        }
    )

    kind: Literal["task_execution"] = "task_execution"
    flow_execution_id: Id
    task_name: TaskName
    state: TaskState


Message = TagBatch | RegisterExecution | SetTaskState


def register_execution(
    flow_execution_id: UUID | str, task_names: Sequence[str] | None = None
) -> RegisterExecution:
    """Build the message that registers a flow execution; None allows every task name.

    Raises `InvalidMessage`, also for one string, whose characters would be taken for names.
    """
    names = task_names if task_names is None or isinstance(task_names, str) else list(task_names)
    fields = {"flow_execution_id": flow_execution_id, "task_names": names}
    return build(RegisterExecution, fields)


def set_task_state(flow_execution_id: UUID | str, task_name: str, state: TaskState) -> SetTaskState:
    """Build the message that sets the state of a task. Raises `InvalidMessage`."""
    fields = {"flow_execution_id": flow_execution_id, "task_name": task_name, "state": state}
    return build(SetTaskState, fields)
