"""How a fault is described: in result records, in HTTP errors and in exceptions alike."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import Field, ValidationError

from producers.contract.values import TolerantModel, tolerant

ErrorCode = Literal[
    "bad_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "conflict",
    "precondition_failed",
    "too_large",
    "internal_error",
]


class FoundTag(TolerantModel):
    """An active tag, as the error for a failed condition describes it."""

    tag_type: str
    tag: str
    created_by: str
    created_at: datetime


class ErrorDetail(TolerantModel):
    """One fault.

    `index` is the position, from 0, of the operation that has it, or of the item if `field` is
    `conditions`, `task_names` or `clear`; null for the whole message. `found` lists the active tags
    that made a condition fail, the oldest five, if the token has the scope `task-tags:read`.
    """

    index: int | None = None
    field: str | None = None
    message: str
    found: list[FoundTag] | None = Field(default=None, exclude_if=lambda found: found is None)


class ErrorInfo(TolerantModel):
    """Why a message, or an HTTP request, had no effect; `details` lists every fault found."""

    code: Annotated[ErrorCode, tolerant(ErrorCode)]
    message: str
    details: list[ErrorDetail] = Field(default=[])


CONDITIONS: Final = "conditions"


class TaskTagsError(Exception):
    """The root of all exceptions that the SDK raises on purpose."""


class InvalidMessage(TaskTagsError, ValueError):
    """The message breaks the contract: correct it. `details` lists every fault and quotes no value.

    `batch_id` is None if none could be read; then no result can be published.
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
    """Return a fault as one line: `operation 3, tag: must have at least 1 character(s)`."""
    where = [f"operation {detail.index}"] if detail.index is not None else []
    where += [detail.field] if detail.field is not None else []
    if detail.field == CONDITIONS and detail.index is not None:
        where = [f"condition {detail.index}"]
    if detail.field in ("task_names", "clear") and detail.index is not None:
        where = [f"{detail.field}, item {detail.index}"]
    tags = ", ".join(
        f"{each.tag_type} {each.tag} of {each.created_by}" for each in detail.found or ()
    )
    text = f"{detail.message}; there is {tags}" if tags else detail.message
    return f"{', '.join(where)}: {text}" if where else text


# --- pydantic's faults in words ------------------------------------------------------------------


def error_details(error: ValidationError) -> list[ErrorDetail]:
    """Return all faults of a pydantic error in words of our own: pydantic's may quote the value."""
    return [
        detail_of(fault["loc"], fault["type"], fault.get("ctx", {}))
        for fault in error.errors(include_url=False, include_input=False)
    ]


def detail_of(location: tuple[int | str, ...], kind: str, context: dict[str, Any]) -> ErrorDetail:
    index = next((step for step in location if isinstance(step, int)), None)
    names = [step for step in location if isinstance(step, str)]
    field = names[-1] if names and not (names == ["tags"] and index is not None) else None
    if kind == "extra_forbidden" and field is not None and not _is_plain_name(field):
        field = None
    if names[:1] == [CONDITIONS] and index is not None:
        text = _text(kind, field, context)
        return ErrorDetail(
            index=index,
            field=CONDITIONS,
            message=text if field in (CONDITIONS, None) else f"{field} {text}",
        )
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
    "condition": "has tag_metadata without a tag",
    "bool_type": "must be true or false",
}


def _text(kind: str, field: str | None, context: dict[str, Any]) -> str:
    if kind == "string_pattern_mismatch":
        if field == "reply_to":
            return "must have 1 to 200 of the characters A-Z a-z 0-9 . _ : -"
        return "must not contain U+0000"
    return _TEXTS.get(kind, "is not valid").format_map(context)
