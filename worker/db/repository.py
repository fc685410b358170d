"""The worker's SQL, and the transactions it runs in (design, section 5). What the endpoint reads: worker/api/queries.py.

Statements take arrays, so their number does not grow with a batch or with a group of batches. Each
transaction names its organization, and row-level security lets it see and write nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString, cast
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError

from producers.contract.messages import SetTaskState, TagBatch
from producers.contract.results import Tag, Task
from worker.db import pg_arrays
from worker.rules import (
    AuthorizedMessage,
    ChangeSet,
    Execution,
    NewBatch,
    NewChange,
    NewTag,
    Snapshot,
    StoredResult,
    TagKey,
    TaskKey,
    tag_key,
)

# --- Statements ----------------------------------------------------------------------------------

_SCOPE: Final = "select set_config('app.organization_id', %(organization_id)s::text, true)"

# The lock makes one drain at a time out of several. It is taken in a statement of its own, so that the
# next one sees what the drain before committed; the time is read after it, so that it never runs back.
_BEGIN: Final = """
    select clock_timestamp()
      from (select set_config('app.organization_id', %(organization_id)s::text, true),
                   pg_advisory_xact_lock(hashtextextended(%(organization_id)s::text, 0)) offset 0) as locked
"""

# Arrays that stand side by side in a select list become rows one by one; in `from unnest(a, b)` all would be copied first.
#
# `offset 0`, here and below, keeps the planner from turning look-ups by key into scans of a whole table, as it would
# while it has no statistics of one that was just made: and a prepared plan stays as it is while the table grows.
_LOAD_BATCHES: Final = """
    select b.batch_id, b.digest, b.result_record::text, made.executions, made.events
      from tag_batches b
     cross join lateral (
           select coalesce(array_agg(flow_execution_id), '{}') as executions, coalesce(array_agg(event), '{}') as events
             from jsonb_each_text(b.revisions) as r (id, number)
            cross join lateral (
                  select flow_execution_id, event::text
                    from tag_changes
                   where organization_id = %(organization_id)s
                     and flow_execution_id = r.id::uuid and revision = r.number::bigint
                  offset 0) c) as made
     where b.organization_id = %(organization_id)s
       and b.batch_id = any(%(batch_ids)s)
"""

_LOAD_EXECUTIONS: Final = """
    select flow_execution_id, task_names, revision
      from flow_executions
     where organization_id = %(organization_id)s
       and flow_execution_id = any(%(flow_execution_ids)s)
"""

_LOAD_TAGS: Final = """
    select t.metadata_digest, t.id, t.flow_execution_id, t.task_name, t.tag_type, t.tag, t.tag_metadata,
           %(organization_id)s, t.status, t.created_at, t.created_by, t.updated_at, t.modified_by
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id, unnest(%(task_names)s) as task_name,
                   unnest(%(tag_types)s) as tag_type, unnest(%(tags)s) as tag) as k
     cross join lateral (
           select metadata_digest, id, flow_execution_id, task_name, tag_type, tag, tag_metadata, status,
                  created_at, created_by, updated_at, modified_by
             from task_tags
            where organization_id = %(organization_id)s
              and flow_execution_id = k.flow_execution_id and task_name = k.task_name
              and tag_type = k.tag_type and tag = k.tag and status = 'active'
           offset 0) t
     order by t.created_at, t.id
"""

_LOAD_TASKS: Final = """
    select t.*
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id, unnest(%(task_names)s) as task_name) as k
     cross join lateral (
           select flow_execution_id, task_name, state, state_changed_at, state_changed_by
             from task_executions
            where organization_id = %(organization_id)s
              and flow_execution_id = k.flow_execution_id and task_name = k.task_name
           offset 0) t
