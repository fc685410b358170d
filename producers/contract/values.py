"""What messages and results are built of: ids, texts with limits, and tag metadata in one form."""

from __future__ import annotations

import math
import os
import re
import secrets
import threading
import time
from typing import Annotated, Any, Final, cast
from uuid import UUID, SafeUUID, uuid5

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError, PydanticSerializationError, to_json

MAX_METADATA_BYTES: Final = 8 * 1024
MAX_METADATA_DEPTH: Final = 32
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

MAX_NAME_LENGTH: Final = 200
MAX_TYPE_LENGTH: Final = 100

_NO_NUL: Final = r"^[^\x00]*$"
REPLY_TO_PATTERN: Final = r"^[A-Za-z0-9._:-]{1,200}$"

Id = Annotated[UUID, Field(strict=False)]
TaskName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=_NO_NUL)]
TagType = Annotated[str, Field(min_length=1, max_length=MAX_TYPE_LENGTH, pattern=_NO_NUL)]
TagName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=_NO_NUL)]
FlowId = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=_NO_NUL)]
ReplyTo = Annotated[str, Field(pattern=REPLY_TO_PATTERN)]


class StrictModel(BaseModel):
    """What is sent: unknown fields and coercions are refused, and errors quote no value."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


class TolerantModel(StrictModel):
    """What is read: a reader that is older than the worker skips fields that it does not know."""

    model_config = ConfigDict(extra="ignore")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "must be a string")
    return value


def tolerant(known: Any) -> Any:
    """Return what a reader accepts for a set of words: any text, for words may be added later."""
    return PlainValidator(_text, json_schema_input_type=known)


# --- UUIDv7 --------------------------------------------------------------------------------------


class Uuid7:
    """Makes strictly increasing UUIDv7s (https://www.rfc-editor.org/rfc/rfc9562#section-6.2).

    48 bits of milliseconds, 12 bits of the fraction of a millisecond (method 3), then 62 bits that
    start at random and count up within one microsecond (method 2).
    """

    def __init__(self) -> None:
        self._begin()
        # A fork would go on with the same ids, and with a lock that a lost thread may hold.
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._last_us = -1
        self._next = 0

    def __call__(self, at_us: int | None = None) -> UUID:
        """Return the next id; each is greater than the one before, even if the clock steps back.

        Args:
            at_us: Microseconds since the epoch; the system's clock if it is left out.
        """
        us = time.time_ns() // 1000 if at_us is None else at_us
        with self._lock:
            if us > self._last_us:
                self._last_us = us
                milliseconds, fraction = divmod(us, 1000)
                high = milliseconds << 16 | 7 << 12 | (fraction << 12) // 1000
                self._next = high << 64 | 0b10 << 62 | secrets.randbits(60)
            number = self._next
            self._next += 1
        return _uuid(number)


class _WritableUUID(UUID):
    __slots__ = ()
    __setattr__ = object.__setattr__  # type: ignore[assignment]


_UNKNOWN: Final = SafeUUID.unknown  # looked up once: an enumeration's member takes a call


def _uuid(number: int) -> UUID:
    """Return `UUID(int=number)` in a fifth of the time, without its checks of the arguments."""
    id: Any = object.__new__(_WritableUUID)
    id.int = number
    id.is_safe = _UNKNOWN
    id.__class__ = UUID
    return cast(UUID, id)


uuid7: Final = Uuid7()

_NAMESPACE: Final = UUID("7461736b-2d74-8167-8000-000000000001")


def batch_id_for(run: UUID | str, step: UUID | str | int) -> UUID:
    """Return the batch id of a step of a run: the same each time the step runs again.

    A UUIDv5 (https://www.rfc-editor.org/rfc/rfc9562#section-5.5). The same batch takes effect once
    under it; another batch under it is refused as a `conflict`.
    """
    return uuid5(_NAMESPACE, f"{step}:{run}")


# --- Tag metadata --------------------------------------------------------------------------------


class BeyondInt64:
    """Stands in parsed JSON for an integer beyond 64 bits, so that an error can name its place."""


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("tag_metadata", "{reason}", {"reason": message})


def _normal_number(value: int | float) -> int | float:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _fault("must not contain NaN, infinities or numbers beyond a double")
        return int(value) if value.is_integer() and abs(value) < 2**63 else value
    if not INT64_MIN <= value <= INT64_MAX:
        raise _fault("must not contain integers beyond 64 bits")
    return value


def _sorted_keys(value: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(value)
    except TypeError:  # of several types
        return list(value)


def _normal_json(value: Any, depth: int = 1) -> Any:
    """Return `value` in the one form that equal JSON values share, or raise why it is refused.

    Keys are sorted and an integral float becomes the integer that it equals, so that two values of
    the same tag (docs/concepts/contract.md#rule-2) serialize alike. Characters are checked after
    serialization.
    """
    if depth > MAX_METADATA_DEPTH and isinstance(value, (dict, list, tuple)):
        raise _fault(f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
    if isinstance(value, dict):
        normal = {}
        for key in _sorted_keys(value) if len(value) > 1 else value:
            if not isinstance(key, str):
                raise _fault("must have strings as keys")
            item = value[key]
            normal[key] = item if type(item) is str else _normal_json(item, depth + 1)
        return normal
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return _normal_number(value)
    if isinstance(value, (list, tuple)):
        return [_normal_json(item, depth + 1) for item in value]
    if isinstance(value, BeyondInt64):
        raise _fault("must not contain integers beyond 64 bits")
    raise _fault("must be JSON: null, a boolean, a number, a string, a list or an object")


def canonical_json(value: Any) -> bytes:
    """Serialize validated metadata; equal values give equal bytes."""
    return to_json(value)


# U+0000 in JSON, but not an escaped backslash that happens to be followed by these letters.
_ESCAPED_NUL: Final = re.compile(rb"(?<!\\)(\\\\)*\\u0000")


def normal_metadata(value: Any) -> Any:
    """Return tag metadata in the one form that equal values share.

    Raises `PydanticCustomError` if it is not valid.
    """
    if value is None:
        return None
    normal = _normal_json(value)
    try:
        encoded = canonical_json(normal)
    except PydanticSerializationError:  # everything else that it refuses was refused above
        raise _fault("must not contain lone surrogates") from None
    if b"u0000" in encoded and _ESCAPED_NUL.search(encoded):
        raise _fault("must not contain U+0000")
    if len(encoded) > MAX_METADATA_BYTES:
        raise _fault(f"must not be larger than {MAX_METADATA_BYTES} bytes of JSON")
    return normal


TagMetadata = Annotated[Any, AfterValidator(normal_metadata)]
