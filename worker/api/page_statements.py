"""The statements that read pages: of an execution's tags or tasks, and of the work list.

A page looks at 10,000 candidates at most, in their order. `offset 0` keeps a subquery from being
joined in another way, which would read more than the page. The condition on the time allows the
indexes task_tags_work and task_tags_page (worker/db/tables.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple
from uuid import UUID

from producers.contract.cursors import Cursor
from worker.api.change_queries import in_microseconds, read_cursor
from worker.db.pg_arrays import decode

MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024
"""The most bytes of an answer that is no page."""
_MAX_TAGS: Final = MAX_ANSWER_BYTES // 333
"""More tags than this always exceed `MAX_ANSWER_BYTES`: a tag has at least 333 bytes."""

MAX_CANDIDATES: Final = 10_000
"""How many rows a page examines. If few of them match, the page is short."""
MAX_TAGS: Final = 100
"""The most tags that are shown with a task."""
_PAGE_BYTES: Final = 1024 * 1024

_TIME: Final = '\'YYYY-MM-DD"T"HH24:MI:SS.US"Z"\''
TAG: Final = f"""
        id, flow_execution_id, task_name, tag_type, tag, tag_metadata, organization_id, status,
        to_char(created_at at time zone 'UTC', {_TIME}) as created_at,
        created_by, null as updated_at, null as modified_by
"""
"""The columns of an active tag as it is served."""

BEFORE_ALL: Final = f"-infinity {UUID(int=0)}"
"""The place before all tags."""
_PLACE_OF_TAG: Final = f"to_char(created_at at time zone 'UTC', {_TIME}) || ' ' || id"


# --- Tags ----------------------------------------------------------------------------------------

_IN_ORDER: Final = "and created_at > '-infinity'"
_OF_EXECUTION: Final = f"""select * from task_tags
                            where organization_id = $1 and flow_execution_id = $2
                              and (created_at, id) > ($6::timestamptz, $7::uuid)
                              and status = 'active' {_IN_ORDER}"""

# $1 organization, $2 flow execution, $3 task name, $4 types, $5 tags; $6 and $7 time and id of the
# last tag before; $8 limit. $3, $4, $5 and $8 may be null.
_READ_PAGE: Final = f"""
    with page as materialized (
           select row_number() over () as place, t.created_at || ' ' || t.id as last,
                  row_to_json(t) as tag
             from (select {TAG}
                     from (select * from ({_OF_EXECUTION}) found
                            order by created_at, id
                            limit case when $8 is not null then {MAX_CANDIDATES} end) candidates
                    where ($3 is null or task_name = $3)
                      and ($4 is null or tag_type = any($4)) and ($5 is null or tag = any($5))
                    limit coalesce($8 + 1, {_MAX_TAGS + 1})) t)
    select e.revision, e.changed_at,
           (select coalesce(json_agg(tag order by place), '[]')::text
              from page where $8 is null or place <= $8
            having $8 is not null
                or coalesce(sum(octet_length(tag::text)), 0) <= {MAX_ANSWER_BYTES}),
           case when $8 is null then null
                when exists (select from page where place > $8)
                then (select last from page where place = $8)
                else (select {_PLACE_OF_TAG}
                        from (select * from ({_OF_EXECUTION}) found
                               order by created_at, id offset {MAX_CANDIDATES - 1} limit 1) c) end
      from flow_executions e
     where e.organization_id = $1 and e.flow_execution_id = $2
"""
"""Returns the revision, a page of tags as JSON, and where the next page begins.

