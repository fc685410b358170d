"""A drain's main path: read, authorize, load, decide, save, publish (design, section 3).

A round takes what is at the head of an inbox through all of it, and its last step brings what comes next. Until
that step the messages are still in the inbox, so a round that breaks anywhere is simply run again: what was
committed is known by its batch id, and only its publication is repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any, Final
from uuid import UUID

from redis import exceptions as redis_errors

from producers.contract.encoding import parse_canonical, parse_message
from producers.contract.errors import ErrorCode, ErrorInfo, InvalidMessage, describe
from producers.contract.messages import MAX_MESSAGE_BYTES, Message, TagBatch, digest
from producers.contract.values import Uuid7
from producers.inbox.protocol import DeadLetter, Inbox, StreamEntry
from worker.auth import EXECUTIONS_WRITE, WRITE, Authorizer, InvalidToken, JwksUnavailable
from worker.db.repository import Repository, is_transient
from worker.drain.publish import publications
from worker.rules import AuthorizedMessage, Outcome, decide, decide_failure, error_record

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS: Final = 0.05
MAX_BACKOFF_SECONDS: Final = 1.0


@dataclass(slots=True)
class Received:
    """A message on its way: either `request` is still to be applied, or it is answered or rejected."""

    entry: StreamEntry
    reply_to: str = ""
    request: AuthorizedMessage | None = None
    outcome: Outcome | None = None
    rejection: DeadLetter | None = None
    attempts: int = 0


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(slots=True)
class Drain:
    """One drain of one organization's inbox.

    `run_id` is this delivery's own: the lease says which run of a drain is at work. `budget_seconds`: after
    this time it goes to the end of the queue. `stopping` tells whether the process is to end. `requeue` sends
    the drain again; the lease is kept for it.
    """

    inbox: Inbox
    organization_id: UUID
    run_id: str
    store: Repository
    authorizer: Authorizer
    requeue: Callable[[], None]
    group_size: int
    budget_seconds: float
    stopping: Callable[[], bool]
    new_id: Uuid7 = field(default_factory=Uuid7)
    now: Callable[[], datetime] = _utc_now

    def run(self) -> int:
        """Drain the inbox until it is empty, the lease is lost or the budget is used up.

        Returns how many messages were answered. Errors that may pass are waited out, in place, so that
        nothing overtakes the messages at the head.
        """
        answered, failures = 0, 0
        deadline = time.monotonic() + self.budget_seconds
        entries: list[StreamEntry] | None = None
        while True:
            try:
                if entries is None:
                    entries = self.inbox.acquire(self.run_id, max_messages=self.group_size)
                while entries:
                    if time.monotonic() > deadline or self.stopping():
                        # If Redis has no memory for that, another turn follows: draining is what frees some.
                        deadline = time.monotonic() + FIRST_BACKOFF_SECONDS + self.budget_seconds
                        self._requeue()
                        return answered
                    count = len(entries)
                    entries = self._round(entries)
                    answered += count
                    failures = 0
                return answered
            except Exception as error:
                if not is_retryable(error) or (self.stopping() and failures):
                    raise
                entries = None
                failures += 1
                self._back_off(failures, error)

    def _round(self, entries: Sequence[StreamEntry]) -> list[StreamEntry]:
        """Take these entries all the way, and return those that come next."""
        received = [self._admit(entry) for entry in entries]
        self._apply([message for message in received if message.request is not None])
        return self._publish(received)

    def _admit(self, entry: StreamEntry) -> Received:
        """Read and authorize one message. What can't be applied is refused or rejected here."""
        now = self.now()
        try:
            return admit(entry, self.organization_id, self.authorizer, now)
        except JwksUnavailable:
            raise
        except Exception as error:  # a fault of ours: those behind this message must not wait
            logger.exception("a message could not be read", extra={"entry": entry.id.decode()})
            received, batch_id = Received(entry), None
            with suppress(Exception):  # it may be the very reading that fails
                message = parse_message(entry.message or b"")
                fault = _error("internal_error", "the worker failed to read this batch")
                record = error_record(self.organization_id, message.batch_id, fault).encode()
                received.reply_to = message.reply_channel_name
                received.outcome, batch_id = Outcome(record), message.batch_id
            reason = type(error).__name__
            received.rejection = _rejection(entry, reason, now, batch_id=batch_id)
            return received

    def _apply(self, received: Sequence[Received]) -> None:
        """Apply messages in one transaction; if that fails for a lasting reason, each one by itself, a lone one too.

        Only at the second time is a message to blame: what an error says of itself may be wrong.
        """
        if not received:
            return
        for message in received:
            message.attempts += 1
        try:
            requests = [message.request for message in received if message.request]
            outcomes = apply_in_transaction(self.store, self.organization_id, requests, self.new_id)
        except Exception as error:
            if is_retryable(error):
                raise
            if received[0].attempts > 1:
                self._dead_letter(received[0], error)
                return
            logger.warning(
                "a transaction failed: applying its messages one by one",
                extra={**self._what_failed(error), "messages": len(received)},
            )
            time.sleep(FIRST_BACKOFF_SECONDS)
            for message in received:
                self._apply([message])
            return
        for message, outcome in zip(received, outcomes, strict=True):
            message.outcome = outcome

    def _dead_letter(self, message: Received, error: Exception) -> None:
        """Answer the one message at which the transaction failed, for good, and keep it for the operators.

        It is kept before the commit: a crash after that would find it answered, and never keep it.
        """
        assert message.request is not None
        batch_id = message.request.message.batch_id
        logger.error("a batch failed", exc_info=error, extra={"batch_id": str(batch_id)})
        text = "the worker failed at this batch; nothing of it took effect"
        outcome, writes = decide_failure(self.organization_id, message.request, text)
        rejection = _rejection(
            message.entry,
            f"internal_error: {type(error).__name__}",
            self.now(),
            message.attempts,
            batch_id,
        )
        with self.store.transaction(self.organization_id) as transaction:
            known = transaction.batches([batch_id]).get(batch_id)
            if known is None:
                transaction.save(writes)
                self.inbox.reject(rejection)
            else:
                outcome = Outcome(known.record, known.events)
        message.outcome = outcome

    def _publish(self, received: Sequence[Received]) -> list[StreamEntry]:
        return self.inbox.ack_and_publish(
            self.run_id,
            [message.entry for message in received],
            [
                publication
                for message in received
                if message.outcome is not None
                for publication in publications(
                    self.organization_id, message.reply_to, message.outcome
                )
            ],
            [message.rejection for message in received if message.rejection is not None],
            max_messages=self.group_size,
        )

    def _requeue(self) -> None:
        if self.inbox.requeue(self.run_id):
            self.requeue()

    def _back_off(self, failures: int, error: Exception) -> None:
        seconds = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), MAX_BACKOFF_SECONDS)
        if failures in (1, 10, 100):
            extra = {**self._what_failed(error), "failures": failures}
            logger.warning("trying again", extra=extra)
        time.sleep(seconds)

    def _what_failed(self, error: Exception) -> dict[str, Any]:
        """Return what a log says of an error: of its text the first line, which has no values of rows."""
        cause = str(error).partition("\n")[0][:200]
        organization = str(self.organization_id)
        return {"organization": organization, "error": type(error).__name__, "cause": cause}


