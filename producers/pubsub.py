"""The one subscription to Redis pub/sub, which reconnects; SDK and endpoint both use it.

It is asyncio at its core; `LoopThread` runs it for callers that are not. Pub/sub keeps nothing for
a listener that is away, so a listener learns when its subscription begins, for the first time and
again after each lost connection: whatever was published before may be lost.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, TypeVar
from weakref import WeakSet

from redis import asyncio as async_redis
from redis.exceptions import ConnectionError, ResponseError

logger = logging.getLogger(__name__)

PING_SECONDS: Final = 5.0
SILENCE_SECONDS: Final = 15.0
MAX_BACKOFF_SECONDS: Final = 1.0
_CANCEL_SECONDS: Final = 0.1
MAX_QUEUED_BYTES: Final = 32 * 1024 * 1024

Result = TypeVar("Result")


class Listener:
    """Receives what is published on a channel. Its methods run in the event loop: never block."""

    def on_subscribed(self) -> None:
        """The subscription has begun, or begun again: what was published before may be lost."""

    def on_event(self, payload: bytes) -> None:
        """A payload was published."""


class PubSubMultiplexer:
    """Subscribes to each channel that has a listener, on one connection. `run` does the work.

    It is a plain connection, not redis-py's PubSub, which reconnects silently in the middle of a
    read. A server that does not answer a ping in time counts as lost, and so does a replica where
    a primary was: it may receive nothing more. A second connection asks for its role, since one
    that subscribes may not.
    """

    def __init__(self, redis: async_redis.Redis) -> None:
        self._redis = redis
        self._listeners: dict[bytes, list[Listener]] = {}
        self._confirmed: set[bytes] = set()
        """The channels that Redis has confirmed."""
        self._changed = asyncio.Event()
        self._received_at = 0.0
        self._had_primary = False

    def __len__(self) -> int:
        return len(self._listeners)

    @contextmanager
    def listening(self, channel: str, listener: Listener) -> Iterator[None]:
        """Let a listener receive what is published on a channel until the block ends."""
        name = channel.encode()
        self._listeners.setdefault(name, []).append(listener)
        self._changed.set()
        if name in self._confirmed:
            listener.on_subscribed()
        try:
            yield
        finally:
            self._listeners[name].remove(listener)
            if not self._listeners[name]:
                del self._listeners[name]
                self._changed.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run until the block ends."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run(self) -> None:
        """Keep the subscriptions up until cancelled; reconnect with a backoff of up to a second."""
        failures = 0
        while True:
            if not self._listeners:
                await self._changed.wait()
            pool: Any = self._redis.connection_pool
            asking, connection = pool.make_connection(), pool.make_connection()
            try:
                await asking.connect()  # first: it must not be the one that leads to a newer server
                await connection.connect()
                self._received_at = _now()
                await first_completed(
                    self._receive(connection),
                    self._subscribe(connection),
                    self._ping(connection),
                    self._watch_role(asking),
                )
            except Exception as error:  # whatever it is, the listeners would wait for ever
                failures = 0 if self._confirmed else failures + 1
                if failures in (0, 3, 100):
                    what = "no subscription is possible" if failures else "the subscription is lost"
                    about = {"error": f"{type(error).__name__}: {error}"}
                    logger.warning(f"{what}; connecting again", extra=about)
            finally:
                self._confirmed.clear()
                await asking.disconnect(nowait=True)
                await connection.disconnect(nowait=True)
            await asyncio.sleep(min(0.05 * 2 ** min(failures, 10), MAX_BACKOFF_SECONDS))

    async def _subscribe(self, connection: Any) -> None:
        """Subscribe to what has listeners, and unsubscribe from what has none any more."""
        subscribed: set[bytes] = set()
        while True:
            self._changed.clear()
            wanted = set(self._listeners)
            if new := wanted - subscribed:
                await connection.send_command("SUBSCRIBE", *new)
            if old := subscribed - wanted:
                self._confirmed -= old
                await connection.send_command("UNSUBSCRIBE", *old)
            subscribed = wanted
            await self._changed.wait()

    async def _receive(self, connection: Any) -> None:
        while True:
            answer = await connection.read_response(timeout=math.inf)
            self._received_at = _now()
            if isinstance(answer, list) and len(answer) == 3:  # the answer to a ping has two
                self._dispatch(*answer)

    async def _ping(self, connection: Any) -> None:
        """Ask a silent server for an answer; raise `ConnectionError` if it gives none."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            silent = _now() - self._received_at
            if silent > SILENCE_SECONDS:
                raise ConnectionError("the server is silent")
            if silent >= PING_SECONDS:
                await connection.send_command("PING")

    async def _watch_role(self, asking: Any) -> None:
        """Raise `ConnectionError` if the server is a replica where a primary was, or may be now.

        The URL may lead to it for a while, so a replica is asked for on new connections. Those of
        the pool are closed as well.
        """
        is_replica = await _is_replica(asking)
        while True:
            self._had_primary |= is_replica is False
            await asyncio.sleep(PING_SECONDS)
            if is_replica:
                await asking.disconnect(nowait=True)
                await asking.connect()
            was_replica, is_replica = is_replica, await _is_replica(asking)
            has_moved = was_replica and is_replica is False
            if has_moved or (is_replica and self._had_primary):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
                raise ConnectionError("the server is a replica, and the URL led to a primary")

    def _dispatch(self, kind: bytes, channel: bytes, payload: Any) -> None:
        listeners = self._listeners.get(channel, [])
        if kind == b"subscribe" and listeners:
            self._confirmed.add(channel)
        for listener in list(listeners):
            try:
                if kind == b"subscribe":
                    listener.on_subscribed()
                elif kind == b"message":
                    listener.on_event(payload)
            except Exception:  # the other listeners still depend on this connection
                logger.exception("a listener failed")


