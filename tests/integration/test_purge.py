"""The hourly purge by a real worker: in turn with drains, and past organizations that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from producers.client import TagProducer
from producers.contract.messages import TagBatch, add, register_execution
from producers.inbox.drain_message import QUEUE, task_message
from producers.redis_client import open_redis
from tests.support.database import own_database
from tests.support.processes import settings_of, started
from tests.support.servers import Servers
from tests.support.tenant import applied
from tests.support.waiting import eventually
from worker.broker import PURGE_TASK
from worker.db.migrate import migrate
from worker.db.repository import Repository
from worker.local.stack import WORKER

LOCKED, FAILING = UUID(int=1), UUID(int=2)  # the first ones in the order of a purge
OTHERS = sorted(uuid4() for _ in range(10))
DRAINED = uuid4()


@dataclass
class Purged:
    """A database that a purge has gone through, and the log of its worker."""

    owner: psycopg.Connection
    redis: Any
    log: Path
    locking: psycopg.Connection
    """The session that has locked a row of `LOCKED` since before the purge."""

    def entries(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line[0] == "{" and line[-1] == "\n"]

    def ends(self) -> int:
        """Return how often a purge has come to its end."""
        return len([e for e in self.entries() if e["message"] == "purged" and "rows" not in e])

    def stored(self) -> set[UUID]:
        """Return the organizations with a stored result or the first of their change events."""
        rows = self.owner.execute(
            "select organization_id from tag_batches union "
            "select organization_id from tag_changes where position = 1"
        ).fetchall()
        return {organization for (organization,) in rows}


def send_purge(redis: Any) -> None:
    redis.lpush(QUEUE, task_message(PURGE_TASK, str(uuid4()), []))


def fill(database: Servers) -> None:
    """Store results and change events that are 31 days old, for organizations without inboxes."""
    repository, execution = Repository(database.worker_url), uuid4()
    batches = [TagBatch(tags=[add(execution, "task", "type", tag)]) for tag in ("first", "last")]
    for organization in (LOCKED, FAILING, *OTHERS):
        applied(repository, organization, register_execution(execution), *batches)
    repository.close()
    with database.owner() as owner:
        owner.execute(
            """
            insert into tag_batches (organization_id, batch_id, digest, result_record, revisions,
                                     event_bytes, applied_at)
            select organization_id, gen_random_uuid(), digest, result_record, revisions,
                   event_bytes, applied_at
              from tag_batches, generate_series(1, 2500)
             where (organization_id, batch_id) = (%s, %s)
            """,
            [OTHERS[0], batches[0].batch_id],
        )
        owner.execute("update tag_batches set applied_at = applied_at - interval '31 days'")
        owner.execute("update tag_changes set changed_at = changed_at - interval '31 days'")


def break_deletion(owner: psycopg.Connection) -> None:
    owner.execute(
        "create function refuse() returns trigger language plpgsql as "
        "$$ begin raise exception 'broken'; end $$"
    )
    owner.execute(
        "create trigger broken before delete on tag_batches for each row "
        f"when (old.organization_id = '{FAILING}') execute function refuse()".encode()
    )


@pytest.fixture(scope="module")
def purged(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Purged]:
    """A purge and a drain wait in the queue, in this order, as the worker starts."""
    log = tmp_path_factory.mktemp("purge") / "worker"
    redis_url = servers.stack.redis_url.replace("?db=0", "?db=5")
    with ExitStack() as stack:
        database = stack.enter_context(own_database(servers, "purged"))
        migrate(database.owner_url, {})
        fill(database)
        owner, locking = (stack.enter_context(database.owner()) for _ in range(2))
        break_deletion(owner)
        locking.autocommit = False
        locking.execute(
            "select from tag_batches where organization_id = %s limit 1 for update", [LOCKED]
        )
        redis: Any = stack.enter_context(open_redis(redis_url))
        redis.flushdb()
        send_purge(redis)
        producer = stack.enter_context(
            TagProducer(redis_url=redis_url, organization_id=DRAINED, token=servers.token(DRAINED))
        )
        result = producer.submit(register_execution(uuid4()))
        environment = settings_of(
            database,
            TASK_TAGS_REDIS_URL=redis_url,
            TASK_TAGS_CHANGES_RETENTION_DAYS="30",  # as it is for results by default
            TASK_TAGS_DRAIN_BUDGET_SECONDS="0.001",
            TASK_TAGS_LOG_LEVEL="DEBUG",
        )
        stack.enter_context(started(WORKER, log, environment))
        assert result.result(30).statuses == ["registered"]
        purged = Purged(owner, redis, log, locking)
        eventually(purged.ends)
        yield purged
        locking.rollback()


def test_a_purge_and_drains_take_turns(purged: Purged) -> None:
    """Past its budget it sends itself again: a drain that waits has its turn, then it goes on."""
    order = [
        "drain" if entry["message"] == "drain" else entry["organization"]
        for entry in purged.entries()
        if entry["message"] == "drain" or "rows" in entry
    ]
    assert order.count("drain") >= 1
    last = str(OTHERS[-1])
    assert order.index("drain") < order.index(last)
    once = list(dict.fromkeys(each for each in order if each != "drain"))
    assert once == [str(each) for each in OTHERS]
    assert order.count(str(OTHERS[0])) >= 3  # it deletes 1,000 rows in a turn
    assert purged.ends() == 1
    assert not purged.redis.llen(QUEUE)


def test_an_organization_that_fails_keeps_no_other_from_being_purged(purged: Purged) -> None:
    """Neither a row that another session has locked, nor a statement that fails; both are logged.

    The others have no keys in Redis. What is younger than the retention stays.
    """
    assert purged.stored() == {LOCKED, FAILING, DRAINED}
    failures = {
        entry["organization"]: entry["error"]
        for entry in purged.entries()
        if entry["message"] == "an organization could not be purged"
    }
    assert failures == {str(LOCKED): "LockNotAvailable", str(FAILING): "RaiseException"}


def test_the_next_purge_makes_up_for_what_failed(purged: Purged) -> None:
    """Once the lock is gone and the fault is mended."""
    purged.locking.rollback()
    purged.owner.execute("drop trigger if exists broken on tag_batches")
    ends = purged.ends()
    send_purge(purged.redis)
    eventually(lambda: purged.ends() > ends)
    assert purged.stored() == {DRAINED}


def test_a_purge_waits_until_organizations_can_be_listed(purged: Purged) -> None:
    """It would otherwise end until the next hour."""
    ends, said = purged.ends(), "organizations can't be listed; retrying"
    purged.owner.execute("revoke select on organizations from task_tags_worker")
    try:
        send_purge(purged.redis)
        eventually(lambda: [each for each in purged.entries() if each["message"] == said])
        assert purged.ends() == ends
    finally:
        purged.owner.execute("grant select on organizations to task_tags_worker")
    eventually(lambda: purged.ends() > ends)