def apply_in_transaction(
    store: Repository, organization_id: UUID, requests: Sequence[AuthorizedMessage], new_id: Uuid7
) -> list[Outcome]:
    """Load, decide and save, in one transaction; return the outcomes, in the order of the requests."""
    with store.transaction(organization_id) as transaction:
        state = transaction.load(requests)  # first, so that it is sent together with the lock
        now = transaction.now
        microseconds = int(now.timestamp()) * 1_000_000 + now.microsecond
        decision = decide(
            organization_id,
            requests,
            state,
            now=now,
            new_id=partial(new_id, microseconds),
        )
        transaction.save(decision.writes)
    return decision.outcomes


def is_retryable(error: Exception) -> bool:
    """Whether the same round may succeed later, without anybody changing anything in the messages."""
    passing = (
        redis_errors.ConnectionError,
        redis_errors.TimeoutError,
        redis_errors.OutOfMemoryError,
        JwksUnavailable,
    )
    return isinstance(error, passing) or is_transient(error)


def admit(
    entry: StreamEntry, organization_id: UUID, authorizer: Authorizer, now: datetime
) -> Received:
    """Read one message and check that its token allows it (section 4, rule 7).

    A message without a readable batch id is rejected, for there is nobody to answer. Who sent it is settled
    before anything else is said about it.
    """
    message: Message | None = None
    broken: InvalidMessage | None = None
    try:
        message, canonical_bytes = parse_canonical(entry.message or b"")
        batch_id, reply_to = message.batch_id, message.reply_channel_name
    except InvalidMessage as error:
        if error.batch_id is None:
            reason = "; ".join(describe(detail) for detail in error.details[:10])
            return Received(entry, rejection=_rejection(entry, reason, now))
        broken = error
        batch_id, reply_to = error.batch_id, error.reply_to or str(error.batch_id)

    def refuse(error: ErrorInfo) -> Received:
        record = error_record(organization_id, batch_id, error).encode()
        return Received(entry, reply_to, outcome=Outcome(record))

    try:
        grant = authorizer.verify(entry.token, at=entry.accepted_at)
    except InvalidToken as error:
        return refuse(_error("unauthorized", str(error)))
    if grant.organization_id != organization_id:
        return refuse(_error("forbidden", "the token is of another organization than the inbox"))
    if broken is not None:
        text = "the message breaks the contract"
        return refuse(ErrorInfo(code="bad_request", message=text, details=broken.details))
    assert message is not None
    scope = WRITE if isinstance(message, TagBatch) else EXECUTIONS_WRITE
    if not grant.allows(scope):
        return refuse(_error("forbidden", f"the token lacks the scope {scope}"))
    return Received(
        entry, reply_to, request=AuthorizedMessage(message, grant.actor, digest(canonical_bytes))
    )


def _error(code: ErrorCode, message: str) -> ErrorInfo:
    return ErrorInfo(code=code, message=message, details=[])


def _rejection(
    entry: StreamEntry, reason: str, now: datetime, attempts: int = 1, batch_id: UUID | None = None
) -> DeadLetter:
    """Keep a message whole, or the first mebibyte of one that is larger than messages may be."""
    message = (entry.message or b"")[:MAX_MESSAGE_BYTES]
    return DeadLetter(message, reason, now, attempts, batch_id)
