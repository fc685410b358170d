"""Completes the futures of a producer with the results that are published on its channel."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID, uuid4

from producers.contract.channels import inbox_key, lease_key, results_channel
from producers.contract.messages import Message
from producers.contract.results import ResultRecord
from producers.errors import (
    BatchIdInUse,
    LeaseState,
    ProducerClosed,
    ResultTimeout,
    Unavailable,
)
from producers.pubsub import Listener, LoopThread, PubSubMultiplexer, wait_at_most
from producers.redis_client import open_async_redis

logger = logging.getLogger(__name__)

RESEND_SECONDS: Final = 5.0
MAX_RESEND_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.5


@dataclass(slots=True)
class _Waiting:
    """A batch whose result is awaited by one or more futures."""

    message: Message
    resend_at: float
    backoff: float = RESEND_SECONDS
    futures: list[Future[ResultRecord]] = field(default_factory=list)


class ResultListener(Listener):
    """Completes futures with the results that are published on this producer's own channel."""

    def __init__(
        self, redis_url: str, organization_id: UUID, resend: Callable[[Sequence[Message]], None]
    ) -> None:
        self._redis_url = redis_url
        self._organization_id = organization_id
        self._resend = resend
        self._closed = threading.Event()
        self._thread = LoopThread("task-tags-results", self._begin)
        self._begin()

    def _begin(self) -> None:
        """Begin with a channel of its own, also in a fork, which does not wait for anything."""
        self._reply_to = f"producer-{uuid4()}"
        self._channel = results_channel(self._organization_id, self._reply_to)
        self._waiting: dict[UUID, _Waiting] = {}
        self._lock = threading.Lock()
        self._subscribed = threading.Event()
        self._running: Future[None] | None = None

    def register(
        self, message: Message, enqueue: Callable[[Message], Any], seconds: float
    ) -> Future[ResultRecord]:
        """Enqueue a message that names this listener in `reply_to`; return its result's future.

        Raises `Unavailable` if there is no subscription after so many seconds.
        """
        self._start(seconds)
        message = message.model_copy(update={"reply_to": self._reply_to})
        future: Future[ResultRecord] = Future()
        with self._lock:
            waiting = self._waiting.setdefault(
                message.batch_id, _Waiting(message, time.monotonic() + RESEND_SECONDS)
            )
            if waiting.message.digest() != message.digest():
                raise BatchIdInUse(f"another batch {message.batch_id} is still awaited")
            waiting.futures.append(future)
        try:
            enqueue(message)
        except BaseException:
            future.cancel()
            self._forget_cancelled()
            raise
        return future

    def timeout(self, seconds: float) -> ResultTimeout:
        """Return the error for no result in this time, with what Redis says about the inbox."""
        looking = self._thread.submit(self._look())
        try:
            waiting, lease = looking.result(_LOOK_SECONDS)
        except Exception:  # whatever it is: the error is the same without it
            looking.cancel()
            return ResultTimeout(seconds)
        return ResultTimeout(seconds, waiting, lease)

    async def _look(self) -> tuple[int, LeaseState]:
        """Return how many messages wait, and the state of the lease."""
        async with open_async_redis(self._redis_url) as redis:
            waiting = await redis.xlen(inbox_key(self._organization_id))
            lease: Any = await redis.get(lease_key(self._organization_id)) or b""
        for state in ("queued", "running"):
            if lease.startswith(state.encode()):
                return waiting, state
        return waiting, "missing"

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for future in (future for each in waiting for future in each.futures):
            with suppress(InvalidStateError):
                future.set_exception(ProducerClosed("the producer was closed"))
        self._thread.close()

    def on_subscribed(self) -> None:
        if self._subscribed.is_set():
            self._lost.set()
        self._subscribed.set()

    def on_event(self, payload: bytes) -> None:
        record = ResultRecord.decode(payload)
        with self._lock:
            waiting = self._waiting.pop(record.batch_id, None)
        for future in waiting.futures if waiting else []:
            with suppress(InvalidStateError):  # it was cancelled in the meantime
                future.set_result(record)

    def resend_overdue(self, *, everything: bool = False) -> None:
        """Enqueue again what has waited long, or everything after results may have been missed."""
        self._forget_cancelled()
        now = time.monotonic()
        with self._lock:
            overdue = [
                each for each in self._waiting.values() if everything or now >= each.resend_at
            ]
            for each in overdue:
                each.backoff = min(each.backoff * 2, MAX_RESEND_SECONDS)
                each.resend_at = now + each.backoff
        if overdue:
            self._resend([each.message for each in overdue])

    def _start(self, seconds: float) -> None:
        """Subscribe, and return once that is confirmed. Raises `Unavailable` if it takes longer."""
        if self._closed.is_set():
            raise ProducerClosed("the producer was closed")
        with self._lock:
            if self._running is None or self._running.done():
                self._running = self._thread.submit(self._run())
        if not self._subscribed.wait(max(0, seconds)):
            raise Unavailable("Redis can't be reached (TASK_TAGS_REDIS_URL)")

    async def _run(self) -> None:
        self._lost = asyncio.Event()
        async with open_async_redis(self._redis_url) as redis:
            pubsub = PubSubMultiplexer(redis)
            with pubsub.listening(self._channel, self):
                async with pubsub.running():
                    while True:
                        await wait_at_most(_POLL_SECONDS, self._lost.wait())
                        lost = self._lost.is_set()
                        self._lost.clear()
                        try:
                            await asyncio.to_thread(self.resend_overdue, everything=lost)
                        except Exception:  # of the token function: other futures still wait
                            logger.exception("batches could not be enqueued again")

    def _forget_cancelled(self) -> None:
        with self._lock:
            self._waiting = {
                batch_id: each
                for batch_id, each in self._waiting.items()
                if not all(future.cancelled() for future in each.futures)
            }
