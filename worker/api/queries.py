"""Reads the database for the endpoint. Each statement says what it returns, and by which index."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, NamedTuple
from uuid import UUID

import psycopg

from producers.contract.cursors import Cursor
from worker.api.change_queries import (
    CHANGES_OF_EXECUTION,
    CHANGES_OF_ORGANIZATION,
    HEADS,
    StoredChanges,
    read_changes,
    read_heads,
    read_integer,
)
from worker.api.page_statements import (
    BEFORE_ALL,
    MAX_ANSWER_BYTES,
    PAGES,
    TAG,
    TaskPage,
)
from worker.db.connection import UnsafeRole
from worker.db.pg_arrays import EPOCH, bigints, texts, timestamps, uuids
from worker.db.pg_pipeline import PipelinedConnection, Row
from worker.snapshot import StoredResult

CHECK_SECONDS: Final = 2.0
READ_SECONDS: Final = 10.0
"""A read that takes longer, with those before it on its connection, ends with `TimeoutError`."""
MAX_DIRECT_TAGS: Final = 1000
"""Larger answers are read page by page. So many tags have at most 9 MiB."""

logger = logging.getLogger(__name__)

READ_ERRORS: Final = (psycopg.Error, UnsafeRole, TimeoutError)
"""What the methods of `Reader` raise while the database can't be used."""

_EXECUTION: Final = (
    "from flow_executions e where e.organization_id = $1 and e.flow_execution_id = $2"
)

# $1 organization, $2 flow execution, $3 task name or null, $4 and $5 revisions and their times that
# the reader knows.
READ_TAGS: Final = f"""
    select e.revision, e.changed_at,
           case when e.revision = any($4) and e.changed_at = any($5) then null else (
           select case when count(*) <= {MAX_DIRECT_TAGS}
                       then coalesce(json_agg(row_to_json(t)), '[]')::text end
             from (select {TAG}
                     from task_tags
                    where organization_id = e.organization_id
                      and flow_execution_id = e.flow_execution_id
                      and ($3 is null or task_name = $3)
                      and status = 'active'
                    order by task_tags.created_at, id
                    limit {MAX_DIRECT_TAGS + 1}) t) end
      {_EXECUTION}
"""
"""Returns the revision and the active tags of an execution as JSON, by task_tags_active.

It is one statement, so that the tags are those of the revision. They are null if the reader knows
the revision, or if there are too many for this statement.
"""

# $1 organization, $2 batch.
_READ_RECORD: Final = """
    select digest, result_record::text from tag_batches where organization_id = $1 and batch_id = $2
"""
"""Returns the digest and the stored result of a batch, by primary key."""

_OF_TASK: Final = "($3 is null or task_name = $3)"
"""A prepared plan can't look this up by the index, because $3 may be null.

So `task` is a statement without it.
"""

_READ_RECOVERY: Final = "select pg_is_in_recovery() where $1 is not null"
"""Returns whether the server is in recovery: a standby, or a primary that was fenced."""

PREPARED: Final = {
    "recovery (uuid)": _READ_RECOVERY,
    "tags (uuid, uuid, text, bigint[], timestamptz[])": READ_TAGS,
    "task (uuid, uuid, text, bigint[], timestamptz[])": READ_TAGS.replace(
        _OF_TASK, "task_name = $3"
    ),
    **PAGES,
    "changes (uuid, bigint, bigint, bigint, uuid)": CHANGES_OF_EXECUTION,
    "feed (uuid, bigint, bigint, bigint)": CHANGES_OF_ORGANIZATION,
    "heads (uuid, uuid[])": HEADS,
    "record (uuid, uuid)": _READ_RECORD,
}
"""All statements by name and types, as `PipelinedConnection` prepares them."""


_SMALL: Final = (b"recovery", b"heads", b"record")
"""Statements that read a few rows at most."""


class Page(NamedTuple):
    """Some of an execution's active tags."""

    revision: Cursor
    tags: bytes | None
    """A JSON array; None if it has more than `MAX_ANSWER_BYTES`."""
    after: str | None
    """The time of creation and the id of the last tag, as text; None if no more tags follow."""


