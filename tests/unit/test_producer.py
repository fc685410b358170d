"""TagProducer without a server: what it refuses at once, and when it gives up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import AsyncTagProducer, TagProducer
from producers.contract.messages import add, register_execution, split_batches
from producers.contract.values import batch_id_for
from producers.errors import ConfigurationError, ProducerClosed, Unavailable

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


@pytest.mark.parametrize("other", [{"tags": []}, None, "text", b"{}", add(uuid4(), "t", "y", "x")])
def test_what_is_no_message_is_refused_before_anything_is_sent(
    producer: TagProducer, other: Any
) -> None:
    """A text could be encoded, too."""
    for use in (producer.enqueue, producer.submit, producer.apply):
        with pytest.raises(TypeError, match="a message is expected"):
            use(other)
    with pytest.raises(TypeError, match="a message is expected"):
        producer.enqueue_many([MESSAGE, other])


def test_apply_gives_up_at_its_time_out_while_redis_is_away(producer: TagProducer) -> None:
    """It took 5 s before, whatever the time-out."""
    began = time.monotonic()
    with pytest.raises(Unavailable):
        producer.apply(MESSAGE, timeout=0.1)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("returned", ["two words", "", "ä", b"bytes", None, "x" * 9000])
def test_what_a_function_for_the_token_returns_is_checked_and_never_quoted(returned: Any) -> None:
    """As the setting is: it is no token, so nothing is sent."""
    with TagProducer(**AWAY | {"token": lambda: returned}) as producer:
        with pytest.raises(
            ConfigurationError, match="the result of the function for the token"
        ) as caught:
            producer.enqueue(MESSAGE)
    assert not returned or str(returned) not in str(caught.value)


def test_more_than_100_operations_are_split_into_batches() -> None:
    """In their order; with a batch id, under the same ids each time."""
    operations = [add(uuid4(), "review", "status", str(number)) for number in range(250)]
    parts = split_batches(operations, batch_id_for("run", "step"))
    assert [len(part.tags) for part in parts] == [100, 100, 50]
    assert [each for part in parts for each in part.tags] == operations
    assert parts == split_batches(operations, batch_id_for("run", "step"))
    assert len({part.batch_id for part in parts + split_batches(operations)}) == 6
    assert split_batches([]) == []


def test_a_step_has_one_batch_id_in_each_run() -> None:
    """It is the id that `--ids-from` gives to a line."""
    assert batch_id_for("run", 1) == UUID("f7a34db1-924b-5d10-be9a-f1308b97c951")
    assert len({batch_id_for(run, step) for run in ("a", "b") for step in ("x", "y")}) == 4


def test_a_closed_producer_enqueues_nothing() -> None:
    """It does not connect again."""
    producer = TagProducer(**AWAY)
    producer.close()
    for use in (producer.enqueue, producer.submit, producer.apply):
        with pytest.raises(ProducerClosed):
            use(MESSAGE)
