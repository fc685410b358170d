"""Between rows and objects: what a look-up returns, and what a statement takes as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

from msgspec import Raw

from producers.contract.messages import MAX_OPERATIONS, RegisterExecution, SetTaskState
from producers.contract.results import Task
from worker.bounds import MAX_GROUP_BYTES, MAX_OF_TYPE, MAX_OF_TYPES, MAX_VARIANTS
from worker.db import pg_arrays
from worker.snapshot import (
    AuthorizedMessage,
    Execution,
    NewBatch,
    NewChange,
    NewTag,
    StoredResult,
    TagKey,
    TaskKey,
    TypeKey,
    tag_key,
    types_of,
)
from worker.wire import Batch, Tag, encode

Parameters = dict[str, pg_arrays.Parameter]

MAX_LOADED_BYTES: Final = 8 * 1024 * 1024
"""Of tags, for one transaction: 100 bytes each, and the metadata of those that may be removed.

Behind it, tags are loaded without their metadata. A message that reaches it alone is `too_large`,
whatever is missing: of the 25,000 tags that it may name, those whose metadata is not asked for have
2.5 MB, those that 100 `set` keep have 0.8 MB, and all others are removed, with more than its change
events may hold (bounds.MAX_EVENT_BYTES).
"""
MAX_LOADED_TAGS: Final = MAX_OF_TYPES + 1
MAX_WHOLE_NAMES: Final = 3
_METADATA: Final = Tag.__struct_fields__.index("tag_metadata")
assert MAX_OPERATIONS * MAX_VARIANTS < MAX_LOADED_TAGS


# --- Rows to objects -----------------------------------------------------------------------------


class Names(NamedTuple):
    """What messages name, each once and in their order."""

    tags: dict[tuple[TagKey, bool], int]
    """Names of tags, and whether all of their metadata are needed, with the message's place."""
    tasks: dict[TaskKey, None]
    executions: dict[int, None]
    types: dict[tuple[TypeKey, bool], int]
    """Types of tags, as `tags`."""


def named(messages: Sequence[AuthorizedMessage]) -> Names:
    names = Names({}, {}, {}, {})
    for place, message in enumerate(each.message for each in messages):
        for _, _, key, whole in types_of(message):
            names.types.setdefault((key, whole), place)
        if isinstance(message, Batch):
            for condition in message.conditions:
                names.executions[condition.flow_execution_id.int] = None
            for operation in message.tags:
                names.tags.setdefault((tag_key(operation), operation.any_metadata), place)
                names.executions[operation.flow_execution_id.int] = None
            continue
        names.executions[message.flow_execution_id.int] = None
        if isinstance(message, SetTaskState):
            names.tasks[message.flow_execution_id, message.task_name] = None
    return names


def complete(
    messages: Sequence[AuthorizedMessage],
    names: Names,
    last_batch: UUID | None,
    last_tag: int,
    last_type: int,
) -> int:
    """Return for how many messages, counted from the first, everything was loaded.

    Args:
        last_batch: The stored batch at which a look-up was cut; None: it was not.
        last_tag: The place of the name at which a look-up was cut, from 1; 0: it was not.
        last_type: The place of the first type that was cut, likewise.
    """
    complete = len(messages)
    if last_batch is not None:
        ids = [each.message.batch_id for each in messages]
        complete = ids.index(last_batch) + 1
    if last_tag:
        complete = min(complete, list(names.tags.values())[last_tag - 1])
    if last_type:
        complete = min(complete, list(names.types.values())[last_type - 1])
    return complete


def batches(rows: Iterable[Any]) -> tuple[dict[UUID, StoredResult], UUID | None]:
    """Return stored batches, and the one that brought their bytes to the bound, if one did."""
    batches: dict[UUID, StoredResult] = {}
    last: Any = None
    for last in rows:
        _, batch_id, digest, record, executions, events = last
        stored = tuple((id, event.encode()) for id, event in zip(executions, events, strict=True))
        batches[batch_id] = StoredResult(digest, record.encode(), stored)
    return batches, last[1] if last and last[0] >= MAX_GROUP_BYTES else None


