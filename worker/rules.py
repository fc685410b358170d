"""The rules of a batch (docs/concepts/contract.md): pure, without a clock, I/O or random ids.

A snapshot and messages go in; outcomes and a change set come out. The caller loads the snapshot and
saves the change set in one transaction (worker/db/repository.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from pydantic_core import to_json

from producers.contract.errors import ErrorDetail, ErrorInfo
from producers.contract.messages import (
    Message,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    TagOperation,
)
from producers.contract.results import (
    Change,
    ChangeEvent,
    OperationStatus,
    RecordingStatus,
    RegistrationStatus,
    ResultRecord,
    StateChange,
    Tag,
    Task,
)
from producers.contract.values import canonical_json

TagKey = tuple[int, str, str, str]
"""Flow execution, task name, tag type, tag. Together with the metadata they identify a tag.

Ids are looked up as integers, here and below, because a UUID hashes and compares in Python.
"""

TaskKey = tuple[UUID, str]
"""A flow execution's id and a task name. Together they identify a task."""


def tag_key(named: TagOperation | Tag) -> TagKey:
    return named.flow_execution_id.int, named.task_name, named.tag_type, named.tag


def stored_metadata(tag_metadata: Any) -> tuple[bytes | None, bytes]:
    """Return validated metadata as it is stored: canonical JSON, and its digest of 16 bytes.

    For null, these are None and no bytes. Two digests are equal if and only if the metadata are the
    same (docs/concepts/contract.md#rule-2).
    """
    if tag_metadata is None:
        return None, b""
    text = canonical_json(tag_metadata)
    hasher = _NEW_HASHER()  # a copy is cheaper than parsing the options again
    hasher.update(text)
    return text, hasher.digest()


_NEW_HASHER: Final = hashlib.blake2b(digest_size=16).copy


@dataclass(frozen=True, slots=True)
class AuthorizedMessage:
    """A message that is well formed and authorized.

    Its actor is that of its token (docs/concepts/contract.md#rule-7).
    """

    message: Message
    actor: str
    digest: bytes
    """Equal for two messages that ask for the same."""


@dataclass(slots=True)
class Execution:
    """A registered flow execution; `task_names` None allows every task name."""

    id: UUID
    task_names: frozenset[str] | None
    revision: int


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What is stored of a batch: enough to answer it again."""

    digest: bytes
    record: bytes
    events: tuple[tuple[UUID, bytes], ...] = ()
    """The change events, each with its execution's id, in the order in which they were made."""


@dataclass(slots=True)
class Snapshot:
    """What is stored of everything that the messages name. `decide` updates it."""

    batches: dict[UUID, StoredResult] = field(default_factory=dict)
    executions: dict[int, Execution] = field(default_factory=dict)
    tags: dict[TagKey, dict[bytes, Tag]] = field(default_factory=dict)
    """The active tags by key, and then by the digest of their metadata."""
    tasks: dict[TaskKey, Task] = field(default_factory=dict)
    """The tasks that have a state."""


class NewTag(NamedTuple):
    tag: Tag
    metadata: bytes | None
    metadata_digest: bytes


@dataclass(frozen=True, slots=True)
class NewBatch:
    batch_id: UUID
    digest: bytes
    record: bytes
    revisions: dict[UUID, int]


@dataclass(frozen=True, slots=True)
class NewChange:
    flow_execution_id: UUID
    revision: int
    batch_id: UUID
    event: bytes


@dataclass(slots=True)
class ChangeSet:
    """What must be stored before the outcomes are published. Every value is final."""

    batches: list[NewBatch] = field(default_factory=list)
    registrations: dict[UUID, Execution] = field(default_factory=dict)
    revisions: dict[UUID, int] = field(default_factory=dict)
    added: dict[int, NewTag] = field(default_factory=dict)
    """New rows by id, also of tags that are removed again (docs/concepts/contract.md#rule-4)."""
    removed: dict[int, Tag] = field(default_factory=dict)
    tasks: dict[TaskKey, Task] = field(default_factory=dict)
    changes: list[NewChange] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is published for a message: its result record and its change events."""

    record: bytes
    events: tuple[tuple[UUID, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcomes in the order of the messages, and the change set to store with them."""

    outcomes: list[Outcome]
    change_set: ChangeSet


