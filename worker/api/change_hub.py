"""The change feeds that are watched in this process: one Redis subscription for all watchers.

Workers announce each transaction with change events. An announcement only says that there are new
events: they are read from the table, once for all watchers at the end of a feed. Pub/sub may lose
an announcement, so the key that has the last cursor is compared with what was read there before,
every 2 s. If it differs, if a subscription has begun, and every 30 s, the last events are read from
the table, so that watchers find what was lost, and a history that a restore has replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final
from uuid import UUID

import psycopg
from pydantic_core import from_json
from redis import asyncio as async_redis
from redis.exceptions import RedisError

from producers.contract.channels import position_key, positions_channel
from producers.contract.cursors import Cursor
from producers.pubsub import Listener, PubSubMultiplexer, wait_at_most
from worker.api.change_queries import StoredChanges
from worker.api.changes import stored_changes
from worker.api.errors import ApiError
from worker.api.queries import Reader

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
"""The longest time between two looks at the keys of positions."""
LOOK_SECONDS: Final = 30.0
"""The longest time between two looks at the last events in the table."""
_RETRY_SECONDS: Final = 1.0
_GATHER_SECONDS: Final = 0.02
_MAX_ASKED: Final = 1000
_PAGE_EVENTS: Final = 100
_PAGE_BYTES: Final = 64 * 1024
_MAX_KEPT_BYTES: Final = 256 * 1024

Event = tuple[Cursor, bytes]
"""A change event as it was published, and the place behind it."""


class Feed:
    """The change events of an organization, or of one of its executions.

    The newest of them are kept for the watchers that are at the end of the feed.
    """

    def __init__(self, read: Callable[[Cursor], Awaitable[StoredChanges]]) -> None:
        self.watchers = 0
        self.news = 0
        """Counts what may have brought new events."""
        self.head: Cursor | None = None
        """The last event, as the table was last read."""
        self._read = read
        self._moved = asyncio.Event()
        self._reading = asyncio.Lock()
        self._kept: deque[Event] = deque()
        self._kept_bytes = 0
        self._begin: Cursor | None = None
        self._end: Cursor | None = None
        """The places before and behind the events that are kept."""
        self._read_at = -1
        """`news` at the last read that found no newer event."""

    def wake(self) -> None:
        self.news += 1
        self._move()

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def compare(self, head: Cursor) -> None:
        """Wake the watchers if the last event in the table is another one than before."""
        if head != self.head:
            self.head = head
            self._move()

    async def wait_past(self, after: Cursor, news: int) -> None:
        """Wait until there may be more behind a place than when `news` had this value."""
        while self.news == news and self._is_head(after):
            await self._moved.wait()

    def _is_head(self, place: Cursor) -> bool:
        if self.head is None or place.time is None:
            return self.head is None or self.head.number == place.number
        return self.head == place

    async def next(self, after: Cursor) -> Sequence[Event]:
        """Return the next events behind a place; none if there are none.

        Raises `ApiError` as `stored_changes` does, and what reading the database raises.
        """
        if after != self._end:
            return self._kept_after(after) or await self._load(after)
        async with self._reading:  # one read for all watchers at the end
            if after != self._end:
                return self._kept_after(after) or await self._load(after)
            if self._read_at == self.news and self._is_head(after):
                return ()
            return await self._load(after)

    async def _load(self, after: Cursor) -> Sequence[Event]:
        news = self.news
        try:
            found = await self._read(after)
        except ApiError:
            self._keep(None, ())  # what was kept may be of the history that was replaced
            raise
        self.compare(found.head)
        if after == self._end or found.head == (found.events or [(after, b"")])[-1][0]:
            self._keep(after, found.events)
            self._read_at = -1 if found.events else news
        return found.events

    def _keep(self, after: Cursor | None, events: Sequence[Event]) -> None:
        """Keep events that end the feed."""
        if after != self._end or after is None:
            self._kept.clear()
            self._kept_bytes, self._begin = 0, after
        self._end = events[-1][0] if events else after
        for each in events:
            self._kept.append(each)
            self._kept_bytes += len(each[1])
        while self._kept_bytes > _MAX_KEPT_BYTES:
            self._begin, event = self._kept.popleft()
            self._kept_bytes -= len(event)

    def _kept_after(self, after: Cursor) -> Sequence[Event]:
        """Return the kept events behind a place between them."""
        if self._begin is None:
            return ()
        place = after.number - self._begin.number
        if not 0 <= place < len(self._kept):
            return ()
        found = self._kept[place - 1][0] if place else self._begin
        return list(islice(self._kept, place, None)) if found == after else ()


@dataclass(eq=False)
class _Organization(Listener):
    """What is watched of an organization: its own feed, by None, and those of executions."""

    refresh: Callable[[], None]
    feeds: dict[UUID | None, Feed] = field(default_factory=dict)
    subscription: ExitStack = field(default_factory=ExitStack)
    due: bool = True
    """Whether the last events are to be read from the table."""
    key: bytes | None = None
    """The value of the key of its position, as it was last read."""
    looked_at: float = 0.0

    def on_subscribed(self) -> None:
        self.due = True
        self.refresh()

    def on_event(self, payload: bytes) -> None:
        try:
            touched = from_json(payload)["flow_executions"]
            names = list(self.feeds) if touched is None else [None, *map(UUID, touched)]
        except (ValueError, LookupError, TypeError, AttributeError):
            logger.warning("skipped a publication that announces no change events")
            return
        for name in names:
            if feed := self.feeds.get(name):
                feed.wake()


@dataclass
class ChangeHub:
    """The feeds that are watched in this process. `run` keeps them up to date."""

    pubsub: PubSubMultiplexer
    redis: async_redis.Redis
    reader: Reader
    _organizations: dict[UUID, _Organization] = field(default_factory=dict)
    _refresh: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return sum(len(each.feeds) for each in self._organizations.values())

    @contextmanager
    def watch(self, organization_id: UUID, flow_execution_id: UUID | None) -> Iterator[Feed]:
        """Watch an execution, or all of them, until the block ends."""
        organization = self._organizations.get(organization_id)
        if organization is None:
            organization = _Organization(self._refresh.set)
            self._organizations[organization_id] = organization
            listening = self.pubsub.listening(positions_channel(organization_id), organization)
            organization.subscription.enter_context(listening)
        feed = organization.feeds.get(flow_execution_id)
        if feed is None:
            feed = organization.feeds[flow_execution_id] = Feed(
                partial(self._read, organization_id, flow_execution_id)
            )
        feed.watchers += 1
        try:
            yield feed
        finally:
            feed.watchers -= 1
            if not feed.watchers:
                del organization.feeds[flow_execution_id]
            if not organization.feeds:
                del self._organizations[organization_id]
                organization.subscription.close()

    async def _read(
        self, organization_id: UUID, flow_execution_id: UUID | None, after: Cursor
    ) -> StoredChanges:
        feed = self.reader, organization_id, flow_execution_id
        return await stored_changes(*feed, after, limit=_PAGE_EVENTS, max_bytes=_PAGE_BYTES)

    async def run(self) -> None:
        """Look for lost announcements until cancelled: every 2 s, or at once if asked to."""
        while True:
            await wait_at_most(POLL_SECONDS, self._refresh.wait())
            self._refresh.clear()
            try:
                await self._poll()
            except Exception as error:  # without this loop, watchers would miss lost events
                if not isinstance(error, (psycopg.Error, TimeoutError)):
                    logger.exception("last events can't be read")
                self._refresh.set()
                await asyncio.sleep(_RETRY_SECONDS)
            await asyncio.sleep(_GATHER_SECONDS)  # one read for watchers that arrive together

    async def _poll(self) -> None:
        watched = list(self._organizations.items())
        if not watched:
            return
        try:
            keys: Sequence[Any] = await self.redis.mget([position_key(id) for id, _ in watched])
        except (RedisError, OSError):
            keys = [None] * len(watched)
            for _, organization in watched:
                organization.due = True
        now = asyncio.get_running_loop().time()
        for (id, organization), key in zip(watched, keys, strict=True):
            if (
                organization.due
                or key != organization.key
                or (now - organization.looked_at > LOOK_SECONDS)
            ):
                organization.due = True
                organization.key = key
                await self._look(id, organization)
                organization.due, organization.looked_at = False, now

    async def _look(self, organization_id: UUID, organization: _Organization) -> None:
        """Read the last events of all feeds from the table."""
        names = [name for name in organization.feeds if name is not None]
        for first in range(0, max(1, len(names)), _MAX_ASKED):
            head, heads = await self.reader.heads(
                organization_id, names[first : first + _MAX_ASKED]
            )
            for name, each in [(None, head), *heads.items()]:
                if feed := organization.feeds.get(name):
                    feed.compare(each)
