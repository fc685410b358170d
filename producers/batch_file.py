"""Reads files of batches, one JSON object in a line, without holding them in memory."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from tempfile import SpooledTemporaryFile
from typing import Final, NamedTuple
from uuid import UUID

from producers import console
from producers.contract.encoding import MAX_READABLE_BYTES, parse_line
from producers.contract.errors import InvalidMessage, TaskTagsError, describe
from producers.contract.messages import TOO_LARGE
from producers.contract.values import batch_id_for, uuid7

_IN_MEMORY_BYTES: Final = 1024 * 1024
_DETAILS: Final = 20


class WrongInput(TaskTagsError):
    """A file can't be read, or has a wrong line."""


class Batch(NamedTuple):
    """A message as it is sent; `new_id` is its batch id if its line, counted from 1, had none."""

    line: int
    encoded: bytes
    new_id: UUID | None = None


def read_unchecked(file: str) -> Iterator[Batch]:
    """Yield the lines of a file, unchanged, as batches. Raises `WrongInput`."""
    for number, line in _lines(file):
        if len(line) > MAX_READABLE_BYTES:
            raise WrongInput(f"line {number}: {describe(TOO_LARGE)}")
        yield Batch(number, line)


class CheckedBatches:
    """The batches of a file, all of whose lines are right, to be iterated over once.

    They are kept in a temporary file.

    Args:
        file: Its name, or - for standard input.
        ids_from: Batch ids that are left out are made of this name and the line's number; or else
            they are new.

    Raises:
        WrongInput: A line is wrong, after each fault was printed; or a file can't be used.
    """

    def __init__(self, file: str, ids_from: str | None) -> None:
        self.total = 0
        try:
            self._kept = SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115
            self._check(_lines(file), ids_from)
        except OSError as error:
            raise WrongInput(f"the temporary directory can't be used: {error.strerror}") from None

    def __iter__(self) -> Iterator[Batch]:
        for kept in self._kept:
            number, new_id, encoded = kept.rstrip(b"\n").split(b" ", 2)
            yield Batch(int(number), encoded, UUID(new_id.decode()) if new_id else None)

    def _check(self, lines: Iterable[tuple[int, bytes]], ids_from: str | None) -> None:
        wrong = 0
        for self.total, (number, line) in enumerate(lines, 1):
            id = uuid7() if ids_from is None else batch_id_for(ids_from, number)
            try:
                message = parse_line(line, id)
                encoded = message.encode()
            except InvalidMessage as error:
                wrong += 1
                for detail in error.details[:_DETAILS]:
                    console.print_error(f"line {number}: {describe(detail)}")
                continue
            new_id = str(id) if message.batch_id == id else ""
            self._kept.write(b"%d %s %s\n" % (number, new_id.encode(), encoded))
        self._kept.seek(0)  # it writes what is buffered
        if wrong:
            raise WrongInput(f"nothing was enqueued: {wrong} of {self.total} lines are wrong")


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers; a byte order mark is skipped.

    Of a line that is too large for any message, only the beginning is yielded.
    """
    name = "standard input" if file == "-" else file
    if file == "-" and sys.stdin is None:
        raise WrongInput(f"{name} is closed")
    most = MAX_READABLE_BYTES + 1
    try:
        with sys.stdin.buffer if file == "-" else open(file, "rb") as stream:
            for number in count(1):
                rest = line = stream.readline(most)
                while len(rest) == most and not rest.endswith(b"\n"):
                    rest = stream.readline(most)
                if not line:
                    return
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line.removesuffix(b"\n")
    except OSError as error:
        raise WrongInput(f"{name}: {error.strerror or error}") from None
