"""The exceptions of the SDK. Each docstring says what the caller can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from producers.contract.errors import TaskTagsError as TaskTagsError
from producers.contract.errors import describe
from producers.contract.messages import Message
from producers.contract.results import ResultRecord, Tag


class ConfigurationError(TaskTagsError):
    """A setting is missing or wrong. Correct it; retrying does not help."""


class Unavailable(TaskTagsError):
    """Redis or the endpoint can't be used at present. Retry later with the same batches.

    Some of them may have been accepted. A batch that is enqueued again does not take effect twice.
    """


class RedisOutOfMemory(Unavailable):
    """Redis has no memory left for messages. Enqueue the same batches again later.

    Drains continue and free memory; or give Redis more memory. `block` does not help: it waits
    only while the inbox is at its limit, which is not reached here. With a lower
    TASK_TAGS_INBOX_LIMIT, the inbox reaches its limit before Redis runs out of memory.
    """


class InboxFull(TaskTagsError):
    """The inbox is at its limit. Enqueue `unsent` again later, in this order, or use `block`."""

    def __init__(self, unsent: Sequence[Message]) -> None:
        super().__init__(f"the inbox is full: {len(unsent)} batch(es) were not enqueued")
        self.unsent = list(unsent)


class RevisionExpired(TaskTagsError):
    """The changes behind this place are not stored. Read the tags again; continue from `cursor`.

    They were purged, or a restore has replaced them.
    """

    def __init__(self, message: str, cursor: str | None = None) -> None:
        super().__init__(message)
        self.cursor = cursor


class WaitTimeout(TaskTagsError):
    """The tag was not active in time. `found` has the active tags of its type on the task."""

    def __init__(self, seconds: float, found: Sequence[Tag] | None) -> None:
        text = f"the tag was not active within {seconds:g} s"
        if found is None:
            text += ", and the endpoint can't be asked what is"
        else:
            names = ", ".join(tag.tag for tag in found[:10]) or "none"
            text += f"; active tags of its type: {names}"
        super().__init__(text)
        self.found = list(found or ())


class ChangesRefused(TaskTagsError):
    """The endpoint refused the token, the execution or a parameter: the message says which.

    `status` is that of HTTP: 400 for a parameter, 401 or 403 for the token, 404 for the execution.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


LeaseState = Literal["queued", "running", "missing"]
_LEASES: Final = {
    "queued": "a drain of it is queued: is a worker running?",
    "running": "a worker drains it",
    "missing": "no drain of it is queued or running: is beat running?",
}


class ResultTimeout(TaskTagsError):
    """The batch was accepted, but no result came in time. Call `apply` with it again.

    The batch may still take effect, but only once. `waiting` is the number of messages in the
    inbox, and `lease` is `queued`, `running` or `missing` (docs/concepts/inbox-protocol.md); both
    are None if Redis could not be read.
    """

    def __init__(
        self, seconds: float, waiting: int | None = None, lease: LeaseState | None = None
    ) -> None:
        text = f"no result in {seconds:g} s; the batch was accepted"
        if waiting is None or lease is None:
            text += ", and Redis can't be reached to check the inbox"
        elif waiting == 0:
            text += ", and the inbox is empty: message or result was lost; send the batch again"
        else:
            text += f", and {waiting} message(s) wait in the inbox: {_LEASES[lease]}"
        super().__init__(text)
        self.waiting = waiting
        self.lease = lease


class TokenExpired(TaskTagsError):
    """The token expired more than a minute ago. Get a new one, and enqueue the same batches again.

    Those that were accepted before do not take effect twice.
    """


class ProducerClosed(TaskTagsError):
    """The producer was closed while the call waited. Use an open one."""


class BatchIdInUse(TaskTagsError):
    """The producer still waits for another batch with this id. Give this one a new id."""


class BatchRefused(TaskTagsError):
    """The worker refused the batch: it had no effect, and `record` has the error."""

    def __init__(self, record: ResultRecord) -> None:
        error = record.error
        assert error is not None
        details = "; ".join(describe(detail) for detail in error.details[:10])
        super().__init__(f"{error.code}: {error.message}{f' ({details})' if details else ''}")
        self.record = record


class BadRequest(BatchRefused):
    """The message breaks the contract. Correct it; nothing is stored under its batch id."""


class Unauthorized(BatchRefused):
    """The token is missing, wrong or expired. Get a new one and send the same batch again."""


class Forbidden(BatchRefused):
    """The token lacks the scope, or is of another organization. Retry with another token."""


class NotFound(BatchRefused):
    """An execution or task name is unknown. Register it, then send a batch with a new id.

    The same id gets the same error again (docs/concepts/contract.md#rule-8).
    """


class Conflict(BatchRefused):
    """The batch id was used for another batch: send this one under a new id.

    Or `record.error.details` names `flow_id`: the execution was registered with another one, or
    with none (docs/concepts/contract.md#rule-15).
    """


class PreconditionFailed(BatchRefused):
    """A condition of the batch did not hold, so nothing of it took effect.

    `record.error.details` lists which, and the active tags that are the cause, if the token has the
    scope `task-tags:read`. The same id gets the same error again
    (docs/concepts/contract.md#rule-18).
    """


class TooLarge(BatchRefused):
    """The message exceeds a limit of what one may change, or of what a task or execution has.

    `record.error.details` names the limit. Split the batch, remove tags first, or register fewer
    names; the same id gets the same error again (docs/concepts/contract.md#rule-17).
    """


class InternalError(BatchRefused):
    """The worker failed at this batch, and kept it for an operator. Report the batch id."""


_REFUSALS: dict[str, type[BatchRefused]] = {
    "bad_request": BadRequest,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "not_found": NotFound,
    "conflict": Conflict,
    "precondition_failed": PreconditionFailed,
    "too_large": TooLarge,
    "internal_error": InternalError,
}


def refusal(record: ResultRecord) -> BatchRefused:
    """Return the exception for a result record that is an error."""
    assert record.error is not None
    return _REFUSALS.get(record.error.code, BatchRefused)(record)
