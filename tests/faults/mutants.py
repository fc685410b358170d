"""The worker of the harness: `celery -A tests.faults.mutants worker`.

It is the product's worker with failpoints, at which it kills itself on demand, and, if
FAULTS_PLANT names one, with a bug that the harness must notice.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import worker.db.rows
import worker.db.statements
import worker.drain.path
import worker.tasks
from producers.contract.cursors import Cursor
from producers.inbox import protocol
from producers.inbox.protocol import Acknowledged, Acquired, Inbox, StreamEntry
from worker.celery import app
from worker.db.repository import Repository, Transaction, UnknownOrganization
from worker.drain.application import Application
from worker.drain.path import Drain, Steps, Turn
from worker.rules import BatchProcessor

FAILPOINTS = (
    *("after_read", "after_lock", "before_commit", "commit_sent"),
    *("before_publish", "amid_publish", "answers_sent"),
)
PLANTS = {
    "remove_before_commit": ("lost", "die|kill worker"),
    "publish_before_commit": ("lost", "die before commit|kill worker"),
    "no_batch_id_check": ("doubled", ""),
    "apply_backwards": ("reordered", ""),
    "skip_positions": ("gaps", ""),
    "skip_revisions": ("gaps", ""),
    "publish_no_result": ("missing_results", ""),
    "release_blindly": ("stuck", ""),
    "blame_at_once": ("wrongly_refused", "worker: error at (lock|look-up|write)"),
    "end_on_errors": ("ended", ""),
}
"""Bugs that can be planted: the count that must find each, and the faults that bring it out."""

_armed = Path(os.environ.get("FAULTS_FAILPOINT", "/nonexistent"))
_plant = os.environ.get("FAULTS_PLANT", "")
_clock = Path(os.environ.get("FAULTS_CLOCK", "/nonexistent"))


def reach(failpoint: str) -> None:
    """Die here, as by SIGKILL, if this failpoint is armed; the first process that gets here."""
    with suppress(OSError):
        if _armed.read_text() == failpoint:
            _armed.rename(_armed.with_suffix(".hit"))
            os.kill(os.getpid(), signal.SIGKILL)


_acquire, _ack_and_publish = Inbox.acquire, Inbox.ack_and_publish
_begin, _save, _commit = Repository.begin, Transaction.save, Transaction.commit
_take, _process, _next_group = Turn.take, Drain._process, Drain.next_group
_following = Acknowledged.following
_advance, _drain = BatchProcessor._advance, worker.tasks._drain


def acquire(self: Inbox, run_id: str, **bounds: Any) -> Acquired:
    acquired = _acquire(self, run_id, **bounds)
    if acquired.entries:
        reach("after_read")
    return acquired


def begin(self: Repository, organization_id: UUID) -> Transaction:
    opened = _begin(self, organization_id)
    if _armed.exists():
        with suppress(UnknownOrganization):
            assert opened.now  # it is known once the lock is held
            reach("after_lock")
    return opened


def save(self: Transaction, change_set: Any) -> None:
    _save(self, change_set)
    reach("before_commit")


def commit(self: Transaction) -> None:
    _commit(self)
    reach("commit_sent")


def ack_and_publish(
    self: Inbox, run_id: str, entries: Any, publications: Any, *rest: Any, **bounds: Any
) -> Acknowledged:
    reach("before_publish")
    if _armed.exists() and publications:
        connection: Any = self.redis.connection_pool.get_connection()
        connection.send_command("MULTI")
        connection.send_command("PUBLISH", *publications[0])
        reach("amid_publish")
        connection.disconnect()
        self.redis.connection_pool.release(connection)
    sent = _ack_and_publish(self, run_id, entries, publications, *rest, **bounds)
    reach("answers_sent")
    return sent


def drain(*arguments: Any) -> Drain:
    """Make a drain by the clock of the workers, which the harness steps.

    Of the whole process it can't be: `time.sleep` fails with libfaketime, and nothing else of a
    worker goes by a clock that can be set.
    """
    made = _drain(*arguments)
    made.now = stepped_now
    return made


def stepped_now() -> datetime:
    ahead = 0.0
    with suppress(OSError, ValueError):
        ahead = float(_clock.read_text())
    return datetime.now(timezone.utc) + timedelta(seconds=ahead)


worker.tasks._drain = drain  # type: ignore[assignment]
protocol.QUEUE_SHARE = 2  # type: ignore[misc]  # eight organizations make no long queue
Inbox.acquire, Inbox.ack_and_publish = acquire, ack_and_publish  # type: ignore[method-assign]
Repository.begin, Transaction.save = begin, save  # type: ignore[method-assign]
Transaction.commit = commit  # type: ignore[method-assign]


# --- Planted bugs --------------------------------------------------------------------------------


def _ack_before_commit(self: Drain, turn: Turn) -> Steps:
    group = turn.waiting[: 1 if turn.alone else turn.size]
    self.inbox.redis.xdel(self.inbox._inbox, *[entry.id for entry in group])
    yield from _process(self, turn)


def _publish_before_commit() -> None:
    """The commit is sent when the publication has been answered."""
    waiting: list[Transaction] = []

    def commit_at_last(self: Acknowledged) -> list[StreamEntry] | None:
        found = _following(self)
        time.sleep(0.01)
        reach("before_commit")
        while waiting:
            transaction = waiting.pop()
            _commit(transaction)
            transaction.wait()
        return found

    def one_by_one(self: Drain, before: Steps | None) -> Steps | None:
        return None if self.turn.under_way else _next_group(self, before)

    Transaction.commit = lambda self: waiting.append(self)  # type: ignore[method-assign]
    Application.wait = lambda self: None  # type: ignore[method-assign]
    Acknowledged.following = commit_at_last  # type: ignore[method-assign]
    Drain.next_group = one_by_one  # type: ignore[method-assign]


def _release_blindly(self: Acknowledged) -> list[StreamEntry] | None:
    """As if the read of the next entries and the release of the lease were two steps."""
    found = _following(self)
    if found is not None and len(found) < 2:
        time.sleep(0.02)
        self._inbox.redis.delete(self._inbox._lease)
        return []
    return found


def _ignore_batch_ids() -> None:
    """Only of what took effect: a message that fails would delay its organization each time."""
    find = worker.db.rows.batches

    def batches(rows: Any) -> Any:
        known, seen = find(rows)
        return {id: it for id, it in known.items() if b'"internal_error"' in it.record}, seen

    worker.db.rows.batches = batches
    statement = worker.db.statements.SAVE_BATCHES
    worker.db.statements.SAVE_BATCHES = statement + " on conflict do nothing"  # type: ignore[misc]


def _end_on_errors() -> None:
    Drain._ends_turn = lambda self, turn, error: os._exit(3)  # type: ignore[method-assign]


def _apply_backwards(self: Turn) -> list[StreamEntry]:
    return _take(self)[::-1]


def _skip_revisions(self: BatchProcessor, *arguments: Any) -> dict[UUID, int]:
    revisions: dict[UUID, int] = _advance(self, *arguments)
    for execution in self.snapshot.executions.values():
        execution.revision += execution.revision % 50 == 49
    return revisions


def _skip_positions(self: BatchProcessor, *arguments: Any) -> dict[UUID, int]:
    revisions: dict[UUID, int] = _advance(self, *arguments)
    number, time = self.snapshot.head
    self.snapshot.head = Cursor(number + (number % 50 == 49), time)
    return revisions


def _publish_no_result(
    self: Inbox, run_id: str, entries: Any, publications: Any, *rest: Any, **bounds: Any
) -> Acknowledged:
    """Publish no result of a tag batch whose id ends with an f."""
    lost = re.compile(rb'.{13}[-0-9a-f]{35}f".*"tags":')
    kept = [each for each in publications if not lost.match(each[1])]
    return ack_and_publish(self, run_id, entries, kept, *rest, **bounds)


_plants: dict[str, Callable[[], Any]] = {
    "apply_backwards": lambda: setattr(Turn, "take", _apply_backwards),
    "skip_positions": lambda: setattr(BatchProcessor, "_advance", _skip_positions),
    "skip_revisions": lambda: setattr(BatchProcessor, "_advance", _skip_revisions),
    "publish_no_result": lambda: setattr(Inbox, "ack_and_publish", _publish_no_result),
    "remove_before_commit": lambda: setattr(Drain, "_process", _ack_before_commit),
    "publish_before_commit": _publish_before_commit,
    "release_blindly": lambda: setattr(Acknowledged, "following", _release_blindly),
    "no_batch_id_check": _ignore_batch_ids,
    "blame_at_once": lambda: setattr(worker.drain.path, "attempts_to_blame", lambda *_: 1),
    "end_on_errors": _end_on_errors,
}
if _plant:
    _plants[_plant]()

__all__ = ["app"]