def executions(rows: Iterable[Any]) -> tuple[dict[int, Execution], set[int]]:
    """Return executions by id, and those whose task names are too long to be among these rows."""
    executions: dict[int, Execution] = {}
    long: set[int] = set()
    for id, names, any_name, revision, flow_id, is_long in rows:
        executions[id.int] = Execution(id, dict.fromkeys(names or ()), any_name, revision, flow_id)
        if is_long:
            long.add(id.int)
    return executions, long


def all_names_needed(
    messages: Sequence[AuthorizedMessage], long: set[int]
) -> tuple[list[int], int]:
    """Return which executions need all of their many task names: those that get more of them.

    These are three at most, for their size. The second value is for how many messages, counted from
    the first, that is enough.
    """
    whole: dict[int, None] = {}
    for place, message in enumerate(each.message for each in messages):
        if isinstance(message, RegisterExecution) and message.flow_execution_id.int in long:
            if len(whole) == MAX_WHOLE_NAMES and message.flow_execution_id.int not in whole:
                return list(whole), place
            whole[message.flow_execution_id.int] = None
    return list(whole), len(messages)


def tags(
    rows: Iterable[Any], tags: dict[TagKey, dict[bytes, Tag]]
) -> tuple[list[tuple[int, TagKey]], int]:
    """Add active tags to `tags`; return numbers and keys, and the number of the first name cut.

    That is the one at which a bound of all is reached; 0: none is. A tag that was asked for both
    ways comes with its metadata, and without.
    """
    found: list[tuple[int, TagKey]] = []
    number, total, cut = 0, 0, 0
    for number, total, digest, *fields in rows:
        if fields[_METADATA] is not None:
            fields[_METADATA] = Raw(fields[_METADATA].encode())
        tag = Tag(*fields)
        key = tag_key(tag)
        found.append((number, key))
        active = tags.setdefault(key, {})
        if tag.tag_metadata is not None or digest not in active:
            active[digest] = tag
        if total >= MAX_LOADED_BYTES and not cut:
            cut = number
    return found, cut or (number if len(found) >= MAX_LOADED_TAGS else 0)


def types(
    rows: Iterable[Any], tags_by_key: dict[TagKey, dict[bytes, Tag]], names: Names
) -> tuple[dict[TypeKey, dict[TagKey, None]], int]:
    """Add active tags of types, as `tags` does; return their keys by type, and the first cut type.

    A type is also cut by its own bound.
    """
    types: dict[TypeKey, dict[TagKey, None]] = {key: {} for key, _ in names.types}
    found, last = tags(rows, tags_by_key)
    for _, key in found:
        types[key[:3]][key] = None
    counts = Counter(number for number, _ in found)
    cut = [number for number, count in counts.items() if count > MAX_OF_TYPE]
    return types, min([*cut, last] if last else cut, default=0)


# --- Objects to columns --------------------------------------------------------------------------


def key_columns(keys: Sequence[tuple[TagKey | TypeKey, bool]]) -> Parameters:
    """Return the columns of names of tags, or of types, which have no tags."""
    executions, *named = zip(*[key for key, _ in keys], strict=True)
    columns = zip(("task_names", "tag_types", "tags"), named, strict=False)
    return {
        "whole": pg_arrays.bigints([whole for _, whole in keys]),
        "flow_execution_ids": pg_arrays.uuids(executions),
        **{name: pg_arrays.texts(column) for name, column in columns},
    }


def task_name_columns(names: Names, long: set[int], whole: Sequence[int]) -> Parameters:
    pairs = [(key[0], key[1]) for key, _ in names.tags]
    pairs += [(key[0], key[1]) for key, _ in names.types]
    pairs += [(id.int, name) for id, name in names.tasks]
    wanted = list(dict.fromkeys(pair for pair in pairs if pair[0] in long))
    return {
        "long_ids": pg_arrays.uuids(list(long)),
        "whole_ids": pg_arrays.uuids(whole),
        "flow_execution_ids": pg_arrays.uuids([id for id, _ in wanted]),
        "task_names": pg_arrays.texts([name for _, name in wanted]),
    }