def decide(
    organization_id: UUID,
    messages: Iterable[AuthorizedMessage],
    snapshot: Snapshot,
    *,
    now: datetime,
    new_id: Callable[[], UUID],
) -> Decision:
    """Apply messages to `snapshot` one after the other; each sees the effects of those before it.

    Args:
        now: The transaction's time, UTC.
        new_id: Returns an id for a new tag, greater than the ones before.
    """
    processor = BatchProcessor(organization_id, snapshot, now, new_id)
    outcomes = [processor.process(each) for each in messages]
    return Decision(outcomes, processor.change_set)


def error_record(organization_id: UUID, batch_id: UUID, error: ErrorInfo) -> ResultRecord:
    return ResultRecord(batch_id=batch_id, organization_id=organization_id, error=error)


def decide_failure(
    organization_id: UUID, authorized: AuthorizedMessage, text: str
) -> tuple[Outcome, ChangeSet]:
    """Decide that a message ends in `internal_error` and is never applied under its batch id.

    The error must be stored: another drain may have a copy of the message, and would otherwise
    apply it after the batches behind it.
    """
    batch_id = authorized.message.batch_id
    error = ErrorInfo(code="internal_error", message=text, details=[])
    record = error_record(organization_id, batch_id, error).encode()
    batch = NewBatch(batch_id, authorized.digest, record, {})
    return Outcome(record), ChangeSet(batches=[batch])


ExecutionChanges = dict[int, list[Change | StateChange]]
"""What one message changes, by execution, in the order of its operations."""


