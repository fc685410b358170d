"""What the SDK's callers rely on while a result, room or a subscription does not come."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import AsyncTagProducer, TagProducer
from producers.contract.channels import inbox_key, lease_key
from producers.contract.messages import register_execution
from producers.errors import InboxFull, ResultTimeout
from tests.support.servers import Servers


@contextmanager
def held(redis: Any, organization: UUID, lease: str = "running by-the-test") -> Iterator[None]:
    """Let nobody drain the inbox of an organization, and empty it at the end."""
    redis.set(lease_key(organization), lease, px=60_000)
    try:
        yield
    finally:
        redis.delete(inbox_key(organization), lease_key(organization))


def test_eight_that_wait_for_room_do_not_hold_up_a_ninth(servers: Servers, redis: Any) -> None:
    """In one event loop, whose default executor has fewer threads than that."""
    full, other = uuid4(), uuid4()

    def producer(organization: UUID) -> AsyncTagProducer:
        return AsyncTagProducer(
            redis_url=servers.stack.redis_url,
            organization_id=organization,
            token=servers.token(organization),
            inbox_limit=1,
        )

    async def main() -> None:
        async with producer(full) as waiting, producer(other) as free:
            await waiting.enqueue(register_execution(uuid4()))
            many = [
                asyncio.create_task(waiting.enqueue_many([register_execution(uuid4())], block=60))
                for _ in range(8)
            ] + [
                asyncio.create_task(waiting.submit(register_execution(uuid4()), block=60))
                for _ in range(8)
            ]
            record = await free.apply(register_execution(uuid4()), timeout=30)
            assert record.statuses == ["registered"]
            assert [each.done() for each in many] == [False] * 16
            for each in many:
                each.cancel()
            with pytest.raises(InboxFull):
                await waiting.enqueue_many([register_execution(uuid4())], block=0.05)

    with held(redis, full):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("lease", "known"),
    [
        ("running by-the-test", ("running", "a worker drains it")),
        ("queued by-the-test", ("queued", "is a worker running?")),
    ],
)
def test_a_time_out_says_what_is_known(
    servers: Servers, redis: Any, lease: str, known: tuple[str, str]
) -> None:
    """The batch was accepted; how many wait, and what the lease says. Both producers say it."""
    organization = uuid4()
    arguments: Any = {
        "redis_url": servers.stack.redis_url,
        "organization_id": organization,
        "token": servers.token(organization),
    }

    async def apply() -> None:
        async with AsyncTagProducer(**arguments) as producer:
            await producer.apply(register_execution(uuid4()), timeout=0.1)

    with held(redis, organization, lease), TagProducer(**arguments) as producer:
        with pytest.raises(ResultTimeout) as caught:
            producer.apply(register_execution(uuid4()), timeout=0.1)
        with pytest.raises(ResultTimeout) as caught_too:
            asyncio.run(apply())
    state, words = known
    assert (caught.value.waiting, caught.value.lease) == (1, state)
    assert "no result in 0.1 s; the batch was accepted, and 1 message(s)" in str(caught.value)
    assert words in str(caught.value)
    assert (caught_too.value.waiting, caught_too.value.lease) == (2, state)
