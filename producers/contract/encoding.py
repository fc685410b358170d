"""Reads messages: bytes become a message, or an `InvalidMessage` that lists every fault."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final, cast
from uuid import UUID

from pydantic import BaseModel, TypeAdapter, ValidationError

from producers.contract.errors import ErrorDetail, InvalidMessage, detail_of, error_details
from producers.contract.messages import (
    MAX_MESSAGE_BYTES,
    SCHEMA_VERSION,
    TOO_LARGE,
    BaseMessage,
    Condition,
    Message,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    TagOperation,
)
from producers.contract.values import INT64_MAX, INT64_MIN, BeyondInt64, ReplyTo

MAX_DETAILS: Final = 100
"""Further faults of one message are counted, not listed."""
MAX_READABLE_BYTES: Final = 4 * MAX_MESSAGE_BYTES
"""A message over its limit is still read up to this size, to find whom to answer."""

_NOT_AN_OBJECT: Final = ErrorDetail(message="the message must be a JSON object")
_DUPLICATE_KEY: Final = ErrorDetail(message="the message has the same key twice in one object")

_MESSAGES: Final[dict[str, type[BaseMessage]]] = {
    "tag_batch": TagBatch,
    "flow_execution": RegisterExecution,
    "task_execution": SetTaskState,
}
# The first one that is there tells the kind of a message that does not say it.
_KIND_OF_FIELD: Final = {
    "tags": "tag_batch",
    "state": "task_execution",
    "flow_execution_id": "flow_execution",
}
_ID: Final[TypeAdapter[UUID]] = TypeAdapter(UUID)
_REPLY_TO: Final[TypeAdapter[str]] = TypeAdapter(ReplyTo)


def parse_message(raw: bytes) -> Message:
    """Read one message.

    Raises:
        InvalidMessage: With every fault, and with the batch id if there is one. The limits are in
            docs/concepts/contract.md#messages.
    """
    return _parse_strictly(raw)


def parse_line(raw: bytes, batch_id: UUID) -> Message:
    """Read one message that a person wrote.

    `schema_version`, `kind` and `batch_id` may be left out: the version is 1, the kind is that of
    the fields, and the id is the one given here. Raises as `parse_message` does.
    """
    return _parse_strictly(raw, batch_id)


def parse_body(kind: str, raw: bytes, **rest: Any) -> Message:
    """Build a message from a JSON object and the fields in `rest`, which the object must not have.

    The object has the fields of this kind alone, none of those that all messages have. Raises
    `InvalidMessage` with every fault.
    """
    fields, model = _json_object(raw), _MESSAGES[kind]
    own = model.model_fields.keys() - BaseMessage.model_fields.keys() - {"kind"} - rest.keys()
    known = {name: value for name, value in fields.items() if name in own}
    unknown = [name for name in fields if name not in known][:1]
    details = [detail_of((name,), "extra_forbidden", {}) for name in unknown]
    _keep_one_unknown(known.get("tags"))
    _keep_one_unknown(known.get("conditions"), Condition)
    try:
        message = model.model_validate({"kind": kind, **rest, **known})
    except ValidationError as error:
        raise _invalid(rest, details + error_details(error)) from None
    if details:
        raise _invalid(rest, details)
    return cast(Message, message)


def _parse_strictly(raw: bytes, batch_id: UUID | None = None) -> Message:
    if len(raw) > MAX_MESSAGE_BYTES:
        readable = _read_leniently(raw) if len(raw) <= MAX_READABLE_BYTES else None
        raise _invalid(readable, [TOO_LARGE])
    fields = _json_object(raw)
    if batch_id is not None:
        kinds = [{"kind": kind} for name, kind in _KIND_OF_FIELD.items() if name in fields]
        left_out = {"schema_version": SCHEMA_VERSION, "batch_id": batch_id, **(kinds or [{}])[0]}
        fields = left_out | fields
    kind = fields.get("kind")
    model = _MESSAGES.get(kind) if isinstance(kind, str) else None
    details = [
        ErrorDetail(field=name, message="is required")
        for name in ("schema_version", "kind", "batch_id")
        if name not in fields
    ]
    if batch_id is not None and model is None and "kind" not in fields:
        details = [ErrorDetail(message=f"must have {_either(_KIND_OF_FIELD)}")]
    if model is None:
        if "kind" in fields:
            details.append(ErrorDetail(field="kind", message=f"must be {_either(_MESSAGES)}"))
        raise _invalid(fields, details)
    _keep_one_unknown([fields], model)
    _keep_one_unknown(fields.get("tags"))
    _keep_one_unknown(fields.get("conditions"), Condition)
    try:
        message = model.model_validate(fields)
    except ValidationError as error:
        raise _invalid(fields, details + error_details(error)) from None
    if details:
        raise _invalid(fields, details)
    return cast(Message, message)


def _keep_one_unknown(objects: Any, model: type[BaseModel] = TagOperation) -> None:
    """Remove the unknown fields of each object but one: they are one fault, and cheap to find."""
    known = model.model_fields.keys()
    for each in objects if isinstance(objects, list) else ():
        if isinstance(each, dict) and not each.keys() <= known:
            for name in [name for name in each if name not in known][1:]:
                del each[name]


# --- JSON ----------------------------------------------------------------------------------------


class _DuplicateKey(ValueError):
    pass


def each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its members. Raises `ValueError` if a name is there twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DuplicateKey
    return fields


def _integer(digits: str) -> int | BeyondInt64:
    if len(digits) > 20 or not INT64_MIN <= (value := int(digits)) <= INT64_MAX:
        return BeyondInt64()
    return value


_strict_json: Final = json.JSONDecoder(object_pairs_hook=each_name_once, parse_int=_integer)
_lenient_json: Final = json.JSONDecoder(parse_int=_integer)


def _json_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object. Raises `InvalidMessage`, with the batch id if it can be found."""
    try:
        fields = _strict_json.decode(raw.decode())
    except _DuplicateKey:
        raise _invalid(_read_leniently(raw), [_DUPLICATE_KEY]) from None
    except (ValueError, RecursionError) as error:
        raise InvalidMessage([ErrorDetail(message=f"the message {_fault(raw, error)}")]) from None
    if not isinstance(fields, dict):
        raise InvalidMessage([_NOT_AN_OBJECT])
    return fields


def _read_leniently(raw: bytes) -> Any:
    """Return the value of JSON that has a fault, to find whom to answer; or else None."""
    try:
        return _lenient_json.decode(raw.decode())
    except (ValueError, RecursionError):
        return None


def _fault(raw: bytes, error: Exception) -> str:
    """Return why a message is not JSON, and where."""
    if isinstance(error, RecursionError):
        return "is nested too deep"
    if not raw.strip():
        return "is empty"
    before, form = "", "JSON"
    if isinstance(error, json.JSONDecodeError):
        before = error.doc[: error.pos]
    elif isinstance(error, UnicodeDecodeError):
        before, form = raw[: error.start].decode(), "UTF-8"
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    place = f"column {column}" if line == 1 else f"line {line}, column {column}"
    return f"is not {form} ({place})"


# --- Faults in words -----------------------------------------------------------------------------


def _either(names: Iterable[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _invalid(fields: Any, details: list[ErrorDetail]) -> InvalidMessage:
    """Return the error for a message that was read as `fields`, with its batch id if it has one."""

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
