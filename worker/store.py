"""Every SQL statement, and the transactions they run in (design, section 5). The tables: worker/migrations.

Statements take arrays, so their number does not grow with a batch or with a group of batches. Each
transaction names its organization, and row-level security lets it see and write nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg.types.array import ListBinaryDumper
from psycopg.types.json import Jsonb
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from producers.messages import FlowExecution, Tag, TagBatch, canonical_json
from worker.decide import Applied, Execution, Request, State, TagKey, Writes, tag_key

# --- Statements ----------------------------------------------------------------------------------

_SCOPE: Final = text("select set_config('app.organization_id', :organization_id, true)")

# The lock makes one drain at a time out of several. It is taken in a statement of its own, so that the
# next one sees what the drain before committed; the time is read after it, so that it never runs back.
_BEGIN: Final = text("""
    select clock_timestamp()
      from (select set_config('app.organization_id', :organization_id, true),
                   pg_advisory_xact_lock(hashtextextended(:organization_id, 0)) offset 0) as locked
""")

_LOAD_BATCHES: Final = text("""
    select b.batch_id, b.digest, b.result_record::text as record,
           array(select c.flow_execution_id::text
                   from jsonb_each_text(b.revisions) as r(flow_execution_id, revision)
                   join tag_changes c on c.organization_id = b.organization_id
                    and c.flow_execution_id = r.flow_execution_id::uuid and c.revision = r.revision::bigint
                  order by c.flow_execution_id) as executions,
           array(select c.event::text
                   from jsonb_each_text(b.revisions) as r(flow_execution_id, revision)
                   join tag_changes c on c.organization_id = b.organization_id
                    and c.flow_execution_id = r.flow_execution_id::uuid and c.revision = r.revision::bigint
                  order by c.flow_execution_id) as events
      from tag_batches b
     where b.organization_id = cast(:organization_id as uuid)
       and b.batch_id = any(cast(:batch_ids as uuid[]))
""")

_LOAD_EXECUTIONS: Final = text("""
    select flow_execution_id, task_names, revision
      from flow_executions
     where organization_id = cast(:organization_id as uuid)
       and flow_execution_id = any(cast(:flow_execution_ids as uuid[]))
""")

# `offset 0` keeps the planner from turning the look-ups by key into a scan of all tags, as it would while it
# has no statistics of a table that was just made.
_LOAD_TAGS: Final = text("""
    select t.*
      from unnest(cast(:flow_execution_ids as uuid[]), cast(:task_names as text[]),
                  cast(:tag_types as text[]), cast(:tags as text[]))
           as k (flow_execution_id, task_name, tag_type, tag)
     cross join lateral (
           select id, flow_execution_id, task_name, tag_type, tag, tag_metadata, metadata_digest,
                  organization_id, status, created_at, created_by, updated_at, modified_by
             from task_tags
            where organization_id = cast(:organization_id as uuid)
              and flow_execution_id = k.flow_execution_id and task_name = k.task_name
              and tag_type = k.tag_type and tag = k.tag and status = 'active'
           offset 0) t
     order by t.created_at, t.id
""")

_SAVE_BATCHES: Final = text("""
    insert into tag_batches (organization_id, batch_id, digest, result_record, revisions, applied_at)
    select cast(:organization_id as uuid), batch_id, digest, record::json, revisions::jsonb, :now
      from unnest(cast(:batch_ids as uuid[]), cast(:digests as bytea[]),
                  cast(:records as text[]), cast(:revisions as text[]))
           as b (batch_id, digest, record, revisions)
""")

_SAVE_REGISTRATIONS: Final = text("""
    insert into flow_executions (organization_id, flow_execution_id, task_names, revision, created_at)
    select cast(:organization_id as uuid), flow_execution_id, task_names::jsonb, 0, :now
      from unnest(cast(:flow_execution_ids as uuid[]), cast(:task_names as text[]))
           as e (flow_execution_id, task_names)
        on conflict (organization_id, flow_execution_id) do update set task_names = excluded.task_names
""")

# The values of an update are looked up in a JSON object by key: a join could scan the table, as above.
_SAVE_REVISIONS: Final = text("""
    update flow_executions
       set revision = (:revisions ->> flow_execution_id::text)::bigint
     where organization_id = cast(:organization_id as uuid)
       and flow_execution_id = any(cast(:flow_execution_ids as uuid[]))
""")

_SAVE_REMOVED: Final = text("""
    update task_tags
       set status = 'deleted', updated_at = :now, modified_by = :modified_by ->> id::text
     where organization_id = cast(:organization_id as uuid)
       and id = any(cast(:ids as uuid[]))
