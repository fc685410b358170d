"""What the endpoint reads, and how: many requests share a connection, and none waits for another's answer to be sent.

A line is a connection in libpq's pipeline mode, driven by the event loop. psycopg's own asynchronous connection costs
three times as much for a read, in locks and waits that a single prepared statement does not need.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg import pq

from worker.db.pg_arrays import bigints, decode, texts, uuids
from worker.db.repository import (
    CONNECT_ARGUMENTS,
    DISCARD_PLANS,
    ROLE_CHECK,
    assert_safe_role,
    driver_url,
    should_discard_plans,
)

READ_SECONDS: Final = 10.0
"""A read that takes longer ends with `TimeoutError`."""

SCOPE: Final = "select set_config('app.organization_id', $1::text, true)"

# $1 organization, $2 flow execution, $3 task name or null, $4 revisions that the reader knows: one of them gets null.
# One statement, so that the tags are those of the revision.
READ_TAGS: Final = """
    select e.revision, case when e.revision = any($4) then null else (
           select coalesce(json_agg(row_to_json(t)), '[]')::text
             from (select id, flow_execution_id, task_name, tag_type, tag, tag_metadata, organization_id, status,
                          to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as created_at,
                          created_by, null as updated_at, null as modified_by
                     from task_tags
                    where organization_id = e.organization_id
                      and flow_execution_id = e.flow_execution_id
                      and ($3 is null or task_name = $3)
                      and status = 'active'
                    order by task_tags.created_at, id) t) end
      from flow_executions e
     where e.organization_id = $1 and e.flow_execution_id = $2
"""

# The same tags, of which some are wanted: $4 types, $5 tags, those after the one that was created at $6 with the id $7,
# at most $8 of them; and when the last one was created and its id, if there are more.
_READ_PAGE: Final = """
    with page as materialized (
           select row_number() over (order by t.created_at, t.id) as place, t.created_at || ' ' || t.id as last,
                  row_to_json(t) as tag
             from (select id, flow_execution_id, task_name, tag_type, tag, tag_metadata, organization_id, status,
                          to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as created_at,
                          created_by, null as updated_at, null as modified_by
                     from task_tags
                    where organization_id = $1 and flow_execution_id = $2
                      and ($3 is null or task_name = $3)
                      and ($4 is null or tag_type = any($4)) and ($5 is null or tag = any($5))
                      and ($6 is null or (task_tags.created_at, id) > ($6::timestamptz, $7::uuid))
                      and status = 'active'
                    order by task_tags.created_at, id
                    limit $8 + 1) t)
    select e.revision,
           (select coalesce(json_agg(tag order by place), '[]')::text from page where $8 is null or place <= $8),
           (select last from page where place = $8 and exists (select from page where place > $8))
      from flow_executions e
     where e.organization_id = $1 and e.flow_execution_id = $2