class BatchProcessor:
    """Applies messages to a snapshot, and collects the change set of all of them."""

    def __init__(
        self,
        organization_id: UUID,
        snapshot: Snapshot,
        now: datetime,
        new_id: Callable[[], UUID],
    ) -> None:
        self.organization_id = organization_id
        self.snapshot = snapshot
        self.now = now
        self.new_id = new_id
        self.change_set = ChangeSet()

    def process(self, authorized: AuthorizedMessage) -> Outcome:
        """Apply one message and return its outcome."""
        message, digest = authorized.message, authorized.digest
        known = self.snapshot.batches.get(message.batch_id)
        if known is not None:
            return self._repeat(message.batch_id, digest, known)
        revisions: dict[UUID, int] = {}
        events: tuple[tuple[UUID, bytes], ...] = ()
        if isinstance(message, RegisterExecution):
            record = self._record(message, flow_execution={"status": self._register(message)})
        elif details := self._find_unknown(message):
            error = ErrorInfo(
                code="not_found", message="an execution or task is unknown", details=details
            )
            record = error_record(self.organization_id, message.batch_id, error).encode()
        else:
            if isinstance(message, SetTaskState):
                status, changes = self._set_state(message, authorized.actor)
                record = self._record(message, task_execution={"status": status})
            else:
                statuses, changes = self._apply(message, authorized.actor)
                record = self._record(message, tags=[{"status": status} for status in statuses])
            revisions = self._advance_revisions(changes)
            events = self._events(message.batch_id, authorized.actor, changes, revisions)
        self.change_set.batches.append(NewBatch(message.batch_id, digest, record, revisions))
        self.snapshot.batches[message.batch_id] = StoredResult(digest, record, events)
        return Outcome(record, events)

    def _repeat(self, batch_id: UUID, digest: bytes, known: StoredResult) -> Outcome:
        """Return the stored outcome for the same batch, a conflict for another one with its id."""
        if digest == known.digest:
            return Outcome(known.record, known.events)
        error = ErrorInfo(
            code="conflict", message="this batch id was used for another request", details=[]
        )
        return Outcome(error_record(self.organization_id, batch_id, error).encode())

    def _register(self, message: RegisterExecution) -> RegistrationStatus:
        """Register an execution, or add task names (docs/concepts/contract.md#rule-15).

        Null allows every name, so it stays null.
        """
        names = None if message.task_names is None else frozenset(message.task_names)
        execution = self.snapshot.executions.get(message.flow_execution_id.int)
        if execution is None:
            self._save_execution(Execution(message.flow_execution_id, names, revision=0))
            return "registered"
        if execution.task_names is not None and (
            names is None or not names <= execution.task_names
        ):
            execution.task_names = None if names is None else execution.task_names | names
            self._save_execution(execution)
        return "already_exists"

    def _save_execution(self, execution: Execution) -> None:
        self.snapshot.executions[execution.id.int] = execution
        self.change_set.registrations[execution.id] = execution

    def _find_unknown(self, message: TagBatch | SetTaskState) -> list[ErrorDetail]:
        """Return each use of an unknown execution or task (docs/concepts/contract.md#rule-5)."""
        if isinstance(message, SetTaskState):
            named: Iterable[tuple[int | None, TagOperation | SetTaskState]] = [(None, message)]
        else:
            named = enumerate(message.tags)
        details = []
        executions = self.snapshot.executions
        for index, each in named:
            execution = executions.get(each.flow_execution_id.int)
            if execution is None:
                details.append(_not_found(index, "flow_execution_id", "is unknown"))
            elif execution.task_names is not None and each.task_name not in execution.task_names:
                details.append(_not_found(index, "task_name", "is not registered"))
        return details

    def _set_state(
        self, message: SetTaskState, actor: str
    ) -> tuple[RecordingStatus, ExecutionChanges]:
        key = message.flow_execution_id, message.task_name
        known = self.snapshot.tasks.get(key)
        if known is not None and known.state == message.state:
            return "unchanged", {}
        task = Task(*key, message.state, state_changed_at=self.now, state_changed_by=actor)
        self.snapshot.tasks[key] = self.change_set.tasks[key] = task
        return "recorded", {message.flow_execution_id.int: [StateChange("state", task)]}

    def _apply(self, batch: TagBatch, actor: str) -> tuple[list[OperationStatus], ExecutionChanges]:
        statuses: list[OperationStatus] = []
        changes: ExecutionChanges = {}
        for operation in batch.tags:
            step = self._add if operation.operation == "add" else self._remove
            statuses.append(step(operation, actor, changes))
        return statuses, changes

    def _add(
        self, operation: TagOperation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus:
        metadata, digest = stored_metadata(operation.tag_metadata)
        key = tag_key(operation)
        active = self.snapshot.tags.setdefault(key, {})
        if digest in active:
            return "already_exists"
        flow_execution_key, task_name, tag_type, name = key
        tag = Tag(  # by position, because keywords take twice the time
            self.new_id(),
            operation.flow_execution_id,
            task_name,
            tag_type,
            name,
            operation.tag_metadata,
            self.organization_id,
            "active",
            self.now,
            actor,
            None,
            None,
        )
        active[digest] = tag
        self.change_set.added[tag.id.int] = NewTag(tag, metadata, digest)
        changes.setdefault(flow_execution_key, []).append(Change("added", tag))
        return "added"

    def _remove(
        self, operation: TagOperation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus:
        active = self.snapshot.tags.get(tag_key(operation), {})
        _, digest = stored_metadata(operation.tag_metadata)
        digests = list(active) if operation.any_metadata else [digest] if digest in active else []
        for digest in digests:
            tag = replace(
                active.pop(digest), status="deleted", updated_at=self.now, modified_by=actor
            )
            new = self.change_set.added.get(tag.id.int)
            if new is None:
                self.change_set.removed[tag.id.int] = tag
            else:
                self.change_set.added[tag.id.int] = new._replace(tag=tag)
            changes.setdefault(tag.flow_execution_id.int, []).append(Change("removed", tag))
        return "removed" if digests else "not_found"

    def _advance_revisions(self, changes: ExecutionChanges) -> dict[UUID, int]:
        """Give each execution that the message really changed its next revision."""
        revisions = {}
        for key in changes:
            execution = self.snapshot.executions[key]
            execution.revision += 1
            revisions[execution.id] = execution.revision
        self.change_set.revisions.update(revisions)
        return revisions

    def _events(
        self, batch_id: UUID, actor: str, changes: ExecutionChanges, revisions: dict[UUID, int]
    ) -> tuple[tuple[UUID, bytes], ...]:
        events = []
        for flow_execution_id, revision in revisions.items():
            event = ChangeEvent(
                organization_id=self.organization_id,
                flow_execution_id=flow_execution_id,
                revision=revision,
                batch_id=batch_id,
                changed_by=actor,
                changed_at=self.now,
                changes=list(changes[flow_execution_id.int]),
            ).encode()
            self.change_set.changes.append(NewChange(flow_execution_id, revision, batch_id, event))
            events.append((flow_execution_id, event))
        return tuple(events)

    def _record(self, message: Message, **outcome: Any) -> bytes:
        """Encode the result record of an applied message, as `ResultRecord.encode` does."""
        return to_json(
            {
                "batch_id": message.batch_id,
                "organization_id": self.organization_id,
                "applied_at": self.now,
                **outcome,
            }
        )


def _not_found(index: int | None, field: str, message: str) -> ErrorDetail:
    return ErrorDetail(index=index, field=field, message=message)
