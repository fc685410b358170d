"""The rules of a batch (docs/concepts/contract.md): pure, without a clock, I/O or random ids.

A snapshot and messages go in; outcomes and a change set come out. The caller loads the snapshot and
saves the change set in one transaction (worker/db/repository.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any, Final
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
from worker.snapshot import (
    AuthorizedMessage,
    ChangeSet,
    Decision,
    Execution,
    NewBatch,
    NewChange,
    NewTag,
    Outcome,
    Snapshot,
    StoredResult,
    stored_metadata,
    tag_key,
)

MAX_VARIANTS: Final = 250
"""Active tags of a task that differ in their metadata alone."""
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""Of the change events of one batch together."""
MAX_GROUP_BYTES: Final = 16 * 1024 * 1024
"""At which a group ends: of what it publishes, and of the stored events that it loads."""


def decide(
    organization_id: UUID,
    messages: Iterable[AuthorizedMessage],
    snapshot: Snapshot,
    *,
    now: datetime,
    new_id: Callable[[], UUID],
) -> Decision:
    """Apply messages to `snapshot` one after the other; each sees the effects of those before it.

    At least the first one is applied. The group ends, and the others wait for the next transaction,
    at one of which not all was loaded, and where what is to be published reaches its bound: so what
    a batch is answered does not depend on what it was grouped with.

    Args:
        now: The transaction's time, UTC.
        new_id: Returns an id for a new tag, greater than the ones before.
    """
    processor = BatchProcessor(organization_id, snapshot, now, new_id)
    outcomes: list[Outcome] = []
    to_publish = 0
    answered: set[UUID] = set()
    for each in messages:
        if outcomes and (len(outcomes) >= snapshot.complete or to_publish >= MAX_GROUP_BYTES):
            break
        outcome = processor.process(each, whole=len(outcomes) < snapshot.complete)
        if each.message.batch_id not in answered:  # events are published once for all its copies
            to_publish += sum(len(event) for _, event in outcome.events)
        answered.add(each.message.batch_id)
        to_publish += len(outcome.record)
        outcomes.append(outcome)
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


