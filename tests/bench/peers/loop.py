"""Runs the asyncio producers of peers in the calling thread, between synchronous calls."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import uvloop

from tests.bench.contenders import Item

CHUNK = 100
"""So many messages are in one pipeline or statement."""
AT_ONCE = 16
"""So many calls at once, each on a connection; with more, arq and taskiq are slower."""

Value = TypeVar("Value")


class Loop:
    """An event loop that runs while it is called."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._held: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        return self._loop.run_until_complete(coroutine)

    def hold(self, context: AbstractAsyncContextManager[Any]) -> None:
        """Enter a context, in a separate task, until this is closed."""
        entered = self._loop.create_future()

        async def hold() -> None:
            async with context:
                entered.set_result(None)
                await self._stop.wait()

        self._held = self._loop.create_task(hold())
        self._loop.run_until_complete(
            asyncio.wait([self._held, entered], return_when="FIRST_COMPLETED")
        )
        if self._held.done():
            self._held.result()

    def close(self) -> None:
        self._stop.set()
        if self._held is not None:
            self._loop.run_until_complete(self._held)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


class LoopSender(ABC):
    """Enqueues with calls that are awaited, one for each message, so many at once."""

    def __init__(self) -> None:
        self._loop = Loop()

    def send(self, items: Sequence[Item]) -> None:
        self._loop.run(self._send(items))

    def send_one(self, item: Item) -> None:
        self._loop.run(self._enqueue(item))

    def close(self) -> None:
        self._loop.close()

    async def _send(self, items: Sequence[Item]) -> None:
        for chunk in chunks(items, AT_ONCE):
            await asyncio.gather(*(self._enqueue(item) for item in chunk))

    @abstractmethod
    async def _enqueue(self, item: Item) -> None: ...


def chunks(items: Sequence[Item], size: int = CHUNK) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
