"""What the SDK raises. Each docstring says what the caller can do about it."""

from __future__ import annotations

from collections.abc import Sequence

from producers.contract.errors import InvalidMessage, TaskTagsError
from producers.contract.messages import Message
from producers.contract.results import ResultRecord

__all__ = [
    "BadRequest",
    "BatchIdInUse",
    "BatchRefused",
    "ChangesRefused",
    "ConfigurationError",
    "Conflict",
    "Forbidden",
    "InboxFull",
    "InternalError",
    "InvalidMessage",
    "NotFound",
    "ProducerClosed",
    "RedisOutOfMemory",
    "ResultTimeout",
    "RevisionExpired",
    "TaskTagsError",
    "Unauthorized",
    "Unavailable",
    "refusal",
]


class ConfigurationError(TaskTagsError):
    """A setting is missing or wrong. Correct it; trying again as it is won't help."""


class Unavailable(TaskTagsError):
    """Redis (or the endpoint) can't be reached or refused to work. Try again later with the same batches.

    Some of them may have been accepted: the same batch, enqueued again, never takes effect twice.
    """


class RedisOutOfMemory(Unavailable):
    """Redis has no memory left for messages. Give it more, or let the drains make room: they go on.

    Then enqueue the same batches again. Waiting for the inbox (`block`) does not help: its bound is not the
    one that was reached; a lower TASK_TAGS_INBOX_LIMIT would have been.
    """


class InboxFull(TaskTagsError):
    """The organization's inbox is at its bound. Enqueue `unsent` again later, in their order, or use `block`."""

    def __init__(self, unsent: Sequence[Message]) -> None:
        super().__init__(f"the inbox is full: {len(unsent)} batch(es) were not enqueued")
        self.unsent = list(unsent)


class RevisionExpired(TaskTagsError):
    """Changes after this revision were purged. Read the tags anew, and follow from the revision that they have."""


class ChangesRefused(TaskTagsError):
    """The endpoint refused to give changes: the token, the execution or the revision is wrong, as it says."""


class ResultTimeout(TaskTagsError):
    """No result came in time. The batch may still take effect: call `apply` with the same batch again."""


class ProducerClosed(TaskTagsError):
    """The producer was closed while it waited. Use an open one."""


class BatchIdInUse(TaskTagsError):
    """Another batch with this id is still awaited here. Give this one an id of its own."""


class BatchRefused(TaskTagsError):
    """The worker refused the batch: nothing of it took effect, and `record` has the error."""

    def __init__(self, record: ResultRecord) -> None:
        error = record.error
        assert error is not None
        super().__init__(f"{error.code}: {error.message}")
        self.record = record


class BadRequest(BatchRefused):
    """The message breaks the contract. Correct it and send it under a new batch id."""


class Unauthorized(BatchRefused):
    """The token is missing, wrong or expired. Get a new one and send the same batch again."""


class Forbidden(BatchRefused):
    """The token lacks the scope, or is another organization's. Send the batch with one that may."""


class NotFound(BatchRefused):
    """An execution or task name is unknown. Register it, then send the operations under a new batch id."""


class Conflict(BatchRefused):
    """The batch id was used for something else. Send this batch under a new id."""


class InternalError(BatchRefused):
    """The worker failed at this very batch, and kept it for its operators. Tell them the batch id."""


_REFUSALS: dict[str, type[BatchRefused]] = {
    "bad_request": BadRequest,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "not_found": NotFound,
    "conflict": Conflict,
    "internal_error": InternalError,
}


def refusal(record: ResultRecord) -> BatchRefused:
    """Return the exception for a result record that is an error."""
    assert record.error is not None
    return _REFUSALS[record.error.code](record)
