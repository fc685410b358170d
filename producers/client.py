"""TagProducer: enqueues the batches of a flow runner, and waits for results on request.

Synchronous and asyncio callers share it: they wait on futures that one listening thread completes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Final
from uuid import UUID

from producers.batch_builder import DEFAULT_TIMEOUT_SECONDS, BatchBuilder
from producers.contract.messages import (
    Message,
    TaskState,
    register_execution,
    set_task_state,
)
from producers.contract.results import ResultRecord
from producers.enqueuer import Enqueuer
from producers.errors import (
    InboxFull,
    ProducerClosed,
    ResultTimeout,
    TokenExpired,
    Unavailable,
    refusal,
)
from producers.result_listener import ResultListener
from producers.settings import check_timeout, load_settings, token_source

logger = logging.getLogger(__name__)

MAX_TIMEOUT_SECONDS: Final = 7 * 86_400.0
_SUBSCRIBE_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.2
_EXPIRED_SECONDS: Final = 60.0
_MIN_PAUSE_SECONDS: Final = 0.01
_MAX_PAUSE_SECONDS: Final = 0.2


class TagProducer:
    """Enqueues the tag batches of one organization. Threads may share it; it connects at first use.

    Arguments that are left out come from the environment (`ProducerSettings`). `token` may be a
    function that returns a token, for use beyond the validity of one token. Raises
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
        self._token = token_source(token, settings)
        url = settings.redis_url.get_secret_value()
        self._enqueuer = Enqueuer(url, settings.inbox_limit, int(settings.lease_seconds * 1000))
        self._listener = ResultListener(url, self._organization_id, self._resend)
        self._closed = threading.Event()

    def batch(self, *, batch_id: UUID | None = None) -> BatchBuilder[UUID, ResultRecord]:
        """Begin a batch: `producer.batch().add(…).remove(…).enqueue()`."""
        return BatchBuilder(self.enqueue, self.apply, batch_id)

    def register(
        self,
        flow_execution_id: UUID | str,
        task_names: Sequence[str] | None = None,
        flow_id: str | None = None,
    ) -> UUID:
        """Enqueue the registration of a flow execution; None allows every task name.

        Returns the batch id. The inbox is ordered, so batches for the execution may follow at once.

        Args:
            flow_id: The flow that is executed; only the first registration can set it.
        """
        return self.enqueue(register_execution(flow_execution_id, task_names, flow_id))

    def set_task_state(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        state: TaskState,
        clear: Sequence[str] | None = None,
    ) -> UUID:
        """Enqueue the new state of a task; return the batch id.

        Args:
            clear: Tag types whose active tags on the task are removed with it.
        """
        return self.enqueue(set_task_state(flow_execution_id, task_name, state, clear))

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
        batches = _checked(messages)
        accepted = self.send([batch.encode() for batch in batches], block)
        return _ids(batches, accepted)

    def submit(self, message: Message, block: float | None = None) -> Future[ResultRecord]:
        """Enqueue a batch and return the future of its result record, which may be an error.

        Until the result arrives, the same batch is enqueued again after a lost connection, and
        after 5, 10, 20, 40 and every 60 s: it never takes effect twice. To stop this, cancel the
        future. The result arrives on a channel of this producer, whatever the batch's `reply_to`.

        Args:
            block: Seconds to wait for free capacity in the inbox.

        Raises:
            InboxFull, Unavailable: The batch was not accepted.
            BatchIdInUse: Another batch with this id is still awaited.
        """
        return self._submit(message, block, _SUBSCRIBE_SECONDS)

    def _submit(
        self, message: Message, block: float | None, seconds: float
    ) -> Future[ResultRecord]:
        def enqueue(each: Message) -> None:
            self.enqueue_many([each], block)

        _checked([message])
        return self._listener.register(message, enqueue, min(seconds, _SUBSCRIBE_SECONDS))

    def apply(
        self, message: Message, timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    ) -> ResultRecord:
        """Enqueue a batch and wait for its result, also across lost connections.

        Args:
            timeout: Seconds to wait at most; None for as long as it takes.

        Raises:
            ValueError: The time-out is negative or no number; nothing was enqueued.
            ResultTimeout: No result arrived in time.
            BatchRefused: The worker refused the batch; the subclass says why.
            InboxFull, Unavailable: The batch was not accepted.
        """
        seconds = _seconds(timeout)
        deadline = time.monotonic() + seconds
        future = self._submit_until(message, deadline)
        try:
            return _accepted(future.result(max(0, deadline - time.monotonic())))
        except FutureTimeout:
            raise self.timed_out(seconds) from None
        finally:
            future.cancel()

    def timed_out(self, seconds: float) -> ResultTimeout:
        """Return the error for no result in this time, with the state of the inbox in Redis."""
        return self._listener.timeout(seconds)

    def _submit_until(self, message: Message, deadline: float) -> Future[ResultRecord]:
        """Submit; retry while Redis can't be used, until `deadline` on the monotonic clock."""
        while True:
            try:
                return self._submit(message, None, deadline - time.monotonic())
            except Unavailable:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def send(self, encoded: Sequence[bytes], block: float | None = None) -> int:
        """Append serialized messages unchecked; return how many of them were accepted.

        The worker checks them, and publishes an error for each invalid one.

        Args:
            block: Seconds to wait, in total, for free capacity in the inbox.

        Raises:
            RedisOutOfMemory, Unavailable, ProducerClosed: As `enqueue_many`.
        """
        sending = self._sending(encoded, block)
        while True:
            try:
                pause = next(sending)
            except StopIteration as sent:
                accepted: int = sent.value
                return accepted
            self._closed.wait(pause)

    def _sending(
        self, encoded: Sequence[bytes], block: float | None
    ) -> Generator[float, None, int]:
        """Do what `send` does; yield the seconds to wait before it looks for capacity again."""
        deadline = time.monotonic() + (block or 0)
        accepted, pause = self._append(encoded), _MIN_PAUSE_SECONDS
        while accepted < len(encoded) and (left := deadline - time.monotonic()) > 0:
            yield min(pause, left)
            if self._closed.is_set():
                raise ProducerClosed("the producer was closed")
            # Ask first: an append that is refused would have sent its messages for nothing.
            more = self._append(encoded[accepted:]) if self._free_capacity() else 0
            accepted += more
            pause = _MIN_PAUSE_SECONDS if more else min(pause * 2, _MAX_PAUSE_SECONDS)
        return accepted

    def _free_capacity(self) -> int:
        try:
            return self._enqueuer.free_capacity(self._organization_id)
        except Unavailable:
            if self._closed.is_set():  # under this call, which has sent nothing
                raise ProducerClosed("the producer was closed") from None
            raise

    def _append(self, encoded: Sequence[bytes]) -> int:
        if self._closed.is_set():
            raise ProducerClosed("the producer was closed")
        return self._enqueuer.enqueue(self._organization_id, encoded, self._valid_token())

    def _valid_token(self) -> str:
        """Return the token, the second one if the first is expired. Raises `TokenExpired`."""
        for _ in range(2):
            if not _is_expired(token := self._token()):
                return token
        raise TokenExpired("the token has expired more than a minute ago: get a new one")

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

    def __init__(
        self,
        *,
        redis_url: str | None = None,
        organization_id: UUID | str | None = None,
        token: str | Callable[[], str] | None = None,
        inbox_limit: int | None = None,
    ) -> None:
        self._producer = TagProducer(
            redis_url=redis_url,
            organization_id=organization_id,
            token=token,
            inbox_limit=inbox_limit,
        )

    def batch(
        self, *, batch_id: UUID | None = None
    ) -> BatchBuilder[Awaitable[UUID], Awaitable[ResultRecord]]:
        """As TagProducer's; `enqueue` and `apply` of the builder are awaited."""
        return BatchBuilder(self.enqueue, self.apply, batch_id)

    async def register(
        self,
        flow_execution_id: UUID | str,
        task_names: Sequence[str] | None = None,
        flow_id: str | None = None,
    ) -> UUID:
        """As TagProducer's."""
        return await self.enqueue(register_execution(flow_execution_id, task_names, flow_id))

    async def set_task_state(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        state: TaskState,
        clear: Sequence[str] | None = None,
    ) -> UUID:
        """As TagProducer's."""
        return await self.enqueue(set_task_state(flow_execution_id, task_name, state, clear))

    async def enqueue(self, message: Message) -> UUID:
        """As TagProducer's."""
        return await asyncio.to_thread(self._producer.enqueue, message)

    async def enqueue_many(
        self, messages: Iterable[Message], block: float | None = None
    ) -> list[UUID]:
        """Like `TagProducer.enqueue_many`. Only round trips use a thread; waiting does not."""
        batches = _checked(messages)
        sending = self._producer._sending([batch.encode() for batch in batches], block)

        def step() -> float | int:
            """Return the seconds to wait as a float, in the end how many were accepted."""
            try:
                return float(next(sending))
            except StopIteration as sent:
                return int(sent.value)

        while isinstance(found := await asyncio.to_thread(step), float):
            await asyncio.sleep(found)
        return _ids(batches, found)

    async def submit(
        self, message: Message, block: float | None = None
    ) -> asyncio.Future[ResultRecord]:
        """Enqueue a batch and return the future of its result; see `TagProducer.submit`."""
        deadline, pause = time.monotonic() + (block or 0), _MIN_PAUSE_SECONDS
        while True:
            try:
                return asyncio.wrap_future(await asyncio.to_thread(self._producer.submit, message))
            except InboxFull:
                if (left := deadline - time.monotonic()) <= 0:
                    raise
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)

    async def apply(
        self, message: Message, timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    ) -> ResultRecord:
        """Like `TagProducer.apply`."""
        seconds = _seconds(timeout)
        deadline = time.monotonic() + seconds
        future = await self._submit_until(message, deadline)
        try:
            async with asyncio.timeout(max(0, deadline - time.monotonic())):
                return _accepted(await asyncio.wrap_future(future))
        except TimeoutError:
            raise await asyncio.to_thread(self._producer.timed_out, seconds) from None

    async def _submit_until(self, message: Message, deadline: float) -> Future[ResultRecord]:
        while True:
            try:
                return await asyncio.to_thread(
                    self._producer._submit, message, None, deadline - time.monotonic()
                )
            except Unavailable:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.to_thread(self._producer.close)

    async def __aenter__(self) -> AsyncTagProducer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _checked(messages: Iterable[Message]) -> list[Message]:
    """Return messages as a list. Raises `TypeError` if there is something else among them."""
    found = list(messages)
    for each in found:
        if not isinstance(each, Message):
            raise TypeError(f"a message is expected, such as a TagBatch, not {type(each).__name__}")
    return found


def _ids(batches: Sequence[Message], accepted: int) -> list[UUID]:
    """Return the ids of batches, or raise `InboxFull` with those that were not accepted."""
    if accepted < len(batches):
        raise InboxFull(batches[accepted:])
    return [batch.batch_id for batch in batches]


def _seconds(timeout: float | None) -> float:
    """Return a time-out of at most a week, which None means as well. Raises `ValueError`."""
    check_timeout(timeout)
    return MAX_TIMEOUT_SECONDS if timeout is None else min(timeout, MAX_TIMEOUT_SECONDS)


def _is_expired(token: str) -> bool:
    """Whether a JWT expired more than a minute ago. False if it is not a JWT."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"]) + _EXPIRED_SECONDS < time.time()
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return False


def _accepted(record: ResultRecord) -> ResultRecord:
    if record.error is not None:
        raise refusal(record)
    return record