class _TooLarge(Exception):
    """The batch would pass a bound; `index` is the operation at which it does."""

    def __init__(self, index: int, message: str) -> None:
        self.error = ErrorInfo(
            code="too_large",
            message="the batch would change more than a batch may",
            details=[ErrorDetail(index=index, message=message)],
        )


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

    def process(self, authorized: AuthorizedMessage, *, whole: bool = True) -> Outcome:
        """Apply one message and return its outcome.

        Args:
            whole: All that the message names was loaded. If not, it names too much.
        """
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
            record = self._error(message.batch_id, error)
        else:
            changes: ExecutionChanges = {}
            try:
                if isinstance(message, SetTaskState):
                    status = self._set_state(message, authorized.actor, changes)
                    record = self._record(message, task_execution={"status": status})
                else:
                    statuses = self._apply(message, authorized.actor, changes)
                    record = self._record(message, tags=[{"status": each} for each in statuses])
                events = self._events(message.batch_id, authorized.actor, changes)
                if isinstance(message, TagBatch):
                    _check_size(message, changes, events, whole=whole)
                revisions = self._advance_revisions(message.batch_id, events)
            except _TooLarge as too_large:
                self._undo(changes)
                events = ()
                record = self._error(message.batch_id, too_large.error)
        size = sum(len(event) for _, event in events)
        self.change_set.batches.append(NewBatch(message.batch_id, digest, record, revisions, size))
        self.snapshot.batches[message.batch_id] = StoredResult(digest, record, events)
        return Outcome(record, events)

    def _repeat(self, batch_id: UUID, digest: bytes, known: StoredResult) -> Outcome:
        """Return the stored outcome for the same batch, a conflict for another one with its id."""
        if digest == known.digest:
            return Outcome(known.record, known.events)
        error = ErrorInfo(
            code="conflict", message="this batch id was used for another request", details=[]
        )
        return Outcome(self._error(batch_id, error))

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
        self, message: SetTaskState, actor: str, changes: ExecutionChanges
    ) -> RecordingStatus:
        key = message.flow_execution_id, message.task_name
        known = self.snapshot.tasks.get(key)
        if known is not None and known.state == message.state:
            return "unchanged"
        task = Task(*key, message.state, state_changed_at=self.now, state_changed_by=actor)
        self.snapshot.tasks[key] = self.change_set.tasks[key] = task
        changes[message.flow_execution_id.int] = [StateChange("state", task)]
        return "recorded"

    def _apply(
        self, batch: TagBatch, actor: str, changes: ExecutionChanges
    ) -> list[OperationStatus]:
        statuses: list[OperationStatus] = []
        for index, operation in enumerate(batch.tags):
            step = self._add if operation.operation == "add" else self._remove
            status = step(operation, actor, changes)
            if status is None:
                raise _TooLarge(index, f"{MAX_VARIANTS} active tags differ in their metadata alone")
            statuses.append(status)
        return statuses

    def _add(
        self, operation: TagOperation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus | None:
        """Add a tag; None if there are too many of its name."""
        metadata, digest = stored_metadata(operation.tag_metadata)
        key = tag_key(operation)
        active = self.snapshot.tags.setdefault(key, {})
        if digest in active:
            return "already_exists"
        if len(active) >= MAX_VARIANTS:
            return None
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
        if operation.any_metadata:
            digests = sorted(active, key=lambda it: (active[it].created_at, active[it].id.int))
        else:
            digests = [digest] if digest in active else []
        for digest in digests:
            tag = active.pop(digest)
            metadata = tag.tag_metadata if operation.any_metadata else operation.tag_metadata
            tag = replace(
                tag,
                tag_metadata=metadata,
                status="deleted",
                updated_at=self.now,
                modified_by=actor,
            )
            new = self.change_set.added.get(tag.id.int)
            if new is None:
                self.change_set.removed[tag.id.int] = tag
            else:
                self.change_set.added[tag.id.int] = new._replace(tag=tag)
            changes.setdefault(tag.flow_execution_id.int, []).append(Change("removed", tag))
        return "removed" if digests else "not_found"

    def _undo(self, changes: ExecutionChanges) -> None:
        """Take back what the operations of a batch changed."""
        for change in (each for some in changes.values() for each in reversed(some)):
            assert isinstance(change, Change)
            tag = change.tag
            active = self.snapshot.tags[tag_key(tag)]
            _, digest = stored_metadata(tag.tag_metadata)
            if change.change == "added":
                del active[digest], self.change_set.added[tag.id.int]
                continue
            active[digest] = replace(tag, status="active", updated_at=None, modified_by=None)
            if self.change_set.removed.pop(tag.id.int, None) is None:
                new = self.change_set.added[tag.id.int]
                self.change_set.added[tag.id.int] = new._replace(tag=active[digest])

    def _events(
        self, batch_id: UUID, actor: str, changes: ExecutionChanges
    ) -> tuple[tuple[UUID, bytes], ...]:
        """Return the change event of each execution that the message really changes."""
        events = []
        for key, changed in changes.items():
            execution = self.snapshot.executions[key]
            event = ChangeEvent(
                organization_id=self.organization_id,
                flow_execution_id=execution.id,
                revision=execution.revision + 1,
                batch_id=batch_id,
                changed_by=actor,
                changed_at=self.now,
                changes=list(changed),
            ).encode()
            events.append((execution.id, event))
        return tuple(events)

    def _advance_revisions(
        self, batch_id: UUID, events: tuple[tuple[UUID, bytes], ...]
    ) -> dict[UUID, int]:
        """Store change events, and give each of their executions its next revision."""
        revisions = {}
        for flow_execution_id, event in events:
            execution = self.snapshot.executions[flow_execution_id.int]
            execution.revision += 1
            revision = revisions[flow_execution_id] = execution.revision
            self.change_set.changes.append(NewChange(flow_execution_id, revision, batch_id, event))
        self.change_set.revisions.update(revisions)
        return revisions

    def _error(self, batch_id: UUID, error: ErrorInfo) -> bytes:
        return error_record(self.organization_id, batch_id, error).encode()

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


def _check_size(
    batch: TagBatch,
    changes: ExecutionChanges,
    events: tuple[tuple[UUID, bytes], ...],
    *,
    whole: bool,
) -> None:
    """Raise `_TooLarge` with the operation at which the change events pass their bound.

    Only a removal by name alone makes more than one change.
    """
    if whole and sum(len(event) for _, event in events) <= MAX_EVENT_BYTES:
        return
    message = f"the change events would be larger than {MAX_EVENT_BYTES} bytes"
    left = {key: deque(changed) for key, changed in changes.items()}
    size = 0
    for index, operation in enumerate(batch.tags):
        of_execution = left.get(operation.flow_execution_id.int, deque())
        size += sum(len(to_json(each)) for each in _changes_of(operation, of_execution))
        if size > MAX_EVENT_BYTES or not any(left.values()):
            raise _TooLarge(index, message)
    raise _TooLarge(len(batch.tags) - 1, message)


def _changes_of(
    operation: TagOperation, left: deque[Change | StateChange]
) -> Iterator[Change | StateChange]:
    """Take from an execution's changes those of its next operation."""
    kind = "added" if operation.operation == "add" else "removed"
    wanted = stored_metadata(operation.tag_metadata)
    by_name = operation.any_metadata
    while left and isinstance(first := left[0], Change):
        if first.change != kind or tag_key(first.tag) != tag_key(operation):
            return
        if not by_name and stored_metadata(first.tag.tag_metadata) != wanted:
            return
        yield left.popleft()
        if not by_name:
            return