""")

_SAVE_ADDED: Final = text("""
    insert into task_tags (organization_id, id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
                           metadata_digest, status, created_at, created_by, updated_at, modified_by)
    select cast(:organization_id as uuid), id, flow_execution_id, task_name, tag_type, tag,
           tag_metadata::json, metadata_digest, status, :now, created_by, updated_at, modified_by
      from unnest(cast(:ids as uuid[]), cast(:flow_execution_ids as uuid[]), cast(:task_names as text[]),
                  cast(:tag_types as text[]), cast(:tags as text[]), cast(:tag_metadata as text[]),
                  cast(:metadata_digests as bytea[]), cast(:statuses as text[]),
                  cast(:created_by as text[]), cast(:updated_at as timestamptz[]),
                  cast(:modified_by as text[]))
           as t (id, flow_execution_id, task_name, tag_type, tag, tag_metadata, metadata_digest, status,
                 created_by, updated_at, modified_by)
""")

_SAVE_CHANGES: Final = text("""
    insert into tag_changes (organization_id, flow_execution_id, revision, batch_id, event)
    select cast(:organization_id as uuid), flow_execution_id, revision, batch_id, event::json
      from unnest(cast(:flow_execution_ids as uuid[]), cast(:revisions as bigint[]),
                  cast(:batch_ids as uuid[]), cast(:events as text[]))
           as c (flow_execution_id, revision, batch_id, event)
""")

_PURGE: Final = text("""
    delete from tag_batches where organization_id = cast(:organization_id as uuid) and batch_id in (
        select batch_id from tag_batches
         where organization_id = cast(:organization_id as uuid)
           and applied_at < clock_timestamp() - cast(:age as interval)
         order by applied_at limit 10000)
""")

_FORGET_FAILURE: Final = text("""
    delete from tag_batches
     where organization_id = cast(:organization_id as uuid) and batch_id = cast(:batch_id as uuid)
       and result_record #>> '{error,code}' = 'internal_error'
""")

# One statement, so that the tags are those of the revision. A reader who knows that revision gets null.
_READ_TAGS: Final = text("""
    select e.revision, case when e.revision = any(cast(:known as bigint[])) then null else (
           select coalesce(json_agg(json_build_object(
                      'id', id, 'flow_execution_id', flow_execution_id, 'task_name', task_name,
                      'tag_type', tag_type, 'tag', tag, 'tag_metadata', tag_metadata,
                      'organization_id', organization_id, 'status', status,
                      'created_at',
                      to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                      'created_by', created_by, 'updated_at', null, 'modified_by', null)
                      order by created_at, id), '[]')::text
             from task_tags t
            where t.organization_id = e.organization_id
              and t.flow_execution_id = e.flow_execution_id
              and (cast(:task_name as text) is null or t.task_name = :task_name)
              and t.status = 'active') end as tags
      from flow_executions e
     where e.organization_id = cast(:organization_id as uuid)
       and e.flow_execution_id = cast(:flow_execution_id as uuid)
""")

_READ_RECORD: Final = text("""
    select result_record::text from tag_batches
     where organization_id = cast(:organization_id as uuid) and batch_id = cast(:batch_id as uuid)
""")

_OWN_ROLE: Final = text("""
    select rolsuper or rolbypassrls or exists (
               select from pg_class c
                where c.relname in ('flow_executions', 'task_tags', 'tag_batches', 'tag_changes')
                  and pg_has_role(current_user, c.relowner, 'usage'))
      from pg_roles where rolname = current_user
""")

# --- Errors --------------------------------------------------------------------------------------


class UnsafeRole(Exception):
    """The database role sees through row-level security: connect as the role that `migrate` made."""


_TRANSIENT_CLASSES: Final = ("08", "40", "53", "57", "58")
_TRANSIENT_STATES: Final = (
    "25006",  # a standby, after a failover
    "25P03",  # the session was idle too long: this process stood still in a transaction
    "25P04",  # so did the transaction
    "55P03",  # a lock was held too long
)

# A server that says nothing is noticed: in 5 s while connecting, in about 20 s on a connection.
_CONNECT_ARGUMENTS: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed later: lost connections, deadlocks, resources, shutdowns.

    Source: PostgreSQL's table of error codes, classes 08, 40, 53, 57 and 58.
    """
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, psycopg.Error) and (state := error.orig.sqlstate):
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_STATES
    return isinstance(error.orig, (psycopg.OperationalError, psycopg.InterfaceError))


# --- The worker's side ---------------------------------------------------------------------------


