"""TagProducer: how a flow runner enqueues batches, and waits for a result if it wants one.

Sync and asyncio callers share all of it: waiting is done on futures that one listening thread completes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Self, TypeVar
from uuid import UUID, uuid4

from redis import Redis

from producers.contract.messages import (
    ANY_METADATA,
    Message,
    RegisterExecution,
    ResultRecord,
    SetTaskState,
    TagBatch,
    TagOperation,
    TaskState,
    add,
    remove,
    results_channel,
)
from producers.enqueuer import Sender
from producers.errors import (
    BatchIdInUse,
    InboxFull,
    ProducerClosed,
    ResultTimeout,
    Unavailable,
    refusal,
)
from producers.settings import load_settings
from producers.subscriber import ListenEvent, listen

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS: Final = 30.0
RESEND_SECONDS: Final = 5.0
MAX_RESEND_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 0.2
_MIN_PAUSE_SECONDS: Final = 0.01
_MAX_PAUSE_SECONDS: Final = 0.2


class TagProducer:
    """Enqueues the tag batches of one organization. Safe to share between threads; connects at first use.

    Arguments that are left out come from the environment (`ProducerSettings`). `token` may be a function
    that returns one, for a producer that lives longer than a token. Raises `ConfigurationError`.
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
        self._sender = Sender(url, settings.inbox_limit, int(settings.lease_seconds * 1000))
        self._listener = _ResultListener(
            self._sender.redis, self._organization_id, self._enqueue_again
        )
        self._closed = threading.Event()

    def batch(self, *, batch_id: UUID | None = None) -> BatchBuilder[UUID, ResultRecord]:
        """Begin a batch: `producer.batch().add(…).remove(…).enqueue()`."""
        return BatchBuilder(self.enqueue, self.apply, batch_id)

    def register(
        self, flow_execution_id: UUID | str, task_names: Sequence[str] | None = None
    ) -> UUID:
        """Enqueue the registration of a flow execution; None allows every task name. Returns its batch id.

        The inbox is ordered, so batches for the execution may be enqueued right behind it.
        """
        return self.enqueue(register_execution(flow_execution_id, task_names))

    def set_task_state(
        self, flow_execution_id: UUID | str, task_name: str, state: TaskState
    ) -> UUID:
        """Enqueue the state of a task: `queued`, `running`, `completed` or `failed`. Returns its batch id."""
        return self.enqueue(set_task_state(flow_execution_id, task_name, state))

    def enqueue(self, message: Message) -> UUID:
        """Hand a batch over and go on; returns its id. Raises `InboxFull` or `Unavailable`."""
        return self.enqueue_many([message])[0]

    def enqueue_many(self, messages: Iterable[Message], block: float | None = None) -> list[UUID]:
        """Hand batches over in this order, many in each round trip; returns their ids.

        `block`: wait so many seconds, in total, for room in the inbox. Raises `InboxFull` with those that were
        not accepted (always the last ones), `RedisOutOfMemory`, `Unavailable`, or `ProducerClosed` if that happened meanwhile.
        """
        batches = list(messages)
        accepted = self.send([batch.encode() for batch in batches], block)
        if accepted < len(batches):
            raise InboxFull(batches[accepted:])
        return [batch.batch_id for batch in batches]

    def submit(self, message: Message, block: float | None = None) -> Future[ResultRecord]:
        """Enqueue a batch and return the future of its result record, whether that is an error or not.

        Until it comes, the same batch is enqueued again after a lost connection, and after 5, 10, 20, 40 and
        each 60 s: it never takes effect twice. Cancel the future to stop that. The result is heard on a channel of this
        producer's own, whatever the batch's `reply_to`. `block`: wait so many seconds for room in the inbox.
        Raises `InboxFull`, `Unavailable`, or `BatchIdInUse` if something else is awaited under this id.
        """
        return self._listener.expect(message, lambda each: self.enqueue_many([each], block))

    def apply(self, message: Message, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> ResultRecord:
        """Enqueue a batch and wait for its result, `timeout` seconds at most, also across lost connections.

        Raises `ResultTimeout` if none came in time, the `BatchRefused` that fits if it was refused, `InboxFull`
        or `Unavailable`.
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
        """Submit, again and again while Redis can't be used, until a time of the monotonic clock."""
        while True:
            try:
                return self.submit(message)
            except Unavailable:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def send(self, encoded: Sequence[bytes], block: float | None = None) -> int:
        """Append messages that are serialized, unchecked, and return how many of them were accepted.

        The worker answers what is wrong with them. `block`: wait so many seconds, in total, for room in the
        inbox. Raises `RedisOutOfMemory`, `Unavailable` or `ProducerClosed`.
        """
        deadline = time.monotonic() + (block or 0)
        accepted = self._append(encoded)
        while accepted < len(encoded) and self._room_until(deadline):
            accepted += self._append(encoded[accepted:])
        return accepted

    def _room_until(self, deadline: float) -> bool:
        """Wait for room in the inbox. False: there is none in time."""
        pause = _MIN_PAUSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            if self._closed.wait(min(pause, left)):
                raise ProducerClosed("the producer was closed")
            # Only a look: a refused append would have sent its messages in vain.
            if self._sender.free_capacity(self._organization_id):
                return True
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)
        return False

    def _append(self, encoded: Sequence[bytes]) -> int:
        return self._sender.send(self._organization_id, encoded, self._token())

    def close(self) -> None:
        """Let go of connections; whatever still waits fails with `ProducerClosed`."""
        self._closed.set()
        self._listener.close()
        self._sender.close()

    def __enter__(self) -> TagProducer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enqueue_again(self, messages: Sequence[Message]) -> None:
        try:
            self.enqueue_many(messages)
        except (Unavailable, InboxFull) as error:
            logger.warning("asking again failed, and will be tried again: %s", error)


