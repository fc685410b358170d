"""Waits for tags: all waits of a subscriber share one stream of the organization's changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard
from uuid import UUID

import httpx

from producers.contract.results import Change, ChangeEvent, Tag
from producers.endpoint import Page, get, last_cursor, read_answer, stream_changes
from producers.errors import RevisionExpired, Unavailable, WaitTimeout

logger = logging.getLogger(__name__)

_READS: Final = 50
"""Reads at the same time, when many waits begin."""
_RETRY_SECONDS: Final = 1.0
_LAST_LOOK_SECONDS: Final = 2.0
_FOUND: Final = 100
"""Tags that a time-out tells of, at most."""


@dataclass(eq=False)
class _Wait:
    flow_execution_id: UUID
    task_name: str
    tag_type: str
    tag: str | None
    found: asyncio.Future[Tag] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def query(self, *, any_of_type: bool = False) -> dict[str, Any]:
        """Return the parameters that ask for the tag, or for all of its type."""
        query = {
            "flow_execution_id": str(self.flow_execution_id),
            "task_name": self.task_name,
            "tag_type": self.tag_type,
        }
        return query if self.tag is None or any_of_type else {**query, "tag": self.tag}

    def end(self, tags: Iterable[Tag]) -> None:
        """End the wait if one of these tags is the one."""
        named = self.task_name, self.tag_type
        for tag in tags:
            is_wanted = (tag.task_name, tag.tag_type) == named and self.tag in (None, tag.tag)
            if is_wanted and not self.found.done():
                self.found.set_result(tag)

    def fail(self, error: Exception) -> None:
        """End the wait with an error, unless it has ended."""
        if not self.found.done():
            self.found.set_exception(error)


class TagWaits:
    """The waits of a subscriber, in one event loop. The stream is open while there is one.

    Args:
        open_client: Returns a new client of the endpoint.
    """

    def __init__(self, open_client: Callable[[], httpx.AsyncClient]) -> None:
        self._open_client = open_client
        self._waits: dict[UUID, list[_Wait]] = {}
        self._opening = asyncio.Lock()
        self._reads = asyncio.Semaphore(_READS)
        self._client: httpx.AsyncClient | None = None
        self._following: asyncio.Task[None] | None = None

    async def wait_for(
        self,
        flow_execution_id: UUID,
        task_name: str,
        tag_type: str,
        tag: str | None,
        timeout: float | None,
    ) -> Tag:
        wait = _Wait(flow_execution_id, task_name, tag_type, tag)
        self._waits.setdefault(flow_execution_id, []).append(wait)
        try:
            async with asyncio.timeout(timeout):
                client = await self._open()
                await self._look(client, wait)
                return await asyncio.shield(wait.found)  # cancelled, it could not be looked at
        except TimeoutError:
            assert timeout is not None
            there = await self._of_type(wait)
            wait.end(there or [])  # it may have come at the last moment
            if wait.found.done():
                return wait.found.result()
            raise WaitTimeout(timeout, there) from None
        finally:
            self._waits[flow_execution_id].remove(wait)
            if not self._waits[flow_execution_id]:
                del self._waits[flow_execution_id]
            await self._close_if_idle()

    async def _open(self) -> httpx.AsyncClient:
        """Begin the stream at the last event, unless it has begun."""
        async with self._opening:
            if self._client is None:
                client = self._open_client()
                try:
                    cursor = await last_cursor(client)
                except BaseException:
                    await client.aclose()
                    raise
                self._client = client
                self._following = asyncio.create_task(self._follow(client, cursor))
            return self._client

    async def _close_if_idle(self) -> None:
        if not self._waits:
            await self._close()

    async def _close(self) -> None:
        """End the stream. The next wait begins a new one, even if this is cancelled."""
        client, following = self._client, self._following
        self._client = self._following = None
        if client is None or following is None:
            return
        following.cancel()
        try:
            await asyncio.gather(following, return_exceptions=True)
        finally:
            await client.aclose()

    async def _look(self, client: httpx.AsyncClient, wait: _Wait) -> None:
        """End a wait if its tag is active, or its query refused; retry if there is no answer."""
        while not wait.found.done():
            try:
                async with self._reads:
                    wait.end(await _oldest_tags(client, wait.query(), 1))
                return
            except Unavailable as error:
                logger.warning("tags can't be read now; retrying: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as error:  # also what a token's function raises
                wait.fail(error)

    async def _of_type(self, wait: _Wait) -> list[Tag] | None:
        """Return the active tags of the type on the task, if the endpoint can be asked."""
        try:
            async with asyncio.timeout(_LAST_LOOK_SECONDS), self._open_client() as client:
                return await _oldest_tags(client, wait.query(any_of_type=True), _FOUND)
        except Exception:  # the wait ends with its time-out, whatever hinders this look
            return None

    async def _follow(self, client: httpx.AsyncClient, cursor: str) -> None:
        """End waits by the events behind a place; what no event tells is looked at again."""
        while True:
            try:
                async with aclosing(stream_changes(client, cursor)) as changes:
                    async for reached, event in changes:
                        cursor = reached
                        if event is not None:
                            self._receive(event)
            except RevisionExpired as error:
                cursor = error.cursor or cursor
                await asyncio.gather(*(self._look(client, wait) for wait in self._all()))
            except Unavailable:
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as error:  # also what a token's function raises
                self._client = self._following = None  # the next wait begins a new stream
                for wait in self._all():
                    wait.fail(error)
                await client.aclose()
                return

    def _all(self) -> list[_Wait]:
        return [wait for some in self._waits.values() for wait in some]

    def _receive(self, event: ChangeEvent) -> None:
        waits = self._waits.get(event.flow_execution_id)
        if not waits:
            return
        added = {each.tag.id: each.tag for each in event.changes if _is(each, "added")}
        for each in event.changes:
            if _is(each, "removed"):
                added.pop(each.tag.id, None)
        for wait in waits:
            wait.end(added.values())


async def _oldest_tags(client: httpx.AsyncClient, query: dict[str, Any], limit: int) -> list[Tag]:
    """Return the oldest active tags that match, from the first page that has any."""
    query = {**query, "limit": limit}
    while True:
        page = read_answer(await get(client, "/task-tags", query), Page[Tag])
        if page.items or page.next_page is None:
            return page.items
        query["page"] = page.next_page


def _is(change: object, kind: str) -> TypeGuard[Change]:
    return isinstance(change, Change) and change.change == kind
