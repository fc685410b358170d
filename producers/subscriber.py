"""Results and changes as they are published, across lost connections (design, sections 1 and 4).

Pub/sub keeps nothing for who is away. A lost result is asked for by enqueuing the same batch again (which
`TagProducer.apply` does); lost changes are read from the endpoint, for who asks for all (producers/change_feed.py).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Final, TypeVar, cast
from uuid import UUID

from pydantic import ValidationError
from redis import Redis
from redis.exceptions import ConnectionError, RedisError

from producers.change_feed import GapFiller, endpoint, fetch_from
from producers.contract.messages import ChangeEvent, ResultRecord, changes_channel, results_channel
from producers.errors import Unavailable
from producers.redis_client import open_redis
from producers.settings import ProducerSettings, load_settings

logger = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.5
PING_SECONDS: Final = 5.0
SILENCE_SECONDS: Final = 15.0
MAX_BACKOFF_SECONDS: Final = 1.0


class ListenEvent(Enum):
    """What `listen` tells besides payloads."""

    SUBSCRIBED = (
        "what is published from now on will be heard; what was published before may be lost"
    )
    QUIET = "nothing was published for a while"


def listen(
    redis: Redis, channels: Sequence[str], stop: threading.Event
) -> Iterator[bytes | ListenEvent]:
    """Yield what is published on channels, for ever: a lost connection is made again, with a backoff.

    `SUBSCRIBED` comes first, once for each channel, and again after each loss. Something is yielded at least
    once a second or so, so the caller can look at the clock.
    """
    failures = 0
    while not stop.is_set():
        try:
            for heard in _listen_once(redis, channels, stop):
                if heard is ListenEvent.SUBSCRIBED:
                    failures = 0
                yield heard
        except (RedisError, OSError) as error:
            failures += 1
            if failures == 3:
                logger.warning("can't listen, and will go on trying: %s", type(error).__name__)
            yield ListenEvent.QUIET
            stop.wait(min(0.05 * 2 ** min(failures, 10), MAX_BACKOFF_SECONDS))


def _listen_once(
    redis: Redis, channels: Sequence[str], stop: threading.Event
) -> Iterator[bytes | ListenEvent]:
    """Listen on one connection. A server that does not answer a ping in time is as good as gone."""
    with redis.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe(*channels)
        heard_at = pinged_at = time.monotonic()
        while not stop.is_set():
            message = pubsub.get_message(timeout=TICK_SECONDS)
            now = time.monotonic()
            if message is not None:
                heard_at = now
            elif now - heard_at > SILENCE_SECONDS:
                raise ConnectionError("the server is silent")
            elif now - max(heard_at, pinged_at) > PING_SECONDS:
                pinged_at = now
                pubsub.ping()
            if message is not None and message["type"] == "subscribe":
                yield ListenEvent.SUBSCRIBED
            elif message is not None and message["type"] == "message":
                yield message["data"]
            else:
                yield ListenEvent.QUIET


Published = TypeVar("Published", ResultRecord, ChangeEvent)


class Subscriber:
    """Hears the results of a `reply_to`, or the changes of an execution, of one organization.

    Arguments that are left out come from the environment (`ProducerSettings`). Iterate with `for`, or with
    `async for` over the methods whose names begin with `a`. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        *,
        redis_url: str | None = None,
        organization_id: UUID | str | None = None,
        endpoint_url: str | None = None,
        token: str | None = None,
    ) -> None:
        settings: ProducerSettings = load_settings(
            redis_url=redis_url,
            organization_id=organization_id,
            endpoint_url=endpoint_url,
            token=token,
        )
        self._settings = settings
        self._organization_id = settings.required_organization_id
        self._redis = open_redis(settings.redis_url.get_secret_value())
        self._stop = threading.Event()

    def results(self, reply_to: str) -> Iterator[ResultRecord]:
        """Yield the result records that are published for this `reply_to` (or batch id), for ever.

        Raises `Unavailable` if Redis can't be reached at the start; later it is waited for.
        """
        return self._now(self._results(reply_to, self._stop))

    def changes(self, flow_execution_id: UUID, after: int | None = None) -> Iterator[ChangeEvent]:
        """Yield the change events of an execution, for ever; a gap in `revision` is a lost one.

        With `after`, a revision, all events after that one are yielded, in order, without a gap or a repetition:
        what is not heard is read from the endpoint, with the token.

        Raises `Unavailable` if Redis, or the endpoint, can't be reached at the start; later they are waited for. With
        `after` also `ConfigurationError`, `RevisionExpired` and `ChangesRefused`.
        """
        return self._now(self._changes(flow_execution_id, after, self._stop))

    def aresults(self, reply_to: str) -> AsyncIterator[ResultRecord]:
        """As `results`, for asyncio."""
        stop = threading.Event()
        return self._later(self._results(reply_to, stop), stop)

    def achanges(
        self, flow_execution_id: UUID, after: int | None = None
    ) -> AsyncIterator[ChangeEvent]:
        """As `changes`, for asyncio."""
        stop = threading.Event()
        return self._later(self._changes(flow_execution_id, after, stop), stop)

    def close(self) -> None:
        """End all iterations, each within half a second."""
        self._stop.set()
        # What another thread still listens on is closed there: see `listen`.
        self._redis.connection_pool.disconnect(inuse_connections=False)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results(self, reply_to: str, stop: threading.Event) -> Iterator[ResultRecord | None]:
        """Yield results; None now and then, so that whoever iterates can look up."""
        channel = results_channel(self._organization_id, reply_to)
        for heard in listen(self._redis, [channel], stop):
            yield _parsed(heard, ResultRecord)

    def _changes(
        self, flow_execution_id: UUID, after: int | None, stop: threading.Event
    ) -> Iterator[ChangeEvent | None]:
        channel = changes_channel(self._organization_id, flow_execution_id)
        if after is None:
            for heard in listen(self._redis, [channel], stop):
                yield _parsed(heard, ChangeEvent)
            return
        with endpoint(self._settings.endpoint_url, self._settings.required_token) as client:
            feed = GapFiller(fetch_from(client, flow_execution_id), after)
            for heard in listen(self._redis, [channel], stop):
                if heard is ListenEvent.SUBSCRIBED:
                    yield from feed.on_subscribed()
                elif (event := _parsed(heard, ChangeEvent)) is not None:
                    yield from feed.on_event(event)
                else:
                    yield from feed.on_idle()
                yield None

    def _now(self, reports: Iterator[Published | None]) -> Iterator[Published]:
        self._reach()
        for report in reports:
            if report is not None:
                yield report

    async def _later(
        self, reports: Iterator[Published | None], stop: threading.Event
    ) -> AsyncIterator[Published]:
        """Iterate in a thread of its own; one that is given up ends at its next tick."""
        loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(1, thread_name_prefix="task-tags")
        ended = object()
        try:
            await loop.run_in_executor(executor, self._reach)
            while not self._stop.is_set():
                report = await loop.run_in_executor(executor, next, reports, ended)
                if report is ended:
                    return
                if report is not None:
                    yield cast(Published, report)
        finally:
            stop.set()
            executor.shutdown(wait=False)

    def _reach(self) -> None:
        try:
            self._redis.ping()
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis can't be used: {type(error).__name__}: {error}") from error


def _parsed(heard: bytes | ListenEvent, model: type[Published]) -> Published | None:
    if not isinstance(heard, bytes):
        return None
    try:
        return model.decode(heard)
    except ValidationError:
        logger.warning("what was published is not a %s: skipped", model.__name__)
        return None