def task_columns(tasks: Sequence[TaskKey]) -> Parameters:
    return {
        "flow_execution_ids": pg_arrays.uuids([id.int for id, _ in tasks]),
        "task_names": pg_arrays.texts([task_name for _, task_name in tasks]),
    }


def state_columns(tasks: dict[TaskKey, Task]) -> Parameters:
    return {
        **task_columns(list(tasks)),
        "states": pg_arrays.texts([task.state for task in tasks.values()]),
        "state_changed_by": pg_arrays.texts([task.state_changed_by for task in tasks.values()]),
    }


def registration_columns(registrations: dict[UUID, Execution]) -> Parameters:
    named = [(each, encode(list(each.task_names))) for each in registrations.values()]
    return {
        "flow_execution_ids": pg_arrays.uuids([id.int for id in registrations]),
        "task_names": pg_arrays.encoded_texts(
            [None if each.any_task_name else names for each, names in named]
        ),
        "given_task_names": pg_arrays.encoded_texts(
            [names if each.any_task_name else None for each, names in named]
        ),
        "flow_ids": pg_arrays.texts([each.flow_id for each in registrations.values()]),
    }


def revision_columns(revisions: dict[UUID, int]) -> Parameters:
    return {
        "flow_execution_ids": pg_arrays.uuids([id.int for id in revisions]),
        "revisions": pg_arrays.jsonb(encode(revisions)),
    }


def removed_columns(removed: dict[int, Tag]) -> Parameters:
    return {
        "ids": pg_arrays.uuids(list(removed)),
        "modified_by": pg_arrays.jsonb(
            encode({tag.id: tag.modified_by for tag in removed.values()})
        ),
    }


def added_columns(added: dict[int, NewTag]) -> Parameters:
    tags = [each.tag for each in added.values()]
    return {
        "ids": pg_arrays.uuids([tag.id.int for tag in tags]),
        "flow_execution_ids": pg_arrays.uuids([tag.flow_execution_id.int for tag in tags]),
        "task_names": pg_arrays.texts([tag.task_name for tag in tags]),
        "tag_types": pg_arrays.texts([tag.tag_type for tag in tags]),
        "tags": pg_arrays.texts([tag.tag for tag in tags]),
        "tag_metadata": pg_arrays.encoded_texts([each.metadata for each in added.values()]),
        "metadata_digests": pg_arrays.byteas([each.metadata_digest for each in added.values()]),
        "created_by": pg_arrays.texts([tag.created_by for tag in tags]),
        "modified_by": pg_arrays.texts([tag.modified_by for tag in tags]),
    }


def change_columns(changes: Sequence[NewChange]) -> Parameters:
    return {
        "flow_execution_ids": pg_arrays.uuids([change.flow_execution_id.int for change in changes]),
        "revisions": pg_arrays.bigints([change.revision for change in changes]),
        "positions": pg_arrays.bigints([change.position for change in changes]),
        "batch_ids": pg_arrays.uuids([change.batch_id.int for change in changes]),
        "events": pg_arrays.encoded_texts([change.event for change in changes]),
        "position": pg_arrays.bigint(changes[-1].position),
    }


def batch_columns(batches: Sequence[NewBatch]) -> Parameters:
    return {
        "batch_ids": pg_arrays.uuids([batch.batch_id.int for batch in batches]),
        "digests": pg_arrays.byteas([batch.digest for batch in batches]),
        "records": pg_arrays.encoded_texts([batch.record for batch in batches]),
        "revisions": pg_arrays.encoded_texts([encode(batch.revisions) for batch in batches]),
        "event_bytes": pg_arrays.bigints([batch.event_bytes for batch in batches]),
    }