"""

_SAVE_BATCHES: Final = """
    insert into tag_batches (organization_id, batch_id, digest, result_record, revisions, applied_at)
    select %(organization_id)s, batch_id, digest, record::json, revisions::jsonb, %(now)s
      from (select unnest(%(batch_ids)s) as batch_id, unnest(%(digests)s) as digest,
                   unnest(%(records)s) as record, unnest(%(revisions)s) as revisions) as b
"""

_SAVE_REGISTRATIONS: Final = """
    insert into flow_executions (organization_id, flow_execution_id, task_names, revision, created_at)
    select %(organization_id)s, flow_execution_id, task_names::jsonb, 0, %(now)s
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id, unnest(%(task_names)s) as task_names) as e
        on conflict (organization_id, flow_execution_id) do update set task_names = excluded.task_names
"""

# The values of an update are looked up in a JSON object by key: a join could scan the table, as above.
_SAVE_REVISIONS: Final = """
    update flow_executions
       set revision = (%(revisions)s ->> flow_execution_id::text)::bigint
     where organization_id = %(organization_id)s
       and flow_execution_id = any(%(flow_execution_ids)s)
"""

_SAVE_REMOVED: Final = """
    update task_tags
       set status = 'deleted', updated_at = %(now)s, modified_by = %(modified_by)s ->> id::text
     where organization_id = %(organization_id)s
       and id = any(%(ids)s)
"""

_SAVE_ADDED: Final = """
    insert into task_tags (organization_id, id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
                           metadata_digest, status, created_at, created_by)
    select %(organization_id)s, id, flow_execution_id, task_name, tag_type, tag, tag_metadata::json,
           metadata_digest, 'active', %(now)s, created_by
      from (select unnest(%(ids)s) as id, unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(task_names)s) as task_name, unnest(%(tag_types)s) as tag_type, unnest(%(tags)s) as tag,
                   unnest(%(tag_metadata)s) as tag_metadata, unnest(%(metadata_digests)s) as metadata_digest,
                   unnest(%(created_by)s) as created_by) as t
"""

# Tags that were removed in the very transaction that added them: rows all the same (rule 4).
_SAVE_ADDED_AND_REMOVED: Final = """
    insert into task_tags (organization_id, id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
                           metadata_digest, status, created_at, created_by, updated_at, modified_by)
    select %(organization_id)s, id, flow_execution_id, task_name, tag_type, tag, tag_metadata::json,
           metadata_digest, 'deleted', %(now)s, created_by, %(now)s, modified_by
      from (select unnest(%(ids)s) as id, unnest(%(flow_execution_ids)s) as flow_execution_id,
                   unnest(%(task_names)s) as task_name, unnest(%(tag_types)s) as tag_type, unnest(%(tags)s) as tag,
                   unnest(%(tag_metadata)s) as tag_metadata, unnest(%(metadata_digests)s) as metadata_digest,
                   unnest(%(created_by)s) as created_by, unnest(%(modified_by)s) as modified_by) as t
"""

_SAVE_TASKS: Final = """
    insert into task_executions (organization_id, flow_execution_id, task_name, state, state_changed_at,
                                 state_changed_by)
    select %(organization_id)s, flow_execution_id, task_name, state, %(now)s, state_changed_by
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id, unnest(%(task_names)s) as task_name,
                   unnest(%(states)s) as state, unnest(%(state_changed_by)s) as state_changed_by) as t
        on conflict (organization_id, flow_execution_id, task_name) do update
       set state = excluded.state, state_changed_at = excluded.state_changed_at,
           state_changed_by = excluded.state_changed_by
"""

_SAVE_CHANGES: Final = """
    insert into tag_changes (organization_id, flow_execution_id, revision, batch_id, event, changed_at)
    select %(organization_id)s, flow_execution_id, revision, batch_id, event::json, %(now)s
      from (select unnest(%(flow_execution_ids)s) as flow_execution_id, unnest(%(revisions)s) as revision,
                   unnest(%(batch_ids)s) as batch_id, unnest(%(events)s) as event) as c
