"""What is published, for all who wait for it in this process: one Redis connection, one subscription for each channel.

Pub/sub may lose a message, repeat it or bring it late, and all that is silent. So of an execution that is watched only
its last revision is taken from there: the events themselves come from the few that were heard last if these are the next
ones, and from the table otherwise. And the table is asked for the last revision whenever a subscription begins
anew, and now and then.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final
from uuid import UUID

import psycopg
from pydantic_core import from_json
from redis import asyncio as async_redis

from producers.contract.messages import changes_channel
from worker.api.queries import Reader

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
"""So often the table is asked for last revisions, at least."""
_POLL_RETRY_SECONDS: Final = 1.0
_PING_SECONDS: Final = 5.0
_SILENCE_SECONDS: Final = 15.0
_MAX_BACKOFF_SECONDS: Final = 1.0
_RECENT_EVENTS: Final = 100
_RECENT_BYTES: Final = 256 * 1024


class Listener:
    """Somebody who hears a channel. What is published before `begin`, or while Redis is away, is not heard."""

    def begin(self) -> None:
        """The subscription has begun, for the first time or again."""

    def hear(self, payload: bytes) -> None:
        """This was published."""


class PubSubMultiplexer:
    """Subscribes to each channel that somebody listens to, on one connection, which is made again when it is lost."""

    def __init__(self, redis: async_redis.Redis) -> None:
        self._redis = redis
        self._listeners: dict[bytes, list[Listener]] = {}
        self._confirmed: set[bytes] = set()
        """What Redis said that it is subscribed."""
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._listeners)

    @contextmanager
    def listening(self, channel: str, listener: Listener) -> Iterator[None]:
        """Let a listener hear a channel."""
        name = channel.encode()
        self._listeners.setdefault(name, []).append(listener)
        self._changed.set()
        if name in self._confirmed:
            listener.begin()
        try:
            yield
        finally:
            self._listeners[name].remove(listener)
            if not self._listeners[name]:
                del self._listeners[name]
                self._changed.set()

    async def run(self) -> None:
        """Listen, for ever."""
        failures = 0
        while True:
            if not self._listeners:
                await self._changed.wait()
            connection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.connect()
                await self._listen(connection)
            except Exception as error:  # whatever it is, those who listen would wait for ever
                failures += 1
                if failures in (1, 10, 100):
                    name = type(error).__name__
                    logger.warning("Redis can't be listened to", extra={"error": name})
                if self._confirmed:
                    failures = 0
            finally:
                self._confirmed.clear()
                await connection.disconnect(nowait=True)
            await asyncio.sleep(min(0.05 * 2 ** min(failures, 10), _MAX_BACKOFF_SECONDS))

    async def _listen(self, connection: Any) -> None:
        """Subscribe to what is wanted and tell what comes, until the connection is lost.

        It is a plain connection, not redis-py's PubSub: that makes a lost one anew by itself, also in the middle of a
        read. A server that does not answer a ping in time is as good as gone.
        """
        subscribed: set[bytes] = set()
        heard_at = asyncio.get_running_loop().time()
        reading = changed = None
        try:
            while True:
                self._changed.clear()
                wanted = set(self._listeners)
                if new := wanted - subscribed:
                    await connection.send_command("SUBSCRIBE", *new)
                if old := subscribed - wanted:
                    self._confirmed -= old
                    await connection.send_command("UNSUBSCRIBE", *old)
                subscribed = wanted
                reading = reading or asyncio.create_task(connection.read_response(timeout=math.inf))
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait(
                    (reading, changed), timeout=_PING_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                now = asyncio.get_running_loop().time()
                if reading.done():
                    heard_at = now
                    self._tell(reading.result())
                    reading = None
                elif now - heard_at > _SILENCE_SECONDS:
                    raise ConnectionError("the server is silent")
                elif not changed.done():
                    await connection.send_command("PING")
                changed.cancel()
        finally:
            for task in (reading, changed):
                if task is not None:
                    task.cancel()
                    await asyncio.wait((task,), timeout=1)

    def _tell(self, answer: Any) -> None:
        if not isinstance(answer, list) or len(answer) != 3:
            return  # to a ping
        kind, channel, payload = answer
        listeners = self._listeners.get(channel, [])
        if kind == b"subscribe" and listeners:
            self._confirmed.add(channel)
        for listener in list(listeners):
            try:
                if kind == b"subscribe":
                    listener.begin()
                elif kind == b"message":
                    listener.hear(payload)
            except Exception:  # the others still wait for this task
                logger.exception("what was published could not be taken in")


Event = tuple[int, bytes]
"""A revision, and its change event as it was published."""


class ExecutionFeed(Listener):
    """An execution that somebody watches: its last revision, as far as is known, and the events that came last."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.revision = 0
        self.watchers = 0
        self._look = look
        self._recent: deque[Event] = deque()
        self._bytes = 0
        self._moved = asyncio.Event()

    def begin(self) -> None:
        self._look()

    def hear(self, payload: bytes) -> None:
        try:
            revision = from_json(payload)["revision"]
        except (ValueError, LookupError, TypeError):
            logger.warning("what was published is not a change event: skipped")
            return
        if not isinstance(revision, int) or revision <= self.revision:
            return  # it was heard before, or comes late
        if self._recent and self._recent[-1][0] != revision - 1:
            self._recent.clear()
            self._bytes = 0
        self._recent.append((revision, payload))
        self._bytes += len(payload)
        while len(self._recent) > _RECENT_EVENTS or self._bytes > _RECENT_BYTES:
            self._bytes -= len(self._recent.popleft()[1])
        self.advance(revision)

    def advance(self, revision: int) -> None:
        """The execution is known to have this revision: wake whoever waits for it."""
        if revision > self.revision:
            self.revision = revision
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    def settle(self, revision: int, believed: int) -> None:
        """The table had this revision when `believed` was known here: the table is right, whatever was published."""
        if revision < believed == self.revision:
            self.revision = revision
            self._recent.clear()
            self._bytes = 0
            self._look()  # what was heard meanwhile seemed to come late
        else:
            self.advance(revision)

    def recent(self, after: int) -> Sequence[Event]:
        """Return the events after a revision, or nothing if the next one is not among those that were kept."""
        if not self._recent or not self._recent[0][0] <= after + 1 <= self._recent[-1][0]:
            return ()
        return list(islice(self._recent, after + 1 - self._recent[0][0], None))

    async def beyond(self, revision: int) -> None:
        """Wait until the execution is known to have a later revision."""
        while self.revision <= revision:
            await self._moved.wait()