async def _is_replica(connection: Any) -> bool | None:
    """Ask with HELLO, which any user may; None if the server does not know it.

    See https://valkey.io/commands/hello/
    """
    await connection.send_command("HELLO", 2)
    try:
        answer = await connection.read_response(timeout=SILENCE_SECONDS + PING_SECONDS)
    except ResponseError:
        return None
    return b"replica" in answer


def _now() -> float:
    return asyncio.get_running_loop().time()


async def wait_at_most(seconds: float | None, waiting: Awaitable[Any]) -> None:
    """Wait for something, so many seconds at most; None is without end."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waiting


async def first_completed(*jobs: Awaitable[Any]) -> None:
    """Run jobs side by side until one ends; cancel the others, and raise what it raised.

    A job may not notice that it is cancelled, while it sends with `asyncio.wait_for` of Python
    before 3.12 (https://github.com/python/cpython/issues/86296): then it is cancelled again.
    """
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        while pending := [task for task in tasks if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=_CANCEL_SECONDS)
        await asyncio.gather(*tasks, return_exceptions=True)


class EventQueue(Listener):
    """Queues what is published on a channel. A reader 32 MiB behind loses what is queued.

    Args:
        also: Is called each time the subscription begins.
    """

    def __init__(self, also: Callable[[], None] | None = None) -> None:
        self._also = also
        self._events: list[bytes] = []
        self._bytes = 0
        self._arrived = asyncio.Event()

    def on_subscribed(self) -> None:
        if self._also is not None:
            self._also()

    def on_event(self, payload: bytes) -> None:
        self._bytes += len(payload)
        if self._bytes > MAX_QUEUED_BYTES:
            logger.warning("events were dropped: the subscriber reads too slowly")
            self._events, self._bytes = [], len(payload)
        self._events.append(payload)
        self._arrived.set()

    async def take(self, seconds: float) -> list[bytes]:
        """Return all that has arrived; if nothing has, wait for so many seconds at most."""
        await wait_at_most(seconds, self._arrived.wait())
        self._arrived.clear()
        events, self._events, self._bytes = self._events, [], 0
        return events


async def flatten(events: AsyncGenerator[Sequence[Result], None]) -> AsyncIterator[Result]:
    """Yield the items of what an iteration yields, as `LoopThread.iterate` does, for asyncio."""
    async with aclosing(events):
        async for some in events:
            for each in some:
                yield each


class LoopThread:
    """An event loop in a daemon thread, for callers that have none. It starts at its first use.

    Args:
        after_fork: Called in the child process of a fork, which has no threads but its own.
    """

    def __init__(self, name: str, after_fork: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._after_fork = after_fork
        self._is_closed = False
        self._begin()
        _LOOP_THREADS.add(self)

    def begin_after_fork(self) -> None:
        """Forget the thread of the parent process, and the lock that it may have held."""
        self._begin()
        self._after_fork()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine in the loop, and return its future.

        Raises `RuntimeError` after `close`.
        """
        if self._is_closed:
            job.close()
            raise RuntimeError(f"{self._name} was closed")
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(job, self._loop)

    def iterate(self, events: AsyncGenerator[Sequence[Result], None]) -> Iterator[Result]:
        """Run an asynchronous iteration in the loop; yield the items of what it yields.

        One task alone uses `events`, and takes no more than is asked for. It ends with this
        iterator, or with `close`.
        """
        taken: queue.SimpleQueue[Sequence[Result] | None] = queue.SimpleQueue()
        wanted = asyncio.Event()

        async def pump() -> None:
            try:
                async with aclosing(events):
                    async for some in events:
                        taken.put(some)
                        await wanted.wait()
                        wanted.clear()
            finally:
                taken.put(None)

        pumping = self.submit(pump())
        try:
            while (some := taken.get()) is not None:
                yield from some
                assert self._loop is not None
                with suppress(RuntimeError):  # the loop was closed
                    self._loop.call_soon_threadsafe(wanted.set)
            with suppress(CancelledError):  # by `close`
                pumping.result()
        finally:
            pumping.cancel()

    def close(self, seconds: float = 2.0) -> None:
        """Cancel all that runs in the loop, and wait for its end, so many seconds at most."""
        self._is_closed = True
        with self._lock:
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or not thread.is_alive():
            return
        with suppress(RuntimeError):  # it was closed at this moment
            loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(seconds)

    def _run(self) -> None:
        assert self._loop is not None
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


_LOOP_THREADS: WeakSet[LoopThread] = WeakSet()


def _begin_after_fork() -> None:
    for each in list(_LOOP_THREADS):
        each.begin_after_fork()


os.register_at_fork(after_in_child=_begin_after_fork)