"""

_PURGE_RESULTS: Final = """
    delete from tag_batches where organization_id = %(organization_id)s and batch_id in (
        select batch_id from tag_batches
         where organization_id = %(organization_id)s
           and applied_at < clock_timestamp() - %(age)s::interval
         order by applied_at limit 10000)
"""

# The time never runs back within an execution, so what stays is what came last, without gaps.
_PURGE_CHANGES: Final = """
    delete from tag_changes where organization_id = %(organization_id)s
       and (flow_execution_id, revision) in (
        select flow_execution_id, revision from tag_changes
         where organization_id = %(organization_id)s
           and changed_at < clock_timestamp() - %(age)s::interval
         order by changed_at, flow_execution_id, revision limit 10000)
"""

_FORGET_FAILURE: Final = """
    delete from tag_batches
     where organization_id = %(organization_id)s and batch_id = %(batch_id)s::uuid
       and result_record #>> '{error,code}' = 'internal_error'
    returning batch_id
"""

ROLE_CHECK: Final = """
    select rolsuper or rolbypassrls or exists (
               select from pg_class c
                where c.relname in ('flow_executions', 'task_tags', 'tag_batches', 'tag_changes', 'task_executions')
                  and pg_has_role(current_user, c.relowner, 'usage'))
      from pg_roles where rolname = current_user
"""

# --- Errors --------------------------------------------------------------------------------------


class UnsafeRole(Exception):
    """The database role sees through row-level security: connect as the role that `migrate` made."""


_TRANSIENT_CLASSES: Final = ("08", "0A", "40", "53", "57", "58")
_TRANSIENT_STATES: Final = (
    "42P01",  # a migration is missing: there is no such table
    "42703",  # no such column
    "42883",  # no such function
    "42501",  # no such right
    "25006",  # a standby, after a failover
    "25P03",  # the session was idle too long: this process stood still in a transaction
    "25P04",  # so did the transaction
    "55P03",  # a lock was held too long
)

DISCARD_PLANS: Final = "discard plans"


def should_discard_plans(uses: int) -> bool:
    """Whether plans should be made anew at this use of a connection, of so many: the 2nd, 4th, 8th, 16th and so on.

    A prepared plan is kept until the table is analyzed, a minute later or so. One that was made while an organization had
    a few hundred rows may read all of them for each look-up, whose cost then grows with what the organization stores.
    """
    return uses > 1 and uses & (uses - 1) == 0


# A server that says nothing is noticed: in 5 s while connecting, in about 20 s on a connection.
CONNECT_ARGUMENTS: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed later: lost connections, deadlocks, resources, shutdowns.

    So may one that finds a table or a right missing, or its plan out of date, once the database is migrated: statements
    are the same for all batches. Source: PostgreSQL's table of error codes.
    """
    if isinstance(error, psycopg.Error) and (state := error.sqlstate):
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_STATES
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))


# --- The worker's side ---------------------------------------------------------------------------