Key = tuple[UUID, UUID]
"""An organization and a flow execution."""


@dataclass
class ChangeHub:
    """All executions that are watched in this process."""

    channels: PubSubMultiplexer
    reader: Reader
    _watched: dict[Key, ExecutionFeed] = field(default_factory=dict)
    _look: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return len(self._watched)

    @contextmanager
    def watch(self, organization_id: UUID, flow_execution_id: UUID) -> Iterator[ExecutionFeed]:
        """Watch an execution. It is one subscription, however many watch the same."""
        key = organization_id, flow_execution_id
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = ExecutionFeed(self._look.set)
        watched.watchers += 1
        try:
            with self.channels.listening(changes_channel(*key), watched):
                yield watched
        finally:
            watched.watchers -= 1
            if not watched.watchers and self._watched.get(key) is watched:
                del self._watched[key]

    async def run(self) -> None:
        """Ask the table for last revisions, for ever: soon when something may have been missed, and now and then."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._look.wait()
            self._look.clear()
            try:
                await self._ask()
            except (
                Exception
            ) as error:  # whatever it is, those who watch would miss what is not published
                if not isinstance(error, (psycopg.Error, TimeoutError)):
                    logger.exception("revisions can't be read")
                self._look.set()
                await asyncio.sleep(_POLL_RETRY_SECONDS)
            await asyncio.sleep(0.02)  # whoever comes at the same moment is asked for together

    async def _ask(self) -> None:
        by_organization: dict[UUID, list[UUID]] = {}
        for organization_id, flow_execution_id in self._watched:
            by_organization.setdefault(organization_id, []).append(flow_execution_id)
        for organization_id, executions in by_organization.items():
            for number in range(0, len(executions), 1000):
                some = executions[number : number + 1000]
                found = await self.reader.revisions(organization_id, some)
                for flow_execution_id, revision in found.items():
                    if watched := self._watched.get((organization_id, flow_execution_id)):
                        watched.advance(revision)
