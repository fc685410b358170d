"""What a database session brings along does no harm: encodings, time zones, isolation, paths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from producers.contract.messages import TagBatch, add, register_execution
from producers.contract.results import ResultRecord
from producers.contract.values import Uuid7
from tests.support.database import own_database
from tests.support.servers import Servers
from tests.support.tenant import applied, requests_of
from worker.api.queries import Reader
from worker.db.migrate import migrate
from worker.db.repository import Repository
from worker.drain.application import apply_in_transaction

HOSTILE = {
    "client_encoding": "LATIN1",
    "timezone": "Europe/Berlin",
    "datestyle": "SQL, DMY",
    "intervalstyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "default_transaction_isolation": "repeatable read",
    "default_transaction_read_only": "on",
    "search_path": "nowhere",
    "row_security": "off",
    "statement_timeout": "1",
    "lock_timeout": "0",
    "synchronous_commit": "off",
}


@pytest.fixture(scope="module")
def hostile(servers: Servers) -> Iterator[Servers]:
    """A database whose sessions begin with settings that nobody would choose."""
    with own_database(servers, "hostile") as own:
        migrate(own.owner_url, {})
        with own.owner() as connection:
            for name, value in HOSTILE.items():
                connection.execute(f"alter database hostile set {name} = '{value}'".encode())
        yield own


@pytest.mark.parametrize("suffix", ["", "&client_encoding=LATIN1"])
def test_the_main_path_is_the_same_under_hostile_settings(
    hostile: Servers, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts keep their code points, times are UTC, the same add is found again, reads agree."""
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    organization, execution = uuid4(), uuid4()
    repository = Repository(hostile.worker_url + suffix)
    applied(repository, organization, register_execution(execution))
    batch = [add(execution, "café", "état", "naïve 名", {"é": 1e300})]
    first = applied(repository, organization, TagBatch(tags=batch))
    again = apply_in_transaction(
        repository, organization, requests_of(TagBatch(tags=batch)), Uuid7()
    )
    repository.close()
    assert [ResultRecord.decode(each.record).statuses for each in again[0]] == [["already_exists"]]
    assert b"Z" in first.outcomes[0].record
    assert b"+0" not in first.outcomes[0].record
    (tag,) = asyncio.run(tags(hostile.endpoint_url + suffix, organization, execution))
    assert (tag["task_name"], tag["tag_type"], tag["tag"]) == ("café", "état", "naïve 名")
    assert tag["tag_metadata"] == {"é": 1e300}
    assert tag["created_at"].endswith("Z")
    record = json.loads(first.outcomes[0].record)
    assert tag["created_at"][:19] == record["applied_at"][:19]


async def tags(url: str, organization: UUID, execution: UUID) -> list[dict[str, Any]]:
    reader = Reader(url, connections=1)
    found = await reader.tags(organization, execution, None)
    reader.close()
    assert found is not None
    return list(json.loads(found[1] or b""))


def test_time_never_runs_back_under_contention(servers: Servers) -> None:
    """It is read behind the lock: each transaction's is later than that of the one before."""
    organization = uuid4()
    repositories = [Repository(servers.worker_url) for _ in range(2)]
    times = []
    for number in range(200):
        repository = repositories[number % 2]
        times.append(repository.transact(organization, lambda transaction: transaction.now))
    for repository in repositories:
        repository.close()
    assert times == sorted(times)


def test_two_first_drains_of_an_organization_at_once(servers: Servers) -> None:
    """Both add its row, one of them in vain, and both go on."""

    async def main() -> list[object]:
        repositories = [Repository(servers.worker_url) for _ in range(2)]
        organizations = [uuid4() for _ in range(10)]
        found: list[object] = []
        for organization in organizations:
            jobs = [
                asyncio.to_thread(each.transact, organization, lambda transaction: transaction.now)
                for each in repositories
            ]
            found += await asyncio.gather(*jobs, return_exceptions=True)
        for each in repositories:
            each.close()
        return found

    found = asyncio.run(main())
    unexpected = [
        each
        for each in found
        if isinstance(each, Exception) and not isinstance(each, psycopg.errors.LockNotAvailable)
    ]
    assert not unexpected