class Repository:
    """The worker's way to the database: one connection, opened at the first transaction."""

    def __init__(self, database_url: str) -> None:
        self._engine: Engine = create_engine(
            driver_url(database_url),
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            connect_args=CONNECT_ARGUMENTS,
        )
        event.listen(self._engine, "connect", self._prepare)
        self._uses = 0

    def check(self) -> None:
        """Connect, and raise `UnsafeRole` if the role sees through row-level security."""
        with self._connection() as connection:
            found = connection.execute(ROLE_CHECK).fetchall()
        assert_safe_role(found)

    @contextmanager
    def transaction(self, organization_id: UUID) -> Iterator[Transaction]:
        """Run one transaction in which the organization's tags are this process's alone to change.

        Its statements are sent in two pieces: the lock with all that is looked up, and all that is written with the commit.
        """
        with self._connection() as connection, connection.pipeline():
            self._uses += 1
            if should_discard_plans(self._uses):
                connection.execute(DISCARD_PLANS)
            yield Transaction(connection, organization_id)
            connection.execute("commit")  # not commit(): see _connection

    def purge_results(self, organization_id: UUID, age: timedelta) -> int:
        """Forget stored results that are older than `age`; return how many."""
        return self._purge(_PURGE_RESULTS, organization_id, age)

    def purge_changes(self, organization_id: UUID, age: timedelta) -> int:
        """Forget stored change events that are older than `age`; return how many."""
        return self._purge(_PURGE_CHANGES, organization_id, age)

    def _purge(self, statement: LiteralString, organization_id: UUID, age: timedelta) -> int:
        """Delete 10,000 rows at a time, so that nobody waits for long."""
        parameters = {"organization_id": organization_id, "age": age}
        purged = 0
        while True:
            with self._connection() as connection, connection.pipeline():
                connection.execute(_SCOPE, {"organization_id": organization_id})
                found = connection.execute(statement, parameters)
                connection.execute("commit")
            purged += found.rowcount
            if found.rowcount < 10_000:
                return purged

    def forget_failure(self, organization_id: UUID, batch_id: UUID) -> bool:
        """Forget that a batch ended in `internal_error`, so that it can be tried again under its id.

        Nothing else is ever forgotten here: what took effect must not take effect again. False: there was
        no such failure.
        """
        with self.transaction(organization_id) as transaction:
            return transaction.forget_failure(batch_id)

    def close(self) -> None:
        self._engine.dispose()

    def _prepare(self, connection: psycopg.Connection, _: Any) -> None:
        pg_arrays.register(connection)
        connection.prepare_threshold = 0
        self._uses = 0

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection]:
        """Lend the connection as psycopg's own: SQLAlchemy knows no pipelines. One that broke is made anew.

        SQLAlchemy's first questions to a server may fail, and it has errors of its own for that: they are no batch's fault,
        and may pass like psycopg's.

        In a pipeline, `commit` waits for the answer while part of what was sent may still be in libpq's buffer, and then
        for ever, if that is more than the socket takes at once. The end of the pipeline sends it all before it waits.
        """
        try:
            lent = self._engine.raw_connection()
        except DBAPIError as error:
            raise psycopg.OperationalError(f"there is no connection: {error}") from error
        connection = cast(psycopg.Connection, lent.driver_connection)
        try:
            yield connection
        except BaseException:
            if connection.closed:
                lent.invalidate()
            raise
        finally:
            lent.close()


def driver_url(database_url: str) -> Any:
    """Return the URL with psycopg 3 as its driver, whichever way `postgresql://` was spelled."""
    return make_url(database_url).set(drivername="postgresql+psycopg")


def assert_safe_role(found: Sequence[Any]) -> None:
    """Raise `UnsafeRole` if what `ROLE_CHECK` found is a role that sees through row-level security."""
    if found != [(False,)]:
        raise UnsafeRole(
            "this database role owns the tables, is a superuser or bypasses row-level security: "
            "connect as task_tags_worker or task_tags_endpoint (task-tags-admin migrate makes them)"
        )


