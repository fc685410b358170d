"""Puts the numbered events of one feed in order. Pure: no I/O, no clock.

Pub/sub may lose an event, repeat it or deliver it late, and does so silently. But events are
numbered 1, 2, 3 … without gaps, and all of them are stored. So what is published is trusted only as
far as its number goes: a reader takes the events after the last one it has passed on from the few
that are buffered here, and from the store if the next one is not among them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Generic, TypeVar

Payload = TypeVar("Payload")

MAX_BUFFERED_EVENTS: Final = 100
MAX_BUFFERED_BYTES: Final = 256 * 1024


class GapFiller(Generic[Payload]):
    """The newest events of a feed, without gaps, and the number of the last one that is known."""

    def __init__(self) -> None:
        self.last = 0
        self._events: deque[tuple[int, Payload, int]] = deque()
        self._bytes = 0

    def receive(self, number: int, payload: Payload, size: int) -> None:
        """Buffer a published event of so many bytes, unless it is old."""
        if number <= self.last:
            return
        if self._events and self._events[-1][0] != number - 1:
            self._clear()
        self._events.append((number, payload, size))
        self._bytes += size
        while len(self._events) > MAX_BUFFERED_EVENTS or self._bytes > MAX_BUFFERED_BYTES:
            self._bytes -= self._events.popleft()[2]
        self.last = number

    def advance(self, number: int) -> None:
        """Take note that the store has events up to a number."""
        self.last = max(self.last, number)

    def reconcile(self, stored: int, assumed: int) -> bool:
        """Take over the store's last number; `assumed` is what `last` was when the store was asked.

        The store is right, whatever was published. Returns whether the store has to be asked again:
        events received in the meantime looked late if `last` was too high.
        """
        if stored < assumed == self.last:
            self.last = stored
            self._clear()
            return True
        self.advance(stored)
        return False

    def buffered_after(self, number: int) -> Sequence[tuple[int, Payload]]:
        """Return the events after a number, or none if the next one is not buffered."""
        if not self._events or not self._events[0][0] <= number + 1 <= self._events[-1][0]:
            return ()
        first = number + 1 - self._events[0][0]
        return [(number, payload) for number, payload, _ in islice(self._events, first, None)]

    def _clear(self) -> None:
        self._events.clear()
        self._bytes = 0