class Reader:
    """Reads the database for the endpoint. Its methods raise `READ_ERRORS`.

    One connection is for reads of a few rows, so that results, revisions and readiness never wait
    behind large ones. Of the others, an organization occupies half at a time.

    Args:
        connections: How many; with one, all reads share it.
    """

    def __init__(self, database_url: str, connections: int) -> None:
        self._connections = [
            PipelinedConnection(database_url, PREPARED) for _ in range(connections)
        ]
        self._shared = self._connections[1:] or self._connections

    async def check(self) -> None:
        """Check that the database is a primary server. Raises what reading raises."""
        await self._check(self._connections[0])

    async def _check(self, connection: PipelinedConnection) -> None:
        """Close a connection to a server in recovery, and raise: its content is old, or will be.

        The next connection goes through the URL and its names again.
        """
        row = await self._ask_on(connection, UUID(int=0), b"recovery", [])
        if row is None or row[0] != b"\x00":
            error = psycopg.OperationalError("the server is in recovery")
            connection.close(error)
            raise error

    async def run(self) -> None:
        """Check all connections every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            opened = [self._connections[0], *(each for each in self._shared if each.is_open)]
            for found in await asyncio.gather(*map(self._check, opened), return_exceptions=True):
                if isinstance(found, READ_ERRORS):
                    about = {"error": str(found)[:200] or type(found).__name__}
                    logger.warning("the database can't be used", extra=about)

    async def tags(
        self,
        organization_id: UUID,
        flow_execution_id: UUID,
        task_name: str | None,
        known: Sequence[Cursor] = (),
    ) -> tuple[Cursor, bytes | None] | None:
        """Return the revision and the active tags as JSON; None if there is no such execution.

        The tags are None if the revision is one of `known`, or if they are more than
        `MAX_DIRECT_TAGS`: `page` returns them.
        """
        revisions = bigints([each.number for each in known])
        times = timestamps([each.time or 0 for each in known])
        parameters = [flow_execution_id.bytes, _text(task_name), revisions, times]
        statement = b"tags" if task_name is None else b"task"
        found = await self._ask(organization_id, statement, parameters)
        if found is None or found[0] is None:
            return None
        return _revision(found), _bounded(found[2])

    async def changes(
        self,
        organization_id: UUID,
        flow_execution_id: UUID | None,
        after: int,
        limit: int,
        max_bytes: int,
    ) -> StoredChanges | None:
        """Return change events of an execution, or of all; None if nothing is known of it.

        Args:
            after: The revision, or the position, that precedes the first event.
            limit: Events, at most.
            max_bytes: Characters in all events, at most; the first event may exceed it.
        """
        parameters = [*map(_bigint, (after, limit, max_bytes))]
        if flow_execution_id is None:
            found = await self._ask(organization_id, b"feed", parameters)
        else:
            parameters.append(flow_execution_id.bytes)
            found = await self._ask(organization_id, b"changes", parameters)
        return None if found is None else read_changes(found)

    async def page(
        self,
        organization_id: UUID,
        flow_execution_id: UUID,
        task_name: str | None,
        tag_types: Sequence[str],
        tags: Sequence[str],
        after: str | None,
        limit: int | None,
    ) -> Page | None:
        """Return a page of the wanted active tags; None if there is no such execution.

        Args:
            task_name, tag_types, tags: Which tags; None and empty lists mean any.
            after: The end of the page before, as `Page.after` has it.
            limit: Tags in the page, at most; None for all.
        """
        created_at, _, id = (after or BEFORE_ALL).partition(" ")
        parameters = [
            flow_execution_id.bytes,
            _text(task_name),
            texts(tag_types) if tag_types else None,
            texts(tags) if tags else None,
            created_at.encode(),
            id.encode(),
            None if limit is None else _bigint(limit),
        ]
        statement = b"page" if task_name is None else b"page_of_task"
        found = await self._ask(organization_id, statement, parameters)
        if found is None:
            return None
        *_, page, last = found
        if limit is None:
            page = _bounded(page)
        return Page(_revision(found), page, None if last is None else last.decode())

    async def tasks(
        self, organization_id: UUID, statement: bytes, parameters: Sequence[bytes | None]
    ) -> TaskPage | None:
        """Return a page of tasks; None if there is no such execution."""
        found = await self._ask(organization_id, statement, parameters)
        return None if found is None else TaskPage.read(found)

    async def heads(
        self, organization_id: UUID, flow_execution_ids: Sequence[UUID]
    ) -> tuple[Cursor, dict[UUID, Cursor]]:
        """Return the last event of the organization, and those of executions that are known."""
        ids = uuids([id.int for id in flow_execution_ids])
        return read_heads(await self._ask(organization_id, b"heads", [ids]))

    async def record(self, organization_id: UUID, batch_id: UUID) -> StoredResult | None:
        """Return what is stored of a batch; None if nothing is."""
        found = await self._ask(organization_id, b"record", [batch_id.bytes])
        return None if found is None else StoredResult(found[0] or b"", found[1] or b"")

    def close(self) -> None:
        for connection in self._connections:
            connection.close(psycopg.OperationalError("the endpoint ends"))

    async def _ask(
        self, organization_id: UUID, statement: bytes, parameters: Sequence[bytes | None]
    ) -> Row | None:
        """Run a statement on the connection where it waits least."""
        if statement in _SMALL:
            connection = self._connections[0]
        else:
            used = [each for each in self._shared if each.serves(organization_id)]
            is_most = 2 * len(used) >= len(self._shared)
            connection = min(used if is_most else self._shared, key=len)
        return await self._ask_on(connection, organization_id, statement, parameters)

    async def _ask_on(
        self,
        connection: PipelinedConnection,
        organization_id: UUID,
        statement: bytes,
        parameters: Sequence[bytes | None],
    ) -> Row | None:
        """Run a statement; retry once if the connection was lost, or another read was cancelled.

        A connection whose statements the server no longer has is closed, as if it was lost.
        """
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(READ_SECONDS):
                try:
                    return await connection.ask(organization_id, statement, parameters)
                except psycopg.errors.QueryCanceled:
                    if connection.cancelled_at < began:
                        raise  # it took too long itself
                except psycopg.errors.InvalidSqlStatementName as error:
                    connection.close(psycopg.OperationalError(str(error)))
                except psycopg.OperationalError:
                    pass
                return await connection.ask(organization_id, statement, parameters)
        except TimeoutError:
            if connection.is_stuck:
                connection.close(psycopg.OperationalError("the database does not answer"))
            raise


def _bounded(answer: bytes | None) -> bytes | None:
    return None if answer is None or len(answer) > MAX_ANSWER_BYTES else answer


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _bigint(value: int) -> bytes:
    return value.to_bytes(8, signed=True)


def _revision(row: Row) -> Cursor:
    """Read the first two columns, a revision and its time."""
    return Cursor(read_integer(row[0]), read_integer(row[1]) + EPOCH)
