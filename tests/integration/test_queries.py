"""Reads on shared connections: each gets its own answer, also if others or the server fail."""

from __future__ import annotations

import asyncio
import json
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import make_url

from producers.contract.messages import TagBatch, add, register_execution
from tests.support.servers import Servers
from tests.support.tenant import applied
from worker.api.queries import PREPARED, Reader
from worker.db.connection import UnsafeRole
from worker.db.pg_pipeline import PipelinedConnection, Row
from worker.db.repository import Repository


@asynccontextmanager
async def reading(url: str, connections: int = 2) -> AsyncIterator[Reader]:
    reader = Reader(url, connections)
    yield reader
    reader.close()


@pytest.fixture
def tagged(repository: Repository) -> list[tuple[UUID, UUID]]:
    """Organizations with an execution each; the first has one tag, the second two, …"""
    found = []
    for number in range(1, 6):
        organization, execution = uuid4(), uuid4()
        tags = [add(execution, "task", "type", f"{n}") for n in range(number)]
        applied(repository, organization, register_execution(execution), TagBatch(tags=tags))
        found.append((organization, execution))
    return found


async def names(reader: Reader, organization: UUID, execution: UUID) -> list[str] | None:
    found = await reader.tags(organization, execution, None)
    if found is None:
        return None
    tags = json.loads(found[1] or b"")
    assert {tag["organization_id"] for tag in tags} == {str(organization)}
    return [tag["tag"] for tag in tags]


def test_a_socket_may_be_in_a_directory_with_a_space(servers: Servers) -> None:
    """As in a home directory of somebody's: the endpoint takes the URL as the worker does."""
    url = make_url(servers.endpoint_url)
    with tempfile.TemporaryDirectory(prefix="a space ") as short:
        Path(short, "run").symlink_to(str(url.query["host"]))
        quoted = quote(f"{short}/run")
        spaced = (
            f"postgresql://{url.username}:{url.password}@/{url.database}?host={quoted}&port=5432"
        )

        async def main() -> None:
            async with reading(spaced) as reader:
                await reader.check()

        asyncio.run(main())


def test_many_readers_at_once_get_their_own_answers(
    servers: Servers, tagged: list[tuple[UUID, UUID]]
) -> None:
    """A thousand reads of five organizations on two connections; foreign executions are unknown."""

    async def main() -> None:
        async with reading(servers.endpoint_url) as reader:
            asked = [(a, b) for a in range(5) for b in range(5)] * 40
            answers = await asyncio.gather(
                *(names(reader, tagged[a][0], tagged[b][1]) for a, b in asked)
            )
            for (a, b), answer in zip(asked, answers, strict=True):
                assert answer == ([f"{n}" for n in range(a + 1)] if a == b else None)

    asyncio.run(main())


def test_an_answer_that_nobody_waits_for_is_not_given_to_another(
    servers: Servers, tagged: list[tuple[UUID, UUID]]
) -> None:
    """Questions are taken back at any moment; those that stay get their own answers."""

    async def main() -> None:
        async with reading(servers.endpoint_url, 1) as reader:
            tasks = [
                asyncio.create_task(names(reader, *tagged[number % 5])) for number in range(200)
            ]
            await names(reader, *tagged[0])
            tasks += [
                asyncio.create_task(names(reader, *tagged[number % 5])) for number in range(200)
            ]
            await asyncio.sleep(0)
            for task in tasks[1::2]:
                task.cancel()
            for number, task in list(enumerate(tasks))[::2]:
                assert await task == [f"{n}" for n in range(number % 200 % 5 + 1)]

    asyncio.run(main())


def test_connections_that_were_lost_are_made_anew(
    servers: Servers, tagged: list[tuple[UUID, UUID]]
) -> None:
    """After a restart of the server nobody gets an error for a connection of the time before."""

    async def main() -> None:
        async with reading(servers.endpoint_url) as reader:
            await asyncio.gather(*(names(reader, *each) for each in tagged))
            with servers.owner() as connection:
                connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where usename = 'task_tags_endpoint'"
                )
            answers = await asyncio.gather(*(names(reader, *each) for each in tagged))
            assert [len(answer or []) for answer in answers] == [1, 2, 3, 4, 5]

    asyncio.run(main())


