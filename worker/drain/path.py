"""The main path of a drain: acquire, admit, apply, publish and acknowledge.

A group is what is at the head of an inbox. Its last step removes it from the inbox and returns the
next group. Until that step its messages are still in the inbox, so a group that breaks anywhere is
simply processed again: what was committed is known by its batch id, and only published again
(docs/concepts/inbox-protocol.md).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, assert_never
from uuid import UUID

import psycopg
from redis.exceptions import RedisError

from producers.contract.channels import changes_channel, positions_channel, results_channel
from producers.contract.cursors import BEGINNING, Cursor
from producers.contract.results import encode_position
from producers.contract.values import Uuid7, uuid7
from producers.inbox.protocol import Acquired, DeadLetter, Inbox, StreamEntry
from worker.auth import Authorizer
from worker.db.repository import Repository, Transaction
from worker.drain.admission import Admission, Admitted, Refused, Unreadable, admit, fail_admission
from worker.drain.application import Application, apply_in_transaction
from worker.drain.blame import (
    attempts_to_blame,
    decide_failure,
    is_locked_out,
    is_server_fault,
    is_timeout,
    log_wait,
)
from worker.jwk_set import JwksUnavailable
from worker.rules import decide
from worker.snapshot import Outcome, Snapshot

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS: Final = 0.05
MAX_BACKOFF_SECONDS: Final = 1.0
_TAG_IDS: Final = Uuid7()
"""Apart from `uuid7`: they follow the clock of the database, not that of this machine."""
MAX_GROUP_MESSAGE_BYTES: Final = 256 * 1024
"""The size of the messages at which a group ends: 1,700 operations, at about 150 bytes each."""


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(slots=True)
class Turn:
    """A drain between two waits in the Celery queue."""

    deadline: float
    size: int
    """How many messages are applied in one transaction, at most: fewer after a server's fault."""
    answered: int = 0
    failures: int = 0
    """Failures since the last group that succeeded."""
    alone: int = 0
    """How many messages are still to be applied one by one."""
    waiting: list[StreamEntry] = field(default_factory=list)
    """What was read from the inbox, and is in no group."""
    unanswered: int = 0
    """How many messages were read, and not yet answered."""
    last: bytes = b""
    """The id of the last message that was read."""
    has_begun: bool = False
    """A group was taken since the inbox was acquired."""
    under_way: int = 0
    """Groups that were taken and are not done."""

    def begin(self, entries: Sequence[StreamEntry]) -> None:
        """Go on with what is at the head of the inbox."""
        self.waiting, self.unanswered, self.under_way, self.has_begun = [], 0, 0, False
        self.read(entries)

    @property
    def is_over(self) -> bool:
        """Whether all that was read is done."""
        return not (self.waiting or self.under_way)

    def read(self, entries: Sequence[StreamEntry]) -> None:
        self.waiting += entries
        self.unanswered += len(entries)
        self.last = entries[-1].id if entries else self.last

    def take(self) -> list[StreamEntry]:
        """Return the next group. It ends with the message at which it reaches its size."""
        self.has_begun = True
        self.under_way += 1
        size = total_bytes = 0
        for entry in self.waiting[: 1 if self.alone else self.size]:
            size += 1
            total_bytes += len(entry.message or b"")
            if total_bytes >= MAX_GROUP_MESSAGE_BYTES:
                break
        group, self.waiting = self.waiting[:size], self.waiting[size:]
        return group

    def drop(self) -> None:
        """Forget what is in no group."""
        self.unanswered -= len(self.waiting)
        self.waiting = []

    def succeed(self, answered: int, most: int) -> None:
        """Take note of a group that was answered; the next one may be larger."""
        self.answered += answered
        self.under_way -= 1
        self.failures, self.alone = 0, max(0, self.alone - 1)
        self.size = min(self.size * 2, most)


@dataclass(slots=True)
class Answers:
    """The answers to the first messages of a group, and how many messages these are."""

    count: int = 0
    publications: list[tuple[str, bytes]] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    position: str | None = None


Steps = Generator[None]
"""A group in progress: it yields while a server works, so that groups can be interleaved:

1. its look-ups are sent, 2. its commit is sent, 3. its answers are sent; then it is done.
"""


