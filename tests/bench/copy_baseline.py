"""The limit of writing: the rows that the product wrote, written by one connection with COPY.

No queue and no rules: the rows are in memory in COPY's binary format; COPY and commit are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

from producers.client import TagProducer
from tests.bench.contenders import Item
from tests.bench.load import Batches, Load, register
from tests.bench.read import spread
from tests.bench.servers import EMPTY, BenchServers
from tests.bench.servers import WORKER as WORKER_ROLE
from worker.local.stack import WORKER, command
from worker.local.supervisor import ProcessSpec, Supervisor

ORGANIZATIONS: Final = 8
ROWS: Final = 1000
"""Rows of task_tags in one transaction."""
TABLES: Final = ("task_tags", "tag_batches", "tag_changes")
APPLIED_SECONDS: Final = 300.0
DATABASE: Final = "written"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chunk:
    """What one transaction writes: the rows of each table, and the executions' revisions."""

    copies: dict[str, bytes]
    organization_id: UUID
    revisions: dict[UUID, int]


class Limit:
    """The rows of these batches, in a separate database, and how fast they are written there."""

    def __init__(self, servers: BenchServers, batches: int, operations: int, say: Say) -> None:
        """Let the product apply the batches once, and keep what it leaves behind."""
        self._servers, self._say = servers, say
        self._batches, self._operations = batches, operations
        self._seconds: list[float] = []
        self._wal: list[float] = []
        items = Batches(servers).take(Load(operations, ORGANIZATIONS, batches))
        servers.fresh()
        with servers.owner() as connection:
            register(connection)
            _apply(servers, connection, items)
            self._chunks = [_chunk(connection, group) for group in _groups(items, operations)]
            self._expected = _counts(connection)
        assert self._expected["task_tags"] == batches * operations
        servers.copy(EMPTY, DATABASE)
        with servers.owner(DATABASE) as connection:
            register(connection)

    def round(self) -> None:
        with self._servers.owner(DATABASE) as connection:
            _empty(connection)
            before = _wal_position(connection)
            self._seconds.append(_write(connection, self._chunks))
            self._wal.append((_wal_position(connection) - before) / self._batches)
            assert _counts(connection) == self._expected
        self._say(f"limit: {self._batches / self._seconds[-1]:,.0f} batches/s")

    def result(self) -> dict[str, Any]:
        rates = [self._batches / each for each in self._seconds]
        return {
            "limit": {
                "operations": self._operations,
                "batches": self._batches,
                "batches_per_second": spread(rates),
                "rows_per_second": spread([rate * self._operations for rate in rates]),
                "wal_bytes_per_batch": spread(self._wal),
            }
        }


# --- The rows ------------------------------------------------------------------------------------


def _apply(servers: BenchServers, connection: psycopg.Connection, items: Sequence[Item]) -> None:
    """Enqueue the batches, and wait until a worker has applied them all."""
    child = ProcessSpec(
        name="limit-worker",
        argv=[*command(WORKER), "-n", "limit@%h"],
        ready=lambda: True,
        environment=servers.environment(WORKER_ROLE),
    )
    with Supervisor(servers.directory / "logs") as supervisor:
        supervisor.start(child)
        for organization_id, of_one in _by_organization(items).items():
            with TagProducer(
                redis_url=servers.redis_url, organization_id=organization_id, token=of_one[0].token
            ) as producer:
                producer.enqueue_many([item.batch for item in of_one], block=APPLIED_SECONDS)
        deadline = time.monotonic() + APPLIED_SECONDS
        while _counts(connection)["tag_batches"] < len(items):
            if time.monotonic() > deadline:
                raise TimeoutError("the worker did not apply all batches")
            time.sleep(0.1)


def _by_organization(items: Sequence[Item]) -> dict[UUID, list[Item]]:
    grouped: dict[UUID, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.organization_id, []).append(item)
    return grouped


def _groups(items: Sequence[Item], operations: int) -> list[list[Item]]:
    """Return the batches of each transaction: of one organization, which take turns."""
    size = ROWS // operations
    cut = [
        [of_one[start : start + size] for start in range(0, len(of_one), size)]
        for of_one in _by_organization(items).values()
    ]
    return [group for turn in zip_longest(*cut) for group in turn if group]


_OF_BATCHES: Final = "organization_id = {organization} and batch_id = any({batches})"
_ROWS: Final = {
    "task_tags": "organization_id = {organization} and tag = any({tags})",
    "tag_batches": _OF_BATCHES,
    "tag_changes": _OF_BATCHES,
}


def _chunk(connection: psycopg.Connection, group: Sequence[Item]) -> Chunk:
    """Read what the batches have left behind. Each batch has other tags."""
    organization_id = group[0].organization_id
    values = {
        "organization": sql.Literal(organization_id),
        "batches": sql.Literal([item.batch.batch_id for item in group]),
        "tags": sql.Literal(
            sorted({operation.tag for item in group for operation in item.batch.tags})
        ),
    }
    copies = {}
    for table, condition in _ROWS.items():
        statement = sql.SQL(
            "copy (select * from {table} where {condition}) to stdout (format binary)"
        )
        where = sql.SQL(condition).format(**values)
        with connection.cursor().copy(
            statement.format(table=sql.Identifier(table), condition=where)
        ) as copy:
            copies[table] = b"".join(map(bytes, copy))
    found = connection.execute(
        sql.SQL(
            "select flow_execution_id, max(revision) from tag_changes where {condition} group by 1"
        ).format(condition=sql.SQL(_OF_BATCHES).format(**values))
    )
    return Chunk(copies, organization_id, dict(found.fetchall()))


# --- The measurement -----------------------------------------------------------------------------


def _empty(connection: psycopg.Connection) -> None:
    connection.execute(f"truncate {', '.join(TABLES)}".encode())
    connection.execute("update flow_executions set revision = 0")
    connection.execute("vacuum flow_executions")
    connection.execute("checkpoint")  # what was before is not to be paid for in the round


_SAVE_REVISIONS: Final = """
    update flow_executions e set revision = r.revision
      from unnest(%s::uuid[], %s::bigint[]) as r (flow_execution_id, revision)
     where e.organization_id = %s and e.flow_execution_id = r.flow_execution_id
"""


def _write(connection: psycopg.Connection, chunks: Sequence[Chunk]) -> float:
    """Write each chunk in a separate transaction; return the seconds that all took."""
    statements = {
        table: sql.SQL("copy {} from stdin (format binary)").format(sql.Identifier(table))
        for table in TABLES
    }
    cursor = connection.cursor()
    begin = time.perf_counter()
    for chunk in chunks:
        with connection.transaction():
            for table, rows in chunk.copies.items():
                with cursor.copy(statements[table]) as copy:
                    copy.write(rows)
            revisions = chunk.revisions
            cursor.execute(
                _SAVE_REVISIONS, [list(revisions), list(revisions.values()), chunk.organization_id]
            )
    return time.perf_counter() - begin


def _counts(connection: psycopg.Connection) -> dict[str, int]:
    return {
        table: connection.execute(f"select count(*) from {table}".encode()).fetchall()[0][0]
        for table in TABLES
    }


def _wal_position(connection: psycopg.Connection) -> int:
    row = connection.execute("select pg_current_wal_insert_lsn() - '0/0'").fetchone()
    assert row is not None
    return int(row[0])