class Transaction:
    """What a drain does between taking the lock and the commit."""

    def __init__(self, connection: psycopg.Connection, organization_id: UUID) -> None:
        self._connection = connection
        self._organization_id = organization_id
        self._begun = self._send(_BEGIN)
        self._now: datetime | None = None

    @property
    def now(self) -> datetime:
        """The database's time: one clock for all workers, read while the lock is held."""
        if self._now is None:
            ((self._now,),) = self._begun.fetchall()
        return cast(datetime, self._now)

    def load(self, requests: Sequence[AuthorizedMessage]) -> Snapshot:
        """Return the state of all that the requests name."""
        messages = [request.message for request in requests]
        keys = list(
            {
                tag_key(operation): None
                for message in messages
                if isinstance(message, TagBatch)
                for operation in message.tags
            }
        )
        tasks = {
            (message.flow_execution_id, message.task_name): None
            for message in messages
            if isinstance(message, SetTaskState)
        }
        executions = {flow_execution_id for flow_execution_id, _, _, _ in keys}
        executions.update(
            message.flow_execution_id.int
            for message in messages
            if not isinstance(message, TagBatch)
        )
        found_batches = self._find_batches([message.batch_id for message in messages])
        found_executions = self._send(
            _LOAD_EXECUTIONS, flow_execution_ids=pg_arrays.uuids(list(executions))
        )
        found_tags: Iterable[Any] = []
        if keys:
            found_tags = self._send(_LOAD_TAGS, **_key_columns(keys))
        found_tasks: Iterable[Any] = []
        if tasks:
            found_tasks = self._send(_LOAD_TASKS, **_task_columns(list(tasks)))
        return Snapshot(
            batches=dict(map(_batch, found_batches)),
            executions=dict(map(_execution, found_executions)),
            tags=_tags(found_tags),
            tasks={row[:2]: Task(*row) for row in found_tasks},
        )

    def save(self, writes: ChangeSet) -> None:
        """Store what was decided. Every statement that has nothing to do is left out."""
        added = [each for each in writes.added.values() if each.tag.status == "active"]
        removed_again = [each for each in writes.added.values() if each.tag.status != "active"]
        if writes.registrations:
            self._send(_SAVE_REGISTRATIONS, **_registration_columns(writes.registrations))
        if writes.revisions:
            self._send(_SAVE_REVISIONS, **_revision_columns(writes.revisions))
        if writes.removed:
            self._send(_SAVE_REMOVED, **_removed_columns(writes.removed))
        if added:
            self._send(_SAVE_ADDED, **_added_columns(added))
        if removed_again:
            modified_by = pg_arrays.texts([each.tag.modified_by for each in removed_again])
            columns = _added_columns(removed_again)
            self._send(_SAVE_ADDED_AND_REMOVED, modified_by=modified_by, **columns)
        if writes.tasks:
            self._send(_SAVE_TASKS, **_state_columns(writes.tasks))
        if writes.changes:
            self._send(_SAVE_CHANGES, **_change_columns(writes.changes))
        if writes.batches:
            self._send(_SAVE_BATCHES, **_batch_columns(writes.batches))

    def batches(self, batch_ids: Sequence[UUID]) -> dict[UUID, StoredResult]:
        """Return what is stored of these batches, with the change events that they made."""
        return dict(map(_batch, self._find_batches(batch_ids)))

    def forget_failure(self, batch_id: UUID) -> bool:
        return bool(self._send(_FORGET_FAILURE, batch_id=batch_id).fetchall())

    def _find_batches(self, batch_ids: Sequence[UUID]) -> Iterable[Any]:
        return self._send(_LOAD_BATCHES, batch_ids=pg_arrays.uuids([id.int for id in batch_ids]))

    def _send(self, statement: LiteralString, **parameters: Any) -> psycopg.Cursor[Any]:
        """Queue a statement; what it found is waited for when it is looked at."""
        values = {"organization_id": self._organization_id, **parameters}
        if "%(now)s" in statement:
            values["now"] = self.now
        return self._connection.cursor(binary=True).execute(statement, values)


def _batch(row: Any) -> tuple[UUID, StoredResult]:
    batch_id, digest, record, executions, events = row
    stored = tuple((id, event.encode()) for id, event in zip(executions, events, strict=True))
    return batch_id, StoredResult(digest, record.encode(), stored)


def _execution(row: Any) -> tuple[int, Execution]:
    flow_execution_id, task_names, revision = row
    names = None if task_names is None else frozenset(task_names)
    return flow_execution_id.int, Execution(flow_execution_id, names, revision)


