"""The rules of a batch (docs/concepts/contract.md): pure, without a clock, I/O or random ids.

A snapshot and messages go in; outcomes and a change set come out. The caller loads the snapshot and
saves the change set in one transaction (worker/db/repository.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, assert_never
from uuid import UUID

from msgspec import UNSET
from msgspec.structs import replace

from producers.contract.cursors import Cursor, microseconds
from producers.contract.errors import ErrorDetail, ErrorInfo
from producers.contract.messages import MAX_TASK_NAMES, RegisterExecution, SetTaskState
from producers.contract.results import (
    OperationStatus,
    RecordingStatus,
    RegistrationStatus,
    ResultRecord,
    Task,
)
from worker.bounds import (
    EVENT_FRAME_BYTES,
    EVENTS_TOO_LARGE,
    MAX_EVENT_BYTES,
    MAX_GROUP_BYTES,
    MAX_VARIANTS,
    ExecutionChanges,
    Refusal,
    TooLarge,
    check_size,
)
from worker.checks import check_conditions, check_known, check_types, tags_of
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
    type_key,
)
from worker.wire import (
    Batch,
    Change,
    ChangeEvent,
    Message,
    Operation,
    StateChange,
    Tag,
    encode,
)


def decide(
    organization_id: UUID,
    messages: Iterable[AuthorizedMessage],
    snapshot: Snapshot,
    *,
    now: datetime,
    new_id: Callable[[], UUID],
) -> Decision:
    """Apply messages as `decide_in_parts` does, as one part."""
    (decision,) = decide_in_parts(organization_id, messages, snapshot, now=now, new_id=new_id)
    return decision


def decide_in_parts(
    organization_id: UUID,
    messages: Iterable[AuthorizedMessage],
    snapshot: Snapshot,
    *,
    now: datetime,
    new_id: Callable[[], UUID],
    size: int = sys.maxsize,
) -> Iterator[Decision]:
    """Apply messages to `snapshot` one after the other; each sees the effects of those before it.

    Yields what was decided in parts of `size` messages, each to be stored before the next one, in
    the same transaction.

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
    for place, each in enumerate(messages):
        if place and (place >= snapshot.complete or to_publish >= MAX_GROUP_BYTES):
            break
        if len(outcomes) == size:
            yield Decision(outcomes, processor.change_set, snapshot.head)
            outcomes, processor.change_set = [], ChangeSet()
        outcome = processor.process(each)
        if each.message.batch_id not in answered:  # events are published once for all its copies
            to_publish += sum(len(event) for _, event in outcome.events)
        answered.add(each.message.batch_id)
        to_publish += len(outcome.record)
        outcomes.append(outcome)
    yield Decision(outcomes, processor.change_set, snapshot.head)


