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
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Final, assert_never
from uuid import UUID

import psycopg
from redis.exceptions import RedisError

from producers.contract.channels import changes_channel, positions_channel, results_channel
from producers.contract.cursors import BEGINNING, Cursor, microseconds
from producers.contract.results import encode_position
from producers.contract.values import Uuid7
from producers.inbox.protocol import DeadLetter, Inbox, StreamEntry
from worker.auth import Authorizer
from worker.db.repository import Repository, Transaction
from worker.drain.admission import Admission, Admitted, Refused, Unreadable, admit, fail_admission
from worker.drain.blame import attempts_to_blame, decide_failure, is_server_fault, log_wait
from worker.jwk_set import JwksUnavailable
from worker.rules import decide_in_parts
from worker.snapshot import AuthorizedMessage, Outcome

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS: Final = 0.05
MAX_BACKOFF_SECONDS: Final = 1.0
PART_SIZE: Final = 50
"""Messages of a group that are saved while the next ones are decided."""


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(slots=True)
class _Turn:
    """A drain between two waits in the Celery queue."""

    deadline: float
    size: int
    """How many messages are applied in one transaction, at most: fewer after a server's fault."""
    answered: int = 0
    failures: int = 0
    """Failures since the last group that succeeded."""
    alone: int = 0
    """How many messages are still to be applied one by one."""


