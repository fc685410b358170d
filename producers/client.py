"""TagProducer: enqueues the batches of a flow runner, and waits for results on request.

Synchronous and asyncio callers share it: they wait on futures that one listening thread completes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Self, TypeVar
from uuid import UUID, uuid4

from producers.contract.channels import results_channel
from producers.contract.messages import (
    ANY_METADATA,
    Message,
    TagBatch,
    TagOperation,
    TaskState,
    add,
    register_execution,
    remove,
    set_task_state,
)
from producers.contract.results import ResultRecord
from producers.enqueuer import Enqueuer
from producers.errors import (
    BatchIdInUse,
    InboxFull,
    ProducerClosed,
    ResultTimeout,
    TokenExpired,
    Unavailable,
    refusal,
)
from producers.pubsub import Listener, LoopThread, PubSubMultiplexer, wait_at_most
from producers.redis_client import open_async_redis
from producers.settings import load_settings

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS: Final = 30.0
RESEND_SECONDS: Final = 5.0
MAX_RESEND_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 0.2
_POLL_SECONDS: Final = 0.5
_EXPIRED_SECONDS: Final = 60.0
_MIN_PAUSE_SECONDS: Final = 0.01
_MAX_PAUSE_SECONDS: Final = 0.2


class TagProducer:
    """Enqueues the tag batches of one organization. Threads may share it; it connects at first use.

    Arguments that are left out come from the environment (`ProducerSettings`). `token` may be a
    function that returns a token, for a producer that lives longer than one. Raises
    `ConfigurationError`.
    """

    def __init__(
        self,
        *,
        redis_url: str | None = None,
        organization_id: UUID | str | None = None,
        token: str | Callable[[], str] | None = None,
        inbox_limit: int | None = None,
    ) -> None:
        settings = load_settings(
            redis_url=redis_url,
            organization_id=organization_id,
            token=None if callable(token) else token,
            inbox_limit=inbox_limit,
        )
        self._organization_id = settings.required_organization_id
        if callable(token):
            self._token = token
        else:
            fixed = settings.required_token
            self._token = lambda: fixed
        url = settings.redis_url.get_secret_value()
        self._enqueuer = Enqueuer(url, settings.inbox_limit, int(settings.lease_seconds * 1000))
        self._listener = _ResultListener(url, self._organization_id, self._resend)
        self._closed = threading.Event()

    def batch(self, *, batch_id: UUID | None = None) -> BatchBuilder[UUID, ResultRecord]:
        """Begin a batch: `producer.batch().add(…).remove(…).enqueue()`."""
        return BatchBuilder(self.enqueue, self.apply, batch_id)

    def register(
        self, flow_execution_id: UUID | str, task_names: Sequence[str] | None = None
    ) -> UUID:
        """Enqueue the registration of a flow execution; None allows every task name.

        Returns the batch id. The inbox is ordered, so batches for the execution may follow at once.
        """
        return self.enqueue(register_execution(flow_execution_id, task_names))

    def set_task_state(
        self, flow_execution_id: UUID | str, task_name: str, state: TaskState
    ) -> UUID:
        """Enqueue the new state of a task; return the batch id."""
        return self.enqueue(set_task_state(flow_execution_id, task_name, state))

    def enqueue(self, message: Message) -> UUID:
        """Enqueue a batch; return its id. Raises `InboxFull` or `Unavailable`."""
        return self.enqueue_many([message])[0]

    def enqueue_many(self, messages: Iterable[Message], block: float | None = None) -> list[UUID]:
        """Enqueue batches in this order, many in each round trip; return their ids.

        Args:
            block: Seconds to wait, in total, for free capacity in the inbox.

        Raises:
            InboxFull: With the batches that were not accepted, which are always the last ones.
            RedisOutOfMemory, Unavailable: Redis refused, or can't be reached.
            ProducerClosed: The producer was closed in the meantime.
        """
        batches = list(messages)
        accepted = self.send([batch.encode() for batch in batches], block)
        if accepted < len(batches):
            raise InboxFull(batches[accepted:])
        return [batch.batch_id for batch in batches]

    def submit(self, message: Message, block: float | None = None) -> Future[ResultRecord]:
        """Enqueue a batch and return the future of its result record, be it an error or not.

        Until the result arrives, the same batch is enqueued again after a lost connection, and
        after 5, 10, 20, 40 and every 60 s: it never takes effect twice. Cancel the future to stop
        that. The result arrives on a channel of this producer, whatever the batch's `reply_to`.

        Args:
            block: Seconds to wait for free capacity in the inbox.

        Raises:
            InboxFull, Unavailable: The batch was not accepted.
            BatchIdInUse: Another batch with this id is still awaited.
        """
        return self._listener.register(message, lambda each: self.enqueue_many([each], block))

    def apply(self, message: Message, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> ResultRecord:
        """Enqueue a batch and wait for its result, also across lost connections.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            ResultTimeout: No result arrived in time.
            BatchRefused: The worker refused the batch; the subclass says why.
            InboxFull, Unavailable: The batch was not accepted.
        """
        deadline = time.monotonic() + timeout
        future = self.submit_until(message, deadline)
        try:
            return _accepted(future.result(max(0, deadline - time.monotonic())))
        except FutureTimeout:
            raise ResultTimeout(f"no result in {timeout:g} s") from None
        finally:
            future.cancel()

    def submit_until(self, message: Message, deadline: float) -> Future[ResultRecord]:
        """Submit; retry while Redis can't be used, until `deadline` on the monotonic clock."""
        while True:
            try:
                return self.submit(message)
            except Unavailable:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def send(self, encoded: Sequence[bytes], block: float | None = None) -> int:
        """Append serialized messages unchecked; return how many of them were accepted.

        The worker answers with what is wrong with them.

        Args:
            block: Seconds to wait, in total, for free capacity in the inbox.

        Raises:
            RedisOutOfMemory, Unavailable, ProducerClosed: As `enqueue_many`.
        """
        deadline = time.monotonic() + (block or 0)
        accepted = self._append(encoded)
        while accepted < len(encoded) and self._wait_for_capacity(deadline):
            accepted += self._append(encoded[accepted:])
        return accepted

    def _wait_for_capacity(self, deadline: float) -> bool:
        """Wait for free capacity in the inbox; return whether there is some."""
        pause = _MIN_PAUSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            if self._closed.wait(min(pause, left)):
                raise ProducerClosed("the producer was closed")
            # Ask first: an append that is refused would have sent its messages for nothing.
            if self._enqueuer.free_capacity(self._organization_id):
                return True
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)
        return False

    def _append(self, encoded: Sequence[bytes]) -> int:
        return self._enqueuer.enqueue(self._organization_id, encoded, self._valid_token())

    def _valid_token(self) -> str:
        """Return the token, the second one if the first is expired. Raises `TokenExpired`."""
        for _ in range(2):
            if not _is_expired(token := self._token()):
                return token
        raise TokenExpired("the token has expired: nothing was enqueued")

    def close(self) -> None:
        """Close all connections; futures that still wait fail with `ProducerClosed`."""
        self._closed.set()
        self._listener.close()
        self._enqueuer.close()

    def __enter__(self) -> TagProducer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resend(self, messages: Sequence[Message]) -> None:
        try:
            self.enqueue_many(messages)
        except (Unavailable, InboxFull) as error:
            logger.warning("batches could not be enqueued again; retrying: %s", error)


