"""The worker's SQL: what each statement is for, by which index it goes, what it returns.

Statements take arrays, so their number does not grow with a batch or a group of batches. Two
habits:

- Arrays side by side in a select list become rows one by one; `from unnest(a, b)` copies them
  first.
- `offset 0` keeps the planner from turning a look-up by key into a scan of the whole table, as it
  does while it has no statistics of a new table; a prepared plan stays while the table grows. For
  the same reason an update takes its values from a JSON object by key: a join could scan the table.
"""

from __future__ import annotations

from typing import Final

LOCK: Final = """
    select clock_timestamp(), position, changed_at
      from (select position, changed_at from organizations
             where organization_id = %(organization_id)s
               for update) as locked
"""
"""Locks the organization's row, by primary key; returns the time and its last event's place.

No row: the organization is not known yet.

It is a statement of its own, so that the next one sees what the transaction before committed. The
time is read behind the lock, so that it never runs back within an organization: written without the
subquery, it would be read before.
"""

ADD_ORGANIZATION: Final = """
    insert into organizations (organization_id, created_at)
    values (%(organization_id)s, clock_timestamp())
        on conflict do nothing
"""
"""Adds an organization, by primary key, in a transaction of its own."""

LOCK_NOW: Final = LOCK.replace("for update", "for update nowait")
"""The same, without waiting for another transaction, for a worker that has more to do."""

LOAD_BATCHES: Final = """
    select b.total, b.batch_id, b.digest, b.result_record::text, made.executions, made.events
      from (select b.*, sum(b.bytes) over (rows unbounded preceding) as total
              from (select unnest(%(batch_ids)s) as batch_id) as k
             cross join lateral (
                   select batch_id, digest, result_record, revisions,
                          event_bytes + octet_length(result_record::text) as bytes
                     from tag_batches
                    where organization_id = %(organization_id)s and batch_id = k.batch_id
                   offset 0) b) b
     cross join lateral (
           select coalesce(array_agg(flow_execution_id order by position), '{}') as executions,
                  coalesce(array_agg(event order by position), '{}') as events
             from jsonb_each_text(b.revisions) as r (id, number)
            cross join lateral (
                  select flow_execution_id, event::text, position
                    from tag_changes
                   where organization_id = %(organization_id)s
                     and flow_execution_id = r.id::uuid and revision = r.number::bigint
                  offset 0) c) as made
     where b.total - b.bytes < %(max_bytes)s
"""
"""Returns the stored results of batches with their change events, by the two primary keys.

They come in the order of their ids, and end with the one that brings the total of their bytes to
the bound.
"""

LOAD_EXECUTIONS: Final = """
    select flow_execution_id, case when is_short then names end, task_names is null, revision,
           flow_id, not is_short
      from (select *, coalesce(task_names, given_task_names) as names
              from flow_executions
             where organization_id = %(organization_id)s
               and flow_execution_id = any(%(flow_execution_ids)s)) as e
     cross join lateral (
           select case when names is null then true
                       when pg_column_size(names) > 4096 then false
                       else octet_length(names::text) <= 4096 end as is_short) as s
"""
"""Returns the executions that messages name, by primary key; without their registered task names if
these have more than 4 KiB, because a message may name 100 executions with 8 MB each."""

LOAD_TASK_NAMES: Final = """
    select flow_execution_id, name
      from (select flow_execution_id, coalesce(task_names, given_task_names) as names
              from flow_executions
             where organization_id = %(organization_id)s
               and flow_execution_id = any(%(long_ids)s)) as e
     cross join lateral jsonb_array_elements_text(names) with ordinality as n (name, place)
     where flow_execution_id = any(%(whole_ids)s)
        or (flow_execution_id, name) in (
           select unnest(%(flow_execution_ids)s), unnest(%(task_names)s))
     order by place
"""
"""Returns registered task names of executions that have many, by primary key, in their order: all
names of some executions, and of the others those that messages name."""

