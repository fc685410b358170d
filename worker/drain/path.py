"""The main path of a drain: acquire, admit, apply, publish and acknowledge.

A group is what is at the head of an inbox. Its last step removes it from the inbox and returns the
next group. Until that step its messages are still in the inbox, so a group that breaks anywhere is
simply processed again: what was committed is known by its batch id, and only published again
(docs/concepts/inbox-protocol.md).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any, Final, assert_never
from uuid import UUID

from redis import exceptions as redis_errors

from producers.contract.channels import changes_channel, results_channel
from producers.contract.values import Uuid7
from producers.inbox.protocol import DeadLetter, Inbox, StreamEntry
from worker.auth import Authorizer, JwksUnavailable
from worker.db.connection import is_transient
from worker.db.repository import Repository, Transaction
from worker.drain.admission import Admission, Admitted, Refused, Unreadable, admit, fail_admission
from worker.rules import AuthorizedMessage, Outcome, decide, decide_failure

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS: Final = 0.05
MAX_BACKOFF_SECONDS: Final = 1.0
_ATTEMPTS: Final = 2
"""A message is to blame for a failure at its second attempt, which is made for it alone."""


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(slots=True)
class Drain:
    """One drain of one organization's inbox.

    Args:
        run_id: Identifies this delivery: the lease says which run of a drain is working.
        requeue: Sends the drain to the end of the Celery queue; the lease is kept for it.
        group_size: Messages in one transaction, at most.
        budget_seconds: After this time the drain goes to the end of the queue.
        stopping: Tells whether the process is to end.
    """

    inbox: Inbox
    organization_id: UUID
    run_id: str
    repository: Repository
    authorizer: Authorizer
    requeue: Callable[[], None]
    group_size: int
    budget_seconds: float
    stopping: Callable[[], bool]
    new_id: Uuid7 = field(default_factory=Uuid7)
    now: Callable[[], datetime] = _utc_now

    def run(self) -> int:
        """Drain the inbox until it is empty, the lease is lost or the budget is used up.

        Returns how many messages were answered. Errors that may pass are waited out in place, so
        that nothing overtakes the messages at the head.
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
                        # If Redis has no memory for that, draining goes on: it frees some.
                        deadline = time.monotonic() + FIRST_BACKOFF_SECONDS + self.budget_seconds
                        self._requeue()
                        return answered
                    count = len(entries)
                    entries = self._process(entries)
                    answered += count
                    failures = 0
                return answered
            except Exception as error:
                if not is_retryable(error) or (self.stopping() and failures):
                    raise
                entries = None
                failures += 1
                self._back_off(failures, error)

    def _process(self, entries: Sequence[StreamEntry]) -> list[StreamEntry]:
        """Take a group all the way; return the group that comes next."""
        admissions = [self._admit(entry) for entry in entries]
        outcomes = iter(self._apply([each for each in admissions if isinstance(each, Admitted)]))
        to_publish: list[tuple[str, bytes]] = []
        dead_letters: list[DeadLetter] = []
        for admission in admissions:
            match admission:
                case Admitted():
                    to_publish += publications(
                        self.organization_id, admission.reply_to, next(outcomes)
                    )
                case Refused(reply_to=reply_to, record=record):
                    to_publish += publications(self.organization_id, reply_to, Outcome(record))
                case Unreadable(dead_letter=dead_letter, answer=answer):
                    dead_letters.append(dead_letter)
                    if answer is not None:
                        to_publish += publications(
                            self.organization_id, answer.reply_to, Outcome(answer.record)
                        )
                case _:
                    assert_never(admission)
        return self.inbox.ack_and_publish(
            self.run_id, entries, to_publish, dead_letters, max_messages=self.group_size
        )

    def _admit(self, entry: StreamEntry) -> Admission:
        now = self.now()
        try:
            return admit(entry, self.organization_id, self.authorizer, now)
        except JwksUnavailable:
            raise
        except Exception as error:  # a fault of ours: the messages behind this one must not wait
            logger.exception("a message could not be read", extra={"entry": entry.id.decode()})
            return fail_admission(entry, self.organization_id, error, now)

    def _apply(self, admitted: Sequence[Admitted]) -> list[Outcome]:
        """Apply messages in one transaction; if it fails for a lasting reason, each by itself.

        Returns the outcomes in the order of the messages.
        """
        if not admitted:
            return []
        try:
            return self._transact([each.message for each in admitted])
        except Exception as error:
            if is_retryable(error):
                raise
            logger.warning(
                "a transaction failed: applying its messages one by one",
                extra={**self._described(error), "messages": len(admitted)},
            )
            time.sleep(FIRST_BACKOFF_SECONDS)
            return [self._apply_alone(each) for each in admitted]

    def _apply_alone(self, admitted: Admitted) -> Outcome:
        try:
            return self._transact([admitted.message])[0]
        except Exception as error:
            if is_retryable(error):
                raise
            return self._fail(admitted, error)

    def _transact(self, messages: Sequence[AuthorizedMessage]) -> list[Outcome]:
        return apply_in_transaction(self.repository, self.organization_id, messages, self.new_id)

    def _fail(self, admitted: Admitted, error: Exception) -> Outcome:
        """Store `internal_error` as the answer to the message to blame, and keep a dead letter.

        The dead letter is written before the commit: after a crash in between, the message would be
        found answered and never kept.
        """
        batch_id = admitted.message.message.batch_id
        logger.error("a batch failed", exc_info=error, extra={"batch_id": str(batch_id)})
        text = "the worker failed at this batch; nothing of it took effect"
        outcome, change_set = decide_failure(self.organization_id, admitted.message, text)
        reason = f"internal_error: {type(error).__name__}"
        dead_letter = DeadLetter.of(admitted.entry, reason, self.now(), _ATTEMPTS, batch_id)

        def store(transaction: Transaction) -> Outcome:
            known = transaction.batches([batch_id]).get(batch_id)
            if known is not None:
                return Outcome(known.record, known.events)
            transaction.save(change_set)
            self.inbox.add_dead_letter(dead_letter)
            return outcome

        return self.repository.transact(self.organization_id, store)

    def _requeue(self) -> None:
        if self.inbox.requeue(self.run_id):
            self.requeue()

    def _back_off(self, failures: int, error: Exception) -> None:
        seconds = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), MAX_BACKOFF_SECONDS)
        if failures in (1, 10, 100):
            extra = {**self._described(error), "failures": failures}
            logger.warning("a drain failed; retrying", extra=extra)
        time.sleep(seconds)

    def _described(self, error: Exception) -> dict[str, Any]:
        """Return the log fields of an error: of its text the first line, which quotes no row."""
        cause = str(error).partition("\n")[0][:200]
        organization = str(self.organization_id)
        return {"organization": organization, "error": type(error).__name__, "cause": cause}