def _tags(rows: Iterable[Any]) -> dict[TagKey, dict[bytes, Tag]]:
    tags: dict[TagKey, dict[bytes, Tag]] = {}
    for digest, *fields in rows:
        tag = Tag(*fields)
        tags.setdefault(tag_key(tag), {})[digest] = tag
    return tags


def _key_columns(keys: Sequence[TagKey]) -> dict[str, Any]:
    executions, task_names, tag_types, tags = zip(*keys, strict=True)
    return {
        "flow_execution_ids": pg_arrays.uuids(executions),
        "task_names": pg_arrays.texts(task_names),
        "tag_types": pg_arrays.texts(tag_types),
        "tags": pg_arrays.texts(tags),
    }


def _task_columns(tasks: Sequence[TaskKey]) -> dict[str, Any]:
    return {
        "flow_execution_ids": pg_arrays.uuids([id.int for id, _ in tasks]),
        "task_names": pg_arrays.texts([task_name for _, task_name in tasks]),
    }


def _state_columns(tasks: dict[TaskKey, Task]) -> dict[str, Any]:
    return {
        **_task_columns(list(tasks)),
        "states": pg_arrays.texts([task.state for task in tasks.values()]),
        "state_changed_by": pg_arrays.texts([task.state_changed_by for task in tasks.values()]),
    }


def _registration_columns(registrations: dict[UUID, Execution]) -> dict[str, Any]:
    return {
        "flow_execution_ids": pg_arrays.uuids([id.int for id in registrations]),
        "task_names": pg_arrays.texts(
            [
                None if execution.task_names is None else json.dumps(sorted(execution.task_names))
                for execution in registrations.values()
            ]
        ),
    }


def _revision_columns(revisions: dict[UUID, int]) -> dict[str, Any]:
    return {
        "flow_execution_ids": pg_arrays.uuids([id.int for id in revisions]),
        "revisions": Jsonb({str(id): revision for id, revision in revisions.items()}),
    }


def _removed_columns(removed: dict[int, Tag]) -> dict[str, Any]:
    return {
        "ids": pg_arrays.uuids(list(removed)),
        "modified_by": Jsonb({str(tag.id): tag.modified_by for tag in removed.values()}),
    }


def _added_columns(added: Sequence[NewTag]) -> dict[str, Any]:
    tags = [each.tag for each in added]
    return {
        "ids": pg_arrays.uuids([tag.id.int for tag in tags]),
        "flow_execution_ids": pg_arrays.uuids([tag.flow_execution_id.int for tag in tags]),
        "task_names": pg_arrays.texts([tag.task_name for tag in tags]),
        "tag_types": pg_arrays.texts([tag.tag_type for tag in tags]),
        "tags": pg_arrays.texts([tag.tag for tag in tags]),
        "tag_metadata": pg_arrays.encoded_texts([each.metadata for each in added]),
        "metadata_digests": pg_arrays.byteas([each.metadata_digest for each in added]),
        "created_by": pg_arrays.texts([tag.created_by for tag in tags]),
    }


def _change_columns(changes: Sequence[NewChange]) -> dict[str, Any]:
    return {
        "flow_execution_ids": pg_arrays.uuids([change.flow_execution_id.int for change in changes]),
        "revisions": pg_arrays.bigints([change.revision for change in changes]),
        "batch_ids": pg_arrays.uuids([change.batch_id.int for change in changes]),
        "events": pg_arrays.encoded_texts([change.event for change in changes]),
    }


def _batch_columns(batches: Sequence[NewBatch]) -> dict[str, Any]:
    return {
        "batch_ids": pg_arrays.uuids([batch.batch_id.int for batch in batches]),
        "digests": pg_arrays.byteas([batch.digest for batch in batches]),
        "records": pg_arrays.encoded_texts([batch.record for batch in batches]),
        "revisions": pg_arrays.texts(
            [
                json.dumps({str(id): revision for id, revision in batch.revisions.items()})
                for batch in batches
            ]
        ),
    }
