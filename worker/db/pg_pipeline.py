"""libpq's pipeline mode: statements are sent before earlier ones are answered. No SQL.

The endpoint's reads share `PipelinedConnection`, which the event loop drives; a worker's
transactions follow one another on a `Pipeline`, whose caller waits. psycopg's own pipelines and
asynchronous connections take several times as long, in locks and waits that prepared statements do
not need (docs/decisions.md#pipeline-mode-without-psycopgs-api).
"""

from __future__ import annotations

import asyncio
import re
import select
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from producers.pubsub import first_completed
from worker.db.connection import (
    CONNECT_ARGUMENTS,
    DISCARD_PLANS,
    ROLE_CHECK,
    SCHEMA,
    TABLES,
    assert_safe_role,
    scope_statement,
    session_statement,
    should_discard_plans,
)
from worker.db.pg_arrays import Parameter
from worker.settings import connect_arguments

Row = tuple[bytes | None, ...]
"""The columns of a row in PostgreSQL's binary format."""

SCOPE_STATEMENT: Final = b"scope"
STATEMENT_TIMEOUT: Final = "2s"
"""How long the server works on one statement; the transactions behind it wait for as long."""
STUCK_SECONDS: Final = 6.0
"""A connection whose server has not answered anything for this time is lost."""
SLOW_SECONDS: Final = 0.2
_MAX_SENT: Final = 32
"""Transactions under way on one connection. The others wait, and are not sent if cancelled."""
_CANCEL_AFTER_SECONDS: Final = 0.05
_CANCEL_SECONDS: Final = 3.0


class _Awaited(NamedTuple):
    """A transaction that was sent."""

    organization_id: UUID
    answer: asyncio.Future[Row | None]


# --- Reads of many callers at once ---------------------------------------------------------------