class AsyncTagProducer:
    """TagProducer for asyncio: the same arguments; what waits is awaited."""

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
        """As TagProducer's. It waits in a thread, which goes on until its time is up if this is cancelled."""
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
    """Collects operations, then enqueues or applies them as one batch, as its producer does it."""

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


def register_execution(
    flow_execution_id: UUID | str, task_names: Sequence[str] | None = None
) -> RegisterExecution:
    """Build the message that registers a flow execution."""
    names = None if task_names is None else list(task_names)
    return RegisterExecution.model_validate(
        {"flow_execution_id": flow_execution_id, "task_names": names}
    )


def set_task_state(flow_execution_id: UUID | str, task_name: str, state: TaskState) -> SetTaskState:
    """Build the message that records the state of a task."""
    return SetTaskState.model_validate(
        {"flow_execution_id": flow_execution_id, "task_name": task_name, "state": state}
    )


def _accepted(record: ResultRecord) -> ResultRecord:
    if record.error is not None:
        raise refusal(record)
    return record


@dataclass(slots=True)
class _Waiting:
    """A batch whose result is awaited by one or more futures."""

    message: Message
    ask_again_at: float
    patience: float = RESEND_SECONDS
    futures: list[Future[ResultRecord]] = field(default_factory=list)


class _ResultListener:
    """Completes futures with the results that one thread hears on a channel of its own."""

    def __init__(
        self,
        redis: Redis,
        organization_id: UUID,
        enqueue_again: Callable[[Sequence[Message]], None],
    ) -> None:
        self._redis = redis
        self._reply_to = f"producer-{uuid4()}"
        self._channel = results_channel(organization_id, self._reply_to)
        self._enqueue_again = enqueue_again
        self._waiting: dict[UUID, _Waiting] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._subscribed = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, message: Message, enqueue: Callable[[Message], Any]) -> Future[ResultRecord]:
        """Enqueue a message in whose result this listener is named, and return the result's future."""
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
        self._stop.set()
        with self._lock:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for future in (future for each in waiting for future in each.futures):
            with suppress(InvalidStateError):
                future.set_exception(ProducerClosed("the producer was closed"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2)

    def _start(self) -> None:
        """Listen, and return once what is published will be heard. Raises `Unavailable` after 5 s."""
        if self._stop.is_set():
            raise ProducerClosed("the producer was closed")
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._listen, name="task-tags-results", daemon=True
                )
                self._thread.start()
        if not self._subscribed.wait(5):
            raise Unavailable("Redis can't be reached")

    def _listen(self) -> None:
        for heard in listen(self._redis, [self._channel], self._stop):
            try:
                self._take_in(heard)
            except Exception:  # whatever it was, the other futures still wait for this thread
                logger.exception("a result could not be taken in")

    def _take_in(self, heard: bytes | ListenEvent) -> None:
        if isinstance(heard, bytes):
            self._complete(ResultRecord.decode(heard))
        elif heard is ListenEvent.SUBSCRIBED and not self._subscribed.is_set():
            self._subscribed.set()
        else:
            self._ask_again(everything=heard is ListenEvent.SUBSCRIBED)

    def _complete(self, record: ResultRecord) -> None:
        with self._lock:
            waiting = self._waiting.pop(record.batch_id, None)
        for future in waiting.futures if waiting else []:
            with suppress(InvalidStateError):  # it was cancelled meanwhile
                future.set_result(record)

    def _ask_again(self, *, everything: bool) -> None:
        """Enqueue again what has waited long, or all of it after results may have been missed."""
        self._forget_cancelled()
        now = time.monotonic()
        with self._lock:
            overdue = [
                each for each in self._waiting.values() if everything or now >= each.ask_again_at
            ]
            for each in overdue:
                each.patience = min(each.patience * 2, MAX_RESEND_SECONDS)
                each.ask_again_at = now + each.patience
        if overdue:
            self._enqueue_again([each.message for each in overdue])

    def _forget_cancelled(self) -> None:
        with self._lock:
            self._waiting = {
                batch_id: each
                for batch_id, each in self._waiting.items()
                if not all(future.cancelled() for future in each.futures)
            }