class Store:
    """The worker's way to the database: one connection, opened at the first transaction."""

    def __init__(self, database_url: str) -> None:
        self._engine: Engine = create_engine(
            driver_url(database_url),
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            connect_args=_CONNECT_ARGUMENTS,
        )
        event.listen(self._engine, "connect", _send_arrays_in_binary)

    def check(self) -> None:
        """Connect, and raise `UnsafeRole` if the role sees through row-level security."""
        with self._engine.connect() as connection:
            refuse_unsafe(connection.execute(_OWN_ROLE).scalar())

    @contextmanager
    def transaction(self, organization_id: UUID) -> Iterator[Transaction]:
        """Run one transaction in which the organization's tags are this process's alone to change."""
        scope = {"organization_id": str(organization_id)}
        with self._engine.begin() as connection:
            now = connection.execute(_BEGIN, scope).scalar_one()
            yield Transaction(connection, organization_id, now)

    def purge(self, organization_id: UUID, age: timedelta) -> int:
        """Forget stored results that are older than `age`; return how many. Deletes 10,000 at a time."""
        scope = {"organization_id": str(organization_id)}
        purged = 0
        while True:
            with self._engine.begin() as connection:
                connection.execute(_SCOPE, scope)
                count = connection.execute(_PURGE, {**scope, "age": age}).rowcount
            purged += count
            if count < 10_000:
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


def _send_arrays_in_binary(connection: psycopg.Connection, _: Any) -> None:
    """As text, every quote and backslash of every value would be escaped: ten times the work for events."""
    connection.adapters.register_dumper(list, ListBinaryDumper)


def driver_url(database_url: str) -> Any:
    """Return the URL with psycopg 3 as its driver, whichever way `postgresql://` was spelled."""
    return make_url(database_url).set(drivername="postgresql+psycopg")


def refuse_unsafe(sees_through: Any) -> None:
    if sees_through:
        raise UnsafeRole(
            "this database role owns the tables, is a superuser or bypasses row-level security: "
            "connect as task_tags_worker or task_tags_endpoint (task-tags-admin migrate makes them)"
        )


@dataclass(slots=True)
class Transaction:
    """What a drain does between taking the lock and the commit."""

    connection: Connection
    organization_id: UUID
    now: datetime
    """The database's time: one clock for all workers, read while the lock is held."""

    def load(self, requests: Sequence[Request]) -> State:
        """Return the state of all that the requests name."""
        batches = [request.message for request in requests if isinstance(request.message, TagBatch)]
        keys = list({tag_key(operation): None for batch in batches for operation in batch.tags})
        executions = {key.flow_execution_id for key in keys}
        executions.update(
            request.message.flow_execution_id
            for request in requests
            if isinstance(request.message, FlowExecution)
        )
        return State(
            batches=self.batches([request.message.batch_id for request in requests]),
            executions=self._load_executions(executions),
            tags=self._load_tags(keys) if keys else {},
        )

    def save(self, writes: Writes) -> None:
        """Store what was decided. Every statement that has nothing to do is left out."""
        self._save(_SAVE_REGISTRATIONS, _registration_columns(writes))
        self._save(_SAVE_REVISIONS, _revision_columns(writes))
        self._save(_SAVE_REMOVED, _removed_columns(writes))
        self._save(_SAVE_ADDED, _added_columns(writes))
        self._save(_SAVE_CHANGES, _change_columns(writes))
        self._save(_SAVE_BATCHES, _batch_columns(writes))

    def batches(self, batch_ids: Sequence[UUID]) -> dict[UUID, Applied]:
        """Return what is stored of these batches, with the change events that they made."""
        rows = self._execute(_LOAD_BATCHES, batch_ids=list(batch_ids))
        return {
            row.batch_id: Applied(
                row.digest,
                row.record.encode(),
                tuple(
                    (UUID(id), event.encode())
                    for id, event in zip(row.executions, row.events, strict=True)
                ),
            )
            for row in rows
        }

    def forget_failure(self, batch_id: UUID) -> bool:
        return bool(self._execute(_FORGET_FAILURE, batch_id=batch_id).rowcount)

    def _load_executions(self, flow_execution_ids: Iterable[UUID]) -> dict[UUID, Execution]:
        rows = self._execute(_LOAD_EXECUTIONS, flow_execution_ids=list(flow_execution_ids))
        return {
            row.flow_execution_id: Execution(
                None if row.task_names is None else frozenset(row.task_names), row.revision
            )
            for row in rows
        }

    def _load_tags(self, keys: Sequence[TagKey]) -> dict[TagKey, dict[bytes, Tag]]:
        columns = [list(column) for column in zip(*keys, strict=True)]
        names = ("flow_execution_ids", "task_names", "tag_types", "tags")
        tags: dict[TagKey, dict[bytes, Tag]] = {}
        for row in self._execute(_LOAD_TAGS, **dict(zip(names, columns, strict=True))).mappings():
            fields = dict(row)
            digest = fields.pop("metadata_digest")
            tag = Tag.model_construct(**fields)
            key = TagKey(tag.flow_execution_id, tag.task_name, tag.tag_type, tag.tag)
            tags.setdefault(key, {})[digest] = tag
        return tags

    def _save(self, statement: TextClause, columns: dict[str, Any]) -> None:
        if next(iter(columns.values())):
            self._execute(statement, **columns)

    def _execute(self, statement: TextClause, **parameters: Any) -> Any:
        return self.connection.execute(
            statement,
            {"organization_id": str(self.organization_id), "now": self.now, **parameters},
        )