LOAD_TAGS: Final = """
    select number, total, metadata_digest, id, flow_execution_id, task_name, tag_type, tag,
           case when total - bytes < %(max_bytes)s then tag_metadata::text end, %(organization_id)s,
           status, created_at, created_by, updated_at, modified_by
      from (select *, sum(bytes) over (rows unbounded preceding) as total
              from (select k.number, t.*,
                           case when k.whole > 0 then t.metadata end as tag_metadata,
                           case when k.whole > 0 and t.metadata is not null
                                then 100 + octet_length(t.metadata::text) else 100 end as bytes
                      from (select generate_subscripts(%(whole)s, 1) as number,
                                   unnest(%(whole)s) as whole,
                                   unnest(%(flow_execution_ids)s) as flow_execution_id,
                                   unnest(%(task_names)s) as task_name,
                                   unnest(%(tag_types)s) as tag_type,
                                   unnest(%(tags)s) as tag) as k
                     cross join lateral (
                           select metadata_digest, id, flow_execution_id, task_name, tag_type,
                                  tag, tag_metadata as metadata, status, created_at, created_by,
                                  updated_at, modified_by
                             from task_tags
                            where organization_id = %(organization_id)s
                              and flow_execution_id = k.flow_execution_id
                              and task_name = k.task_name and tag_type = k.tag_type
                              and tag = k.tag and status = 'active'
                           offset 0) t
                     limit %(max_rows)s) as found) as summed
"""
"""Returns the active tags of the names in operations, by task_tags_active.

They come in the order of the names, up to `max_rows`, with the metadata where it is asked for as a
`whole`, until the total of bytes has reached the bound. A window without an order takes its rows as
they come, so what is behind the limit is never read.
"""

LOAD_TYPES: Final = (
    LOAD_TAGS.replace(",\n                                   unnest(%(tags)s) as tag)", ")")
    .replace("tag = k.tag and ", "")
    .replace("offset 0", " limit %(max_of_type)s")
)
"""Returns the active tags of types on tasks, by task_tags_active, of each up to a bound.

It is LOAD_TAGS without the names of tags, and with that bound.
"""

LOAD_TASKS: Final = """
    select t.*
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(task_names)s) as task_name) as k
     cross join lateral (
           select flow_execution_id, task_name, state, state_changed_at, state_changed_by
             from task_executions
            where organization_id = %(organization_id)s
              and flow_execution_id = k.flow_execution_id and task_name = k.task_name
           offset 0) t
"""
"""Returns the states of the tasks that messages name, by primary key."""

SAVE_BATCHES: Final = """
    insert into tag_batches (organization_id, batch_id, digest, result_record, revisions,
                             event_bytes, applied_at)
    select %(organization_id)s, batch_id, digest, record::json, revisions::jsonb, event_bytes,
           %(now)s
      from (select unnest(%(batch_ids)s) as batch_id, unnest(%(digests)s) as digest,
                   unnest(%(records)s) as record, unnest(%(revisions)s) as revisions,
                   unnest(%(event_bytes)s) as event_bytes) as b
"""
"""Stores the results of batches, under their primary key."""

SAVE_REGISTRATIONS: Final = """
    insert into flow_executions (organization_id, flow_execution_id, task_names, given_task_names,
                                 revision, created_at, flow_id, changed_at)
    select %(organization_id)s, flow_execution_id, task_names::jsonb, given_task_names::jsonb, 0,
           %(now)s, flow_id, %(now)s
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(task_names)s) as task_names,
                   unnest(%(given_task_names)s) as given_task_names,
                   unnest(%(flow_ids)s) as flow_id) as e
        on conflict (organization_id, flow_execution_id) do update
       set task_names = excluded.task_names, given_task_names = excluded.given_task_names
"""
"""Stores new executions, and new task names of known ones, by primary key."""

SAVE_REVISIONS: Final = """
    update flow_executions
       set revision = (%(revisions)s ->> flow_execution_id::text)::bigint, changed_at = %(now)s
     where organization_id = %(organization_id)s
       and flow_execution_id = any(%(flow_execution_ids)s)
"""
"""Stores the new revisions of executions, by primary key."""

SAVE_REMOVED: Final = """
    update task_tags
       set status = 'deleted', updated_at = %(now)s, modified_by = %(modified_by)s ->> id::text
     where organization_id = %(organization_id)s
       and id = any(%(ids)s)
"""
"""Marks tags as deleted, by primary key."""