def test_a_read_that_fails_or_takes_too_long_ends_with_an_error_and_the_next_is_answered(
    servers: Servers, tagged: list[tuple[UUID, UUID]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the table is locked: after the server's time-out for locks or the reader's own."""

    async def main() -> None:
        async with reading(servers.endpoint_url, 1) as reader:
            await names(reader, *tagged[0])
            with servers.owner() as connection, connection.transaction():
                connection.execute("lock table task_tags in access exclusive mode")
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    await names(reader, *tagged[0])
                monkeypatch.setattr("worker.api.queries.READ_SECONDS", 0.2)
                with pytest.raises(TimeoutError):
                    await names(reader, *tagged[0])
            monkeypatch.undo()
            assert await names(reader, *tagged[1]) == ["0", "1"]

    asyncio.run(main())


NAP = {"nap (uuid, double precision)": "select pg_sleep($2)::text where $1 is not null"}


async def nap(connection: PipelinedConnection, seconds: float) -> Row | None:
    return await connection.ask(uuid4(), b"nap", [struct.pack("!d", seconds)])


def test_a_statement_that_takes_too_long_fails_alone(servers: Servers) -> None:
    """The server ends it after 2 s; those that share its connection are answered."""

    async def main() -> None:
        connection = PipelinedConnection(servers.endpoint_url, NAP)
        naps = [nap(connection, 60 if number == 3 else 0) for number in range(8)]
        found = await asyncio.gather(*naps, return_exceptions=True)
        assert [isinstance(each, tuple) for each in found] == [number != 3 for number in range(8)]
        assert isinstance(found[3], psycopg.errors.QueryCanceled)
        connection.close(psycopg.OperationalError())

    asyncio.run(main())


def test_a_statement_that_nobody_waits_for_is_cancelled(servers: Servers) -> None:
    """Where it is under way, and where it waits behind others that are."""

    async def main() -> None:
        connection = PipelinedConnection(servers.endpoint_url, NAP)
        await nap(connection, 0)
        began = asyncio.get_running_loop().time()
        abandoned = [asyncio.create_task(nap(connection, 1.9)) for _ in range(10)]
        await asyncio.sleep(0.1)
        for each in abandoned:
            each.cancel()
        while True:
            try:
                await nap(connection, 0)
            except psycopg.errors.QueryCanceled:
                continue  # a cancellation that came late
            break
        assert asyncio.get_running_loop().time() - began < 5  # without, it would be 19
        connection.close(psycopg.OperationalError())

    asyncio.run(main())


def test_of_many_reads_that_nobody_waits_for_few_are_run(servers: Servers) -> None:
    """Those that end before they could be cancelled; the others are never sent."""

    async def main() -> None:
        connection = PipelinedConnection(servers.endpoint_url, NAP)
        await nap(connection, 0)
        abandoned = [asyncio.create_task(nap(connection, 0.045)) for _ in range(600)]
        await asyncio.sleep(0.1)
        assert len(connection) > 500
        began = asyncio.get_running_loop().time()
        for each in abandoned:
            each.cancel()
        with suppress(psycopg.errors.QueryCanceled):
            await nap(connection, 0)
        assert asyncio.get_running_loop().time() - began < 15  # 1.5 s; all of them take 27 s
        assert len(connection) == 0
        connection.close(psycopg.OperationalError())

    asyncio.run(main())


def test_nobody_waits_behind_the_large_reads_of_another_organization(
    servers: Servers, tagged: list[tuple[UUID, UUID]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for results, revisions and readiness, of any organization."""
    (slow,) = (name for name in PREPARED if name.startswith("changes"))
    monkeypatch.setitem(
        PREPARED, slow, "select 1::bigint, null, null, null, null, pg_sleep(1.5)::text"
    )

    async def main() -> None:
        (greedy, its), *others = tagged
        async with reading(servers.endpoint_url, 4) as reader:
            large = [
                asyncio.create_task(reader.changes(greedy, its, 0, 1, 1000)) for _ in range(20)
            ]
            await asyncio.sleep(0)  # they wait for connections, which are opened now
            for organization, execution in others:
                assert await names(reader, organization, execution)
            _, heads = await reader.heads(greedy, [its])
            assert heads[its].number == 1
            assert await reader.record(greedy, uuid4()) is None
            await reader.check()
            assert not any(task.done() for task in large)
            for task in large:
                task.cancel()

    asyncio.run(main())


def test_a_connection_that_has_lost_its_statements_is_replaced(
    servers: Servers, tagged: list[tuple[UUID, UUID]]
) -> None:
    """As behind a pooler, or after DEALLOCATE: no read fails for it, nor those behind it."""

    async def main() -> None:
        async with reading(servers.endpoint_url, 1) as reader:
            assert await names(reader, *tagged[0]) == ["0"]
            opened = reader._connections[0]._connection
            assert opened is not None
            opened.pgconn.send_query_params(b"deallocate all", [])
            found = await asyncio.gather(*(names(reader, *each) for each in tagged))
            assert [len(tags or []) for tags in found] == [1, 2, 3, 4, 5]

    asyncio.run(main())


def test_a_role_that_sees_through_row_level_security_is_refused(servers: Servers) -> None:
    """As at the start of the endpoint, also when it connects later."""

    async def main() -> None:
        async with reading(servers.owner_url) as reader:
            with pytest.raises(UnsafeRole):
                await reader.check()

    asyncio.run(main())


def test_a_server_that_is_away_is_an_error() -> None:
    """Not an empty answer."""

    async def main() -> None:
        async with reading("postgresql://nobody@localhost:1/none") as reader:
            with pytest.raises(psycopg.OperationalError):
                await names(reader, uuid4(), uuid4())

    asyncio.run(main())
