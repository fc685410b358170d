"""The executions that are watched in this process: one Redis subscription for all watchers.

Pub/sub may lose an event, repeat it or deliver it late, and does not report it. So the last
revisions are read from the table whenever a subscription begins, and every 2 s. `GapFiller` puts
the events in order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import psycopg
from pydantic_core import from_json

from producers.contract.channels import changes_channel
from producers.gap_filler import GapFiller
from producers.pubsub import Listener, PubSubMultiplexer, wait_at_most
from worker.api.queries import Reader

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
"""The longest time between two reads of the last revisions."""
_POLL_RETRY_SECONDS: Final = 1.0
_GATHER_SECONDS: Final = 0.02
_MAX_ASKED: Final = 1000


class ExecutionFeed(Listener):
    """A watched execution: its last known revision, and the newest of its published events."""

    def __init__(self, refresh: Callable[[], None]) -> None:
        self.watchers = 0
        self._refresh = refresh
        self._events: GapFiller[bytes] = GapFiller()
        self._moved = asyncio.Event()
        self.buffered_after = self._events.buffered_after

    @property
    def revision(self) -> int:
        """The last revision that is known here."""
        return self._events.last

    def on_subscribed(self) -> None:
        self._refresh()

    def on_event(self, payload: bytes) -> None:
        try:
            revision = from_json(payload)["revision"]
        except (ValueError, LookupError, TypeError):
            revision = None
        if not isinstance(revision, int):
            logger.warning("skipped a publication that is not a change event")
            return
        before = self.revision
        self._events.receive(revision, payload, len(payload))
        self._wake(before)

    def advance(self, revision: int) -> None:
        """Take over a revision of the table, if it is greater than the one known here."""
        before = self.revision
        self._events.advance(revision)
        self._wake(before)

    def reconcile(self, stored: int, assumed: int) -> None:
        """Take over the last revision of the table, even if it is less than the one known here.

        Args:
            stored: The last revision in the table.
            assumed: The revision known here when the table was read.
        """
        before = self.revision
        if self._events.reconcile(stored, assumed):
            self._refresh()
        self._wake(before)

    async def wait_past(self, revision: int) -> None:
        """Wait until a later revision is known."""
        while self.revision <= revision:
            await self._moved.wait()

    def _wake(self, before: int) -> None:
        if self.revision > before:
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()


@dataclass
class ChangeHub:
    """The feeds of all executions that are watched in this process. `run` keeps them up to date."""

    pubsub: PubSubMultiplexer
    reader: Reader
    _feeds: dict[tuple[UUID, UUID], ExecutionFeed] = field(default_factory=dict)
    _refresh: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return len(self._feeds)

    @contextmanager
    def watch(self, organization_id: UUID, flow_execution_id: UUID) -> Iterator[ExecutionFeed]:
        """Watch an execution until the block ends; all its watchers share one subscription."""
        key = organization_id, flow_execution_id
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = ExecutionFeed(self._refresh.set)
        feed.watchers += 1
        try:
            with self.pubsub.listening(changes_channel(*key), feed):
                yield feed
        finally:
            feed.watchers -= 1
            if not feed.watchers and self._feeds.get(key) is feed:
                del self._feeds[key]

    async def run(self) -> None:
        """Read the last revisions until cancelled: every 2 s, or at once if a feed asks for it."""
        while True:
            await wait_at_most(POLL_SECONDS, self._refresh.wait())
            self._refresh.clear()
            try:
                await self._poll()
            except Exception as error:  # without this loop, watchers would miss lost events
                if not isinstance(error, (psycopg.Error, TimeoutError)):
                    logger.exception("revisions can't be read")
                self._refresh.set()
                await asyncio.sleep(_POLL_RETRY_SECONDS)
            await asyncio.sleep(_GATHER_SECONDS)  # one read for watchers that arrive together

    async def _poll(self) -> None:
        by_organization: dict[UUID, list[UUID]] = {}
        for organization_id, flow_execution_id in self._feeds:
            by_organization.setdefault(organization_id, []).append(flow_execution_id)
        for organization_id, executions in by_organization.items():
            for first in range(0, len(executions), _MAX_ASKED):
                some = executions[first : first + _MAX_ASKED]
                found = await self.reader.revisions(organization_id, some)
                for flow_execution_id, revision in found.items():
                    if feed := self._feeds.get((organization_id, flow_execution_id)):
                        feed.advance(revision)
