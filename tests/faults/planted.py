"""The worker of the harness: `celery -A tests.faults.planted worker`.

It is the product's worker with failpoints, at which it kills itself when it is told to, and, if
FAULTS_PLANT names one, with a bug that the harness must notice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text

import worker.store
from producers.inbox import Entry, Inbox
from worker.apply import Drain
from worker.celery import app
from worker.store import Store, Transaction

FAILPOINTS = ("after_read", "after_lock", "before_commit", "before_publish", "amid_publish")
PLANTS = ("remove_before_commit", "release_blindly", "no_batch_id_check", "publish_before_commit")

_armed = Path(os.environ.get("FAULTS_FAILPOINT", "/nonexistent"))
_plant = os.environ.get("FAULTS_PLANT", "")


def reach(failpoint: str) -> None:
    """Die here, as by SIGKILL, if this failpoint is armed; whoever renames the file is the one."""
    with suppress(OSError):
        if _armed.read_text() == failpoint:
            _armed.rename(_armed.with_suffix(".hit"))
            os.kill(os.getpid(), signal.SIGKILL)


_read, _remove, _transaction, _save = Inbox.read, Inbox.remove, Store.transaction, Transaction.save


def read(self: Inbox, run_id: str, **bounds: Any) -> list[Entry]:
    entries = _read(self, run_id, **bounds)
    if entries:
        reach("after_read")
    return entries


@contextmanager
def transaction(self: Store, organization_id: UUID) -> Iterator[Transaction]:
    with _transaction(self, organization_id) as opened:
        reach("after_lock")
        yield opened


def save(self: Transaction, writes: Any) -> None:
    _save(self, writes)
    reach("before_commit")


def remove(self: Inbox, entries: Iterable[Entry], publications: Any, *rest: Any) -> None:
    reach("before_publish")
    publications = list(publications)
    if _armed.exists() and publications:
        connection: Any = self._redis.connection_pool.get_connection()
        connection.send_command("MULTI")
        connection.send_command("PUBLISH", *publications[0])
        reach("amid_publish")
        connection.disconnect()
        self._redis.connection_pool.release(connection)
    _remove(self, entries, publications, *rest)


Inbox.read, Inbox.remove = read, remove  # type: ignore[method-assign, assignment]
Store.transaction, Transaction.save = transaction, save  # type: ignore[method-assign]


# --- Planted bugs --------------------------------------------------------------------------------


def _round_that_removes_first(self: Drain) -> int:
    entries = self.inbox.read(self.run_id, most=self.group_size)
    if entries:
        received = [self._receive(entry) for entry in entries]
        self.inbox.remove(entries, [])
        self._apply([message for message in received if message.request is not None])
        self._publish(received)
    return len(entries)


def _round_that_publishes_first(self: Drain) -> int:
    entries = self.inbox.read(self.run_id, most=self.group_size)
    if entries:
        received = [self._receive(entry) for entry in entries]
        requests = [message.request for message in received if message.request is not None]
        try:
            with _transaction(self.store, self.organization_id) as opened:
                from worker.decide import decide

                state = opened.load(requests)
                decision = decide(
                    self.organization_id, requests, state, now=opened.now, new_id=self.new_id
                )
                for message, outcome in zip(
                    [m for m in received if m.request], decision.outcomes, strict=True
                ):
                    message.outcome = outcome
                self._publish(received)
                time.sleep(0.01)
                _save(opened, decision.writes)
        except Exception:
            time.sleep(0.05)
    return len(entries)


def _release_blindly(self: Inbox, run_id: str) -> bool:
    time.sleep(0.02)
    self._redis.delete(self._lease)
    return True


def _ignore_batch_ids() -> None:
    Transaction.batches = lambda self, batch_ids: {}  # type: ignore[method-assign]
    statement = str(worker.store._SAVE_BATCHES)
    worker.store._SAVE_BATCHES = text(  # type: ignore[misc]
        statement + " on conflict do nothing"
    )


_plants: dict[str, Callable[[], Any]] = {
    "remove_before_commit": lambda: setattr(Drain, "_round", _round_that_removes_first),
    "publish_before_commit": lambda: setattr(Drain, "_round", _round_that_publishes_first),
    "release_blindly": lambda: setattr(Inbox, "release", _release_blindly),
    "no_batch_id_check": _ignore_batch_ids,
}
if _plant:
    _plants[_plant]()

__all__ = ["app"]
