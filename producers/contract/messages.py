"""The contract: messages, results, change events, and the names of keys and channels (design, section 4).

This file owns what may be said and how it is spelled. It depends on pydantic alone and does no I/O;
what a batch *does* is in worker/rules.py, how it travels is in producers/inbox/protocol.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self, cast
from uuid import UUID, SafeUUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticSerializationError, to_json

from producers.errors import TaskTagsError

SCHEMA_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 1024 * 1024
MAX_OPERATIONS: Final = 100
MAX_TASK_NAMES: Final = 10_000
MAX_METADATA_BYTES: Final = 8 * 1024
MAX_METADATA_DEPTH: Final = 32
MAX_DETAILS: Final = 1_000
"""More faults than this in one message are counted, not listed."""
MAX_READABLE_BYTES: Final = 4 * MAX_MESSAGE_BYTES
"""A message over its limit is still read up to this size, to find whom to tell; beyond it, it is not."""

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


# --- Names of keys and channels ------------------------------------------------------------------
# The braces are a Redis Cluster hash tag: all that belongs to an organization lives in one slot.


def inbox_key(organization_id: UUID) -> str:
    return f"task-tags:{{{organization_id}}}:inbox"


def lease_key(organization_id: UUID) -> str:
    return f"task-tags:{{{organization_id}}}:lease"


def dead_letters_key(organization_id: UUID) -> str:
    return f"task-tags:{{{organization_id}}}:rejected"


def results_channel(organization_id: UUID, reply_to: str) -> str:
    return f"task-tags:{{{organization_id}}}:results:{reply_to}"


def changes_channel(organization_id: UUID, flow_execution_id: UUID) -> str:
    return f"task-tags:{{{organization_id}}}:changes:{flow_execution_id}"


# --- UUIDv7 --------------------------------------------------------------------------------------


class Uuid7:
    """Makes UUIDv7s (RFC 9562) that increase strictly, each made after the one before.

    48 bits of milliseconds, 12 bits of the fraction of a millisecond (section 6.2, method 3), then 62
    bits that start at random and count up within one microsecond (method 2).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_us = -1
        self._next = 0

    def __call__(self, at_us: int | None = None) -> UUID:
        """Return the next id. `at_us`: microseconds since the epoch; the system's clock if left out.

        A clock that steps back does not take the ids with it.
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


def _uuid(number: int) -> UUID:
    """Return `UUID(int=number)`, but in a fifth of the time: it is not asked which of its arguments is given."""
    id: Any = object.__new__(_WritableUUID)
    id.int = number
    id.is_safe = SafeUUID.unknown
    id.__class__ = UUID
    return cast(UUID, id)


uuid7: Final = Uuid7()


# --- Building blocks -----------------------------------------------------------------------------


class StrictModel(BaseModel):
    """Unknown fields, coercions and echoes of what was sent are refused everywhere."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


_NO_NUL: Final = r"^[^\x00]*$"
REPLY_TO_PATTERN: Final = r"^[A-Za-z0-9._:-]{1,200}$"

Id = Annotated[UUID, Field(strict=False)]
TaskName = Annotated[str, Field(min_length=1, max_length=200, pattern=_NO_NUL)]
TagType = Annotated[str, Field(min_length=1, max_length=100, pattern=_NO_NUL)]
TagName = Annotated[str, Field(min_length=1, max_length=200, pattern=_NO_NUL)]
ReplyTo = Annotated[str, Field(pattern=REPLY_TO_PATTERN)]


class _BeyondInt64:
    """Stands in parsed JSON for an integer that is beyond 64 bits, so that its place can be named."""


def _metadata_fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("tag_metadata", "{reason}", {"reason": message})


def _normal_number(value: int | float) -> int | float:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _metadata_fault("must not contain NaN, infinities or numbers beyond a double")
        return int(value) if value.is_integer() and abs(value) < 2**63 else value
    if not INT64_MIN <= value <= INT64_MAX:
        raise _metadata_fault("must not contain integers beyond 64 bits")
    return value


