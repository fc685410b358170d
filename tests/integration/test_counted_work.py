"""Counted, not timed: how much work a drain is does not depend on how much it applies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from redis import Redis

from producers.contract.messages import RegisterExecution, TagBatch, add, remove
from tests.support.database import own_database
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, Tenant, applied
from tests.support.waiting import eventually
from worker.api.queries import Reader
from worker.db.connection import DISCARD_PLANS
from worker.db.migrate import migrate
from worker.db.repository import Repository

CONNECTED = """
    select from pg_stat_activity
     where datname = current_database() and pid <> pg_backend_pid() and pid = coalesce(%s, pid)
"""
ROWS_READ = """
    select sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))
      from pg_stat_user_tables where relname = any('{flow_executions, task_tags, tag_batches, tag_changes}')
"""
WAIT = "(wait for what was found)"
Work = tuple[list[str], list[str]]


def batches(count: int, operations: int, name: str) -> list[TagBatch]:
    return [
        TagBatch(
            tags=[add(EXECUTION, f"{i}", name, f"{number}", {"i": i}) for i in range(operations)]
        )
        for number in range(count)
    ]


def removals(of: list[TagBatch]) -> list[TagBatch]:
    return [
        TagBatch(
            tags=[remove(EXECUTION, each.task_name, each.tag_type, each.tag) for each in batch.tags]
        )
        for batch in of
    ]


def rows_read(servers: Servers, reader: int | None = None) -> int:
    """Return how many rows have been read, once the connection of this pid, or else every one, is gone: then it has told."""
    with servers.owner() as connection:
        eventually(lambda: not connection.execute(CONNECTED, [reader]).fetchall())
        ((total,),) = connection.execute(ROWS_READ).fetchall()
    return int(total)


@pytest.fixture
def counted(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Drain what is sent; return the SQL statements, with the waits between them, and the Redis calls, a round trip each.

    That plans are made anew is left out: it is done at the 2nd, 4th, 8th … transaction of a connection.
    """
    statements: list[str] = []
    calls: list[str] = []
    execute: Any = psycopg.Cursor.execute
    fetch_all: Any = psycopg.Cursor.fetchall
    fetch_one: Any = psycopg.Cursor.fetchone
    iterate: Any = psycopg.Cursor.__iter__
    call: Any = Redis.execute_command

    def execute_counted(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        statements.append(str(query))
        return execute(self, query, *arguments, **options)

    def waited_for(look: Any) -> Any:
        def counted(self: Any) -> Any:
            if self.pgresult is None:
                statements.append(WAIT)
            return look(self)

        return counted

    def call_counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(str(arguments[0]))
        return call(self, *arguments, **options)

    def drain(messages: list[TagBatch]) -> Work:
        tenant.send(*messages)
        with monkeypatch.context() as patch:
            patch.setattr(psycopg.Cursor, "execute", execute_counted)
            patch.setattr(psycopg.Cursor, "fetchall", waited_for(fetch_all))
            patch.setattr(psycopg.Cursor, "fetchone", waited_for(fetch_one))
            patch.setattr(psycopg.Cursor, "__iter__", waited_for(iterate))
            patch.setattr(Redis, "execute_command", call_counted)
            statements.clear()
            calls.clear()
            # Only the drain itself: the fixture listens to what is published.
            assert Tenant.drain(tenant, group_size=1000) == len(messages)
            return [each for each in statements if each != DISCARD_PLANS], calls[:]

    return drain


def test_a_drain_is_the_same_work_for_one_operation_and_for_a_thousand(counted: Any) -> None:
    """Nine statements and the commit, in two pieces, and two Redis calls, however many batches and operations there are."""
    sizes = [(1, 1), (1, 100), (50, 1), (100, 10)]
    adding = [counted(batches(*size, name=f"{size}")) for size in sizes]
    for statements, calls in adding:
        assert statements == adding[0][0]
        assert calls == ["EVALSHA", "EVALSHA"]
        assert [each == WAIT for each in statements] == [*[False] * 5, True, *[False] * 5]
    removing = [counted(removals(batches(*size, name=f"{size}"))) for size in sizes]
    for statements, calls in removing:
        assert statements == removing[0][0]
        assert calls == ["EVALSHA", "EVALSHA"]
        assert [each == WAIT for each in statements] == [*[False] * 5, True, *[False] * 5]


def test_batches_that_come_again_are_looked_up_at_once(counted: Any) -> None:
    """A repeated group costs the look-ups, and no more for more of them."""
    sent = batches(60, 2, name="again")
    counted(sent)
    (one, _), (many, _) = counted(sent[:1]), counted(sent)
    assert one == many
    assert len(one) == 7


def test_a_drain_reads_no_more_rows_when_more_is_stored(
    counted: Any, tenant: Tenant, servers: Servers
) -> None:
    """What a drain looks up, it looks up by its whole key, also in tables of which the planner knows nothing yet.

    A plan is made once for each connection, and one that suits an empty table would be kept while it grows.
    """

    def rows_read_so_far() -> int:
        """The drain makes a new connection."""
        with tenant.repository._connection() as connected:
            pid = connected.info.backend_pid
        tenant.repository.close()
        return rows_read(servers, pid)

    def cost(messages: list[TagBatch]) -> int:
        before = rows_read_so_far()
        counted(messages)
        return rows_read_so_far() - before

    few, many, last = (batches(count, 2, name=f"of {count}") for count in (5, 300, 6))
    first = [cost(few), cost(few)]
    counted(many)
    assert [cost(last[:5]), cost(last[:5])] == first
    assert cost(few) == first[1]
    assert cost(removals(last[:5])) == cost(removals(few))


# --- A database that was just made ----------------------------------------------------------------

MISLEADING = 15
"""Batches of ten tags, after which either index seems to do for a look-up, and the wrong one seems to be the cheaper one."""


@pytest.fixture
def young(servers: Servers) -> Iterator[Servers]:
    """The same servers, with a database of its own that nobody has used."""

    with own_database(servers, "young") as young:
        migrate(young.owner_url, {})
        yield young


def test_a_plan_from_a_misleading_moment_is_not_kept_by_a_drain(
    young: Servers, organization: UUID
) -> None:
    """A connection whose first plan reads an organization's tags one by one soon makes a better one."""
    first, drain = Repository(young.worker_url), Repository(young.worker_url)
    applied(first, organization, RegisterExecution(flow_execution_id=EXECUTION))
    applied(first, organization, *batches(MISLEADING, 10, "first"))
    first.close()
    rounds, operations = 60, 20
    for number in range(rounds):
        applied(drain, organization, *batches(10, operations // 10, f"round {number}"))
    drain.close()
    # It would be 740 rows for each operation, were the plan kept.
    assert rows_read(young) < 20 * rounds * operations


def test_a_plan_from_a_misleading_moment_is_not_kept_by_the_endpoint(
    young: Servers, organization: UUID
) -> None:
    repository, reader = Repository(young.worker_url), Reader(young.endpoint_url, connections=1)
    first = Repository(young.worker_url)
    applied(first, organization)  # adds the organization, which takes a transaction more
    first.close()
    empty = RegisterExecution(flow_execution_id=organization)
    applied(repository, organization, RegisterExecution(flow_execution_id=EXECUTION), empty)
    applied(repository, organization, *batches(MISLEADING, 10, "first"))

    async def read() -> None:
        for number in range(100):
            await reader.tags(organization, empty.flow_execution_id, None)
            if number == 0:
                applied(repository, organization, *batches(300, 10, "more"))
        reader.close()

    asyncio.run(read())
    repository.close()
    # It would be 3,000 rows for each read, were the plan kept.
    assert rows_read(young) < 20 * 100
