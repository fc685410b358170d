"""What producers send: tag batches, registrations of executions and task states, with their limits.

The rules are in docs/concepts/contract.md. What a message does is decided in worker/rules.py, and
how it travels is in producers/inbox/protocol.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from uuid import UUID

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from producers.contract.errors import ErrorDetail, InvalidMessage, error_details
from producers.contract.values import (
    FlowId,
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
MAX_CONDITIONS: Final = 100
MAX_CLEARED_TYPES: Final = 20
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


def _without_default(schema: dict[str, Any]) -> None:
    """Describe a field that, left out, does not always mean null."""
    del schema["default"]


# --- Tag batches ---------------------------------------------------------------------------------


OperationName = Literal["add", "remove", "set"]


class TagOperation(StrictModel):
    """Adds or removes one tag, or sets it as the only one of its type on the task.

    The rules are docs/concepts/contract.md#rule-1 to #rule-4 and #rule-19. `tag_metadata` is any
    JSON value of at most 8 KiB and 32 levels. In `remove`, null means exactly the tag without
    metadata, and a field that is left out means every tag of that name.
    """

    operation: OperationName
    flow_execution_id: Id
    task_name: TaskName
    tag_type: TagType
    tag: TagName
    tag_metadata: TagMetadata = Field(default=None, json_schema_extra=_without_default)

    @property
    def any_metadata(self) -> bool:
        """Whether this removes the tag with any metadata (docs/concepts/contract.md#rule-3)."""
        return self.operation == "remove" and "tag_metadata" not in self.model_fields_set


class _Unset:
    def __repr__(self) -> str:
        return "any metadata"


ANY_METADATA: Final = _Unset()
_NAMED: Final = ("flow_execution_id", "task_name", "tag_type", "tag", "tag_metadata")


def _fields(*named: Any, **rest: Any) -> dict[str, Any]:
    """Return fields with those that name a tag; `tag_metadata` is left out if any is meant."""
    fields = {**rest, **dict(zip(_NAMED, named, strict=True))}
    if fields["tag_metadata"] is ANY_METADATA:
        del fields["tag_metadata"]
    return fields


def add(
    flow_execution_id: UUID | str, task_name: str, tag_type: str, tag: str, tag_metadata: Any = None
) -> TagOperation:
    """Build the operation that adds a tag. Raises `InvalidMessage`."""
    named = flow_execution_id, task_name, tag_type, tag, tag_metadata
    return build(TagOperation, _fields(*named, operation="add"))


def set_tag(
    flow_execution_id: UUID | str, task_name: str, tag_type: str, tag: str, tag_metadata: Any = None
) -> TagOperation:
    """Build the operation after which this tag is the only active one of its type on the task.

    Raises `InvalidMessage`. The rule is docs/concepts/contract.md#rule-19.
    """
    named = flow_execution_id, task_name, tag_type, tag, tag_metadata
    return build(TagOperation, _fields(*named, operation="set"))


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
    named = flow_execution_id, task_name, tag_type, tag, tag_metadata
    return build(TagOperation, _fields(*named, operation="remove"))


# --- Conditions ----------------------------------------------------------------------------------


class Condition(StrictModel):
    """A tag that must, or must not, be active for a batch to take effect.

    The rule is docs/concepts/contract.md#rule-18.

    Without `tag`, the condition is about any tag of the type; without `tag_metadata`, about the tag
    with any metadata; a null `tag_metadata` means exactly the tag without metadata.
    """

    flow_execution_id: Id
    task_name: TaskName
    tag_type: TagType
    tag: TagName | None = None
    tag_metadata: TagMetadata = Field(default=None, json_schema_extra=_without_default)
    exists: bool

    @model_validator(mode="after")
    def _names_a_tag(self) -> Self:
        if self.tag is None and not self.any_metadata:
            raise PydanticCustomError("condition", "has tag_metadata without a tag")
        return self

    @property
    def any_metadata(self) -> bool:
        """Whether the tag is meant whatever its metadata is."""
        return "tag_metadata" not in self.model_fields_set

    def left_out(self) -> set[str]:
        """Return the fields that its canonical form does not have."""
        names = {"tag"} if self.tag is None else set()
        return names | {"tag_metadata"} if self.any_metadata else names


def when(
    flow_execution_id: UUID | str,
    task_name: str,
    tag_type: str,
    tag: str | None = None,
    tag_metadata: Any = ANY_METADATA,
) -> Condition:
    """Build the condition that a tag, or any tag of the type, is active. Raises `InvalidMessage`.

    Args:
        tag_metadata: Means exactly the tag with this metadata (None: without metadata). If it is
            left out, the tag with any metadata.
    """
    named = flow_execution_id, task_name, tag_type, tag, tag_metadata
    return build(Condition, _fields(*named, exists=True))


def unless(
    flow_execution_id: UUID | str,
    task_name: str,
    tag_type: str,
    tag: str | None = None,
    tag_metadata: Any = ANY_METADATA,
) -> Condition:
    """Build the condition that no such tag is active; see `when`. Raises `InvalidMessage`."""
    named = flow_execution_id, task_name, tag_type, tag, tag_metadata
    return build(Condition, _fields(*named, exists=False))


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
    """1 to 100 operations, applied together or not at all (docs/concepts/contract.md#rule-5).

    With conditions, nothing takes effect unless all hold (docs/concepts/contract.md#rule-18).
    """

    model_config = ConfigDict(
        json_schema_extra={"required": ["schema_version", "kind", "batch_id", "tags"]}
    )

    kind: Literal["tag_batch"] = "tag_batch"
    tags: Annotated[list[TagOperation], Field(min_length=1, max_length=MAX_OPERATIONS)]
    conditions: Annotated[list[Condition], Field(max_length=MAX_CONDITIONS)] = Field(
        default_factory=list, exclude_if=lambda conditions: not conditions
    )

    def canonical_bytes(self) -> bytes:
        """Serialize in canonical form; `tag_metadata` stays out where that differs from null."""
        left_out: dict[str, Any] = {}
        without = {
            index: {"tag_metadata"}
            for index, operation in enumerate(self.tags)
            if operation.operation == "remove" and operation.any_metadata
        }
        if without:
            left_out["tags"] = without
        if self.conditions:
            left_out["conditions"] = {
                index: condition.left_out() for index, condition in enumerate(self.conditions)
            }
        return self.model_dump_json(exclude=left_out or None).encode()


def split_batches(
    operations: Iterable[TagOperation], batch_id: UUID | None = None
) -> list[TagBatch]:
    """Return batches of at most 100 operations each, in order.

    Each batch takes effect, or is refused, independently of the others.

    Args:
        batch_id: If given, the batches' ids are derived from it and from their positions, so that
            a run can be repeated; otherwise they are new.
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
    flow_id: FlowId | None = Field(default=None, exclude_if=lambda flow_id: flow_id is None)


TaskState = Literal[
    "queued", "running", "awaiting_input", "completed", "failed", "cancelled", "skipped"
]


class SetTaskState(BaseMessage):
    """Sets the state of a task in one flow execution. Any state may follow any other.

    With `clear`, all active tags of these types on the task are removed
    (docs/concepts/contract.md#rule-20).
    """

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
    clear: Annotated[list[TagType], Field(min_length=1, max_length=MAX_CLEARED_TYPES)] | None = (
        Field(default=None, exclude_if=lambda clear: clear is None)
    )


Message = TagBatch | RegisterExecution | SetTaskState


def register_execution(
    flow_execution_id: UUID | str,
    task_names: Sequence[str] | None = None,
    flow_id: str | None = None,
) -> RegisterExecution:
    """Build the message that registers a flow execution; None allows every task name.

    Raises `InvalidMessage`, also if `task_names` is a single string.

    Args:
        flow_id: The flow that is executed; only the first registration can set it.
    """
    names = task_names if task_names is None or isinstance(task_names, str) else list(task_names)
    fields = {"flow_execution_id": flow_execution_id, "task_names": names, "flow_id": flow_id}
    return build(RegisterExecution, fields)


def set_task_state(
    flow_execution_id: UUID | str,
    task_name: str,
    state: TaskState,
    clear: Sequence[str] | None = None,
) -> SetTaskState:
    """Build the message that sets the state of a task. Raises `InvalidMessage`.

    Args:
        clear: Tag types whose active tags on the task are removed with it; one string is refused.
    """
    fields: dict[str, Any] = {
        "flow_execution_id": flow_execution_id,
        "task_name": task_name,
        "state": state,
        "clear": clear if clear is None or isinstance(clear, str) else list(clear),
    }
    return build(SetTaskState, fields)


# --- Batches for decisions -----------------------------------------------------------------------

CLAIM: Final = "claim"
"""The tag type of claims: its one tag names who works on the task."""


def claim(
    flow_execution_id: UUID | str,
    task_name: str,
    claimant: str,
    *,
    batch_id: UUID | None = None,
) -> TagBatch:
    """Build the batch that claims a task, unless it is claimed. Raises `InvalidMessage`.

    Args:
        batch_id: For a step that may run again (`batch_id_for`); None makes a new one.
    """
    task = flow_execution_id, task_name
    return _decision(batch_id, unless(*task, CLAIM), set_tag(*task, CLAIM, claimant))


def release(
    flow_execution_id: UUID | str,
    task_name: str,
    claimant: str,
    *,
    batch_id: UUID | None = None,
) -> TagBatch:
    """Build the batch that ends a claim, if it is this claimant's. Raises `InvalidMessage`.

    The name is no secret: who knows it may end the claim. The token's actor is not compared.
    """
    named = flow_execution_id, task_name, CLAIM, claimant
    return _decision(batch_id, when(*named), remove(*named))


def decide(
    flow_execution_id: UUID | str,
    task_name: str,
    tag_type: str,
    tag: str,
    tag_metadata: Any = None,
    *,
    pending: str = "pending",
    batch_id: UUID | None = None,
) -> TagBatch:
    """Build the batch that sets a tag in place of the pending one, if that is still there.

    So the first decision counts, and a second one gets `precondition_failed`. Raises
    `InvalidMessage`.
    """
    named = flow_execution_id, task_name, tag_type
    return _decision(batch_id, when(*named, pending), set_tag(*named, tag, tag_metadata))


def _decision(batch_id: UUID | None, condition: Condition, operation: TagOperation) -> TagBatch:
    return TagBatch(batch_id=batch_id or uuid7(), tags=[operation], conditions=[condition])
