"""The waits of the SDK, with an endpoint that is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import uuid4

import httpx
import pytest
from pydantic_core import to_json

from producers.contract.results import Tag
from producers.endpoint import TokenAuth
from producers.errors import WaitTimeout
from producers.waiting import TagWaits

WAIT = uuid4(), "task", "review_status", "approved", None


class Silent(httpx.AsyncByteStream):
    """A stream without events, until it is lost."""

    def __init__(self, lost: asyncio.Event) -> None:
        self._lost = lost

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"retry: 1000\n\n"
        await self._lost.wait()
        raise httpx.ReadError("it is lost")


class Endpoint:
    """Has one tag, on the second page, or none; its streams are silent. Counts the streams."""

    def __init__(self) -> None:
        self.streams = 0
        self.lost = asyncio.Event()
        self.token_error: Exception | None = None
        self.tag: Tag | None = None

    def client(self) -> httpx.AsyncClient:
        transport, auth = httpx.MockTransport(self._answer), TokenAuth(self._token)
        return httpx.AsyncClient(base_url="http://endpoint", transport=transport, auth=auth)

    def _token(self) -> str:
        if self.token_error is not None:
            raise self.token_error
        return "token"

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/changes":
            return httpx.Response(200, json={"changes": [], "cursor": "0"})
        if request.url.path == "/task-tags":
            assert request.url.params["limit"]  # without, the answer may be too large
            is_last = self.tag is None or "page" in request.url.params
            tags = [self.tag] if self.tag and is_last else []
            page = {"tags": tags, "next_page": None if is_last else "2"}
            return httpx.Response(200, content=to_json(page))
        self.streams += 1
        return httpx.Response(200, stream=Silent(self.lost))

    async def opened(self, streams: int) -> None:
        async with asyncio.timeout(5):
            while self.streams < streams:
                await asyncio.sleep(0.01)


def test_a_token_that_can_not_be_made_ends_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for ever, because nobody reads the stream any longer."""
    monkeypatch.setattr("producers.endpoint._RETRY_SECONDS", 0.01)
    monkeypatch.setattr("producers.waiting._RETRY_SECONDS", 0.01)
    asyncio.run(_lose_the_token())


async def _lose_the_token() -> None:
    endpoint = Endpoint()
    waits = TagWaits(endpoint.client)
    waiting = [asyncio.create_task(waits.wait_for(*WAIT)) for _ in range(2)]
    await endpoint.opened(1)
    endpoint.token_error = ConnectionError("no token server")
    endpoint.lost.set()
    done, _ = await asyncio.wait(waiting, timeout=5)
    assert [str(each.exception()) for each in done] == ["no token server"] * 2
    endpoint.token_error = None
    endpoint.lost.clear()
    again = asyncio.create_task(waits.wait_for(*WAIT))
    await endpoint.opened(2)
    again.cancel()


def test_a_tag_on_a_later_page_is_found() -> None:
    """A page may have no tag and a next page: it looks at some rows only."""
    asyncio.run(_find_on_the_second_page())


async def _find_on_the_second_page() -> None:
    endpoint = Endpoint()
    execution, task_name, tag_type, tag, _ = WAIT
    endpoint.tag = Tag(
        *(uuid4(), execution, task_name, tag_type, tag, None, uuid4()),
        status="active",
        created_at=datetime.now(UTC),
        created_by="ada",
        updated_at=None,
        modified_by=None,
    )
    waits = TagWaits(endpoint.client)
    assert await waits.wait_for(execution, task_name, tag_type, tag, 5) == endpoint.tag
    with pytest.raises(WaitTimeout, match="approved"):
        await waits.wait_for(execution, task_name, tag_type, "rejected", 0.1)


def test_a_wait_that_is_cancelled_while_it_ends_leaves_the_next_one_a_stream() -> None:
    """Not a client that is closed already."""
    asyncio.run(_cancel_twice())


async def _cancel_twice() -> None:
    endpoint = Endpoint()
    waits = TagWaits(endpoint.client)
    waiting = asyncio.create_task(waits.wait_for(*WAIT))
    await endpoint.opened(1)
    waiting.cancel()
    await asyncio.sleep(0)  # it waits for the end of the stream
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    again = asyncio.create_task(waits.wait_for(*WAIT))
    await endpoint.opened(2)
    again.cancel()