@dataclass(slots=True, eq=False)
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
    new_id: Uuid7 = _TAG_IDS
    now: Callable[[], datetime] = _utc_now
    turn: Turn = field(init=False)

    def __post_init__(self) -> None:
        self.turn = Turn(time.monotonic() + self.budget_seconds, self.group_size)

    def acquire(self, others: int = 0) -> Acquired:
        """Take the lease, and begin; see `Inbox.acquire`."""
        most = 2 * self.group_size
        return self.begin(self.inbox.acquire(self.run_id, max_messages=most, others=others))

    def begin(self, acquired: Acquired) -> Acquired:
        """Begin with what is at the head of the inbox."""
        self.turn.begin(acquired.entries)
        if acquired.rescue:
            try:
                self.rescue()
            except (RedisError, OSError) as error:  # the next one is due in 5 s
                log_wait("a rescue failed", self.organization_id, error)
        return acquired

    def run(self, *, is_acquired: bool = False) -> int:
        """Drain the inbox until it is empty, the lease is lost or the budget is used up.

        Returns how many messages were answered. Each turn processes one group at least. Faults of
        servers are waited out in place, so that nothing overtakes the messages at the head, until
        the budget is used up; then the drain goes to the end of the queue: others have a turn.
        """
        turn = self.turn
        self.repository.on_wait = self.renew
        while True:
            try:
                if not is_acquired:
                    self.acquire()
                is_acquired = False
                run_groups(self.next_group, self.repository)
                if turn.waiting:
                    self.inbox.requeue(self.run_id)
                return turn.answered
            except Exception as error:
                if is_locked_out(error, self.repository):
                    self.requeue()
                    return turn.answered
                is_slow = is_timeout(error, self.repository) and not self.stopping()
                if not turn.alone and ((is_slow and turn.size == 1) or not is_server_fault(error)):
                    self._go_on_alone(turn, error)
                    continue
                if not is_server_fault(error) and not isinstance(error, psycopg.Error):
                    raise
                if self._ends_turn(turn, error):
                    return turn.answered

    def renew(self) -> None:
        """Keep the lease while PostgreSQL works for this run: another one would find it locked."""
        if not self.stopping():
            with suppress(RedisError, OSError):
                self.inbox.renew(self.run_id)

    def requeue(self) -> None:
        """Go to the end of the queue. If Redis can't be used, the lease expires."""
        with suppress(RedisError, OSError):
            self.inbox.requeue(self.run_id)

    def next_group(self, before: Steps | None) -> Steps | None:
        """Return the next group unless the turn is over. After a failure, groups do not overlap."""
        turn = self.turn
        is_over = turn.has_begun and (time.monotonic() > turn.deadline or self.stopping())
        if not turn.waiting or is_over or (before and (turn.failures or turn.alone)):
            return None
        return self._process(turn)

    def _go_on_alone(self, turn: Turn, error: Exception) -> None:
        """One message of a group may be to blame for a failure: apply them one by one."""
        log_wait(
            "a transaction failed: applying its messages one by one", self.organization_id, error
        )
        turn.alone = max(1, turn.unanswered)
        time.sleep(FIRST_BACKOFF_SECONDS)

    def _ends_turn(self, turn: Turn, error: Exception) -> bool:
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

    def _process(self, turn: Turn) -> Steps:
        """Take the next group all the way.

        A group may end before a message whose look-ups or answer would make it too large
        (rules.decide_in_parts).
        """
        entries, alone = turn.take(), bool(turn.alone)
        admissions = self._admit_all(entries)
        messages = [each.message for each in admissions if isinstance(each, Admitted)]
        application = None
        if messages and not alone:
            application = Application(self.repository, self.organization_id, messages, self.new_id)
        yield
        if application is not None:
            outcomes, head = application.decide()
        else:
            outcomes, head = self._apply_alone(admissions)
        answers = self._answers(admissions, outcomes, head)
        turn.waiting[:0] = entries[answers.count :]
        yield
        if application is not None:
            application.wait()
        turn.unanswered -= answers.count
        acknowledged = self.inbox.ack_and_publish(
            self.run_id,
            entries[: answers.count],
            answers.publications,
            answers.dead_letters,
            position=answers.position,
            max_messages=max(0, 2 * self.group_size - turn.unanswered),
            after=turn.last if turn.unanswered else b"",
        )
        try:
            yield
            following = acknowledged.following()
        finally:
            acknowledged.drop()
        turn.succeed(answers.count, self.group_size)
        if following is None:
            turn.drop()
        else:
            turn.read(following)

    def _answers(
        self, admissions: Sequence[Admission], outcomes: Sequence[Outcome], head: Cursor
    ) -> Answers:
        """Return what is sent for the first messages of a group, until one has no outcome yet."""
        answers = Answers()
        touched = {id for each in outcomes for id, _ in each.events}
        if touched:
            answers.position = str(head)
            channel = positions_channel(self.organization_id)
            answers.publications.append((channel, encode_position(head, touched)))
        left = iter(outcomes)
        events_of: set[UUID] = set()
        for admission in admissions:
            match admission:
                case Admitted():
                    outcome = next(left, None)
                    if outcome is None:
                        break
                    batch_id = admission.message.message.batch_id
                    if batch_id in events_of:  # a copy: its events are published once
                        outcome = Outcome(outcome.record)
                    events_of.add(batch_id)
                    self._publish(answers, admission.reply_to, outcome)
                case Refused(reply_to=reply_to, record=record):
                    self._publish(answers, reply_to, Outcome(record))
                case Unreadable(dead_letter=dead_letter, answer=answer):
                    answers.dead_letters.append(dead_letter)
                    if answer is not None:
                        self._publish(answers, answer.reply_to, Outcome(answer.record))
                case _:
                    assert_never(admission)
            answers.count += 1
        return answers

    def _publish(self, answers: Answers, reply_to: str, outcome: Outcome) -> None:
        answers.publications += publications(self.organization_id, reply_to, outcome)

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

    def _apply_alone(self, admissions: Sequence[Admission]) -> tuple[Sequence[Outcome], Cursor]:
        """Apply a message that failed before: it may be to blame. There may be none."""
        admitted = next((each for each in admissions if isinstance(each, Admitted)), None)
        if admitted is None:
            return (), BEGINNING
        try:
            return apply_in_transaction(
                self.repository, self.organization_id, [admitted.message], self.new_id
            )
        except Exception as error:
            if self.stopping():  # its time limit may be to blame
                raise
            attempts = attempts_to_blame(
                error, admitted.entry, self.inbox, self.repository, self.organization_id
            )
            if not attempts:
                raise
            outcome, head = self._fail(admitted, error, attempts)
            return [outcome], head

    def _fail(self, admitted: Admitted, error: Exception, attempts: int) -> tuple[Outcome, Cursor]:
        """Store `internal_error` as the answer to the message to blame, and keep a dead letter.

        If another drain has answered it, or this one before a crash, that is the answer, also to a
        message for which look-ups always fail. The dead letter is written before the commit: after
        a crash in between, the message would be found answered and never kept.
        """
        batch_id = admitted.message.message.batch_id
        text = "the worker failed at this batch; it had no effect"
        outcome, change_set = decide_failure(self.organization_id, admitted.message, text)
        reason = f"internal_error: {type(error).__name__}"
        dead_letter = DeadLetter.of(admitted.entry, reason, self.now(), attempts, batch_id)

        def store(transaction: Transaction) -> tuple[Outcome, Cursor]:
            now, known = transaction.now, Snapshot(batches=transaction.batches([batch_id]))
            if known.batches:
                message = [admitted.message]
                again = decide(self.organization_id, message, known, now=now, new_id=uuid7)
                return again.outcomes[0], transaction.head
            logger.error("a batch failed", exc_info=error, extra={"batch_id": str(batch_id)})
            transaction.save(change_set)
            self.inbox.add_dead_letter(admitted.entry, dead_letter)
            return outcome, BEGINNING

        return self.repository.transact(self.organization_id, store)


def run_groups(next_group: Callable[[Steps | None], Steps | None], repository: Repository) -> None:
    """Process group after group until there is none. Raises the first error.

    A group begins while the one before it commits; it writes nothing before that has succeeded.

    Args:
        next_group: Returns the next group, given the one that is in progress, if any.
    """
    before: Steps | None = None
    group = next_group(None)
    try:
        while group or before:
            _advance(group)  # admitted; its look-ups are sent, behind the commit before
            _advance(before)  # committed; what became of its messages is sent
            _advance(group)  # decided; its commit is sent
            _advance(before)  # published; what comes next is read
            before, group = group, next_group(group)
    except BaseException:
        repository.abandon()
        for each in filter(None, (before, group)):
            each.close()
        raise


def _advance(steps: Steps | None) -> None:
    """Go one step, if there is one."""
    if steps is not None:
        next(steps, None)


def publications(
    organization_id: UUID, reply_to: str, outcome: Outcome
) -> Iterator[tuple[str, bytes]]:
    """Yield channels and payloads: change events first, so that a result never overtakes them."""
    for flow_execution_id, event in outcome.events:
        yield changes_channel(organization_id, flow_execution_id), event
    yield results_channel(organization_id, reply_to), outcome.record
