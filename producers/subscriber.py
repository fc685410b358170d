"""Results and changes as they are published, across lost connections (design, sections 1 and 4).

Pub/sub keeps nothing for who is away. A lost result is asked for by enqueuing the same batch again (which
`TagProducer.apply` does); a lost change shows as a gap in the revisions.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Final
from uuid import UUID

from redis import Redis
from redis.exceptions import ConnectionError, TimeoutError

from producers.connect import open_redis
from producers.messages import ChangeEvent, ResultRecord, changes_channel, results_channel
from producers.settings import ProducerSettings, load_settings

TICK_SECONDS: Final = 0.5
LAST_BACKOFF_SECONDS: Final = 1.0


class Signal(Enum):
    """What `listen` tells besides payloads."""

    SUBSCRIBED = (
        "what is published from now on will be heard; what was published before may be lost"
    )
    QUIET = "nothing was published for a while"


def listen(
    redis: Redis, channels: Sequence[str], stop: threading.Event
) -> Iterator[bytes | Signal]:
    """Yield what is published on channels, for ever: a lost connection is made again, with a backoff.

    `SUBSCRIBED` comes first, once for each channel, and again after each loss. Something is yielded at least twice a second while
    there is a connection, so the caller can look at the clock.
    """
    failures = 0
    while not stop.is_set():
        try:
            with redis.pubsub() as pubsub:  # type: ignore[no-untyped-call]
                pubsub.subscribe(*channels)
                while not stop.is_set():
                    message = pubsub.get_message(timeout=TICK_SECONDS)
                    if message is None:
                        yield Signal.QUIET
                    elif message["type"] == "subscribe":
                        failures = 0
                        yield Signal.SUBSCRIBED
                    elif message["type"] == "message":
                        yield message["data"]
        except (ConnectionError, TimeoutError, OSError):
            failures += 1
            stop.wait(min(0.05 * 2**failures, LAST_BACKOFF_SECONDS))


class Subscriber:
    """Hears the results of a `reply_to`, or the changes of an execution, of one organization.

    Arguments that are left out come from the environment (`ProducerSettings`). Iterate with `for`, or with
    `async for` over the methods whose names begin with `a`. Raises `Misconfigured`.
    """

    def __init__(
        self, *, redis_url: str | None = None, organization_id: UUID | str | None = None
    ) -> None:
        settings: ProducerSettings = load_settings(
            redis_url=redis_url, organization_id=organization_id
        )
        self._organization_id = settings.required_organization_id
        self._redis = open_redis(settings.redis_url.get_secret_value())
        self._stop = threading.Event()

    def results(self, reply_to: str) -> Iterator[ResultRecord]:
        """Yield the result records that are published for this `reply_to` (or batch id), for ever."""
        for payload in self._payloads(results_channel(self._organization_id, reply_to)):
            yield ResultRecord.model_validate_json(payload)

    def changes(self, flow_execution_id: UUID) -> Iterator[ChangeEvent]:
        """Yield the change events of an execution, for ever; a gap in `revision` is a lost one."""
        for payload in self._payloads(changes_channel(self._organization_id, flow_execution_id)):
            yield ChangeEvent.model_validate_json(payload)

    async def aresults(self, reply_to: str) -> AsyncIterator[ResultRecord]:
        """As `results`, for asyncio."""
        channel = results_channel(self._organization_id, reply_to)
        async for payload in self._apayloads(channel):
            yield ResultRecord.model_validate_json(payload)

    async def achanges(self, flow_execution_id: UUID) -> AsyncIterator[ChangeEvent]:
        """As `changes`, for asyncio."""
        channel = changes_channel(self._organization_id, flow_execution_id)
        async for payload in self._apayloads(channel):
            yield ChangeEvent.model_validate_json(payload)

    def close(self) -> None:
        """End all iterations, each within half a second."""
        self._stop.set()
        # What another thread still listens on is closed there: see `listen`.
        self._redis.connection_pool.disconnect(inuse_connections=False)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _payloads(self, channel: str) -> Iterator[bytes]:
        for heard in listen(self._redis, [channel], self._stop):
            if isinstance(heard, bytes):
                yield heard

    async def _apayloads(self, channel: str) -> AsyncIterator[bytes]:
        """Listen in a thread of its own; one that is given up ends at its next tick."""
        loop = asyncio.get_running_loop()
        heard = listen(self._redis, [channel], self._stop)
        executor = ThreadPoolExecutor(1, thread_name_prefix="task-tags")
        try:
            while (payload := await loop.run_in_executor(executor, next, heard, None)) is not None:
                if isinstance(payload, bytes):
                    yield payload
        finally:
            executor.submit(heard.close)  # type: ignore[attr-defined]
            executor.shutdown(wait=False)