def _registration_columns(writes: Writes) -> dict[str, Any]:
    return {
        "flow_execution_ids": list(writes.registrations),
        "task_names": [
            None if execution.task_names is None else json.dumps(sorted(execution.task_names))
            for execution in writes.registrations.values()
        ],
    }


def _revision_columns(writes: Writes) -> dict[str, Any]:
    return {
        "flow_execution_ids": list(writes.revisions),
        "revisions": Jsonb({str(id): revision for id, revision in writes.revisions.items()}),
    }


def _removed_columns(writes: Writes) -> dict[str, Any]:
    return {
        "ids": list(writes.removed),
        "modified_by": Jsonb({str(id): tag.modified_by for id, tag in writes.removed.items()}),
    }


def _added_columns(writes: Writes) -> dict[str, Any]:
    tags = [tag for tag, _ in writes.added.values()]
    return {
        "ids": list(writes.added),
        "flow_execution_ids": [tag.flow_execution_id for tag in tags],
        "task_names": [tag.task_name for tag in tags],
        "tag_types": [tag.tag_type for tag in tags],
        "tags": [tag.tag for tag in tags],
        "tag_metadata": [
            None if tag.tag_metadata is None else canonical_json(tag.tag_metadata) for tag in tags
        ],
        "metadata_digests": [digest for _, digest in writes.added.values()],
        "statuses": [tag.status for tag in tags],
        "created_by": [tag.created_by for tag in tags],
        "updated_at": [tag.updated_at for tag in tags],
        "modified_by": [tag.modified_by for tag in tags],
    }


def _change_columns(writes: Writes) -> dict[str, Any]:
    return {
        "flow_execution_ids": [change.flow_execution_id for change in writes.changes],
        "revisions": [change.revision for change in writes.changes],
        "batch_ids": [change.batch_id for change in writes.changes],
        "events": [change.event.decode() for change in writes.changes],
    }


def _batch_columns(writes: Writes) -> dict[str, Any]:
    return {
        "batch_ids": [batch.batch_id for batch in writes.batches],
        "digests": [batch.digest for batch in writes.batches],
        "records": [batch.record.decode() for batch in writes.batches],
        "revisions": [
            json.dumps({str(id): revision for id, revision in batch.revisions.items()})
            for batch in writes.batches
        ],
    }


# --- The endpoint's side -------------------------------------------------------------------------


READ_SECONDS: Final = 10.0
"""A read that takes longer ends with `TimeoutError`."""


class Reader:
    """The endpoint's way to the database: a pool of connections that can only read."""

    def __init__(self, database_url: str, pool_size: int) -> None:
        self._engine: AsyncEngine = create_async_engine(
            driver_url(database_url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=5,
            hide_parameters=True,
            connect_args=_CONNECT_ARGUMENTS,
        )
        self._safe = False

    async def check(self) -> None:
        """Connect, and raise `UnsafeRole` if the role sees through row-level security."""
        async with self._engine.connect() as connection:
            refuse_unsafe((await connection.execute(_OWN_ROLE)).scalar())
        self._safe = True

    async def tags(
        self,
        organization_id: UUID,
        flow_execution_id: UUID,
        task_name: str | None,
        known: Sequence[int] = (),
    ) -> tuple[int, str | None] | None:
        """Return the revision and the active tags as JSON text; None if there is no such execution.

        The tags are None if the revision is one of those that are `known`.
        """
        async with self._transaction(organization_id) as connection:
            found = await connection.execute(
                _READ_TAGS,
                {
                    "organization_id": str(organization_id),
                    "flow_execution_id": flow_execution_id,
                    "task_name": task_name,
                    "known": list(known),
                },
            )
            row = found.one_or_none()
            return None if row is None else (row.revision, row.tags)

    async def record(self, organization_id: UUID, batch_id: UUID) -> str | None:
        """Return the stored result record as JSON text; None while it is unknown."""
        async with self._transaction(organization_id) as connection:
            found = await connection.execute(
                _READ_RECORD, {"organization_id": str(organization_id), "batch_id": batch_id}
            )
            record: str | None = found.scalar_one_or_none()
            return record

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _transaction(self, organization_id: UUID) -> AsyncIterator[AsyncConnection]:
        async with asyncio.timeout(READ_SECONDS):
            if not self._safe:
                await self.check()
            async with self._engine.begin() as connection:
                await connection.execute(_SCOPE, {"organization_id": str(organization_id)})
                yield connection