class AsyncTagProducer:
    """TagProducer for asyncio, with the same arguments and methods."""

    def __init__(self, **arguments: Any) -> None:
        self._producer = TagProducer(**arguments)

    def batch(
        self, *, batch_id: UUID | None = None
    ) -> BatchBuilder[Awaitable[UUID], Awaitable[ResultRecord]]:
        return BatchBuilder(self.enqueue, self.apply, batch_id)

    async def register(
        self, flow_execution_id: UUID | str, task_names: Sequence[str] | None = None
    ) -> UUID:
        return await self.enqueue(register_execution(flow_execution_id, task_names))

    async def set_task_state(
        self, flow_execution_id: UUID | str, task_name: str, state: TaskState
    ) -> UUID:
        return await self.enqueue(set_task_state(flow_execution_id, task_name, state))

    async def enqueue(self, message: Message) -> UUID:
        return await asyncio.to_thread(self._producer.enqueue, message)

    async def enqueue_many(
        self, messages: Iterable[Message], block: float | None = None
    ) -> list[UUID]:
        """As TagProducer's. It waits in a thread, which cancellation does not interrupt."""
        return await asyncio.to_thread(self._producer.enqueue_many, list(messages), block)

    async def apply(
        self, message: Message, timeout: float = DEFAULT_TIMEOUT_SECONDS
    ) -> ResultRecord:
        deadline = time.monotonic() + timeout
        future = await asyncio.to_thread(self._producer.submit_until, message, deadline)
        try:
            async with asyncio.timeout(max(0, deadline - time.monotonic())):
                return _accepted(await asyncio.wrap_future(future))
        except TimeoutError:
            raise ResultTimeout(f"no result in {timeout:g} s") from None

    async def close(self) -> None:
        await asyncio.to_thread(self._producer.close)

    async def __aenter__(self) -> AsyncTagProducer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


