"""Enqueues a message for a request that writes, and waits for its result.

Nothing here knows of HTTP but the errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID, uuid4
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread

from producers.contract.channels import results_channel
from producers.contract.errors import InvalidMessage
from producers.contract.messages import Message
from producers.contract.results import ResultRecord
from producers.enqueuer import Enqueuer
from producers.errors import Unavailable
from producers.pubsub import Listener, PubSubMultiplexer, wait_at_most
from worker.api.errors import ApiError, invalid_body
from worker.api.queries import READ_ERRORS, Reader

CONFLICT: Final = ApiError(409, "conflict", "this batch id was used for another message")
INBOX_FULL: Final = ApiError(429, "inbox_full", "the organization's inbox is full; try again later")
_SUBSCRIBE_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 1.0
_THREADS: Final = 40
_PARSERS: Final = 2


class PendingResult(Listener):
    """Waits for the one result that is published for a request."""

    def __init__(self) -> None:
        self.subscribed = asyncio.Event()
        self.record: asyncio.Future[ResultRecord] = asyncio.get_running_loop().create_future()

    def on_subscribed(self) -> None:
        self.subscribed.set()

    def on_event(self, payload: bytes) -> None:
        if not self.record.done():
            self.record.set_result(ResultRecord.decode(payload))


@dataclass(frozen=True)
class WriteService:
    """Enqueues messages and waits for their results."""

    enqueuer: Enqueuer
    pubsub: PubSubMultiplexer
    reader: Reader
    threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_THREADS))
    """Limits the threads that wait for Redis. Reads have others, so these can't hold them up."""
    parsers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_PARSERS))
    parsing: WeakValueDictionary[UUID, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def parse_large(self, organization_id: UUID, parse: Callable[[], Message]) -> Message:
        """Parse a large body in a thread, one at a time of an organization, two in total.

        It may take a second to find what is wrong with one, and others wait for the interpreter.
        """
        async with self.parsing.setdefault(organization_id, asyncio.Lock()):
            return await to_thread.run_sync(parse, limiter=self.parsers)

    async def apply(
        self, organization_id: UUID, message: Message, token: str, seconds: float
    ) -> ResultRecord | None:
        """Enqueue a message and return its result; None if there is none in time.

        Each request has its own results channel, because two requests with the same batch id may
        ask for different things, and then have different results.

        Args:
            seconds: How long to wait; 0 does not wait.

        Raises:
            ApiError: 400, 409, 429 or 503.
        """
        if not seconds:
            await self._enqueue(organization_id, message, token)
            return None
        pending, reply_to = PendingResult(), f"endpoint-{uuid4()}"
        with self.pubsub.listening(results_channel(organization_id, reply_to), pending):
            await wait_at_most(_SUBSCRIBE_SECONDS, pending.subscribed.wait())
            named = message.model_copy(update={"reply_to": reply_to})
            await self._enqueue(organization_id, named, token)
            return await self._result(organization_id, message, pending.record, seconds)

    async def _enqueue(self, organization_id: UUID, message: Message, token: str) -> None:
        try:
            accepted = await to_thread.run_sync(
                lambda: self.enqueuer.enqueue(organization_id, [message.encode()], token),
                limiter=self.threads,
            )
        except InvalidMessage as error:
            raise invalid_body(error.details) from None
        except Unavailable as error:
            raise ApiError(503, "unavailable", "Redis can't be used; try again later") from error
        if not accepted:
            raise INBOX_FULL

    async def _result(
        self,
        organization_id: UUID,
        message: Message,
        published: asyncio.Future[ResultRecord],
        seconds: float,
    ) -> ResultRecord | None:
        """Wait for the result; read the stored one every second, because pub/sub may lose it."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while (left := end - clock()) > 0:
            await wait_at_most(min(left, _POLL_SECONDS), asyncio.shield(published))
            if published.done():
                return published.result()
            try:
                stored = await self.reader.record(organization_id, message.batch_id)
            except READ_ERRORS:
                continue
            if stored is not None and stored.digest == message.digest():
                return ResultRecord.decode(stored.record)
            if stored is not None:
                raise CONFLICT
        return None
