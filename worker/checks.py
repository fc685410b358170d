"""What must hold before a message takes effect: checks of the snapshot that raise `Refusal`.

What the message then does is in worker/rules.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from producers.contract.errors import CONDITIONS, ErrorDetail, ErrorInfo, FoundTag
from producers.contract.messages import SetTaskState
from worker.bounds import MAX_FOUND, MAX_OF_TYPE, MAX_OF_TYPES, Refusal, TooLarge
from worker.snapshot import Snapshot, TypeKey, stored_metadata, type_key, types_of
from worker.wire import Batch, Condition, Operation, Tag


def check_known(snapshot: Snapshot, message: Batch | SetTaskState) -> None:
    """Raise `Refusal` with each use of an unknown execution or task.

    The rule is docs/concepts/contract.md#rule-5.
    """
    if isinstance(message, SetTaskState):
        named: Iterable[tuple[int | None, Operation | SetTaskState]] = [(None, message)]
    else:
        named = enumerate(message.tags)
    details = []
    for index, each in named:
        if found := _unknown(snapshot, each):
            details.append(ErrorDetail(index=index, field=found[0], message=found[1]))
    if isinstance(message, Batch) and message.conditions:
        for index, condition in enumerate(message.conditions):
            if found := _unknown(snapshot, condition):
                text = " ".join(found)
                details.append(ErrorDetail(index=index, field=CONDITIONS, message=text))
    if details:
        text = "an execution or task is unknown"
        raise Refusal(ErrorInfo(code="not_found", message=text, details=details))


def _unknown(
    snapshot: Snapshot, named: Operation | SetTaskState | Condition
) -> tuple[str, str] | None:
    """Return the field that is unknown, and what it is."""
    execution = snapshot.executions.get(named.flow_execution_id.int)
    if execution is None:
        return "flow_execution_id", "is unknown"
    if not execution.any_task_name and named.task_name not in execution.task_names:
        return "task_name", "is not registered"
    return None


def check_types(snapshot: Snapshot, message: Batch | SetTaskState) -> None:
    """Raise `TooLarge` if the types that the message depends on have too many tags.

    What was not loaded of a type is not seen here, so a type counts 1,001 tags at most.
    """
    if not snapshot.types:
        return
    tags, counted, total = snapshot.tags, set[tuple[TypeKey, bool]](), 0
    for index, field, key, whole in types_of(message):
        if (key, whole) in counted:
            continue
        counted.add((key, whole))
        of_type = sum(len(tags[each]) for each in snapshot.types[key])
        total += min(of_type, MAX_OF_TYPE + 1)
        if total > MAX_OF_TYPES:
            raise TooLarge(index, f"it depends on more than {MAX_OF_TYPES} tags", field)
        if of_type > MAX_OF_TYPE:
            text = f"more than {MAX_OF_TYPE} active tags of the type are on the task"
            raise TooLarge(index, text, field)


def check_conditions(snapshot: Snapshot, batch: Batch, *, may_read: bool) -> None:
    """Raise `Refusal` with each condition that fails (docs/concepts/contract.md#rule-18)."""
    details = []
    of_types: dict[TypeKey, list[Tag]] = {}  # sorted once, because there may be many conditions
    for index, condition in enumerate(batch.conditions):
        key = type_key(condition)
        if key not in of_types:
            of_types[key] = [tag for tag, _ in tags_of(snapshot, key)]
        of_type = of_types[key]
        meant = of_type if condition.tag is None else _named_by(snapshot, condition)
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


def _named_by(snapshot: Snapshot, condition: Condition) -> list[Tag]:
    """Return the active tags of the name that a condition has, the oldest first."""
    assert condition.tag is not None
    key = *type_key(condition), condition.tag
    active = snapshot.tags.get(key, {})
    if condition.any_metadata:
        return sorted(active.values(), key=_age)
    _, digest = stored_metadata(condition.tag_metadata)
    return [active[digest]] if digest in active else []


def tags_of(snapshot: Snapshot, key: TypeKey) -> list[tuple[Tag, bytes]]:
    """Return the active tags of a type on a task with their digests, the oldest first."""
    tags = snapshot.tags
    found = [(tag, digest) for each in snapshot.types[key] for digest, tag in tags[each].items()]
    return sorted(found, key=lambda it: _age(it[0]))


def _age(tag: Tag) -> tuple[datetime, int]:
    return tag.created_at, tag.id.int