"""

# $1 organization, $2 flow execution, $3 task name: every task that is registered, has a tag or a state.
_READ_TASKS: Final = """
    select e.revision, coalesce(jsonb_array_length(e.task_names), 0)::bigint, (
           select coalesce(json_agg(row_to_json(t) order by t.task_name), '[]')::text
             from (select e.flow_execution_id, n.task_name, s.state,
                          to_char(s.state_changed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
                               as state_changed_at,
                          s.state_changed_by, coalesce(n.tags, '[]') as tags
                     from (select task_name collate "C" as task_name, json_agg(tag order by place) filter (where tag is not null) as tags
                             from (select jsonb_array_elements_text(e.task_names) as task_name, null::json as tag, 0 as place
                                   union all
                                   select task_name, null, 0 from task_executions
                                    where organization_id = $1 and flow_execution_id = $2
                                   union all
                                   select task_name, row_to_json(g), row_number() over (order by g.created_at, g.id)
                                     from (select id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
                                                  organization_id, status,
                                                  to_char(created_at at time zone 'UTC',
                                                          'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as created_at,
                                                  created_by, null as updated_at, null as modified_by
                                             from task_tags
                                            where organization_id = $1 and flow_execution_id = $2
                                              and ($3 is null or task_name = $3) and status = 'active') g) as named
                            where $3 is null or task_name = $3
                            group by 1) n
                     left join task_executions s on s.organization_id = $1 and s.flow_execution_id = $2
                                                and s.task_name = n.task_name) t)
      from flow_executions e
     where e.organization_id = $1 and e.flow_execution_id = $2
"""

# $1 organization, $2 flow execution, $3 revision, $4 most events, $5 most characters, which one event may exceed: the
# events after the revision, in order, and the revision of the first. One after the other, for they may be large.
_READ_CHANGES: Final = """
    with recursive found (revision, event, characters) as (
           select revision, text, length(text)
             from tag_changes cross join lateral (select event::text as text offset 0) t
            where organization_id = $1 and flow_execution_id = $2 and revision = $3 + 1
            union all
           select c.revision, t.text, found.characters + length(t.text)
             from found
            cross join lateral (
                  select revision, event from tag_changes
                   where organization_id = $1 and flow_execution_id = $2 and revision = found.revision + 1
                  offset 0) c
            cross join lateral (select c.event::text as text offset 0) t
            where found.characters < $5 and found.revision < $3 + $4)
    select e.revision, page.first, page.events
      from flow_executions e
     cross join lateral (
           select min(revision) as first, array_agg(event order by revision) as events
             from found
            where revision = $3 + 1 or characters <= $5) as page
     where e.organization_id = $1 and e.flow_execution_id = $2
"""

# $1 organization, $2 flow executions: those that there are, and their last revisions.
_READ_REVISIONS: Final = """
    select array_agg(flow_execution_id), array_agg(revision)
      from flow_executions
     where organization_id = $1 and flow_execution_id = any($2)
"""

_READ_RECORD: Final = """
    select result_record::text, digest from tag_batches where organization_id = $1 and batch_id = $2
"""

_OF_TASK: Final = "($3 is null or task_name = $3)"
"""A plan that is made once can't look up the task by the index as long as there may be none."""

_PREPARED: Final = {
    "scope (text)": SCOPE,
    "tags (uuid, uuid, text, bigint[])": READ_TAGS,
    "task (uuid, uuid, text, bigint[])": READ_TAGS.replace(_OF_TASK, "task_name = $3"),
    "page (uuid, uuid, text, text[], text[], text, text, bigint)": _READ_PAGE,
    "tasks (uuid, uuid, text)": _READ_TASKS,
    "changes (uuid, uuid, bigint, bigint, bigint)": _READ_CHANGES,
    "revisions (uuid, uuid[])": _READ_REVISIONS,
    "record (uuid, uuid)": _READ_RECORD,
}


class StoredChanges(NamedTuple):
    """Stored change events of an execution after some revision."""

    revision: int
    """The execution's last."""
    first: int | None
    """The revision of the first of the events; None if there are none."""
    events: list[bytes]
    """As they were published."""


class StoredResult(NamedTuple):
    """A batch that was applied."""

    record: bytes
    """Its result record, as it was published."""
    digest: bytes
    """The message's."""


class TagFilter(NamedTuple):
    """Which of an execution's tags are wanted: None, or none, is any."""

    task_name: str | None
    tag_types: Sequence[str]
    tags: Sequence[str]


class Page(NamedTuple):
    """Some of an execution's active tags."""

    revision: int
    tags: bytes
    """A JSON array."""
    after: str | None
    """When the last of them was created, and its id; None if there are no more."""


class Tasks(NamedTuple):
    """The tasks of an execution, with their states and tags."""

    revision: int
    registered: int
    """How many task names are registered."""
    tasks: bytes
    """A JSON array."""


Row = tuple[bytes | None, ...]
"""The columns of a row in PostgreSQL's binary format."""


class Reader:
    """The endpoint's way to the database. Its methods raise `psycopg.Error`, `UnsafeRole` and `TimeoutError`."""

    def __init__(self, database_url: str, connections: int) -> None:
        self._lines = [PipelinedConnection(database_url) for _ in range(connections)]

    async def check(self) -> None:
        """Ask for a sign of life, over a connection whose role is one that may be used."""
        nobody = UUID(int=0)
        await self.record(nobody, nobody)

    async def tags(
        self,
        organization_id: UUID,
        flow_execution_id: UUID,
        task_name: str | None,
        known: Sequence[int] = (),
    ) -> tuple[int, bytes | None] | None:
        """Return the revision and the active tags as JSON; None if there is no such execution.

        The tags are None if the revision is one of those that are `known`.
        """
        parameters = [flow_execution_id.bytes, _text(task_name), bigints(known)]
        statement = b"tags" if task_name is None else b"task"
        found = await self._ask(organization_id, statement, parameters)
        if found is None or found[0] is None:
            return None
        return _integer(found[0]), found[1]

    async def changes(
        self,
        organization_id: UUID,
        flow_execution_id: UUID,
        after: int,
        limit: int,
        max_bytes: int,
    ) -> StoredChanges | None:
        """Return change events as they are stored, in order; None if there is no such execution."""
        parameters = [flow_execution_id.bytes, *map(_bigint, (after, limit, max_bytes))]
        found = await self._ask(organization_id, b"changes", parameters)
        if found is None:
            return None
        revision, first, events = found
        if first is None:
            return StoredChanges(_integer(revision), None, [])
        return StoredChanges(_integer(revision), _integer(first), decode(events))

    async def page(
        self,
        organization_id: UUID,
        flow_execution_id: UUID,
        wanted: TagFilter,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> Page | None:
        """Return those of the active tags that are wanted, `limit` of them at most; None if there is no such execution.

        `after`: when the last one before them was created, and its id, both as text.
        """
        created_at, id = after or (None, None)
        parameters = [
            flow_execution_id.bytes,
            _text(wanted.task_name),
            texts(wanted.tag_types) if wanted.tag_types else None,
            texts(wanted.tags) if wanted.tags else None,
            _text(created_at),
            _text(id),
            None if limit is None else _bigint(limit),
        ]
        found = await self._ask(organization_id, b"page", parameters)
        if found is None:
            return None
        revision, tags, last = found
        return Page(_integer(revision), tags or b"[]", None if last is None else last.decode())

    async def tasks(
        self, organization_id: UUID, flow_execution_id: UUID, task_name: str | None
    ) -> Tasks | None:
        """Return the tasks with their states and active tags as JSON; None if there is no such execution."""
        parameters = [flow_execution_id.bytes, _text(task_name)]
        found = await self._ask(organization_id, b"tasks", parameters)
        if found is None:
            return None
        revision, registered, tasks = found
        return Tasks(_integer(revision), _integer(registered), tasks or b"[]")

    async def revisions(
        self, organization_id: UUID, flow_execution_ids: Sequence[UUID]
    ) -> dict[UUID, int]:
        """Return the last revisions of those of the executions that there are."""
        found = await self._ask(
            organization_id, b"revisions", [uuids([id.int for id in flow_execution_ids])]
        )
        if found is None or found[0] is None:
            return {}
        ids, numbers = map(decode, found)
        return {UUID(bytes=id): _integer(number) for id, number in zip(ids, numbers, strict=True)}

    async def record(self, organization_id: UUID, batch_id: UUID) -> StoredResult | None:
        """Return what is stored of a batch; None while it is unknown."""
        found = await self._ask(organization_id, b"record", [batch_id.bytes])
        return None if found is None else StoredResult(found[0] or b"", found[1] or b"")

    def close(self) -> None:
        for line in self._lines:
            line.close(psycopg.OperationalError("the endpoint ends"))

    async def _ask(
        self, organization_id: UUID, statement: bytes, parameters: Sequence[bytes | None]
    ) -> Row | None:
        """Ask on the least busy line; once more on a new one if it broke, for the server may have restarted."""
        line = min(self._lines, key=len)
        try:
            async with asyncio.timeout(READ_SECONDS):
                try:
                    return await line.ask(organization_id, statement, parameters)
                except psycopg.OperationalError:
                    return await line.ask(organization_id, statement, parameters)
        except TimeoutError:
            line.close(psycopg.OperationalError("the database does not answer"))
            raise


class PipelinedConnection:
    """One connection, on which any number of transactions may be under way, each of two statements."""

    def __init__(self, database_url: str) -> None:
        url = driver_url(database_url)
        # As SQLAlchemy reads it, like the worker: the URL that it writes has + for a space, which libpq does not read.
        _, self._arguments = url.get_dialect()().create_connect_args(url)
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._uses = 0
        self._socket = -1  # libpq does not tell it any more once the connection is lost
        self._connecting = asyncio.Lock()
        self._answers: deque[asyncio.Future[Row | None]] = deque()
        self._row: Row | None = None
        self._error: psycopg.Error | None = None

    def __len__(self) -> int:
        """How many answers are waited for."""
        return len(self._answers)

    async def ask(
        self, organization_id: UUID, statement: bytes, parameters: Sequence[bytes | None]
    ) -> Row | None:
        """Return the one row that a prepared statement gives, or None."""
        if self._connection is None:
            async with self._connecting:
                if self._connection is None:
                    self._connection = await self._open()
        answer: asyncio.Future[Row | None] = asyncio.get_running_loop().create_future()
        connection = self._connection.pgconn
        values = [organization_id.bytes, *parameters]
        self._uses += 1
        try:
            if should_discard_plans(self._uses):
                connection.send_query_params(DISCARD_PLANS.encode(), [])
            connection.send_query_prepared(b"scope", [str(organization_id).encode()])
            connection.send_query_prepared(statement, values, [pq.Format.BINARY] * len(values), 1)
            connection.pipeline_sync()
            self._answers.append(answer)
            self._flush()
        except psycopg.OperationalError as error:
            self.close(error)
            raise
        return await answer

    async def _open(self) -> psycopg.AsyncConnection[Any]:
        arguments = {**self._arguments, **CONNECT_ARGUMENTS}
        connection = await psycopg.AsyncConnection.connect(autocommit=True, **arguments)
        try:
            assert_safe_role(await (await connection.execute(ROLE_CHECK)).fetchall())
            for name, statement in _PREPARED.items():
                await connection.execute(f"prepare {name} as {statement}".encode())
        except BaseException:
            await connection.close()
            raise
        self._uses = 0
        connection.pgconn.nonblocking = 1
        connection.pgconn.enter_pipeline_mode()
        self._socket = connection.pgconn.socket
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return connection

    def close(self, error: psycopg.Error) -> None:
        """Give up the connection, if there is one, and tell all who wait."""
        connection, self._connection = self._connection, None
        if connection is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            connection.pgconn.finish()
        answers, self._answers = self._answers, deque()
        self._row = self._error = None
        for answer in answers:
            if not answer.done():
                answer.set_exception(error)

    def _flush(self) -> None:
        """Send what libpq holds; what the server does not take yet is sent when it does."""
        if self._connection is None:
            return
        loop = asyncio.get_running_loop()
        if self._connection.pgconn.flush():
            loop.add_writer(self._socket, self._write)
        else:
            loop.remove_writer(self._socket)

    def _write(self) -> None:
        try:
            self._flush()
        except psycopg.OperationalError as error:
            self.close(error)

    def _read(self) -> None:
        assert self._connection is not None
        connection = self._connection.pgconn
        try:
            connection.consume_input()
            while self._answers and not connection.is_busy():
                result = connection.get_result()
                if result is not None:
                    self._take(result)
                elif connection.status == pq.ConnStatus.BAD:
                    raise psycopg.OperationalError("the connection is lost")
            self._flush()
        except psycopg.OperationalError as error:
            self.close(error)

    def _take(self, result: pq.abc.PGresult) -> None:
        """Keep what the last statement of a transaction gave, or its error, until the transaction has ended."""
        if result.status == pq.ExecStatus.TUPLES_OK:
            columns = range(result.nfields if result.ntuples else 0)
            self._row = tuple(result.get_value(0, column) for column in columns) or None
        elif result.status == pq.ExecStatus.PIPELINE_SYNC:
            answer = self._answers.popleft()
            row, error, self._row, self._error = self._row, self._error, None, None
            if answer.done():
                return  # nobody waits for it any more
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(row)
        elif result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.PIPELINE_ABORTED):
            self._error = _error(result)


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _bigint(value: int) -> bytes:
    return value.to_bytes(8, signed=True)


def _integer(binary: bytes | None) -> int:
    return int.from_bytes(binary or b"", signed=True)


def _error(result: pq.abc.PGresult) -> psycopg.Error:
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"XX000").decode()
    message = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode()
    try:
        return psycopg.errors.lookup(state)(message)
    except KeyError:
        return psycopg.DatabaseError(message)