SAVE_ADDED: Final = """
    insert into task_tags (organization_id, id, flow_execution_id, task_name, tag_type, tag,
                           tag_metadata, metadata_digest, status, created_at, created_by,
                           updated_at, modified_by)
    select %(organization_id)s, id, flow_execution_id, task_name, tag_type, tag,
           tag_metadata::json, metadata_digest,
           case when modified_by is null then 'active' else 'deleted' end, %(now)s, created_by,
           case when modified_by is null then null else %(now)s end, modified_by
      from (select unnest(%(ids)s) as id, unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(task_names)s) as task_name, unnest(%(tag_types)s) as tag_type,
                   unnest(%(tags)s) as tag, unnest(%(tag_metadata)s) as tag_metadata,
                   unnest(%(metadata_digests)s) as metadata_digest,
                   unnest(%(created_by)s) as created_by,
                   unnest(%(modified_by)s) as modified_by) as t
"""
"""Stores new tags, which task_tags_active keeps unique while they are active.

One with `modified_by` was removed by the transaction that added it.
"""

SAVE_TASKS: Final = """
    insert into task_executions (organization_id, flow_execution_id, task_name, state,
                                 state_changed_at, state_changed_by)
    select %(organization_id)s, flow_execution_id, task_name, state, %(now)s, state_changed_by
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(task_names)s) as task_name, unnest(%(states)s) as state,
                   unnest(%(state_changed_by)s) as state_changed_by) as t
        on conflict (organization_id, flow_execution_id, task_name) do update
       set state = excluded.state, state_changed_at = excluded.state_changed_at,
           state_changed_by = excluded.state_changed_by
"""
"""Stores the states of tasks, by primary key."""

SAVE_CHANGES: Final = """
      with head as (
           update organizations set position = %(position)s, changed_at = %(now)s
            where organization_id = %(organization_id)s)
    insert into tag_changes (organization_id, flow_execution_id, revision, batch_id, event,
                             changed_at, position)
    select %(organization_id)s, flow_execution_id, revision, batch_id, event::json, %(now)s,
           position
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(revisions)s) as revision, unnest(%(positions)s) as position,
                   unnest(%(batch_ids)s) as batch_id, unnest(%(events)s) as event) as c
"""
"""Stores change events, and the place of the last one in the organization's row, by primary key."""

PURGE_RESULTS: Final = """
    delete from tag_batches
     where organization_id = %(organization_id)s
       and batch_id = any(array(
           select batch_id from tag_batches
            where organization_id = %(organization_id)s
              and applied_at > '-infinity'
              and applied_at < (select clock_timestamp() - %(age)s::interval)
            order by applied_at limit 1000))
"""
"""Deletes the oldest results beyond an age, up to 1,000, by tag_batches_age and primary key."""

PURGE_CHANGES: Final = """
    delete from tag_changes
     where organization_id = %(organization_id)s and position > 0
       and position = any(array(
           select position
             from (select position,
                          bool_and(changed_at < (select clock_timestamp() - %(age)s::interval))
                          over (order by position) as is_old
                     from (select position, changed_at from tag_changes
                            where organization_id = %(organization_id)s and position > 0
                            order by position limit 1000) as first) as c
            where is_old and position < (
                  select position from organizations
                   where organization_id = %(organization_id)s)))
"""
"""Deletes the first change events up to one that is young enough, at most 1,000 of them.

By tag_changes_position. The organization's last event always stays.
"""

LIST_ORGANIZATIONS: Final = """
    select organization_id from organizations
     where organization_id > %(organization_id)s
     order by organization_id limit 1000
"""
"""Returns the organizations after an id, up to 1,000, by primary key: the worker may list them."""

FORGET_FAILURE: Final = """
    delete from tag_batches
     where organization_id = %(organization_id)s and batch_id = %(batch_id)s::uuid
       and result_record #>> '{error,code}' = 'internal_error'
    returning batch_id
"""
"""Deletes the stored `internal_error` of a batch and returns its id, by primary key."""
