"""Work that is counted, not timed: a drain's does not depend on how much it applies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from redis import Redis
from redis.connection import AbstractConnection

from producers.contract.messages import (
    RegisterExecution,
    TagBatch,
    add,
    register_execution,
    remove,
)
from tests.support.database import own_database
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, Tenant, applied
from tests.support.waiting import eventually
from worker.api.queries import Reader
from worker.auth import Authorizer
from worker.db.connection import DISCARD_PLANS
from worker.db.migrate import migrate
from worker.db.pg_pipeline import Pipeline, Sent
from worker.db.repository import Repository

CONNECTED = """
    select from pg_stat_activity
     where datname = current_database() and pid <> pg_backend_pid()
       and backend_type = 'client backend'
"""
ROWS_READ = """
    select sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))
      from pg_stat_user_tables
       where relname = any('{flow_executions, task_tags, tag_batches, tag_changes}')
"""
ASKED = "(the answers up to here are asked for)"
PIECES = [*[False] * 3, True, *[False] * 3, True, *[False] * 5]
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


def rows_read(servers: Servers) -> int:
    """Return how many rows have been read in all, in a database that nobody else uses.

    Connections report that when they end, at the latest. So this waits until every one has ended.
    In the database of all tests, those of the worker and of tests before would count as well.
    """
    with servers.owner() as connection:
        eventually(lambda: not connection.execute(CONNECTED).fetchall(), 60)
        ((total,),) = connection.execute(ROWS_READ).fetchall()
    return int(total)


@pytest.fixture
def counted(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> Any:
    return counting(tenant, monkeypatch)


def counting(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what drains messages, and returns the SQL statements and Redis calls of that.

    Where the answers are asked for is among them.
    Each Redis call is a round trip. The statement that discards plans is left out: it is executed
    in the 2nd, 4th, 8th … transaction of a connection.
    """
    statements: list[str] = []
    calls: list[str] = []
    send, ask = Pipeline.send, Pipeline.ask
    call: Any = AbstractConnection.send_command

    def send_counted(self: Pipeline, statement: str, values: Any) -> Sent:
        statements.append(statement)
        return send(self, statement, values)

    def ask_counted(self: Pipeline) -> None:
        statements.append(ASKED)
        ask(self)

    def call_counted(self: Any, *arguments: Any, **options: Any) -> Any:
        if arguments[0] not in ("HELLO", "AUTH", "CLIENT", "SELECT"):  # of a new connection
            calls.append(str(arguments[0]))
        return call(self, *arguments, **options)

    def drain(messages: list[TagBatch]) -> Work:
        tenant.send(*messages)
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "send", send_counted)
            patch.setattr(Pipeline, "ask", ask_counted)
            patch.setattr(AbstractConnection, "send_command", call_counted)
            statements.clear()
            calls.clear()
            # Only the drain itself: the fixture listens to what is published.
            assert Tenant.drain(tenant, group_size=1000) == len(messages)
            return [each for each in statements if each != DISCARD_PLANS], calls[:]

    return drain


def test_a_drain_is_the_same_work_for_one_operation_and_for_a_thousand(counted: Any) -> None:
    """For any number: eleven statements, with begin and commit, in three pieces; two Redis calls.

    The pieces are the lock, the look-ups and the writes.
    """
    sizes = [(1, 1), (1, 100), (25, 1), (25, 40)]
    adding = [counted(batches(*size, name=f"{size}")) for size in sizes]
    for statements, calls in adding:
        assert statements == adding[0][0]
        assert calls == ["EVALSHA", "EVALSHA"]
        assert [each == ASKED for each in statements] == PIECES
    removing = [counted(removals(batches(*size, name=f"{size}"))) for size in sizes]
    for statements, calls in removing:
        assert statements == removing[0][0]
        assert calls == ["EVALSHA", "EVALSHA"]
        assert [each == ASKED for each in statements] == PIECES


def test_a_large_group_is_saved_in_parts(counted: Any) -> None:
    """The last statements are sent once more for each 25 batches, in the one transaction."""
    (one, _), (many, calls) = counted(batches(1, 1, "one")), counted(batches(60, 1, "many"))
    assert many == [*one[:-1], *one[-5:-1], *one[-5:-1], one[-1]]
    assert calls == ["EVALSHA", "EVALSHA"]


def test_batches_that_come_again_are_looked_up_at_once(counted: Any) -> None:
    """A repeated group costs the look-ups, and no more for more of them."""
    sent = batches(60, 2, name="again")
    counted(sent)
    (one, _), (many, _) = counted(sent[:1]), counted(sent)
    assert one == many
    assert len(one) == 9


# --- A database that was just made ----------------------------------------------------------------

MISLEADING = 15
"""Batches of ten tags after which the wrong index for a look-up seems to be the cheaper one."""


@pytest.fixture
def young(servers: Servers) -> Iterator[Servers]:
    """The same servers, with a fresh database."""

    with own_database(servers, "young") as young:
        migrate(young.owner_url, {})
        yield young


def test_a_plan_from_a_misleading_moment_is_not_kept_by_a_drain(
    young: Servers, organization: UUID
) -> None:
    """The first plan reads an organization's tags one by one; it is soon replaced by a better."""
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


def test_a_drain_reads_no_more_rows_when_more_is_stored(
    young: Servers,
    quiet_redis: Redis,
    authorizer: Authorizer,
    organization: UUID,
    token: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Look-ups use the whole key, also in tables of which the planner has no statistics yet.

    A connection makes a plan once, and would keep one that suits an empty table while it grows.
    """
    repository = Repository(young.worker_url)
    tenant = Tenant(young, quiet_redis, repository, authorizer, organization, token)
    counted = counting(tenant, monkeypatch)
    tenant.send(register_execution(EXECUTION))
    tenant.drain()

    def cost(messages: list[TagBatch]) -> int:
        repository.close()  # the drain makes a new connection
        before = rows_read(young)
        counted(messages)
        repository.close()
        return rows_read(young) - before

    few, many, last = (batches(count, 2, name=f"of {count}") for count in (5, 300, 6))
    first = [cost(few), cost(few)]
    counted(many)
    assert [cost(last[:5]), cost(last[:5])] == first
    assert cost(few) == first[1]
    assert cost(removals(last[:5])) == cost(removals(few))