def apply_in_transaction(
    repository: Repository,
    organization_id: UUID,
    messages: Sequence[AuthorizedMessage],
    new_id: Uuid7,
) -> list[Outcome]:
    """Load, decide and save in one transaction; return the outcomes in the messages' order."""

    def apply(transaction: Transaction) -> list[Outcome]:
        snapshot = transaction.load(messages)  # before `now`, so that it is sent with the lock
        now = transaction.now
        microseconds = int(now.timestamp()) * 1_000_000 + now.microsecond
        decision = decide(
            organization_id, messages, snapshot, now=now, new_id=partial(new_id, microseconds)
        )
        transaction.save(decision.change_set)
        return decision.outcomes

    return repository.transact(organization_id, apply)


def publications(
    organization_id: UUID, reply_to: str, outcome: Outcome
) -> Iterator[tuple[str, bytes]]:
    """Yield channels and payloads: change events first, so that a result never overtakes them."""
    for flow_execution_id, event in outcome.events:
        yield changes_channel(organization_id, flow_execution_id), event
    yield results_channel(organization_id, reply_to), outcome.record


def is_retryable(error: Exception) -> bool:
    """Whether the same group may succeed later, without a change in its messages."""
    passing = (
        redis_errors.ConnectionError,
        redis_errors.TimeoutError,
        redis_errors.OutOfMemoryError,
        JwksUnavailable,
    )
    return isinstance(error, passing) or is_transient(error)
