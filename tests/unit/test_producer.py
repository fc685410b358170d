"""TagProducer without a server: what it refuses at once, and when it gives up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from producers.client import AsyncTagProducer, TagProducer
from producers.contract.messages import register_execution
from producers.errors import ProducerClosed, Unavailable

AWAY: Any = {
    "redis_url": "redis://127.0.0.1:1/0",
    "organization_id": uuid4(),
    "token": "not-a-jwt",
    "inbox_limit": 10,
}
MESSAGE = register_execution(uuid4())


@pytest.fixture
def producer() -> Iterator[TagProducer]:
    with TagProducer(**AWAY) as producer:
        yield producer


@pytest.mark.parametrize("timeout", [-1, -0.1, math.nan, "3", True])
def test_a_time_out_that_is_none_is_refused_before_anything_is_sent(
    producer: TagProducer, timeout: Any
) -> None:
    """Both producers say so, whether Redis is there or not."""
    with pytest.raises(ValueError, match="timeout must be a number of seconds"):
        producer.apply(MESSAGE, timeout=timeout)

    async def apply() -> None:
        async with AsyncTagProducer(**AWAY) as same:
            await same.apply(MESSAGE, timeout=timeout)

    with pytest.raises(ValueError, match="timeout must be a number of seconds"):
        asyncio.run(apply())


def test_apply_gives_up_at_its_time_out_while_redis_is_away(producer: TagProducer) -> None:
    """It took 5 s before, whatever the time-out."""
    began = time.monotonic()
    with pytest.raises(Unavailable):
        producer.apply(MESSAGE, timeout=0.1)
    assert time.monotonic() - began < 2


def test_a_closed_producer_enqueues_nothing() -> None:
    """It does not connect again."""
    producer = TagProducer(**AWAY)
    producer.close()
    for use in (producer.enqueue, producer.submit, producer.apply):
        with pytest.raises(ProducerClosed):
            use(MESSAGE)
