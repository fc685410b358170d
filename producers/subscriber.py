"""Subscribes to results and to changes, across lost connections.

Pub/sub keeps nothing for a subscriber that is away. A lost result is asked for by enqueuing the
same batch again, which `TagProducer.apply` does; who asks for all changes (`after`) gets them from
the endpoint, which reads what is stored.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar
from uuid import UUID

import httpx
from pydantic import ValidationError
from redis.exceptions import RedisError

from producers.contract.channels import changes_channel, results_channel
from producers.contract.results import ChangeEvent, ResultRecord, Tag
from producers.contract.values import REPLY_TO_PATTERN
from producers.endpoint import client_options, execution_id, stream_changes
from producers.pubsub import EventQueue, LoopThread, PubSubMultiplexer, flatten
from producers.redis_client import open_async_redis, redis_unavailable
from producers.settings import ProducerSettings, check_timeout, load_settings, token_source
from producers.waiting import TagWaits

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5

Published = TypeVar("Published", ResultRecord, ChangeEvent)


class Subscriber:
    """Receives the results of a `reply_to`, or the changes of an execution, of one organization.

    Arguments that are left out come from the environment (`ProducerSettings`). `token` may be a
    function that returns a token, for use beyond the validity of one token. Iterate with `for`,
    or with `async for` over the methods whose names begin with `a`. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        *,
        redis_url: str | None = None,
        organization_id: UUID | str | None = None,
        endpoint_url: str | None = None,
        token: str | Callable[[], str] | None = None,
    ) -> None:
        self._settings: ProducerSettings = load_settings(
            redis_url=redis_url,
            organization_id=organization_id,
            endpoint_url=endpoint_url,
            token=None if callable(token) else token,
        )
        self._token = token
        self._organization_id = self._settings.required_organization_id
        self._thread = LoopThread("task-tags-subscriber", self._begin)
        self._closed = threading.Event()
        self._begin()

    def _begin(self) -> None:
        """Begin without waits, also in a fork: those of its parent end there."""
        self._waits = TagWaits(self._client)

    def results(
        self, reply_to: str, *, on_subscribed: Callable[[], None] | None = None
    ) -> Iterator[ResultRecord]:
        """Yield the result records published for this `reply_to` (or batch id), without end.

        Args:
            on_subscribed: Called when the subscription begins: what is published from then on is
                yielded. After a lost connection it is called again. It runs in the event loop:
                it must not block.

        Raises:
            ValueError: The contract does not allow this `reply_to`.
            Unavailable: Redis can't be reached at the start; later, the iteration waits for it.
        """
        return self._thread.iterate(self._results(reply_to, on_subscribed))

    def changes(
        self,
        flow_execution_id: UUID | str,
        after: int | str | None = None,
        *,
        on_subscribed: Callable[[], None] | None = None,
    ) -> Iterator[ChangeEvent]:
        """Yield the change events of an execution, without end; a gap in `revision` is a loss.

        Args:
            after: A revision, or `<revision>-<t>` as an ETag has it, which is checked. All events
                after it are yielded in order, without a gap or a repetition: they come from the
                endpoint, with the token.
            on_subscribed: As in `results`.

        Raises:
            Unavailable: Redis or, with `after`, the endpoint can't be reached at the start; later,
                the iteration waits for it.
            ConfigurationError, RevisionExpired, ChangesRefused: Only with `after`.
        """
        return self._thread.iterate(self._changes(flow_execution_id, after, on_subscribed))

    def organization_changes(
        self,
        after: str = "0",
        *,
        task_name: Sequence[str] = (),
        tag_type: Sequence[str] = (),
        tag: Sequence[str] = (),
        flow_id: Sequence[str] = (),
        on_cursor: Callable[[str], None] | None = None,
    ) -> Iterator[ChangeEvent]:
        """Yield the change events of all executions behind a cursor, in order and without end.

        They come from the endpoint, with the token; none is lost or repeated. To continue later,
        store the `cursor` of the last event.

        Args:
            after: A cursor; `0` is the beginning, `latest` the end.
            task_name, tag_type, tag, flow_id: Yield only what has one of these values.
            on_cursor: Called with each place that is reached, also if no event there matches. It
                runs in the event loop: it must not block.

        Raises:
            Unavailable: The endpoint can't be reached at the start; later, the iteration waits for
                it.
            RevisionExpired: The events behind this place are not stored; `cursor` of the exception
                is where to continue after reading what one is interested in again.
            ConfigurationError, ChangesRefused: Retrying does not help.
        """
        filters = {"task_name": task_name, "tag_type": tag_type, "tag": tag, "flow_id": flow_id}
        return self._thread.iterate(self._stream(after, on_cursor, filters=filters))

    def aorganization_changes(
        self,
        after: str = "0",
        *,
        task_name: Sequence[str] = (),
        tag_type: Sequence[str] = (),
        tag: Sequence[str] = (),
        flow_id: Sequence[str] = (),
        on_cursor: Callable[[str], None] | None = None,
    ) -> AsyncIterator[ChangeEvent]:
        """As `organization_changes`, for asyncio."""
        filters = {"task_name": task_name, "tag_type": tag_type, "tag": tag, "flow_id": flow_id}
        return flatten(self._stream(after, on_cursor, filters=filters))

    def wait_for(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str | None = None,
        timeout: float | None = None,
    ) -> Tag:
        """Wait until a tag is active on a task, and return it; at once if it is active.

        All waits share one stream of the organization's changes. They last through restarts of the
        endpoint, Redis and the database.

        Args:
            tag: Without it, any tag of the type.
            timeout: Seconds to wait; None is without end, 0 only looks whether it is active.

        Raises:
            ValueError: The time-out is negative or no number.
            WaitTimeout: With the tags of the type that are active instead.
            Unavailable: The endpoint can't be reached at the start.
            ConfigurationError, ChangesRefused: Retrying does not help.
        """
        named = flow_execution_id, task_name, tag_type, tag
        waiting = self._thread.submit(self._wait_for(*named, timeout))
        try:
            return waiting.result()
        finally:
            waiting.cancel()

    async def await_for(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str | None = None,
        timeout: float | None = None,
    ) -> Tag:
        """As `wait_for`, for asyncio."""
        named = flow_execution_id, task_name, tag_type, tag
        return await asyncio.wrap_future(self._thread.submit(self._wait_for(*named, timeout)))

    def aresults(
        self, reply_to: str, *, on_subscribed: Callable[[], None] | None = None
    ) -> AsyncIterator[ResultRecord]:
        """As `results`, for asyncio."""
        return flatten(self._results(reply_to, on_subscribed))

    def achanges(
        self,
        flow_execution_id: UUID | str,
        after: int | str | None = None,
        *,
        on_subscribed: Callable[[], None] | None = None,
    ) -> AsyncIterator[ChangeEvent]:
        """As `changes`, for asyncio."""
        return flatten(self._changes(flow_execution_id, after, on_subscribed))

    def close(self) -> None:
        """End all iterations, each within half a second."""
        self._closed.set()
        self._thread.close()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Subscriber:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _results(
        self, reply_to: str, on_subscribed: Callable[[], None] | None
    ) -> AsyncGenerator[Sequence[ResultRecord], None]:
        if not re.fullmatch(REPLY_TO_PATTERN, str(reply_to)):
            raise ValueError("reply_to: must be 1 to 200 of the characters A-Z a-z 0-9 . _ : -")
        channel = results_channel(self._organization_id, reply_to)
        return self._published(channel, ResultRecord, on_subscribed)

    def _changes(
        self,
        flow_execution_id: UUID | str,
        after: int | str | None,
        on_subscribed: Callable[[], None] | None,
    ) -> AsyncGenerator[Sequence[ChangeEvent], None]:
        execution = execution_id(flow_execution_id)
        if after is None:
            channel = changes_channel(self._organization_id, execution)
            return self._published(channel, ChangeEvent, on_subscribed)
        options = {"flow_execution_id": execution, "on_open": on_subscribed or (lambda: None)}
        return self._stream(str(after), None, **options)

    async def _published(
        self, channel: str, model: type[Published], on_subscribed: Callable[[], None] | None
    ) -> AsyncGenerator[Sequence[Published], None]:
        """Yield what is published on a channel. Raises `Unavailable` if Redis can't be reached."""
        async with open_async_redis(self._settings.redis_url.get_secret_value()) as redis:
            try:
                await redis.ping()
            except (RedisError, OSError) as error:
                raise redis_unavailable(error) from error
            pubsub, events = PubSubMultiplexer(redis), EventQueue(on_subscribed)
            with pubsub.listening(channel, events):
                async with pubsub.running():
                    while not self._closed.is_set():
                        yield list(_decoded(await events.take(POLL_SECONDS), model))

    async def _stream(
        self, after: str, on_cursor: Callable[[str], None] | None, **options: Any
    ) -> AsyncGenerator[Sequence[ChangeEvent], None]:
        async with (
            self._client() as client,
            aclosing(stream_changes(client, after, **options)) as changes,
        ):
            following = asyncio.ensure_future(anext(changes))
            try:
                while not self._closed.is_set():
                    done, _ = await asyncio.wait([following], timeout=POLL_SECONDS)
                    if done:
                        cursor, event = following.result()
                        if on_cursor is not None:
                            on_cursor(cursor)
                        if event is not None:
                            yield [event]
                        following = asyncio.ensure_future(anext(changes))
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _wait_for(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str | None,
        timeout: float | None,
    ) -> Tag:
        for text in (task_name, tag_type, "" if tag is None else tag):
            if not isinstance(text, str):
                raise TypeError(f"a name must be a string, not {type(text).__name__}")
        check_timeout(timeout)
        execution = execution_id(flow_execution_id)
        return await self._waits.wait_for(execution, task_name, tag_type, tag, timeout)

    def _client(self) -> httpx.AsyncClient:
        """Return a client of the endpoint. Raises `ConfigurationError`."""
        token = token_source(self._token, self._settings)
        return httpx.AsyncClient(**client_options(self._settings.endpoint_url, token))


def _decoded(events: Sequence[bytes], model: type[Published]) -> Iterator[Published]:
    """Yield what was published."""
    for event in events:
        try:
            yield model.decode(event)
        except ValidationError:
            logger.warning("skipped a publication that is not a %s", model.__name__)