def _sorted_keys(value: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(value)
    except TypeError:  # of several types
        return list(value)


def _normal_json(value: Any, depth: int = 1) -> Any:
    """Return `value` in the one form that equal JSON values share, or say why it is refused.

    Keys are sorted and an integral float is the integer it equals, so that two values that are the same
    tag (section 4, rule 2) are serialized alike. Characters are looked at once it is serialized.
    """
    if depth > MAX_METADATA_DEPTH and isinstance(value, (dict, list, tuple)):
        raise _metadata_fault(f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
    if isinstance(value, dict):
        normal = {}
        for key in _sorted_keys(value) if len(value) > 1 else value:
            if not isinstance(key, str):
                raise _metadata_fault("must have strings as keys")
            item = value[key]
            normal[key] = item if type(item) is str else _normal_json(item, depth + 1)
        return normal
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return _normal_number(value)
    if isinstance(value, (list, tuple)):
        return [_normal_json(item, depth + 1) for item in value]
    if isinstance(value, _BeyondInt64):
        raise _metadata_fault("must not contain integers beyond 64 bits")
    raise _metadata_fault("must be JSON: null, a boolean, a number, a string, a list or an object")


def canonical_json(value: Any) -> bytes:
    """Serialize a metadata value that was validated: equal values give equal bytes."""
    return to_json(value)


_ESCAPED_NUL: Final = re.compile(rb"(?<!\\)(\\\\)*\\u0000")
"""U+0000 in JSON; not a backslash that is followed by these letters, for it has another one in front."""


def _metadata(value: Any) -> Any:
    if value is None:
        return None
    normal = _normal_json(value)
    try:
        encoded = canonical_json(normal)
    except PydanticSerializationError:  # all else that it refuses was refused above
        raise _metadata_fault("must not contain lone surrogates") from None
    if b"u0000" in encoded and _ESCAPED_NUL.search(encoded):
        raise _metadata_fault("must not contain U+0000")
    if len(encoded) > MAX_METADATA_BYTES:
        raise _metadata_fault(f"must not be larger than {MAX_METADATA_BYTES} bytes of JSON")
    return normal


TagMetadata = Annotated[Any, AfterValidator(_metadata)]


# --- Messages ------------------------------------------------------------------------------------


class TagOperation(StrictModel):
    """Adds or removes one tag (section 4, rules 1 to 4).

    `tag_metadata` is any JSON value of at most 8 KiB and 32 levels. In `remove` there is a difference
    between null (exactly the tag without metadata) and the field left out (every tag of that name).
    """

    operation: Literal["add", "remove"]
    flow_execution_id: Id
    task_name: TaskName
    tag_type: TagType
    tag: TagName
    tag_metadata: TagMetadata = None

    @property
    def any_metadata(self) -> bool:
        """Whether this removes every tag of its name (rule 3)."""
        return self.operation == "remove" and "tag_metadata" not in self.model_fields_set


def add(
    flow_execution_id: UUID | str, task_name: str, tag_type: str, tag: str, tag_metadata: Any = None
) -> TagOperation:
    """Build the operation that adds a tag. Raises pydantic's `ValidationError` for a bad value."""
    return TagOperation(
        operation="add",
        flow_execution_id=cast(UUID, flow_execution_id),
        task_name=task_name,
        tag_type=tag_type,
        tag=tag,
        tag_metadata=tag_metadata,
    )


class _Unset:
    def __repr__(self) -> str:
        return "any metadata"


ANY_METADATA: Final = _Unset()


def remove(
    flow_execution_id: UUID | str,
    task_name: str,
    tag_type: str,
    tag: str,
    tag_metadata: Any = ANY_METADATA,
) -> TagOperation:
    """Build the operation that removes a tag: with any metadata, or (also for None) exactly that one."""
    fields: dict[str, Any] = {
        "operation": "remove",
        "flow_execution_id": flow_execution_id,
        "task_name": task_name,
        "tag_type": tag_type,
        "tag": tag,
    }
    if tag_metadata is not ANY_METADATA:
        fields["tag_metadata"] = tag_metadata
    return TagOperation(**fields)


def _whole_number(value: Any) -> Any:
    if type(value) is not int:  # Literal[1] alone would take true, which equals 1
        raise PydanticCustomError("literal_error", "must be {expected}", {"expected": "1"})
    return value


class _Message(StrictModel):
    """What all messages have. A default is written out when the message is sent."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    schema_version: Annotated[Literal[1], BeforeValidator(_whole_number)] = SCHEMA_VERSION
    batch_id: Id = Field(default_factory=uuid7)
    reply_to: ReplyTo | None = None

    @property
    def reply_channel_name(self) -> str:
        """The last part of the results channel: `reply_to`, or the batch id if there is none."""
        return self.reply_to or str(self.batch_id)

    def encode(self) -> bytes:
        """Serialize for the inbox. Raises `InvalidMessage` if that is over 1 MiB."""
        encoded = self.canonical_bytes()
        if len(encoded) > MAX_MESSAGE_BYTES:
            raise InvalidMessage([_TOO_LARGE], batch_id=self.batch_id)
        return encoded

    def canonical_bytes(self) -> bytes:
        """Return the message in its one spelling, however long it is."""
        return self.model_dump_json().encode()

    def digest(self) -> bytes:
        """Return 32 bytes that are the same for two messages that ask for the same.

        Whom to answer is no part of that, so a batch can be sent again by another sender.
        """
        return digest(self.canonical_bytes())


def digest(encoded: bytes) -> bytes:
    """Return the digest of a message that was spelled out: of all that comes after `reply_to`."""
    return hashlib.sha256(encoded[encoded.index(b'"kind":') :]).digest()


class TagBatch(_Message):
    """1 to 100 operations that take effect together or not at all (section 4, rule 5)."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["schema_version", "kind", "batch_id", "tags"]}
    )

    kind: Literal["tag_batch"] = "tag_batch"
    tags: Annotated[list[TagOperation], Field(min_length=1, max_length=MAX_OPERATIONS)]

    def canonical_bytes(self) -> bytes:
        """Return the message in its one spelling: metadata are left out where that is not the same as null (rule 3)."""
        left_out = {
            index: {"tag_metadata"}
            for index, operation in enumerate(self.tags)
            if operation.operation == "remove" and operation.any_metadata
        }
        return self.model_dump_json(exclude={"tags": left_out} if left_out else None).encode()


class RegisterExecution(_Message):
    """Registers a flow execution, or lets its task names grow; null allows every task name."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["schema_version", "kind", "batch_id", "flow_execution_id"]}
    )

    kind: Literal["flow_execution"] = "flow_execution"
    flow_execution_id: Id
    task_names: Annotated[list[TaskName], Field(max_length=MAX_TASK_NAMES)] | None = None


TaskState = Literal["queued", "running", "completed", "failed"]


class SetTaskState(_Message):
    """Records the state of a task in one flow execution. It is no tag, and may follow any other state."""

    model_config = ConfigDict(
        json_schema_extra={
            "required": [
                *("schema_version", "kind", "batch_id"),
                *("flow_execution_id", "task_name", "state"),
            ]
        }
    )

    kind: Literal["task_execution"] = "task_execution"
    flow_execution_id: Id
    task_name: TaskName
    state: TaskState


Message = TagBatch | RegisterExecution | SetTaskState


# --- Results and events --------------------------------------------------------------------------

OperationStatus = Literal["added", "already_exists", "removed", "not_found"]
RegistrationStatus = Literal["registered", "already_exists"]
RecordingStatus = Literal["recorded", "unchanged"]
ErrorCode = Literal[
    "bad_request", "unauthorized", "forbidden", "not_found", "conflict", "internal_error"
]


class TolerantModel(StrictModel):
    """What a worker says. A reader that is older than the worker skips what it doesn't know."""

    model_config = ConfigDict(extra="ignore")


class ErrorDetail(TolerantModel):
    """One fault. `index`: the operation's (or task name's) position from 0; null for the whole message."""

    index: int | None = None
    field: str | None = None
    message: str


class ErrorInfo(TolerantModel):
    """Why a batch, or a request, had no effect; `details` lists all faults that were found."""

    code: ErrorCode
    message: str
    details: list[ErrorDetail] = []


class OperationResult(TolerantModel):
    status: OperationStatus


class Registration(TolerantModel):
    status: RegistrationStatus


class Recording(TolerantModel):
    status: RecordingStatus


class ResultRecord(TolerantModel):
    """What became of a message: a status for each operation in request order, or one error (rule 6)."""

    batch_id: Id
    organization_id: Id
    applied_at: datetime | None = None
    tags: list[OperationResult] | None = None
    flow_execution: Registration | None = None
    task_execution: Recording | None = None
    error: ErrorInfo | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        outcomes = (self.tags, self.flow_execution, self.task_execution, self.error)
        if sum(outcome is not None for outcome in outcomes) != 1:
            raise PydanticCustomError(
                "outcome", "must have one of tags, flow_execution, task_execution and error"
            )
        if (self.error is None) != (self.applied_at is not None):
            raise PydanticCustomError("outcome", "must have applied_at unless it has an error")
        return self

    @property
    def statuses(self) -> list[str]:
        """The statuses, in the order of the operations; one, if it was no tag batch; none, if it is an error."""
        found = (self.flow_execution, self.task_execution, *(self.tags or ()))
        return [each.status for each in found if each is not None]

    @classmethod
    def decode(cls, encoded: bytes | str) -> Self:
        """Read a record; fields that are not known are skipped. Raises pydantic's `ValidationError`."""
        return cls.model_validate_json(encoded)

    def encode(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


@dataclass(slots=True)
class Tag:
    """A tag as it is stored, read and reported; the last two fields are null until it is modified."""

    id: UUID
    flow_execution_id: UUID
    task_name: str
    tag_type: str
    tag: str
    tag_metadata: Any
    organization_id: UUID
    status: Literal["active", "deleted"]
    created_at: datetime
    created_by: str
    updated_at: datetime | None
    modified_by: str | None


@dataclass(slots=True)
class Change:
    """A tag that was added or removed."""

    change: Literal["added", "removed"]
    tag: Tag


@dataclass(slots=True)
class Task:
    """A task of an execution, with the state that was last recorded of it."""

    flow_execution_id: UUID
    task_name: str
    state: TaskState
    state_changed_at: datetime
    state_changed_by: str


@dataclass(slots=True)
class StateChange:
    """A task that is in another state now."""

    change: Literal["state"]
    task: Task


@dataclass(slots=True)
class ChangeEvent:
    """What one message changed in one execution; `revision` counts 1, 2, 3 … there without gaps.

    All of these are made in great numbers, so they are plain dataclasses, which only `decode` validates.
    """

    organization_id: UUID
    flow_execution_id: UUID
    revision: int
    batch_id: UUID
    changed_by: str
    changed_at: datetime
    changes: list[Annotated[Change | StateChange, Field(discriminator="change")]]

    @staticmethod
    def decode(encoded: bytes | str) -> ChangeEvent:
        """Read an event; fields that are not known are skipped. Raises pydantic's `ValidationError`."""
        return _CHANGE_EVENT.validate_json(encoded)

    def encode(self) -> bytes:
        """Serialize as pydantic would; but it would take twice as long, to tell the kinds of changes apart."""
        head = to_json(
            {
                "organization_id": self.organization_id,
                "flow_execution_id": self.flow_execution_id,
                "revision": self.revision,
                "batch_id": self.batch_id,
                "changed_by": self.changed_by,
                "changed_at": self.changed_at,
            }
        )
        of_tags = all(type(each) is Change for each in self.changes)
        changes = (_TAG_CHANGES if of_tags else _CHANGES).dump_json(cast(Any, self.changes))
        return b'%b,"changes":%b}' % (head[:-1], changes)


_CHANGE_EVENT: Final = TypeAdapter(ChangeEvent)
_TAG_CHANGES: Final = TypeAdapter(list[Change])
_CHANGES: Final = TypeAdapter(list[Annotated[Change | StateChange, Field(discriminator="change")]])


# --- Reading what came in ------------------------------------------------------------------------


class InvalidMessage(TaskTagsError, ValueError):
    """The message breaks the contract; `details` lists every fault and never what was sent.

    `batch_id` is None if none could be read: then there is nobody to answer.
    """

    def __init__(
        self,
        details: list[ErrorDetail],
        *,
        batch_id: UUID | None = None,
        reply_to: str | None = None,
    ) -> None:
        super().__init__("; ".join(describe(detail) for detail in details[:10]))
        self.details = details
        self.batch_id = batch_id
        self.reply_to = reply_to


def describe(detail: ErrorDetail) -> str:
    """Return a fault as a person reads it: `operation 3, tag: must have at least 1 character`."""
    where = [f"operation {detail.index}"] if detail.index is not None else []
    where += [detail.field] if detail.field is not None else []
    return f"{', '.join(where)}: {detail.message}" if where else detail.message


_TOO_LARGE: Final = ErrorDetail(
    message=f"the message must not be larger than {MAX_MESSAGE_BYTES} bytes"
)
_NOT_JSON: Final = ErrorDetail(
    message="the message must be JSON in UTF-8, less than 1,000 levels deep"
)
_NOT_AN_OBJECT: Final = ErrorDetail(message="the message must be a JSON object")
_DOUBLED_KEY: Final = ErrorDetail(message="the message has the same key twice in one object")

_MESSAGES: Final[dict[str, type[_Message]]] = {
    "tag_batch": TagBatch,
    "flow_execution": RegisterExecution,
    "task_execution": SetTaskState,
}
_TAG_BATCH: Final = TypeAdapter(TagBatch)
_ID: Final[TypeAdapter[UUID]] = TypeAdapter(UUID)
_REPLY_TO: Final[TypeAdapter[str]] = TypeAdapter(ReplyTo)


class _DoubledKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DoubledKey
    return fields


def _integer(digits: str) -> int | _BeyondInt64:
    if len(digits) > 20 or not INT64_MIN <= (value := int(digits)) <= INT64_MAX:
        return _BeyondInt64()
    return value


_strict_json: Final = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_lenient_json: Final = json.JSONDecoder(parse_int=_integer)


def parse_message(raw: bytes) -> Message:
    """Read one message. Raises `InvalidMessage` with every fault, and with the batch id if there is one.

    Source of the rules: the limits in section 4 of the design.
    """
    return parse_canonical(raw)[0]


def parse_canonical(raw: bytes) -> tuple[Message, bytes]:
    """Return a message, and as it is spelled here: the bytes from which its digest is made.

    One that was spelled so by its sender, as by the SDK, is read by pydantic's own parser, and nothing in it can
    be other than it seems: no key is doubled, no number changed. All others are read with care, and their faults
    told.
    """
    if len(raw) <= MAX_MESSAGE_BYTES:
        with suppress(ValidationError):
            batch = _TAG_BATCH.validate_json(raw)
            if batch.canonical_bytes() == raw:
                return batch, raw
    message = _read_carefully(raw)
    return message, message.canonical_bytes()


def _read_carefully(raw: bytes) -> Message:
    if len(raw) > MAX_MESSAGE_BYTES:
        readable = _load(_lenient_json, raw) if len(raw) <= MAX_READABLE_BYTES else None
        raise _invalid(readable, [_TOO_LARGE])
    fields = _fields(raw)
    kind = fields.get("kind")
    model = _MESSAGES.get(kind) if isinstance(kind, str) else None
    details = [
        ErrorDetail(field=name, message="is required")
        for name in ("schema_version", "kind", "batch_id")
        if name not in fields
    ]
    if model is None:
        if "kind" in fields:
            details.append(ErrorDetail(field="kind", message=f"must be {_either(_MESSAGES)}"))
        raise _invalid(fields, details)
    try:
        message = model.model_validate(fields)
    except ValidationError as error:
        raise _invalid(fields, details + validation_details(error)) from None
    if details:
        raise _invalid(fields, details)
    return cast(Message, message)


def read_body(kind: str, raw: bytes, **rest: Any) -> Message:
    """Return the message that is made of a JSON object and, in `rest`, of what else belongs to it.

    Raises `InvalidMessage` with every fault; the object has nothing that all messages have, and nothing of `rest`.
    """
    fields, model = _fields(raw), _MESSAGES[kind]
    own = model.model_fields.keys() - _Message.model_fields.keys() - {"kind"} - rest.keys()
    known = {name: value for name, value in fields.items() if name in own}
    details = [_fault((name,), "extra_forbidden", {}) for name in fields if name not in known]
    try:
        message = model.model_validate({"kind": kind, **rest, **known})
    except ValidationError as error:
        raise _invalid(rest, details + validation_details(error)) from None
    if details:
        raise _invalid(rest, details)
    return cast(Message, message)


def _fields(raw: bytes) -> dict[str, Any]:
    """Read a JSON object. Raises `InvalidMessage`, addressed as well as can be."""
    try:
        fields = _load(_strict_json, raw)
    except _DoubledKey:
        raise _invalid(_load(_lenient_json, raw), [_DOUBLED_KEY]) from None
    if fields is _UNREADABLE:
        raise InvalidMessage([_NOT_JSON])
    if not isinstance(fields, dict):
        raise InvalidMessage([_NOT_AN_OBJECT])
    return fields


_UNREADABLE: Final = object()


def _load(decoder: json.JSONDecoder, raw: bytes) -> Any:
    try:
        return decoder.decode(raw.decode())
    except _DoubledKey:
        raise
    except (ValueError, RecursionError):
        return _UNREADABLE


def _either(names: Iterable[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _invalid(fields: Any, details: list[ErrorDetail]) -> InvalidMessage:
    """Return the error for a message that was read as `fields`, addressed as well as can be."""

    def get(name: str, adapter: TypeAdapter[Any]) -> Any:
        try:
            return adapter.validate_python(fields[name])
        except (ValidationError, LookupError, TypeError):
            return None

    if len(details) > MAX_DETAILS:
        more = ErrorDetail(message=f"{len(details) - MAX_DETAILS} more faults are not listed")
        details = [*details[:MAX_DETAILS], more]
    return InvalidMessage(
        details, batch_id=get("batch_id", _ID), reply_to=get("reply_to", _REPLY_TO)
    )


def validation_details(error: ValidationError) -> list[ErrorDetail]:
    """Return all faults of a pydantic error, in words of our own: pydantic's may quote the value."""
    return [
        _fault(fault["loc"], fault["type"], fault.get("ctx", {}))
        for fault in error.errors(include_url=False, include_input=False)
    ]


def _fault(location: tuple[int | str, ...], kind: str, context: dict[str, Any]) -> ErrorDetail:
    index = next((step for step in location if isinstance(step, int)), None)
    names = [step for step in location if isinstance(step, str)]
    field = names[-1] if names and not (names == ["tags"] and index is not None) else None
    if kind == "extra_forbidden" and field is not None and not _is_plain_name(field):
        field = None
    return ErrorDetail(index=index, field=field, message=_text(kind, field, context))


def _is_plain_name(name: str) -> bool:
    return len(name) <= 64 and name.isascii() and name.isidentifier()


_TEXTS: Final = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "string_type": "must be a string",
    "string_unicode": "must not contain lone surrogates",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} characters",
    "uuid_type": "must be a UUID",
    "uuid_parsing": "must be a UUID",
    "literal_error": "must be {expected}",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} items",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "tag_metadata": "{reason}",
}


def _text(kind: str, field: str | None, context: dict[str, Any]) -> str:
    if kind == "string_pattern_mismatch":
        if field == "reply_to":
            return "must have 1 to 200 of the characters A-Z a-z 0-9 . _ : -"
        return "must not contain U+0000"
    return _TEXTS.get(kind, "is not valid").format_map(context)
