"""The rules of a batch: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic_core import to_json

from producers.contract.cursors import Cursor, microseconds
from producers.contract.errors import CONDITIONS, ErrorDetail, ErrorInfo, FoundTag
from producers.contract.results import ResultRecord
from tests.bench.rival.bounds import (
    MAX_FOUND,
    MAX_GROUP_BYTES,
    MAX_OF_TYPE,
    MAX_OF_TYPES,
    MAX_VARIANTS,
    ExecutionChanges,
    Refusal,
    TooLarge,
    check_size,
)
from tests.bench.rival.messages import Condition, TagBatch, TagOperation
from tests.bench.rival.results import Change, ChangeEvent, OperationStatus, Tag
from tests.bench.rival.snapshot import (
    AuthorizedMessage,
    ChangeSet,
    Decision,
    NewBatch,
    NewChange,
    NewTag,
    Outcome,
    Snapshot,
    StoredResult,
    TypeKey,
    stored_metadata,
    tag_key,
    type_key,
    types_of,
)


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
        outcome = processor.process(each)
        if each.message.batch_id not in answered:  # events are published once for all its copies
            to_publish += sum(len(event) for _, event in outcome.events)
        answered.add(each.message.batch_id)
        to_publish += len(outcome.record)
        outcomes.append(outcome)
    return Decision(outcomes, processor.change_set, snapshot.head)


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
            check_size(message, events)
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
        self, message: TagBatch, authorized: AuthorizedMessage, changes: ExecutionChanges
    ) -> bytes:
        """Apply a message, and return its result record. Raises `Refusal`."""
        self._check_known(message)
        self._check_types(message)
        if message.conditions:
            self._check_conditions(message, may_read=authorized.may_read)
        statuses = self._apply(message, authorized.actor, changes)
        return self._record(message, tags=[{"status": each} for each in statuses])

    def _repeat(self, batch_id: UUID, digest: bytes, known: StoredResult) -> Outcome:
        """Return the stored outcome for the same batch, a conflict for another one with its id."""
        if digest == known.digest:
            return Outcome(known.record, known.events)
        error = ErrorInfo(
            code="conflict", message="this batch id was used for another request", details=[]
        )
        return Outcome(self._error(batch_id, error))

    def _check_known(self, message: TagBatch) -> None:
        """Raise `Refusal` with each use of an unknown execution or task."""
        details = []
        for index, operation in enumerate(message.tags):
            if found := self._unknown(operation):
                details.append(ErrorDetail(index=index, field=found[0], message=found[1]))
        for index, condition in enumerate(message.conditions):
            if found := self._unknown(condition):
                text = " ".join(found)
                details.append(ErrorDetail(index=index, field=CONDITIONS, message=text))
        if details:
            text = "an execution or task is unknown"
            raise Refusal(ErrorInfo(code="not_found", message=text, details=details))

    def _unknown(self, named: TagOperation | Condition) -> tuple[str, str] | None:
        """Return the field that is unknown, and what it is."""
        execution = self.snapshot.executions.get(named.flow_execution_id.int)
        if execution is None:
            return "flow_execution_id", "is unknown"
        if execution.task_names is not None and named.task_name not in execution.task_names:
            return "task_name", "is not registered"
        return None

    def _check_types(self, message: TagBatch) -> None:
        """Raise `TooLarge` if the types that the message depends on have too many tags.

        What was not loaded of a type is not seen here, so a type counts 1,001 tags at most.
        """
        if not self.snapshot.types:
            return
        tags, counted, total = self.snapshot.tags, set[tuple[TypeKey, bool]](), 0
        for index, field, key, whole in types_of(message):
            if (key, whole) in counted:
                continue
            counted.add((key, whole))
            of_type = sum(len(tags[each]) for each in self.snapshot.types[key])
            total += min(of_type, MAX_OF_TYPE + 1)
            if total > MAX_OF_TYPES:
                raise TooLarge(index, f"it depends on more than {MAX_OF_TYPES} tags", field)
            if of_type > MAX_OF_TYPE:
                text = f"more than {MAX_OF_TYPE} active tags of the type are on the task"
                raise TooLarge(index, text, field)

    def _check_conditions(self, batch: TagBatch, *, may_read: bool) -> None:
        """Raise `Refusal` with each condition that fails."""
        details = []
        of_types: dict[TypeKey, list[Tag]] = {}  # sorted once, because there may be many conditions
        for index, condition in enumerate(batch.conditions):
            key = type_key(condition)
            if key not in of_types:
                of_types[key] = [tag for tag, _ in self._tags_of(key)]
            of_type = of_types[key]
            meant = of_type if condition.tag is None else self._named_by(condition)
            if bool(meant) == condition.exists:
                continue
            text = "no such tag is active" if condition.exists else "such a tag is active"
            fields: dict[str, Any] = {"index": index, "field": CONDITIONS, "message": text}
            if may_read:
                fields["found"] = [
                    FoundTag(
                        tag_type=tag.tag_type,
                        tag=tag.tag,
                        created_by=tag.created_by,
                        created_at=tag.created_at,
                    )
                    for tag in (of_type if condition.exists else meant)[:MAX_FOUND]
                ]
            details.append(ErrorDetail(**fields))
        if details:
            text = "a condition of the batch does not hold"
            raise Refusal(ErrorInfo(code="precondition_failed", message=text, details=details))

    def _named_by(self, condition: Condition) -> list[Tag]:
        """Return the active tags of the name that a condition has, the oldest first."""
        assert condition.tag is not None
        key = *type_key(condition), condition.tag
        active = self.snapshot.tags.get(key, {})
        if condition.any_metadata:
            return sorted(active.values(), key=_age)
        _, digest = stored_metadata(condition.tag_metadata)
        return [active[digest]] if digest in active else []

    def _tags_of(self, key: TypeKey) -> list[tuple[Tag, bytes]]:
        """Return the active tags of a type on a task with their digests, the oldest first."""
        tags = self.snapshot.tags
        found = [
            (tag, digest) for each in self.snapshot.types[key] for digest, tag in tags[each].items()
        ]
        return sorted(found, key=lambda it: _age(it[0]))

    def _apply(
        self, batch: TagBatch, actor: str, changes: ExecutionChanges
    ) -> list[OperationStatus]:
        statuses: list[OperationStatus] = []
        for index, operation in enumerate(batch.tags):
            if operation.operation == "add":
                status = self._add(operation, actor, changes)
            elif operation.operation == "remove":
                status = self._remove(operation, actor, changes)
            else:
                status = self._set(operation, actor, changes)
            if status is None:
                raise TooLarge(index, f"{MAX_VARIANTS} active tags differ in their metadata alone")
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
        if self.snapshot.types and (of_type := self.snapshot.types.get(key[:3])) is not None:
            of_type[key] = None
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
            tag = active[digest]
            if not operation.any_metadata:  # it was loaded without
                tag.tag_metadata = operation.tag_metadata
            self._delete(tag, digest, actor, changes)
        return "removed" if digests else "not_found"

    def _set(
        self, operation: TagOperation, actor: str, changes: ExecutionChanges
    ) -> OperationStatus | None:
        """Make a tag the only one of its type on the task."""
        _, digest = stored_metadata(operation.tag_metadata)
        wanted = self.snapshot.tags.get(tag_key(operation), {}).get(digest)
        others = [it for it in self._tags_of(type_key(operation)) if it[0] is not wanted]
        for tag, other in others:
            self._delete(tag, other, actor, changes)
        if wanted is None:
            self._add(operation, actor, changes)
        return "replaced" if others else "added" if wanted is None else "already_exists"

    def _delete(self, tag: Tag, digest: bytes, actor: str, changes: ExecutionChanges) -> None:
        """Remove an active tag."""
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
                revision=execution.revision + 1,
                batch_id=batch_id,
                changed_by=actor,
                changed_at=self.now,
                changes=list(changed),
                flow_id=execution.flow_id,
                position=position,
                cursor=f"{position}{self._cursor}",
            ).encode()
            events.append((execution.id, event))
        return tuple(events)

    def _advance(self, batch_id: UUID, events: tuple[tuple[UUID, bytes], ...]) -> dict[UUID, int]:
        """Store change events, each with the next revision and the next position."""
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

    def _record(self, message: TagBatch, **outcome: Any) -> bytes:
        """Encode the result record of an applied message, as `ResultRecord.encode` does."""
        return to_json(
            {
                "batch_id": message.batch_id,
                "organization_id": self.organization_id,
                "applied_at": self.now,
                **outcome,
            }
        )


def _age(tag: Tag) -> tuple[datetime, int]:
    return tag.created_at, tag.id.int