Enqueued = TypeVar("Enqueued")
Applied = TypeVar("Applied")


class BatchBuilder(Generic[Enqueued, Applied]):
    """Collects operations, and enqueues or applies them as one batch of its producer."""

    def __init__(
        self,
        enqueue: Callable[[TagBatch], Enqueued],
        apply: Callable[[TagBatch, float], Applied],
        batch_id: UUID | None,
    ) -> None:
        self._enqueue = enqueue
        self._apply = apply
        self._batch_id = batch_id
        self._operations: list[TagOperation] = []

    def add(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str,
        tag_metadata: Any = None,
    ) -> Self:
        self._operations.append(add(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def remove(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str,
        tag_metadata: Any = ANY_METADATA,
    ) -> Self:
        """Remove the tag with any metadata, or exactly the one with this metadata (also None)."""
        self._operations.append(remove(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def build(self) -> TagBatch:
        if self._batch_id is None:
            return TagBatch(tags=self._operations)
        return TagBatch(tags=self._operations, batch_id=self._batch_id)

    def enqueue(self) -> Enqueued:
        return self._enqueue(self.build())

    def apply(self, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> Applied:
        return self._apply(self.build(), timeout)


def _is_expired(token: str) -> bool:
    """Whether a JWT expired more than a minute ago. What is no JWT is left to the worker."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"]) + _EXPIRED_SECONDS < time.time()
    except (LookupError, TypeError, ValueError, OverflowError):
        return False


def _accepted(record: ResultRecord) -> ResultRecord:
    if record.error is not None:
        raise refusal(record)
    return record


@dataclass(slots=True)
class _Waiting:
    """A batch whose result is awaited by one or more futures."""

    message: Message
    resend_at: float
    backoff: float = RESEND_SECONDS
    futures: list[Future[ResultRecord]] = field(default_factory=list)


class _ResultListener(Listener):
    """Completes futures with the results that are published on this producer's own channel."""

    def __init__(
        self, redis_url: str, organization_id: UUID, resend: Callable[[Sequence[Message]], None]
    ) -> None:
        self._redis_url = redis_url
        self._organization_id = organization_id
        self._reply_to = f"producer-{uuid4()}"
        self._channel = results_channel(organization_id, self._reply_to)
        self._resend = resend
        self._waiting: dict[UUID, _Waiting] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._subscribed = threading.Event()
        self._thread = LoopThread("task-tags-results")
        self._running: Future[None] | None = None
        self._pid = os.getpid()

    def register(self, message: Message, enqueue: Callable[[Message], Any]) -> Future[ResultRecord]:
        """Enqueue a message that names this listener in `reply_to`; return its result's future."""
        self._start()
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

    def _start(self) -> None:
        """Subscribe, and return once that is confirmed. Raises `Unavailable` after 5 s."""
        if self._closed.is_set():
            raise ProducerClosed("the producer was closed")
        if self._pid != os.getpid():  # a fork has neither the thread nor what it was waiting for
            self._pid, self._lock, self._running = os.getpid(), threading.Lock(), None
            self._waiting, self._subscribed = {}, threading.Event()
            self._reply_to = f"producer-{uuid4()}"
            self._channel = results_channel(self._organization_id, self._reply_to)
        with self._lock:
            if self._running is None or self._running.done():
                self._running = self._thread.submit(self._run())
        if not self._subscribed.wait(5):
            raise Unavailable("Redis can't be reached")

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