@dataclass(slots=True)
class Drain:
    """One drain of one organization's inbox.

    Args:
        run_id: Identifies this delivery: the lease says which run of a drain is working.
        rescue: Looks for drains that were lost, if it is this run's turn to do that.
        group_size: Messages in one transaction, at most.
        budget_seconds: After this time the drain goes to the end of the queue.
        stopping: Tells whether the process is to end.
    """

    inbox: Inbox
    organization_id: UUID
    run_id: str
    repository: Repository
    authorizer: Authorizer
    rescue: Callable[[], None]
    group_size: int
    budget_seconds: float
    stopping: Callable[[], bool]
    new_id: Uuid7 = field(default_factory=Uuid7)
    now: Callable[[], datetime] = _utc_now

    def run(self) -> int:
        """Drain the inbox until it is empty, the lease is lost or the budget is used up.

        Returns how many messages were answered. Each turn processes one group at least. Faults of
        servers are waited out in place, so that nothing overtakes the messages at the head, until
        the budget is used up; then the drain goes to the end of the queue: others have a turn.
        """
        turn = _Turn(time.monotonic() + self.budget_seconds, self.group_size)
        while True:
            try:
                self._drain(turn)
                return turn.answered
            except psycopg.errors.LockNotAvailable:  # another worker has the organization
                self.inbox.requeue(self.run_id)
                return turn.answered
            except Exception as error:
                if not is_server_fault(error) and not isinstance(error, psycopg.Error):
                    raise
                if self._ends_turn(turn, error):
                    return turn.answered

    def _drain(self, turn: _Turn) -> None:
        """Process group after group until the turn is over. Raises what breaks one of them."""
        acquired = self.inbox.acquire(self.run_id, max_messages=self.group_size)
        if acquired.rescue:
            self.rescue()
        entries = acquired.entries
        while entries:
            group = entries[: 1 if turn.alone else turn.size]
            try:
                answered, entries = self._process(group, alone=bool(turn.alone))
            except Exception as error:
                if turn.alone or is_server_fault(error):
                    raise
                # One message of the group may be to blame: apply them one by one.
                log_wait(
                    "a transaction failed: applying its messages one by one",
                    self.organization_id,
                    error,
                )
                turn.alone = len(entries)
                time.sleep(FIRST_BACKOFF_SECONDS)
                continue
            turn.answered += answered
            turn.failures, turn.alone = 0, max(0, turn.alone - 1)
            turn.size = min(turn.size * 2, self.group_size)
            if entries and (time.monotonic() > turn.deadline or self.stopping()):
                self.inbox.requeue(self.run_id)
                return

    def _ends_turn(self, turn: _Turn, error: Exception) -> bool:
        """Log a server's fault, and pause; return whether the turn is over.

        The next group is smaller, and has its time: this one may last longer than a transaction
        may (worker/db/time_limit.py).
        """
        log_wait("a drain failed", self.organization_id, error)
        turn.failures, turn.alone = turn.failures + 1, 0
        if turn.size > 1:
            turn.size = max(1, turn.size // 8)
            turn.deadline = max(turn.deadline, time.monotonic() + self.budget_seconds)
        if isinstance(error, RedisError):
            self.inbox.disconnect()
        if self.stopping():
            return True  # the lease runs out, and another worker goes on
        if time.monotonic() > turn.deadline:
            with suppress(RedisError, OSError):  # else it goes on here
                self.inbox.requeue(self.run_id)
                return True
        time.sleep(min(FIRST_BACKOFF_SECONDS * 2 ** (turn.failures - 1), MAX_BACKOFF_SECONDS))
        return False

    def _process(
        self, entries: Sequence[StreamEntry], *, alone: bool = False
    ) -> tuple[int, list[StreamEntry]]:
        """Take a group all the way; return how many were answered, and the group that comes next.

        A group may end before one whose look-ups or answer would make it too large (rules.decide).

        Args:
            alone: The group is one message, which failed before: it may be to blame.
        """
        admissions = self._admit_all(entries)
        admitted = [each for each in admissions if isinstance(each, Admitted)]
        applied, head = self._apply(admitted, alone=alone)
        outcomes = iter(applied)
        touched = {id for each in applied for id, _ in each.events}
        to_publish: list[tuple[str, bytes]] = []
        if touched:
            to_publish.append(
                (positions_channel(self.organization_id), encode_position(head, touched))
            )
        dead_letters: list[DeadLetter] = []
        events_of: set[UUID] = set()
        for place, admission in enumerate(admissions):
            match admission:
                case Admitted():
                    outcome = next(outcomes, None)
                    if outcome is None:
                        entries = entries[:place]
                        break
                    batch_id = admission.message.message.batch_id
                    if batch_id in events_of:  # a copy: its events are published once
                        outcome = Outcome(outcome.record)
                    events_of.add(batch_id)
                    to_publish += publications(self.organization_id, admission.reply_to, outcome)
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
        following = self.inbox.ack_and_publish(
            self.run_id,
            entries,
            to_publish,
            dead_letters,
            position=str(head) if touched else None,
            max_messages=self.group_size,
        )
        return len(entries), following

    def _admit_all(self, entries: Sequence[StreamEntry]) -> list[Admission]:
        """Admit messages. Raises `JwksUnavailable` after all of them were seen."""
        admissions: list[Admission] = []
        unavailable: JwksUnavailable | None = None
        for entry in entries:
            try:
                admissions.append(self._admit(entry))
            except JwksUnavailable as error:
                unavailable = error
        if unavailable is not None:
            raise unavailable
        return admissions

    def _admit(self, entry: StreamEntry) -> Admission:
        now = self.now()
        try:
            return admit(entry, self.organization_id, self.authorizer, now)
        except JwksUnavailable:
            raise
        except Exception as error:  # a fault of ours: the messages behind this one must not wait
            logger.exception("a message could not be read", extra={"entry": entry.id.decode()})
            return fail_admission(entry, self.organization_id, error, now)

    def _apply(
        self, admitted: Sequence[Admitted], *, alone: bool
    ) -> tuple[Sequence[Outcome], Cursor]:
        """Apply messages in one transaction; return outcomes in their order, of the first ones.

        The second value is the place of the organization's last change event.
        """
        if not admitted:
            return (), BEGINNING
        try:
            return self._transact([each.message for each in admitted])
        except Exception as error:
            if not alone:
                raise
            attempts = attempts_to_blame(
                error, admitted[0].entry, self.inbox, self.repository, self.organization_id
            )
            if not attempts:
                raise
            return [self._fail(admitted[0], error, attempts)], BEGINNING

    def _transact(self, messages: Sequence[AuthorizedMessage]) -> tuple[Sequence[Outcome], Cursor]:
        return apply_in_transaction(self.repository, self.organization_id, messages, self.new_id)

    def _fail(self, admitted: Admitted, error: Exception, attempts: int) -> Outcome:
        """Store `internal_error` as the answer to the message to blame, and keep a dead letter.

        The dead letter is written before the commit: after a crash in between, the message would be
        found answered and never kept.
        """
        batch_id = admitted.message.message.batch_id
        logger.error("a batch failed", exc_info=error, extra={"batch_id": str(batch_id)})
        text = "the worker failed at this batch; it had no effect"
        outcome, change_set = decide_failure(self.organization_id, admitted.message, text)
        reason = f"internal_error: {type(error).__name__}"
        dead_letter = DeadLetter.of(admitted.entry, reason, self.now(), attempts, batch_id)

        def store(transaction: Transaction) -> Outcome:
            known = transaction.batches([batch_id]).get(batch_id)
            if known is not None:
                return Outcome(known.record, known.events)
            transaction.save(change_set)
            self.inbox.add_dead_letter(dead_letter)
            return outcome

        return self.repository.transact(self.organization_id, store)


def apply_in_transaction(
    repository: Repository,
    organization_id: UUID,
    messages: Sequence[AuthorizedMessage],
    new_id: Uuid7,
) -> tuple[Sequence[Outcome], Cursor]:
    """Load, decide and save in one transaction; return outcomes, of the first messages.

    The second value is the place of the organization's last change event. PostgreSQL saves one part
    while the next one is decided.
    """

    def apply(transaction: Transaction) -> tuple[Sequence[Outcome], Cursor]:
        snapshot = transaction.load(messages)  # before `now`, so that it is sent with the lock
        now, outcomes = transaction.now, list[Outcome]()
        for part in decide_in_parts(
            organization_id,
            messages,
            snapshot,
            now=now,
            new_id=partial(new_id, microseconds(now)),
            size=PART_SIZE,
        ):
            outcomes += part.outcomes
            transaction.save(part.change_set)
        return outcomes, snapshot.head

    return repository.transact(organization_id, apply)


def publications(
    organization_id: UUID, reply_to: str, outcome: Outcome
) -> Iterator[tuple[str, bytes]]:
    """Yield channels and payloads: change events first, so that a result never overtakes them."""
    for flow_execution_id, event in outcome.events:
        yield changes_channel(organization_id, flow_execution_id), event
    yield results_channel(organization_id, reply_to), outcome.record
