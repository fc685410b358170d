"""Drains of several inboxes in one turn.

While the Celery queue is long, a worker takes several drain messages at once. Each inbox keeps its
lease, its transactions and its order; their groups follow one another on the same connections, so
that one is processed while another one waits for a server. An inbox whose row is locked, or at
which anything fails, leaves the turn; while PostgreSQL is slow at one, the others go back to the
queue. So they wait for none of these.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Final

from redis.exceptions import RedisError

from producers.inbox.protocol import acquire_all
from worker.drain.blame import is_locked_out, is_server_fault
from worker.drain.path import Drain, Steps, run_groups

MAX_OTHERS: Final = 15


def drain_all(first: Drain, others: Callable[[list[bytes]], list[Drain]]) -> None:
    """Drain an inbox, and those whose drain messages come next in a long queue.

    Args:
        others: Returns the drains of more messages from the Celery queue.
    """
    try:
        acquired = first.acquire(MAX_OTHERS)
    except (RedisError, OSError):
        first.run()  # which waits for Redis
        return
    drains = others(acquired.others)
    if drains:
        SharedTurn(first, drains).run()
    else:
        first.run(is_acquired=True)


class SharedTurn:
    """One turn of several drains, the first of which has its messages already."""

    def __init__(self, first: Drain, others: Sequence[Drain]) -> None:
        self._first = self._running = first
        self._others = others
        self._repository = first.repository
        self._drains = deque([first, *others])
        self._alone: list[Drain] = []
        self._requeued: list[Drain] = []
        """Drains that left while PostgreSQL was slow; what is under way of them is finished."""

    def run(self) -> None:
        self._repository.on_slow = self._be_slow
        self._repository.on_wait = lambda: self._running.renew()
        try:
            self._take(list(self._others))
        finally:
            self._repository.on_slow = self._repository.on_wait = None
        with ExitStack() as stack:  # each runs, whatever another one raises
            for drain in reversed(self._alone):
                stack.callback(drain.run)

    def _take(self, new: list[Drain]) -> None:
        """Process groups of all; set aside what fails."""
        while True:
            try:
                acquire_together(new)
                run_groups(self._next_group, self._repository)
            except (RedisError, OSError):
                here = (each for each in new if each not in self._requeued)
                self._alone += dict.fromkeys([*self._unfinished(), *here])
                break
            except Exception as error:
                left = self._leave(self._running)
                if is_locked_out(error, self._repository):
                    self._running.requeue()
                else:
                    if left:
                        self._alone.append(self._running)
                    if is_server_fault(error):
                        break
            else:
                break
            new = self._unfinished()  # what became of their last groups is not known
        self._end()

    def _end(self) -> None:
        """Send what is not done to the end of the queue."""
        for drain in (*self._unfinished(), *self._requeued):
            # One that left may have taken its lease again.
            if not drain.turn.is_over and drain not in self._alone:
                drain.requeue()

    def _next_group(self, before: Steps | None) -> Steps | None:
        """Return the next group of the inbox that has waited longest, unless the turn is over."""
        first = self._first
        is_over = time.monotonic() > first.turn.deadline or first.stopping()
        if is_over and any(drain.turn.has_begun for drain in (first, *self._others)):
            return None
        for _ in range(len(self._drains)):
            drain = self._drains[0]
            self._drains.rotate(-1)
            if steps := drain.next_group(None):
                return self._tracked(drain, steps)
        return None

    def _tracked(self, drain: Drain, steps: Steps) -> Steps:
        """Take the same steps, and record which drain is running."""
        with closing(steps):
            while True:
                self._running = drain
                try:
                    next(steps)
                except StopIteration:
                    return
                yield

    def _unfinished(self) -> list[Drain]:
        return [drain for drain in self._drains if not drain.turn.is_over]

    def _be_slow(self) -> None:
        """Send drains to the end of the queue, but for the one that is running.

        What is under way of one is finished: that does no harm (docs/concepts/inbox-protocol.md).
        """
        for drain in self._unfinished():
            if drain is not self._running:
                self._leave(drain)
                if not drain.turn.under_way:
                    drain.turn.drop()
                self._requeued.append(drain)
                drain.requeue()

    def _leave(self, drain: Drain) -> bool:
        """Take a drain out of the turn; return whether it was in it."""
        if drain not in self._drains:
            return False
        self._drains.remove(drain)
        return True


def acquire_together(drains: Sequence[Drain]) -> None:
    """Begin several drains in one round trip."""
    if drains:
        runs = [(drain.inbox, drain.run_id) for drain in drains]
        found = acquire_all(runs, 2 * drains[0].group_size)
        for drain, acquired in zip(drains, found, strict=True):
            drain.begin(acquired)
