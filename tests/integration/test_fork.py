"""Forks of a process that is busy with the SDK: none hangs, and all ids are unique."""

from __future__ import annotations

import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import TagProducer
from producers.contract.channels import changes_channel
from producers.contract.messages import TagBatch, add, register_execution
from producers.contract.values import Uuid7, uuid7
from producers.subscriber import Subscriber
from producers.tag_reader import TagReader
from tests.support.servers import Servers
from tests.support.waiting import eventually

FORKS = 100
SECONDS = 10.0
AHEAD_US = time.time_ns() // 1000 + 3_600_000_000
"""A moment in an hour: where the parent's clock was, for its last id."""


def forked(work: Callable[[], str], meanwhile: Callable[[], object] = lambda: None) -> list[UUID]:
    """Run some work in a fork; return the ids that it gives, or fail if it takes too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    meanwhile()
    ended, _, _ = select.select([reading], [], [], SECONDS)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as output:
        said = output.read()
    assert said, "it hung" if not ended else "it failed"
    return [UUID(word) for word in said.split()]


@contextmanager
def busy_with_ids() -> Iterator[Uuid7]:
    """Make ids in two threads, so that a fork often comes while one has the generator's lock."""
    stopping, new_id = threading.Event(), Uuid7()

    def make() -> None:
        for us in itertools.count(AHEAD_US):  # a later time takes the longest way
            new_id(us)
            uuid7(AHEAD_US)
            if stopping.is_set():
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield new_id
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


@pytest.fixture
def listening(servers: Servers, producer: TagProducer, organization: UUID) -> Iterator[Subscriber]:
    """A subscriber whose thread receives changes, of an execution that nobody changes."""
    redis: Any = producer._enqueuer.redis
    execution = uuid4()
    with Subscriber(redis_url=servers.stack.redis_url, organization_id=organization) as subscriber:
        thread = threading.Thread(target=lambda: list(subscriber.changes(execution)), daemon=True)
        thread.start()
        eventually(lambda: redis.pubsub_numsub(changes_channel(organization, execution))[0][1])
        yield subscriber
    thread.join(SECONDS)


@pytest.mark.usefixtures("listening")
def test_no_fork_hangs_or_repeats_an_id() -> None:
    """By the system's clock, by one that went back, and by one that stands where the parent's was.

    While threads of the parent make ids and receive changes.
    """
    execution = uuid4()
    earlier = AHEAD_US - 7_200_000_000

    def ids() -> str:
        batch = TagBatch(tags=[add(execution, "task", "type", "tag")])
        return f"{batch.batch_id} {uuid7(AHEAD_US)} {uuid7(earlier)} {new_id(earlier)}"

    first = uuid7(AHEAD_US)
    with busy_with_ids() as new_id:
        made = [id for _ in range(FORKS) for id in forked(ids)]
    last = uuid7(AHEAD_US)
    assert len(set(made)) == len(made) == 4 * FORKS
    assert [id for id in made if first <= id <= last] == []  # the parent's


def test_forks_use_the_producer_and_subscriber_that_they_inherit(
    producer: TagProducer, listening: Subscriber, organization: UUID
) -> None:
    """Each applies a batch, and receives its change, on connections of its own."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    redis: Any = producer._enqueuer.redis
    channel = changes_channel(organization, execution)

    def work() -> str:
        changes = listening.changes(execution)
        received: list[UUID] = []
        thread = threading.Thread(target=lambda: received.append(next(changes).batch_id))
        thread.start()
        eventually(lambda: redis.pubsub_numsub(channel)[0][1], SECONDS)
        record = producer.apply(TagBatch(tags=[add(execution, "t", "t", f"{os.getpid()}")]))
        thread.join(SECONDS)
        return f"{record.batch_id} {received[0]}"

    with busy_with_ids():
        pairs = [forked(work) for _ in range(5)]
    assert all(applied == received for applied, received in pairs)
    assert len({applied for applied, _ in pairs}) == 5
    assert producer.apply(register_execution(execution)).statuses == ["already_exists"]


def test_forks_use_the_waits_and_the_reader_that_they_inherit(
    servers: Servers, producer: TagProducer, organization: UUID, token: str
) -> None:
    """They share no connection with the parent, which waits and reads at the same time."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    tag = "t", "t", "x"
    producer.apply(TagBatch(tags=[add(execution, *tag)]))
    endpoint = {"endpoint_url": servers.stack.endpoint_url, "token": token}
    with (
        TagReader(**endpoint) as reader,
        Subscriber(
            redis_url=servers.stack.redis_url, organization_id=organization, **endpoint
        ) as subscriber,
        ThreadPoolExecutor() as threads,
    ):
        waiting = threads.submit(subscriber.wait_for, execution, "t", "t", "y", 60)
        eventually(lambda: subscriber._waits is not None and subscriber._waits._client is not None)

        def read() -> str:
            found = [each.id for _ in range(100) for each in reader.list_tags(execution)]
            assert len(found) == 100
            return str(found[0])

        def work() -> str:
            return f"{read()} {subscriber.wait_for(execution, *tag, timeout=SECONDS / 2).id}"

        read()  # which opens the connection
        found = [forked(work, meanwhile=read) for _ in range(5)]
        assert len({id for pair in found for id in pair}) == 1
        producer.apply(TagBatch(tags=[add(execution, "t", "t", "y")]))
        assert waiting.result(SECONDS).tag == "y"
