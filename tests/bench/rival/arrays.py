"""PostgreSQL arrays in the binary format: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

_HEADER: Final = struct.Struct("!iiIii").pack
_LENGTH: Final = struct.Struct("!i").pack
_SHORT: Final = 1024
_LENGTHS: Final = tuple(map(_LENGTH, range(_SHORT)))
_NULL: Final = _LENGTH(-1)
_SIXTEEN: Final = _LENGTH(16)
_EIGHT: Final = struct.Struct("!iq").pack


class Uuids(bytes):
    """A uuid[]."""


class Texts(bytes):
    """A text[]."""


class Byteas(bytes):
    """A bytea[]."""


class Bigints(bytes):
    """A bigint[]."""


def uuids(values: Sequence[int]) -> Uuids:
    """Make a uuid[] of UUIDs as integers."""
    return Uuids(_array(2950, len(values), [_SIXTEEN + value.to_bytes(16) for value in values]))


def bigints(values: Sequence[int]) -> Bigints:
    return Bigints(_array(20, len(values), [_EIGHT(8, value) for value in values]))


def texts(values: Sequence[str | None]) -> Texts:
    return encoded_texts([None if value is None else value.encode() for value in values])


def encoded_texts(values: Sequence[bytes | None]) -> Texts:
    """Make a text[] of texts in UTF-8."""
    return Texts(_array(25, len(values), length_prefixed(values), None in values))


def byteas(values: Sequence[bytes]) -> Byteas:
    return Byteas(_array(17, len(values), length_prefixed(values)))


def _array(oid: int, length: int, decode: Iterable[bytes], nulls: bool = False) -> bytes:
    if not length:
        return _HEADER(0, 0, oid, 0, 0)[:12]
    return _HEADER(1, nulls, oid, length, 1) + b"".join(decode)


def length_prefixed(values: Sequence[bytes | None]) -> list[bytes]:
    return [
        _NULL
        if value is None
        else (_LENGTHS[len(value)] if len(value) < _SHORT else _LENGTH(len(value))) + value
        for value in values
    ]


class _Array(Dumper):
    """Sends the bytes as they are."""

    format = Format.BINARY

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


class _Uuids(_Array):
    oid = 2951


class _Texts(_Array):
    oid = 1009


class _Byteas(_Array):
    oid = 1001


class _Bigints(_Array):
    oid = 1016


def register(connection: psycopg.Connection[Any]) -> None:
    """Make a connection accept these arrays as parameters."""
    for made, dumper in (
        *((Uuids, _Uuids), (Texts, _Texts)),
        *((Byteas, _Byteas), (Bigints, _Bigints)),
    ):
        connection.adapters.register_dumper(made, dumper)
