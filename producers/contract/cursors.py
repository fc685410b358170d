"""Places in a feed of change events (docs/concepts/contract.md#rule-21)."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final, NamedTuple

_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_CURSOR: Final = re.compile(r"(0|[1-9][0-9]{0,17})(?:-(0|[1-9a-z][0-9a-z]{0,11}))?")


class Cursor(NamedTuple):
    """The last event that a reader has: its number, and the time at which it was made.

    The number is a position in an organization or a revision in an execution. After a restore,
    another event may have the same number, but not the same time.
    """

    number: int
    time: int | None = None
    """Microseconds since the epoch; None is not compared with anything."""

    def __str__(self) -> str:
        if self.time is None:
            return str(self.number)
        left, digits = self.time, ""
        while left:
            left, digit = divmod(left, 36)
            digits = _DIGITS[digit] + digits
        return f"{self.number}-{digits or '0'}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read `<number>-<t>`, t in base 36, or a number alone. Raises `ValueError`."""
        found = _CURSOR.fullmatch(text)
        if found is None:
            raise ValueError("it is not a cursor")
        return cls(int(found[1]), None if found[2] is None else int(found[2], 36))


BEGINNING: Final = Cursor(0)


def microseconds(at: datetime) -> int:
    """Return a time in microseconds since the epoch, exactly."""
    return int(at.timestamp()) * 1_000_000 + at.microsecond