class PipelinedConnection:
    """One connection, on which any number of transactions may be under way, each of two statements.

    The first sets the organization and the session settings; the second, one of `prepared`, returns
    one row or none.

    Args:
        prepared: SQL by name and types, as in `prepare <name and types> as <SQL>`.
    """

    def __init__(self, database_url: str, prepared: Mapping[str, str]) -> None:
        self._arguments = connect_arguments(database_url)
        self._prepared = prepared
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._uses = 0
        self._socket = -1  # libpq no longer tells it once the connection is lost
        self._connecting = asyncio.Lock()
        self._room = asyncio.Semaphore(_MAX_SENT)
        self._waiting: list[UUID] = []  # the organizations whose statements are not sent yet
        self._awaited: deque[_Awaited] = deque()
        self._by_organization: Counter[UUID] = Counter()
        self._answered_at = 0.0
        self._cancelling: asyncio.Task[None] | None = None
        self.cancelled_at = 0.0
        """When a statement was last cancelled here, by the event loop's clock."""
        self._row: Row | None = None
        self._error: psycopg.Error | None = None

    def __len__(self) -> int:
        """Return how many answers are awaited, also by those whose statements are not sent yet."""
        return len(self._awaited) + len(self._waiting)

    def serves(self, organization_id: UUID) -> bool:
        """Whether an answer for this organization is awaited."""
        return self._by_organization[organization_id] > 0 or organization_id in self._waiting

    @property
    def is_stuck(self) -> bool:
        """Whether the server has not answered anything for too long."""
        waited = asyncio.get_running_loop().time() - self._answered_at
        return bool(self._awaited) and waited > STUCK_SECONDS

    @property
    def is_open(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None

    async def ask(
        self, organization_id: UUID, statement: bytes, parameters: Sequence[bytes | None]
    ) -> Row | None:
        """Run a prepared statement for an organization; return its row, or None.

        If this is cancelled, so is the statement at the server, unless it ends in 50 ms.

        Args:
            parameters: In the binary format; the organization's id goes before them.

        Raises:
            psycopg.Error, UnsafeRole: From PostgreSQL, or from connecting.
        """
        connection = await self._wait_for_room(organization_id)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Row | None] = loop.create_future()
        values = [organization_id.bytes, *parameters]
        self._uses += 1
        if not self._awaited:
            self._answered_at = loop.time()
        self._awaited.append(_Awaited(organization_id, answer))
        self._by_organization[organization_id] += 1
        try:
            if should_discard_plans(self._uses):
                connection.send_query_params(DISCARD_PLANS.encode(), [])
            connection.send_query_prepared(SCOPE_STATEMENT, [str(organization_id).encode()])
            connection.send_query_prepared(statement, values, [pq.Format.BINARY] * len(values), 1)
            connection.pipeline_sync()
            self._flush()
        except psycopg.OperationalError as error:
            self.close(error)  # which is the answer
        try:
            return await answer
        except asyncio.CancelledError:
            self._cancel_soon()
            raise

    async def _wait_for_room(self, organization_id: UUID) -> pq.abc.PGconn:
        """Return the connection when one more statement may be sent; connect if there is none."""
        self._waiting.append(organization_id)
        try:
            await self._room.acquire()
            try:
                if self._connection is None:
                    async with self._connecting:
                        if self._connection is None:
                            # Cancelled once, psycopg waits for the server for up to 10 s.
                            await first_completed(self._open())
                if self._connection is None:
                    raise psycopg.OperationalError("the connection is lost")
                return self._connection.pgconn
            except BaseException:
                self._room.release()
                raise
        finally:
            self._waiting.remove(organization_id)

    async def _open(self) -> None:
        arguments = {**self._arguments, **CONNECT_ARGUMENTS}
        connection = await psycopg.AsyncConnection.connect(autocommit=True, **arguments)
        try:
            assert_safe_role(await (await connection.execute(ROLE_CHECK, TABLES)).fetchall())
            found = await (await connection.execute(SCHEMA)).fetchone()
            schema = found[0] if found else "public"
            await connection.execute(session_statement(schema, STATEMENT_TIMEOUT).encode())
            scope = scope_statement("$1", schema, STATEMENT_TIMEOUT)
            prepared = {"scope (text)": scope, **self._prepared}
            for name, statement in prepared.items():
                await connection.execute(f"prepare {name} as {statement}".encode())
        except BaseException:
            await connection.close()
            raise
        self._uses = 0
        connection.pgconn.nonblocking = 1
        connection.pgconn.enter_pipeline_mode()
        self._socket = connection.pgconn.socket
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        self._connection = connection

    def close(self, error: psycopg.Error) -> None:
        """Close the connection, if there is one; whatever is awaited fails with this error."""
        connection, self._connection = self._connection, None
        if connection is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            connection.pgconn.finish()
        awaited, self._awaited = self._awaited, deque()
        self._by_organization.clear()
        self._row = self._error = None
        for each in awaited:
            self._room.release()
            if not each.answer.done():
                each.answer.set_exception(error)

    def _cancel_soon(self) -> None:
        """Cancel the running statement soon, if its caller was cancelled."""
        if self._awaited and self._awaited[0].answer.cancelled():
            loop = asyncio.get_running_loop()
            loop.call_later(_CANCEL_AFTER_SECONDS, self._cancel, self._awaited[0])

    def _cancel(self, abandoned: _Awaited) -> None:
        if self._connection is None or self._cancelling is not None:
            return
        if self._awaited and self._awaited[0] is abandoned:
            self._cancelling = asyncio.create_task(self._send_cancel(self._connection))

    async def _send_cancel(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Cancel whatever the server works at: by now, it may be the next statement."""
        with suppress(psycopg.Error):
            await connection.cancel_safe(timeout=_CANCEL_SECONDS)
        self.cancelled_at = asyncio.get_running_loop().time()
        self._cancelling = None
        self._cancel_soon()

    def _flush(self) -> None:
        """Send what libpq holds; the rest is sent when the server takes more."""
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
            while self._awaited and not connection.is_busy():
                result = connection.get_result()
                if result is not None:
                    self._take(result)
                elif connection.status == pq.ConnStatus.BAD:
                    raise psycopg.OperationalError("the connection is lost")
            self._flush()
        except psycopg.OperationalError as error:
            self.close(error)

    def _take(self, result: pq.abc.PGresult) -> None:
        """Keep the row or error of a transaction's last statement until it has ended."""
        if result.status == pq.ExecStatus.TUPLES_OK:
            columns = range(result.nfields if result.ntuples else 0)
            self._row = tuple(result.get_value(0, column) for column in columns) or None
        elif result.status == pq.ExecStatus.PIPELINE_SYNC:
            organization_id, answer = self._awaited.popleft()
            self._room.release()
            self._by_organization[organization_id] -= 1
            if not self._by_organization[organization_id]:
                del self._by_organization[organization_id]
            self._answered_at = asyncio.get_running_loop().time()
            row, error, self._row, self._error = self._row, self._error, None, None
            self._cancel_soon()
            if answer.done():
                return  # nobody awaits it any more
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(row)
        elif result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.PIPELINE_ABORTED):
            self._error = psycopg.errors.error_from_result(result)


# --- Transactions of a caller that waits ---------------------------------------------------------


@dataclass(slots=True, eq=False)
class Sent:
    """A statement that was sent, or the end of a transaction, and its result once it was read."""

    statement: str
    result: pq.abc.PGresult | None = None


