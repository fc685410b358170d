"""Parameters of statements in PostgreSQL's binary format: arrays, and single values.

Arrays are made in one step, because psycopg handles each element separately. Their format is that
of array_recv() and array_send() in PostgreSQL's arrayfuncs.c: number of dimensions (one), whether
there are nulls, type of the elements, length, lower bound, then each element with its length in
front.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import ClassVar, Final
from uuid import UUID

_HEADER: Final = struct.Struct("!iiIii").pack
_LENGTH: Final = struct.Struct("!i").pack
_READ_LENGTH: Final = struct.Struct("!i").unpack_from
_SHORT: Final = 8192
_LENGTHS: Final = tuple(map(_LENGTH, range(_SHORT)))
_NULL: Final = _LENGTH(-1)
_SIXTEEN: Final = _LENGTH(16)
_EIGHT: Final = struct.Struct("!iq").pack
_BIGINT: Final = struct.Struct("!q").pack
_INTERVAL: Final = struct.Struct("!qii").pack

EPOCH: Final = 946_684_800_000_000
"""Where PostgreSQL's times begin, 2000-01-01, in microseconds since 1970."""


class Parameter(bytes):
    """A value in the binary format; `oid` is its type."""

    oid: ClassVar[int]


class Uuids(Parameter):
    oid = 2951


class Texts(Parameter):
    oid = 1009


class Byteas(Parameter):
    oid = 1001


class Bigints(Parameter):
    oid = 1016


class Timestamps(Parameter):
    oid = 1185


class Uuid(Parameter):
    oid = 2950


class Bigint(Parameter):
    oid = 20


class Timestamp(Parameter):
    oid = 1184


class Interval(Parameter):
    oid = 1186


class Jsonb(Parameter):
    oid = 3802


# --- Single values -------------------------------------------------------------------------------


def uuid(value: UUID) -> Uuid:
    return Uuid(value.bytes)


def bigint(value: int) -> Bigint:
    return Bigint(_BIGINT(value))


def timestamp(value: int) -> Timestamp:
    """Make a timestamptz of microseconds since the epoch."""
    return Timestamp(_BIGINT(value - EPOCH))


def interval(value: timedelta) -> Interval:
    return Interval(_INTERVAL(value // timedelta(microseconds=1), 0, 0))


def jsonb(text: bytes) -> Jsonb:
    """Make a jsonb of JSON; the first byte is the version of its binary format."""
    return Jsonb(b"\x01" + text)


# --- Arrays --------------------------------------------------------------------------------------


def uuids(values: Sequence[int]) -> Uuids:
    """Make a uuid[] of UUIDs as integers."""
    return Uuids(_array(2950, len(values), [_SIXTEEN + value.to_bytes(16) for value in values]))


def bigints(values: Sequence[int]) -> Bigints:
    return Bigints(_array(20, len(values), [_EIGHT(8, value) for value in values]))


def timestamps(values: Sequence[int]) -> Timestamps:
    """Make a timestamptz[] of microseconds since the epoch."""
    return Timestamps(_array(1184, len(values), [_EIGHT(8, value - EPOCH) for value in values]))


def texts(values: Sequence[str | None]) -> Texts:
    encoded = {value: None if value is None else value.encode() for value in set(values)}
    return encoded_texts([encoded[value] for value in values])


def encoded_texts(values: Sequence[bytes | None]) -> Texts:
    """Make a text[] of texts in UTF-8."""
    return Texts(_array(25, len(values), length_prefixed(values), None in values))


def byteas(values: Sequence[bytes]) -> Byteas:
    return Byteas(_array(17, len(values), length_prefixed(values)))


def decode(array: bytes | None) -> list[bytes]:
    """Return the elements of an array that has no nulls."""
    found, at = [], 20
    while array is not None and at < len(array):
        (length,) = _READ_LENGTH(array, at)
        found.append(array[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def _array(oid: int, length: int, decode: Iterable[bytes], nulls: bool = False) -> bytes:
    if not length:
        return _HEADER(0, 0, oid, 0, 0)[:12]
    return _HEADER(1, nulls, oid, length, 1) + b"".join(decode)


def length_prefixed(values: Sequence[bytes | None]) -> list[bytes]:
    """Return each value behind its length."""
    try:  # most are short, and none is null
        return [_LENGTHS[len(value)] + value for value in values]  # type: ignore[arg-type,operator]
    except (IndexError, TypeError):
        return [_NULL if value is None else _LENGTH(len(value)) + value for value in values]
