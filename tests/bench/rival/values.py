"""What batches are built of: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

import math
import re
import secrets
import time
from typing import Annotated, Any, Final, cast
from uuid import UUID, SafeUUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError, PydanticSerializationError, to_json

MAX_METADATA_BYTES: Final = 8 * 1024
MAX_METADATA_DEPTH: Final = 32
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

_NO_NUL: Final = r"^[^\x00]*$"
REPLY_TO_PATTERN: Final = r"^[A-Za-z0-9._:-]{1,200}$"

Id = Annotated[UUID, Field(strict=False)]
TaskName = Annotated[str, Field(min_length=1, max_length=200, pattern=_NO_NUL)]
TagType = Annotated[str, Field(min_length=1, max_length=100, pattern=_NO_NUL)]
TagName = Annotated[str, Field(min_length=1, max_length=200, pattern=_NO_NUL)]
ReplyTo = Annotated[str, Field(pattern=REPLY_TO_PATTERN)]


class StrictModel(BaseModel):
    """What is sent: unknown fields and coercions are refused, and errors quote no value."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


# --- UUIDv7 --------------------------------------------------------------------------------------


class Uuid7:
    """Makes strictly increasing UUIDv7s, in one thread."""

    def __init__(self) -> None:
        self._last_us = -1
        self._next = 0

    def __call__(self, at_us: int | None = None) -> UUID:
        """Return the next id; each is greater than the one before, even if the clock steps back.

        Args:
            at_us: Microseconds since the epoch; the system's clock if it is left out.
        """
        us = time.time_ns() // 1000 if at_us is None else at_us
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


def _uuid(number: int) -> UUID:
    """Return `UUID(int=number)` in a fifth of the time, without its checks of the arguments."""
    id: Any = object.__new__(_WritableUUID)
    id.int = number
    id.is_safe = SafeUUID.unknown
    id.__class__ = UUID
    return cast(UUID, id)


# --- Tag metadata --------------------------------------------------------------------------------


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


def _normal_json(value: Any, depth: int = 1) -> Any:
    """Return `value` in the one form that equal JSON values share, or raise why it is refused.

    Keys are sorted and an integral float becomes the integer that it equals, so that two values of
    the same tag serialize alike. Characters are checked after serialization.
    """
    if depth > MAX_METADATA_DEPTH and isinstance(value, (dict, list)):
        raise _fault(f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
    if isinstance(value, dict):
        normal = {}
        for key in sorted(value) if len(value) > 1 else value:
            item = value[key]
            normal[key] = item if type(item) is str else _normal_json(item, depth + 1)
        return normal
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return _normal_number(value)
    return [_normal_json(item, depth + 1) for item in value]


def canonical_json(value: Any) -> bytes:
    """Serialize validated metadata; equal values give equal bytes."""
    return to_json(value)


# U+0000 in JSON, but not an escaped backslash that happens to be followed by these letters.
_ESCAPED_NUL: Final = re.compile(rb"(?<!\\)(\\\\)*\\u0000")


def _metadata(value: Any) -> Any:
    if value is None:
        return None
    normal = _normal_json(value)
    try:
        encoded = canonical_json(normal)
    except PydanticSerializationError:
        raise _fault("must not contain lone surrogates") from None
    if b"u0000" in encoded and _ESCAPED_NUL.search(encoded):
        raise _fault("must not contain U+0000")
    if len(encoded) > MAX_METADATA_BYTES:
        raise _fault(f"must not be larger than {MAX_METADATA_BYTES} bytes of JSON")
    return normal


TagMetadata = Annotated[Any, AfterValidator(_metadata)]