It looks at `MAX_CANDIDATES` tags at most, in their order, by task_tags_page; those of a task are
found by task_tags_active and sorted. Without a limit, it looks at all, and the tags are null if
they are more than `MAX_ANSWER_BYTES`.
"""


# --- Tasks ---------------------------------------------------------------------------------------

_EXECUTION: Final = "organization_id = $1 and flow_execution_id = $2"
_OF_TASK: Final = """organization_id = $1 and flow_execution_id = c.flow_execution_id
                         and task_name = c.task_name"""
_FIRST: Final = "tag_type = ($4)[1] and tag = ($5)[1]"

_FITS: Final = f"""($3 is null or c.task_name = $3)
                  and ($8 is null or exists (
                      select from flow_executions
                       where organization_id = $1 and flow_execution_id = c.flow_execution_id
                         and flow_id = $8
                      offset 0))
                  and ($7 is null or exists (
                      select from task_executions where {_OF_TASK} and state = any($7) offset 0))
                  and not exists (
                      select from unnest($4, $5) with ordinality as s (wanted_type, wanted, number)
                       where number > least($6, 1) and (number <= $6) <> case when wanted is null
                             then exists (
                                  select from task_tags
                                   where {_OF_TASK} and tag_type = wanted_type
                                     and status = 'active'
                                  offset 0)
                             else exists (
                                  select from task_tags
                                   where {_OF_TASK} and status = 'active'
                                     and tag_type = wanted_type and tag = wanted
                                  offset 0) end
                      offset 0)"""
"""Whether the task of a candidate c is wanted."""

_IS_OLDEST: Final = f"""{_FIRST} and not exists (
                      select from task_tags
                       where {_OF_TASK} and {_FIRST} and status = 'active'
                         and (created_at, id) < (c.created_at, c.id)
                      offset 0) and """

_TAGGED: Final = f"""
               select flow_execution_id, task_name, tag_type, tag, created_at, id
                 from task_tags
                where organization_id = $1 and {_FIRST}
                  and status = 'active' {_IN_ORDER}
                  and (created_at, id) > ($9::timestamptz, $10::uuid)
                order by created_at, id"""

_UNREGISTERED_NUMBER: Final = 999_999_999
"""Stands for the number of a name that is not registered: behind those that are."""
_GIVEN: Final = f"""select jsonb_array_elements_text(given_task_names)
                      from flow_executions where {_EXECUTION}"""

_NAMED: Final = f"""
               select flow_execution_id, name as task_name, null::timestamptz as created_at, number
                 from flow_executions
                cross join jsonb_array_elements_text(coalesce(task_names, given_task_names))
                           with ordinality as r (name, number)
                where {_EXECUTION} and number > $9::bigint and ($3 is null or name = $3)
                union all
               select $2, name, null, {_UNREGISTERED_NUMBER}
                 from unregistered
                where number > 0 and name not in ({_GIVEN})
                union all
               select $2, $3, null, {_UNREGISTERED_NUMBER}
                 from flow_executions
                where {_EXECUTION} and task_names is null and $3 not in ({_GIVEN})
                  and (exists (select from task_tags
                                where {_EXECUTION} and task_name = $3 and status = 'active'
                               offset 0)
                    or exists (select from task_executions
                                where {_EXECUTION} and task_name = $3
                               offset 0))"""
_PLACE_OF_NAME: Final = "number || ' ' || task_name"

_UNREGISTERED: Final = f"""
         unregistered (number, name) as (
               select 0, case $9 when '{_UNREGISTERED_NUMBER}' then $10 else '' end collate "C"
                 from flow_executions
                where {_EXECUTION} and task_names is null and $3 is null
                union all
               select number + 1, following.name
                 from unregistered u
                cross join lateral (
                      select least(
                             (select task_name from task_tags
                               where {_EXECUTION} and task_name > u.name and status = 'active'
                               order by task_name limit 1),
                             (select task_name from task_executions
                               where {_EXECUTION} and task_name > u.name
                               order by task_name limit 1)) as name
                      offset 0) following
                where following.name is not null),"""
"""The names of tags and states, one after the other, for an execution that allows every name."""

_TASK: Final = f"""
                      select row_to_json(r)::text as task, tags_after
                        from (select executions[page.number + 1] as flow_execution_id,
                                     names[page.number + 1] as task_name,
                                     since[page.number + 1] as since
                              offset 0) c
                       cross join lateral (
                             select coalesce(json_agg(tag) filter (where number <= {MAX_TAGS}),
                                             '[]') as tags,
                                    case when count(*) > {MAX_TAGS}
                                         then max(place) filter (where number = {MAX_TAGS})
                                    end as tags_after
                               from (select row_to_json(t) as tag, row_number() over () as number,
                                            created_at || ' ' || id as place
                                       from (select {TAG}
                                               from (select * from (
                                                     select * from task_tags
                                                      where {_OF_TASK} and status = 'active'
                                                     offset 0) of_task
                                                      order by created_at, id
                                                      limit {MAX_TAGS + 1}) sorted) t) n) shown
                       cross join lateral (
                             select e.flow_id, c.flow_execution_id, c.task_name, s.state,
                                    to_char(s.state_changed_at at time zone 'UTC', {_TIME})
                                    as state_changed_at,
                                    s.state_changed_by, shown.tags,
                                    to_char(c.since at time zone 'UTC', {_TIME}) as waiting_since
                               from flow_executions e
                               left join task_executions s
                                 on s.organization_id = $1
                                and s.flow_execution_id = c.flow_execution_id
                                and s.task_name = c.task_name
                              where e.organization_id = $1
                                and e.flow_execution_id = c.flow_execution_id
                             offset 0) r
                      offset 0"""


def _statement(candidates: str, place: str, fits: str, before: str = "") -> str:
    """Return the statement that reads a page of those candidates that fit.

    $1 organization, $2 flow execution, $3 task name, $4 types and $5 tags of the selectors, $6 how
    many of them are wanted (the others are unwanted), $7 states, $8 flow; $9 and $10 the place
    where the page begins, in two parts; $11 limit. $2, $3, $7, $8 and tags in $5 may be null.
    """
    return f"""
    with recursive {before}
         chosen as materialized (
               select array_agg(flow_execution_id) as executions, array_agg(task_name) as names,
                      array_agg(created_at) as since, array_agg({place}) as places
                 from (select * from ({candidates}
                        limit {MAX_CANDIDATES}) c
                where {fits}
                limit $11 + 1) f),
         page (number, task, tags_after, bytes) as (
               select 0::bigint, null::text, null::text, 0::bigint
                union all
               select page.number + 1, t.task, t.tags_after, page.bytes + octet_length(t.task)
                 from page
                cross join chosen
                cross join lateral ({_TASK}) t
                where page.number < least($11, cardinality(names)) and page.bytes < {_PAGE_BYTES})
    select o.position, {in_microseconds("o.changed_at")}, p.tasks, p.tags_after,
           case when p.last < cardinality(places) then places[p.last]
                else (select {place}
                        from (select * from ({candidates}) c
                              offset {MAX_CANDIDATES - 1} limit 1) c) end
      from (select array_agg(task order by number) filter (where number > 0) as tasks,
                   array_agg(coalesce(tags_after, '') order by number) filter (where number > 0)
                   as tags_after,
                   max(number) as last
              from page) p
     cross join chosen
      left join organizations o on o.organization_id = $1
     where $2 is null or exists (select from flow_executions where {_EXECUTION})
    """


_PAGE_TYPES: Final = "uuid, uuid, text, text[], text[], text, text, bigint"
_TASKS_TYPES: Final = "uuid, uuid, text, text[], text[], bigint, text[], text, text, text, bigint"

PAGES: Final = {
    f"page ({_PAGE_TYPES})": _READ_PAGE,
    f"page_of_task ({_PAGE_TYPES})": _READ_PAGE.replace(
        _OF_EXECUTION, _OF_EXECUTION.replace(_IN_ORDER, "and task_name = $3 offset 0")
    ),
    f"work ({_TASKS_TYPES})": _statement(_TAGGED, _PLACE_OF_TAG, _IS_OLDEST + _FITS),
    f"work_of_execution ({_TASKS_TYPES})": _statement(
        _TAGGED.replace(_FIRST, "flow_execution_id = $2"), _PLACE_OF_TAG, _IS_OLDEST + _FITS
    ),
    f"work_of_task ({_TASKS_TYPES})": _statement(
        _TAGGED.replace(_IN_ORDER, "and flow_execution_id = $2 and task_name = $3"),
        _PLACE_OF_TAG,
        _IS_OLDEST + _FITS,
    ),
    f"tasks ({_TASKS_TYPES})": _statement(_NAMED, _PLACE_OF_NAME, _FITS, _UNREGISTERED),
}
"""Statements by name and types. Those of tasks return one row, or none for an unknown execution.

The row has position and time of the organization's last event, the tasks as JSON, for each task
the place of its last tag if it has more of them, and the place where the next page begins. `work`
goes by task_tags_work, `work_of_execution` by task_tags_page, `work_of_task` by task_tags_active,
and `tasks` by the registered names, or the names in task_tags_active and task_executions.
"""


class TaskPage(NamedTuple):
    """Some tasks, with their states and tags, and the head of the organization's feed."""

    head: Cursor
    tasks: list[bytes]
    """Each as JSON."""
    tags_after: list[bytes]
    """For each task, the place of its last tag if it has more of them; otherwise empty."""
    after: str | None
    """Where the next page begins; None if there is none."""

    @classmethod
    def read(cls, row: Sequence[bytes | None]) -> TaskPage:
        position, at, tasks, tags_after, after = row
        head = read_cursor(position, at)
        return cls(
            head, decode(tasks), decode(tags_after), None if after is None else after.decode()
        )