def error_record(organization_id: UUID, batch_id: UUID, error: ErrorInfo) -> ResultRecord:
    return ResultRecord(batch_id=batch_id, organization_id=organization_id, error=error)


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
        self._time = microseconds(now)
        self._cursor = str(Cursor(0, self._time)).removeprefix("0")
        """What all cursors of this transaction have in common."""

    def process(self, authorized: AuthorizedMessage) -> Outcome:
        message, digest = authorized.message, authorized.digest
        known = self.snapshot.batches.get(message.batch_id)
        if known is not None:
            return self._repeat(message.batch_id, digest, known)
        revisions: dict[UUID, int] = {}
        events: tuple[tuple[UUID, bytes], ...] = ()
        changes: ExecutionChanges = {}
        try:
            record = self._outcome(message, authorized, changes)
            events = self._events(message.batch_id, authorized.actor, changes)
            if isinstance(message, Batch):
                check_size(message, changes, events)
            revisions = self._advance(message.batch_id, events)
        except Refusal as refusal:
            self._undo(changes)
            events = ()
            record = self._error(message.batch_id, refusal.error)
        size = sum(len(event) for _, event in events)
        self.change_set.batches.append(NewBatch(message.batch_id, digest, record, revisions, size))
        self.snapshot.batches[message.batch_id] = StoredResult(digest, record, events)
        return Outcome(record, events)

    def _outcome(
        self, message: Message, authorized: AuthorizedMessage, changes: ExecutionChanges
    ) -> bytes:
        """Apply a message, and return its result record. Raises `Refusal`."""
        if isinstance(message, RegisterExecution):
            return self._record(message, flow_execution={"status": self._register(message)})
        check_known(self.snapshot, message)
        check_types(self.snapshot, message)
        if isinstance(message, SetTaskState):
            recorded = self._set_state(message, authorized.actor, changes)
            return self._record(message, task_execution=recorded)
        if message.conditions:
            check_conditions(self.snapshot, message, may_read=authorized.may_read)
        statuses = self._apply(message, authorized.actor, changes)
        return self._record(message, tags=[{"status": each} for each in statuses])

    def _repeat(self, batch_id: UUID, digest: bytes, known: StoredResult) -> Outcome:
        """Return the stored outcome for the same batch, a conflict for another one with its id."""
        if digest == known.digest:
            return Outcome(known.record, known.events)
        error = ErrorInfo(
            code="conflict", message="this batch id was used for another message", details=[]
        )
        return Outcome(self._error(batch_id, error))

    def _register(self, message: RegisterExecution) -> RegistrationStatus:
        """Register an execution, or add task names (docs/concepts/contract.md#rule-15)."""
        id, names = message.flow_execution_id, dict.fromkeys(message.task_names or ())
        is_open = message.task_names is None
        known = self.snapshot.executions.get(id.int)
        if known is None:
            self._save_execution(Execution(id, names, is_open, 0, message.flow_id))
            return "registered"
        if message.flow_id not in (None, known.flow_id):
            text = "the execution was registered with another flow_id, or none"
            details = [ErrorDetail(field="flow_id", message="is not that of the execution")]
            raise Refusal(ErrorInfo(code="conflict", message=text, details=details))
        if not names.keys() <= known.task_names.keys() or is_open > known.any_task_name:
            all_names = known.task_names | names
            if len(all_names) > max(MAX_TASK_NAMES, len(known.task_names)):
                text = f"an execution has at most {MAX_TASK_NAMES} registered names"
                raise TooLarge(None, text, "task_names")
            known.task_names, known.any_task_name = all_names, is_open or known.any_task_name
            self._save_execution(known)
        return "already_exists"

    def _save_execution(self, execution: Execution) -> None:
        self.snapshot.executions[execution.id.int] = execution
        self.change_set.registrations[execution.id] = execution

    def _set_state(
        self, message: SetTaskState, actor: str, changes: ExecutionChanges
    ) -> dict[str, Any]:
        """Record a state, and remove the tags of the types to clear.

        The rules are docs/concepts/contract.md#rule-16 and #rule-20.
        """
        execution = message.flow_execution_id.int
        cleared = 0
        for tag_type in dict.fromkeys(message.clear or ()):
            for tag, digest in tags_of(self.snapshot, (execution, message.task_name, tag_type)):
                self._delete(tag, digest, actor, changes)
                cleared += 1
        size = sum(len(encode(each)) + 1 for each in changes.get(execution, ()))
        if cleared and size + EVENT_FRAME_BYTES > MAX_EVENT_BYTES:
            raise TooLarge(None, EVENTS_TOO_LARGE, "clear")
        key = message.flow_execution_id, message.task_name
        known = self.snapshot.tasks.get(key)
        if known is None or known.state != message.state:
            task = Task(*key, message.state, state_changed_at=self.now, state_changed_by=actor)
            self.snapshot.tasks[key] = self.change_set.tasks[key] = task
            changes.setdefault(execution, []).insert(0, StateChange("state", task))
        status: RecordingStatus = "recorded" if changes else "unchanged"
        of_tags = {} if message.clear is None else {"cleared": cleared}
        return {"status": status, **of_tags}

    def _apply(self, batch: Batch, actor: str, changes: ExecutionChanges) -> list[OperationStatus]:
        statuses: list[OperationStatus] = []
        for index, operation in enumerate(batch.tags):
            status: OperationStatus | None
            match operation.operation:
                case "add":
                    status = self._add(operation, actor, changes)
                case "remove":
                    status = self._remove(operation, actor, changes)
                case "set":
                    status = self._set(operation, actor, changes)
                case _:
                    assert_never(operation.operation)
            if status is None:
                raise TooLarge(index, f"{MAX_VARIANTS} active tags differ in their metadata alone")
            statuses.append(status)
        return statuses

    def _add(
        self, operation: Operation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus | None:
        """Add a tag; None if there are too many of its name."""
        assert operation.tag_metadata is not UNSET
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
            None if metadata is None else operation.tag_metadata,
            self.organization_id,
            "active",
            self.now,
            actor,
            None,
            None,
        )
        active[digest] = tag
        if self.snapshot.types and (of_type := self.snapshot.types.get(key[:3])) is not None:
            of_type[key] = None
        self.change_set.added[tag.id.int] = NewTag(tag, metadata, digest)
        changes.setdefault(flow_execution_key, []).append(Change("added", tag))
        return "added"

    def _remove(
        self, operation: Operation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus:
        active = self.snapshot.tags.get(tag_key(operation), {})
        _, digest = stored_metadata(operation.tag_metadata)
        if operation.any_metadata:
            digests = sorted(active, key=lambda it: (active[it].created_at, active[it].id.int))
        else:
            digests = [digest] if digest in active else []
        for digest in digests:
            tag = active[digest]
            if operation.tag_metadata is not UNSET:  # it was loaded without
                tag.tag_metadata = operation.tag_metadata
            self._delete(tag, digest, actor, changes)
        return "removed" if digests else "not_found"

    def _set(
        self, operation: Operation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus | None:
        """Make a tag the only one of its type on the task (docs/concepts/contract.md#rule-19)."""
        _, digest = stored_metadata(operation.tag_metadata)
        wanted = self.snapshot.tags.get(tag_key(operation), {}).get(digest)
        others = [it for it in tags_of(self.snapshot, type_key(operation)) if it[0] is not wanted]
        for tag, other in others:
            self._delete(tag, other, actor, changes)
        if wanted is None:
            self._add(operation, actor, changes)
        return "replaced" if others else "added" if wanted is None else "already_exists"

    def _delete(self, tag: Tag, digest: bytes, actor: str, changes: ExecutionChanges) -> None:
        """Remove an active tag (docs/concepts/contract.md#rule-4)."""
        del self.snapshot.tags[tag_key(tag)][digest]
        tag = replace(tag, status="deleted", updated_at=self.now, modified_by=actor)
        new = self.change_set.added.get(tag.id.int)
        if new is None:
            self.change_set.removed[tag.id.int] = tag
        else:
            self.change_set.added[tag.id.int] = new._replace(tag=tag)
        changes.setdefault(tag.flow_execution_id.int, []).append(Change("removed", tag))

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
        for position, (key, changed) in enumerate(changes.items(), self.snapshot.head.number + 1):
            execution = self.snapshot.executions[key]
            event = ChangeEvent(
                organization_id=self.organization_id,
                flow_execution_id=execution.id,
                flow_id=execution.flow_id,
                revision=execution.revision + 1,
                position=position,
                cursor=f"{position}{self._cursor}",
                batch_id=batch_id,
                changed_by=actor,
                changed_at=self.now,
                changes=changed,
            )
            events.append((execution.id, encode(event)))
        return tuple(events)

    def _advance(self, batch_id: UUID, events: tuple[tuple[UUID, bytes], ...]) -> dict[UUID, int]:
        """Store change events, each with the next revision and the next position.

        The rules are docs/concepts/contract.md#rule-12 and #rule-21.
        """
        revisions: dict[UUID, int] = {}
        if not events:
            return revisions
        position = self.snapshot.head.number
        for flow_execution_id, event in events:
            execution = self.snapshot.executions[flow_execution_id.int]
            execution.revision += 1
            revision = revisions[flow_execution_id] = execution.revision
            position += 1
            change = NewChange(flow_execution_id, revision, position, batch_id, event)
            self.change_set.changes.append(change)
        self.snapshot.head = Cursor(position, self._time)
        self.change_set.revisions.update(revisions)
        return revisions

    def _error(self, batch_id: UUID, error: ErrorInfo) -> bytes:
        return error_record(self.organization_id, batch_id, error).encode()

    def _record(self, message: Message, **outcome: Any) -> bytes:
        """Encode the result record of an applied message, as `ResultRecord.encode` does."""
        return encode(
            {
                "batch_id": message.batch_id,
                "organization_id": self.organization_id,
                "applied_at": self.now,
                **outcome,
            }
        )
