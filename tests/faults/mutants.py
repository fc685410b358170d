"""The worker of the harness: `celery -A tests.faults.mutants worker`.

It is the product's worker with failpoints, at which it kills itself on demand, and, if
FAULTS_PLANT names one, with a bug that the harness must notice.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import worker.db.rows
import worker.db.statements
import worker.drain.path
from producers.contract.cursors import Cursor
from producers.inbox.protocol import Acquired, Inbox, StreamEntry
from worker.celery import app
from worker.db.repository import Repository, Transaction
from worker.drain.admission import Admitted
from worker.drain.path import Drain, publications
from worker.rules import BatchProcessor, decide

FAILPOINTS = ("after_read", "after_lock", "before_commit", "before_publish", "amid_publish")
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


def reach(failpoint: str) -> None:
    """Die here, as by SIGKILL, if this failpoint is armed; the first process that gets here."""
    with suppress(OSError):
        if _armed.read_text() == failpoint:
            _armed.rename(_armed.with_suffix(".hit"))
            os.kill(os.getpid(), signal.SIGKILL)


_acquire, _ack_and_publish = Inbox.acquire, Inbox.ack_and_publish
_transaction, _save = Repository.transaction, Transaction.save
_process = Drain._process
_advance = BatchProcessor._advance


def acquire(self: Inbox, run_id: str, **bounds: Any) -> Acquired:
    acquired = _acquire(self, run_id, **bounds)
    if acquired.entries:
        reach("after_read")
    return acquired


@contextmanager
def transaction(self: Repository, organization_id: UUID) -> Iterator[Transaction]:
    with _transaction(self, organization_id) as opened:
        if _armed.exists():
            assert opened.now  # it is known once the lock is held
            reach("after_lock")
        yield opened


def save(self: Transaction, change_set: Any) -> None:
    _save(self, change_set)
    reach("before_commit")


def ack_and_publish(
    self: Inbox, run_id: str, entries: Any, publications: Any, *rest: Any, **bounds: Any
) -> list[StreamEntry]:
    reach("before_publish")
    if _armed.exists() and publications:
        connection: Any = self._redis.connection_pool.get_connection()
        connection.send_command("MULTI")
        connection.send_command("PUBLISH", *publications[0])
        reach("amid_publish")
        connection.disconnect()
        self._redis.connection_pool.release(connection)
    return _ack_and_publish(self, run_id, entries, publications, *rest, **bounds)


Inbox.acquire, Inbox.ack_and_publish = acquire, ack_and_publish  # type: ignore[method-assign]
Repository.transaction, Transaction.save = transaction, save  # type: ignore[method-assign]


# --- Planted bugs --------------------------------------------------------------------------------


def _ack_before_commit(
    self: Drain, entries: Sequence[StreamEntry], **_: bool
) -> tuple[int, list[StreamEntry]]:
    self.inbox.ack_and_publish(self.run_id, entries, [], max_messages=self.group_size)
    return _process(self, entries)


def _publish_before_commit(
    self: Drain, entries: Sequence[StreamEntry], **_: bool
) -> tuple[int, list[StreamEntry]]:
    admitted = [each for each in map(self._admit, entries) if isinstance(each, Admitted)]
    messages = [each.message for each in admitted]
    following: list[StreamEntry] = []

    def apply(transaction: Transaction) -> None:
        snapshot = transaction.load(messages)
        new_id = partial(self.new_id, int(transaction.now.timestamp() * 1_000_000))
        decision = decide(
            self.organization_id, messages, snapshot, now=transaction.now, new_id=new_id
        )
        to_publish = [
            publication
            for each, outcome in zip(admitted, decision.outcomes, strict=False)
            for publication in publications(self.organization_id, each.reply_to, outcome)
        ]
        following[:] = self.inbox.ack_and_publish(
            self.run_id, entries, to_publish, max_messages=self.group_size
        )
        time.sleep(0.01)
        transaction.save(decision.change_set)

    self.repository.transact(self.organization_id, apply)
    return len(entries), following


def _ack_and_release_blindly(self: Inbox, *arguments: Any, **bounds: Any) -> list[StreamEntry]:
    """As if the read of the next entries and the release of the lease were two steps."""
    following = ack_and_publish(self, *arguments, **bounds)
    if len(following) < 2:
        time.sleep(0.02)
        self._redis.delete(self._lease)
        return []
    return following


def _ignore_batch_ids() -> None:
    worker.db.rows.batches = lambda rows: ({}, None)
    statement = worker.db.statements.SAVE_BATCHES
    worker.db.statements.SAVE_BATCHES = statement + " on conflict do nothing"  # type: ignore[misc]


def _end_on_errors() -> None:
    Drain._ends_turn = lambda self, turn, error: os._exit(3)  # type: ignore[method-assign]


def _apply_backwards(
    self: Drain, entries: Sequence[StreamEntry], **alone: bool
) -> tuple[int, list[StreamEntry]]:
    return _process(self, entries[::-1], **alone)


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
) -> list[StreamEntry]:
    """Publish no result of a tag batch whose id ends with an f."""
    lost = re.compile(rb'.{13}[-0-9a-f]{35}f".*"tags":')
    kept = [each for each in publications if not lost.match(each[1])]
    return ack_and_publish(self, run_id, entries, kept, *rest, **bounds)


_plants: dict[str, Callable[[], Any]] = {
    "apply_backwards": lambda: setattr(Drain, "_process", _apply_backwards),
    "skip_positions": lambda: setattr(BatchProcessor, "_advance", _skip_positions),
    "skip_revisions": lambda: setattr(BatchProcessor, "_advance", _skip_revisions),
    "publish_no_result": lambda: setattr(Inbox, "ack_and_publish", _publish_no_result),
    "remove_before_commit": lambda: setattr(Drain, "_process", _ack_before_commit),
    "publish_before_commit": lambda: setattr(Drain, "_process", _publish_before_commit),
    "release_blindly": lambda: setattr(Inbox, "ack_and_publish", _ack_and_release_blindly),
    "no_batch_id_check": _ignore_batch_ids,
    "blame_at_once": lambda: setattr(worker.drain.path, "attempts_to_blame", lambda *_: 1),
    "end_on_errors": _end_on_errors,
}
if _plant:
    _plants[_plant]()

__all__ = ["app"]
