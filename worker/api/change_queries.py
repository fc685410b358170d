"""The SQL of change feeds: events behind a place, and the last events of feeds."""

from __future__ import annotations

from typing import Final, NamedTuple
from uuid import UUID

from producers.contract.cursors import BEGINNING, Cursor
from worker.db.pg_arrays import decode
from worker.db.pg_pipeline import Row


def in_microseconds(time: str) -> str:
    """Return the SQL of a time as the cursors of its events have it."""
    return f"(extract(epoch from {time}) * 1000000)::bigint"


# $1 organization, $2 number, $3 max events, $4 max characters.
_CHANGES: Final = f"""
    with recursive found (number, at, event, characters) as (
           select c.number, c.changed_at, t.text, length(t.text)
             from (select {{number}} as number, changed_at, event
                     from tag_changes where {{key}} = $2 + 1) c
            cross join lateral (select c.event::text as text offset 0) t
            union all
           select c.number, c.changed_at, t.text, found.characters + length(t.text)
             from found
            cross join lateral (
                  select {{number}} as number, changed_at, event
                    from tag_changes where {{key}} = found.number + 1
                  offset 0) c
            cross join lateral (select c.event::text as text offset 0) t
            where found.characters < $4 and found.number < $2 + $3),
         page as (
           select array_agg(number order by number) as numbers,
                  array_agg({in_microseconds("at")} order by number) as times,
                  array_agg(event order by number) as events
             from found
            where number = $2 + 1 or characters <= $4)
    select h.number, {in_microseconds("h.changed_at")},
           case when $2 = 0 then {in_microseconds("h.created_at")}
                else (select {in_microseconds("changed_at")} from tag_changes
                       where {{key}} = $2) end,
           page.numbers, page.times, page.events
      from ({{head}}) h
     cross join page
"""

CHANGES_OF_ORGANIZATION: Final = _CHANGES.format(
    number="position",
    key="organization_id = $1 and position > 0 and position",
    head="select position as number, changed_at, null::timestamptz as created_at "
    "from organizations where organization_id = $1",
)
"""Returns events behind a position in order, by tag_changes_position.

With them come the organization's last event, and the time of the event at that position. It reads
one event after the other, because they may be large. The first may exceed the limit of characters.
"""

# $5 flow execution.
CHANGES_OF_EXECUTION: Final = _CHANGES.format(
    number="revision",
    key="organization_id = $1 and flow_execution_id = $5 and revision",
    head="select revision as number, changed_at, created_at "
    "from flow_executions where organization_id = $1 and flow_execution_id = $5",
)
"""Returns events behind a revision, as above, by primary key."""

# $1 organization, $2 flow executions.
HEADS: Final = f"""
    select o.position, {in_microseconds("o.changed_at")}, e.ids, e.revisions, e.times
      from organizations o
     cross join (
           select array_agg(flow_execution_id) as ids, array_agg(revision) as revisions,
                  array_agg({in_microseconds("changed_at")}) as times
             from flow_executions
            where organization_id = $1 and flow_execution_id = any($2)) e
     where o.organization_id = $1
"""
"""Returns the last events of the organization and of some of its executions, by primary key."""


class StoredChanges(NamedTuple):
    """Stored change events behind some place of a feed."""

    head: Cursor
    """The last event of the feed."""
    at: int | None
    """The time of the event at that place, in microseconds; None: it is not stored."""
    events: list[tuple[Cursor, bytes]]
    """In order, as they were published."""


def read_changes(row: Row) -> StoredChanges:
    number, time, at, numbers, times, events = row
    places = map(read_cursor, decode(numbers), decode(times))
    head = read_cursor(number, time)
    return StoredChanges(
        head,
        None if at is None else read_integer(at),
        list(zip(places, decode(events), strict=True)),
    )


def read_heads(row: Row | None) -> tuple[Cursor, dict[UUID, Cursor]]:
    if row is None:
        return BEGINNING, {}
    number, time, *columns = row
    ids, revisions, times = map(decode, columns)
    heads = zip(ids, revisions, times, strict=True)
    return read_cursor(number, time), {
        UUID(bytes=id): read_cursor(revision, at) for id, revision, at in heads
    }


def read_cursor(number: bytes | None, time: bytes | None) -> Cursor:
    return Cursor(read_integer(number), None if time is None else read_integer(time))


def read_integer(binary: bytes | None) -> int:
    return int.from_bytes(binary or b"", signed=True)
