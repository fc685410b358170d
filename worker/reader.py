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

from worker.arrays import bigints
from worker.store import CONNECT_ARGUMENTS, OWN_ROLE, driver_url, refuse_unsafe

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

# $1 organization, $2 flow execution, $3 revision, $4 most events: those after the revision, up to a mebibyte of them, and
# the revision of the first.
_READ_CHANGES: Final = """
    select e.revision, found.first, found.events
      from flow_executions e
     cross join lateral (
           select min(revision) as first,
                  coalesce('[' || string_agg(event, ',' order by revision) || ']', '[]') as events
             from (select revision, event, row_number() over w as place, sum(length(event)) over w as characters
                     from (select revision, event::text as event from tag_changes
                            where organization_id = $1 and flow_execution_id = $2 and revision > $3
                            order by revision limit $4) as page
                   window w as (order by revision)) as counted
            where place = 1 or characters <= 1048576) as found
     where e.organization_id = $1 and e.flow_execution_id = $2
"""

_READ_RECORD: Final = """
    select result_record::text from tag_batches where organization_id = $1 and batch_id = $2
"""

_PREPARED: Final = {
    "scope (text)": SCOPE,
    "tags (uuid, uuid, text, bigint[])": READ_TAGS,
    "changes (uuid, uuid, bigint, bigint)": _READ_CHANGES,
    "record (uuid, uuid)": _READ_RECORD,
}


class Changes(NamedTuple):
    """Stored change events of an execution after some revision."""

    revision: int
    """The execution's last."""
    first: int | None
    """The revision of the first of the events; None if there are none."""
    events: bytes
    """A JSON array."""


Row = tuple[bytes | None, ...]
"""The columns of a row in PostgreSQL's binary format."""


class Reader:
    """The endpoint's way to the database. Its methods raise `psycopg.Error`, `UnsafeRole` and `TimeoutError`."""

    def __init__(self, database_url: str, connections: int) -> None:
        self._lines = [_Line(database_url) for _ in range(connections)]

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
        name = None if task_name is None else task_name.encode()
        parameters = [flow_execution_id.bytes, name, bigints(known)]
        found = await self._ask(organization_id, b"tags", parameters)
        if found is None or found[0] is None:
            return None
        return _integer(found[0]), found[1]

    async def changes(
        self, organization_id: UUID, flow_execution_id: UUID, after: int, limit: int
    ) -> Changes | None:
        """Return change events as they are stored, in order; None if there is no such execution."""
        parameters = [flow_execution_id.bytes, _bigint(after), _bigint(limit)]
        found = await self._ask(organization_id, b"changes", parameters)
        if found is None:
            return None
        revision, first, events = found
        return Changes(
            _integer(revision), None if first is None else _integer(first), events or b"[]"
        )

    async def record(self, organization_id: UUID, batch_id: UUID) -> bytes | None:
        """Return the stored result record as JSON; None while it is unknown."""
        found = await self._ask(organization_id, b"record", [batch_id.bytes])
        return None if found is None else found[0]

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


class _Line:
    """One connection, on which any number of transactions may be under way, each of two statements."""

    def __init__(self, database_url: str) -> None:
        self._url = driver_url(database_url).set(drivername="postgresql")
        self._connection: psycopg.AsyncConnection[Any] | None = None
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
        try:
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
        url = self._url.render_as_string(hide_password=False)
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, **CONNECT_ARGUMENTS
        )
        try:
            refuse_unsafe(await (await connection.execute(OWN_ROLE)).fetchall())
            for name, statement in _PREPARED.items():
                await connection.execute(f"prepare {name} as {statement}".encode())
        except BaseException:
            await connection.close()
            raise
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
        elif result.status != pq.ExecStatus.PIPELINE_ABORTED:
            self._error = _error(result)


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
