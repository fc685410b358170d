"""How a fault is described: in result records, in HTTP errors and in exceptions alike."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from producers.contract.values import TolerantModel, tolerant

ErrorCode = Literal[
    "bad_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "conflict",
    "too_large",
    "internal_error",
]


class ErrorDetail(TolerantModel):
    """One fault.

    `index` is the position, from 0, of the operation or task name that has it; null for the whole
    message.
    """

    index: int | None = None
    field: str | None = None
    message: str


class ErrorInfo(TolerantModel):
    """Why a message, or an HTTP request, had no effect; `details` lists every fault found."""

    code: Annotated[ErrorCode, tolerant(ErrorCode)]
    message: str
    details: list[ErrorDetail] = Field(default=[])


class TaskTagsError(Exception):
    """The root of all exceptions that the SDK raises on purpose."""


class InvalidMessage(TaskTagsError, ValueError):
    """The message breaks the contract: correct it. `details` lists every fault and quotes no value.

    `batch_id` is None if none could be read; nobody can be answered then.
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
    return f"{', '.join(where)}: {detail.message}" if where else detail.message
