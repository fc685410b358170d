"""What workers publish: result records and change events, with the tags and tasks in them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self, cast
from uuid import UUID

from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError, to_json

from producers.contract.cursors import Cursor, microseconds
from producers.contract.errors import ErrorInfo
from producers.contract.messages import TaskState
from producers.contract.values import Id, TolerantModel, tolerant

OperationStatus = Literal["added", "already_exists", "removed", "not_found", "replaced"]
RegistrationStatus = Literal["registered", "already_exists"]
RecordingStatus = Literal["recorded", "unchanged"]
Status = OperationStatus | RegistrationStatus | RecordingStatus
TagStatus = Literal["active", "deleted"]


# --- Result records ------------------------------------------------------------------------------


class OperationResult(TolerantModel):
    """The status of one operation."""

    status: Annotated[OperationStatus, tolerant(OperationStatus)]


class Registration(TolerantModel):
    status: Annotated[RegistrationStatus, tolerant(RegistrationStatus)]


class Recording(TolerantModel):
    """The outcome for a task's state; with `clear`, `cleared` is how many tags were removed."""

    status: Annotated[RecordingStatus, tolerant(RecordingStatus)]
    cleared: int | None = Field(default=None, exclude_if=lambda cleared: cleared is None)


class ResultRecord(TolerantModel):
    """The result of a message: a status for each operation, in the same order, or one error.

    The rule is docs/concepts/contract.md#rule-6.
    """

    batch_id: Id
    organization_id: Id
    applied_at: datetime | None = None
    tags: list[OperationResult] | None = None
    flow_execution: Registration | None = None
    task_execution: Recording | None = None
    error: ErrorInfo | None = None

    @model_validator(mode="after")
    def _has_one_outcome(self) -> Self:
        outcomes = (self.tags, self.flow_execution, self.task_execution, self.error)
        if sum(outcome is not None for outcome in outcomes) != 1:
            raise PydanticCustomError(
                "outcome", "must have one of tags, flow_execution, task_execution and error"
            )
        if (self.error is None) != (self.applied_at is not None):
            raise PydanticCustomError("outcome", "must have applied_at unless it has an error")
        return self

    @property
    def statuses(self) -> list[Status]:
        """The statuses in their order; one for other messages than batches, none for an error."""
        found = (self.flow_execution, self.task_execution, *(self.tags or ()))
        return [each.status for each in found if each is not None]

    @classmethod
    def decode(cls, encoded: bytes | str) -> Self:
        """Read a record; unknown fields are skipped. Raises pydantic's `ValidationError`."""
        return cls.model_validate_json(encoded)

    def encode(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


# --- Change events -------------------------------------------------------------------------------


@dataclass(slots=True)
class Tag:
    """A tag as it is stored and published; the last two fields are null until it is modified."""

    id: UUID
    flow_execution_id: UUID
    task_name: str
    tag_type: str
    tag: str
    tag_metadata: Any
    organization_id: UUID
    status: Annotated[TagStatus, tolerant(TagStatus)]
    created_at: datetime
    created_by: str
    updated_at: datetime | None
    modified_by: str | None


@dataclass(slots=True)
class Change:
    """A tag that was added or removed."""

    change: Literal["added", "removed"]
    tag: Tag


@dataclass(slots=True)
class Task:
    """A task of an execution, with its last recorded state."""

    flow_execution_id: UUID
    task_name: str
    state: Annotated[TaskState, tolerant(TaskState)]
    state_changed_at: datetime
    state_changed_by: str


@dataclass(slots=True)
class TaskExecution:
    """A task of a work list, with its state and its oldest 100 tags.

    `waiting_since` is when it got the tag that the first selector names. `tags_next` is None, or
    the path of its other tags at the endpoint, which `list_tags` reads, too.
    """

    flow_id: str | None
    flow_execution_id: UUID
    task_name: str
    state: Annotated[TaskState, tolerant(TaskState)] | None
    state_changed_at: datetime | None
    state_changed_by: str | None
    tags: list[Tag]
    waiting_since: datetime | None
    tags_next: str | None


@dataclass(slots=True)
class StateChange:
    """A task that has a new state."""

    change: Literal["state"]
    task: Task


@dataclass(slots=True)
class UnknownChange:
    """A change of a kind that this version does not know."""

    change: str


def _unknown_change(value: Any) -> UnknownChange:
    kind = value.get("change") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind in ("added", "removed", "state"):
        raise PydanticCustomError("change", "is not valid")
    return UnknownChange(kind)


_KnownChange = Annotated[Change | StateChange, Field(discriminator="change")]
_UnknownChange = Annotated[
    UnknownChange,
    PlainValidator(_unknown_change),
    PlainSerializer(lambda change: {"change": change.change}, return_type=dict[str, str]),
]


@dataclass(slots=True)
class ChangeEvent:
    """What one message changed in one execution; `revision` counts 1, 2, 3 … there without gaps.

    `position` counts so in the organization, and `cursor` is the place behind the event in its feed
    (docs/concepts/contract.md#rule-21); both are None in an event of an older worker.
    """

    organization_id: UUID
    flow_execution_id: UUID
    revision: int
    batch_id: UUID
    changed_by: str
    changed_at: datetime
    changes: list[_KnownChange | SkipJsonSchema[_UnknownChange]]
    flow_id: str | None = None
    position: int | None = None
    cursor: str | None = None

    @property
    def place(self) -> str:
        """The place behind the event in the feed of its execution, as an `ETag` has it.

        Unlike `revision` alone, it is not valid in another history, as after a restore.
        """
        return str(Cursor(self.revision, microseconds(self.changed_at)))

    @staticmethod
    def decode(encoded: bytes | str) -> ChangeEvent:
        """Read an event; unknown fields are skipped. Raises pydantic's `ValidationError`."""
        return _CHANGE_EVENT.validate_json(encoded)

    def encode(self) -> bytes:
        """Serialize with the fields in the order in which workers write them."""
        head = to_json(
            {
                "organization_id": self.organization_id,
                "flow_execution_id": self.flow_execution_id,
                "flow_id": self.flow_id,
                "revision": self.revision,
                "position": self.position,
                "cursor": self.cursor,
                "batch_id": self.batch_id,
                "changed_by": self.changed_by,
                "changed_at": self.changed_at,
            }
        )
        changes = _CHANGES.dump_json(cast(Any, self.changes))
        return b'%b,"changes":%b}' % (head[:-1], changes)


MAX_TOUCHED: Final = 100


def encode_position(head: Cursor, flow_executions: Collection[UUID]) -> bytes:
    """Return what announces a transaction: the last event's cursor, and the executions changed.

    More than 100 of them are null: any may have changed.
    """
    touched = list(flow_executions) if len(flow_executions) <= MAX_TOUCHED else None
    return to_json({"cursor": str(head), "flow_executions": touched})


_CHANGE_EVENT: Final = TypeAdapter(ChangeEvent)
_CHANGES: Final = TypeAdapter(list[Annotated[Change | StateChange, Field(discriminator="change")]])
