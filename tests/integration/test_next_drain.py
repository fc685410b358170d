"""A worker takes the next drain messages from the queue itself, and Celery still has its turn."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis import Redis

from producers.contract.channels import inbox_key
from producers.contract.messages import register_execution
from producers.inbox.drain_message import QUEUE, drain_message, task_message
from producers.inbox.protocol import Inbox
from tests.support.processes import await_line, settings_of, started
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.broker import PURGE_TASK, create_app, next_drain
from worker.local.stack import WORKER


def never() -> bool:
    return False


def in_a_second() -> float:
    return time.monotonic() + 1


def test_drains_are_taken_in_the_order_of_the_queue(quiet_redis: Redis) -> None:
    """A malformed message is dropped."""
    ids = [uuid4(), uuid4()]
    for organization_id in ids:
        quiet_redis.lpush(QUEUE, drain_message(organization_id, str(uuid4())))
        quiet_redis.lpush(QUEUE, b"junk")
    assert [next_drain(quiet_redis, in_a_second(), never) for _ in ids] == ids


def test_what_is_for_celery_goes_back_to_where_it_was(quiet_redis: Redis) -> None:
    """And ends the turn: nothing overtakes it."""
    purge = task_message(PURGE_TASK, str(uuid4()), [])
    quiet_redis.lpush(QUEUE, purge)
    quiet_redis.lpush(QUEUE, drain_message(uuid4(), str(uuid4())))
    for _ in range(2):
        assert next_drain(quiet_redis, in_a_second(), never) is None
    assert quiet_redis.llen(QUEUE) == 2
    assert quiet_redis.rpop(QUEUE) == purge


@pytest.mark.parametrize(("seconds", "stopping"), [(-1, False), (0.0, False), (30, True)])
def test_nothing_is_taken_when_the_time_is_up(
    quiet_redis: Redis, seconds: float, stopping: bool
) -> None:
    """What is in the queue is another worker's, or the next process's."""
    quiet_redis.lpush(QUEUE, drain_message(uuid4(), str(uuid4())))
    assert next_drain(quiet_redis, time.monotonic() + seconds, lambda: stopping) is None
    assert quiet_redis.llen(QUEUE) == 1


def test_a_queue_that_stays_empty_is_left_at_the_deadline(quiet_redis: Redis) -> None:
    """And a message that comes before is taken."""
    assert next_drain(quiet_redis, time.monotonic() + 0.05, never) is None
    organization_id = uuid4()
    message = drain_message(organization_id, str(uuid4()))
    timer = threading.Timer(0.1, lambda: quiet_redis.lpush(QUEUE, message))
    timer.start()
    assert next_drain(quiet_redis, time.monotonic() + 20, never) == organization_id
    timer.join()  # it reads its answer before the connection is closed


# --- With a worker -------------------------------------------------------------------------------


def enqueue(servers: Servers, redis: Redis, organization_id: UUID, count: int = 1) -> None:
    messages = [register_execution(uuid4()).encode() for _ in range(count)]
    token = servers.token(organization_id)
    assert Inbox(redis, organization_id).append(messages, token, str(uuid4())) == count


@contextmanager
def worker(servers: Servers, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """Run a worker on the other Redis database, with a Celery app to control it."""
    url, log = servers.stack.redis_url.replace("?db=0", "?db=1"), tmp_path / "log"
    with started(WORKER, log, settings_of(servers, TASK_TAGS_REDIS_URL=url)) as process:
        await_line(log, '"ready"')
        yield process, create_app("control", url).control


def test_a_worker_drains_many_inboxes_for_one_message_of_celery(
    servers: Servers, quiet_redis: Redis, tmp_path: Path
) -> None:
    """Celery counts its tasks: fewer than there were drains."""
    organizations = [uuid4() for _ in range(60)]
    for each in organizations:
        enqueue(servers, quiet_redis, each)
    with worker(servers, tmp_path) as (_, control):
        eventually(lambda: not any(quiet_redis.xlen(inbox_key(each)) for each in organizations))
        (stats,) = control.inspect(timeout=10, limit=1).stats().values()
        assert 1 <= stats["total"]["task_tags.drain"] < 30


def test_remote_control_and_shutdown_have_their_turn_under_full_load(
    servers: Servers, quiet_redis: Redis, tmp_path: Path
) -> None:
    """Each within 5 s: half a second on a quiet machine."""
    organizations = [uuid4() for _ in range(8)]
    with worker(servers, tmp_path) as (process, control):
        for each in organizations:
            enqueue(servers, quiet_redis, each, 9_000)
        eventually(lambda: quiet_redis.xlen(inbox_key(organizations[0])) < 9_000)
        began = time.monotonic()
        assert control.inspect(timeout=20, limit=1).ping()
        assert time.monotonic() - began < 5
        began = time.monotonic()
        process.terminate()
        process.wait(30)
        assert time.monotonic() - began < 5
        assert any(quiet_redis.xlen(inbox_key(each)) for each in organizations)