class Pipeline:
    """A connection for one transaction after the other.

    Each statement is prepared at its first use; parameters and results are binary. After an error
    of psycopg the connection must be closed. All methods raise `psycopg.Error`.

    Args:
        on_slow: Called each `SLOW_SECONDS` for which a transaction has waited for the server, with
            the seconds of all its waits.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], on_slow: Callable[[float], None]
    ) -> None:
        self.connection = connection
        self._on_slow = on_slow
        self._libpq = connection.pgconn
        self._libpq.nonblocking = 1
        self._libpq.enter_pipeline_mode()
        self._poll = select.poll()
        self._poll.register(self._libpq.socket, select.POLLIN)
        self._transformer = Transformer(connection)
        self._prepared: dict[str, tuple[bytes, list[str]]] = {}
        self._awaited: deque[Sent] = deque()
        self._is_asked = True
        """Whether the results of all that was sent were requested."""
        self._waited, self._slow_at = 0.0, SLOW_SECONDS

    @property
    def unanswered(self) -> str | None:
        """The first statement without a result: after an error, the one that failed."""
        return self._awaited[0].statement if self._awaited else None

    def send(self, statement: str, values: Mapping[str, Parameter]) -> Sent:
        """Send a statement, with psycopg's placeholders by name; do not wait."""
        name, names = self._prepared.get(statement) or self._prepare(statement, values)
        parameters = [values[each] for each in names]
        formats = [pq.Format.BINARY] * len(parameters)
        self._libpq.send_query_prepared(name, parameters, formats, pq.Format.BINARY)
        sent = Sent(statement)
        self._awaited.append(sent)
        self._is_asked = False
        return sent

    def _prepare(self, statement: str, values: Mapping[str, Parameter]) -> tuple[bytes, list[str]]:
        names = list(dict.fromkeys(_PLACEHOLDER.findall(statement)))
        query = _PLACEHOLDER.sub(lambda found: f"${names.index(found[1]) + 1}", statement)
        name = b"s%d" % len(self._prepared)
        self._libpq.send_prepare(name, query.encode(), [values[each].oid for each in names])
        self._awaited.append(Sent(statement))
        self._prepared[statement] = name, names
        return name, names

    def rows(self, sent: Sent) -> list[tuple[Any, ...]]:
        """Wait for a statement's rows, and for all before it."""
        if sent.result is None:
            if not self._is_asked:
                self.ask()
            self.wait(sent)
        assert sent.result is not None
        self._transformer.set_pgresult(sent.result)
        return self._transformer.load_rows(0, sent.result.ntuples, tuple)

    def push(self) -> None:
        """Send as much as the server takes now."""
        self._libpq.flush()

    def ask(self) -> None:
        """Request the results of what was sent, without waiting for them."""
        self._libpq.send_flush_request()
        self._libpq.flush()
        self._is_asked = True

    def end(self) -> Sent:
        """Send the end of a transaction, without waiting for it.

        After an error, the server continues behind it. What is in no transaction commits here.
        """
        self._libpq.pipeline_sync()
        self._libpq.flush()
        end = Sent(_END)
        self._awaited.append(end)
        self._is_asked = True
        return end

    def wait(self, sent: Sent) -> None:
        """Wait until a statement, and all before it, has succeeded, or a transaction has ended.

        What is behind it need not be sent by then.
        """
        while sent.result is None:
            self._read()

    def sync(self) -> None:
        """Send the end of a transaction, and wait for it."""
        self.wait(self.end())

    def _read(self) -> None:
        result = self._next_result()
        if result.status not in _SUCCESSES:
            raise psycopg.errors.error_from_result(result)
        sent = self._awaited.popleft()
        sent.result = result
        if sent.statement is _END:
            self._waited, self._slow_at = 0.0, SLOW_SECONDS

    def _next_result(self) -> pq.abc.PGresult:
        while True:
            while self._libpq.is_busy():
                if self._poll_server() & ~select.POLLOUT:
                    self._libpq.consume_input()
            result = self._libpq.get_result()
            if result is not None:
                return result
            if self._libpq.status == pq.ConnStatus.BAD:
                raise psycopg.OperationalError("the connection is lost")

    def _poll_server(self) -> int:
        """Send what the server takes, wait for it, and return the events of its socket, or 0.

        An answer may come in many small pieces, so it is the sum of a transaction's waits that
        makes it slow.
        """
        has_more = self._libpq.flush()
        if has_more and not self._libpq.is_busy():  # it has read the answer
            return 0
        if has_more:
            self._poll.modify(self._libpq.socket, select.POLLIN | select.POLLOUT)
        began = time.monotonic()
        found = self._poll.poll(max(1, (self._slow_at - self._waited) * 1000))
        if has_more:
            self._poll.modify(self._libpq.socket, select.POLLIN)
        self._waited += time.monotonic() - began
        if self._waited >= self._slow_at:
            self._slow_at = self._waited + SLOW_SECONDS
            self._on_slow(self._waited)
        return found[0][1] if found else 0


_END: Final = "end"
_SUCCESSES: Final = (
    pq.ExecStatus.COMMAND_OK,
    pq.ExecStatus.TUPLES_OK,
    pq.ExecStatus.PIPELINE_SYNC,
)
_PLACEHOLDER: Final = re.compile(r"%\((\w+)\)s")
