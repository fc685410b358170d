"""Admission: a stream entry becomes a message to apply, a refusal, or a dead letter.

Bytes are read and the token is verified here; what a message does is decided in worker/rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from producers.contract.errors import ErrorCode, ErrorInfo, InvalidMessage, describe
from producers.contract.messages import SetTaskState, digest
from producers.inbox.protocol import DeadLetter, StreamEntry
from worker.auth import EXECUTIONS_WRITE, READ, WRITE, Authorizer, InvalidToken
from worker.log import log_limited
from worker.rules import error_record
from worker.snapshot import AuthorizedMessage
from worker.wire import Batch, Message, read_message


class Admitted(NamedTuple):
    """The message is well formed and its token allows it: apply it."""

    entry: StreamEntry
    message: AuthorizedMessage

    @property
    def reply_to(self) -> str:
        return self.message.message.reply_channel_name


@dataclass(frozen=True, slots=True)
class Refused:
    """The message is answered with an error and has no effect. Nothing is stored."""

    entry: StreamEntry
    reply_to: str
    record: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The message is kept for an operator, and answered if its batch id could be read."""

    entry: StreamEntry
    dead_letter: DeadLetter
    answer: Refused | None = None


Admission = Admitted | Refused | Unreadable


def admit(
    entry: StreamEntry, organization_id: UUID, authorizer: Authorizer, now: datetime
) -> Admission:
    """Read one message and check that its token allows it (docs/concepts/contract.md#rule-7).

    The token is checked before anything else is said about the message. A message without a
    readable batch id becomes a dead letter: nobody can be answered. Raises `JwksUnavailable`.
    """
    message: Message | None = None
    broken: InvalidMessage | None = None
    try:
        message, canonical = read_message(entry.message or b"")
        batch_id, reply_to = message.batch_id, message.reply_channel_name
    except InvalidMessage as error:
        if error.batch_id is None:
            reason = "; ".join(describe(detail) for detail in error.details[:10])
            return Unreadable(entry, DeadLetter.of(entry, reason, now))
        broken = error
        batch_id, reply_to = error.batch_id, error.reply_to or str(error.batch_id)

    def refuse(error: ErrorInfo) -> Refused:
        log_limited(f"messages are refused: {error.code}", organization=str(organization_id))
        return Refused(entry, reply_to, error_record(organization_id, batch_id, error).encode())

    try:
        principal = authorizer.verify(entry.token, entry.accepted_at, now.timestamp())
    except InvalidToken as error:
        return refuse(_error("unauthorized", str(error)))
    if principal.organization_id != organization_id:
        return refuse(_error("forbidden", "the token belongs to another organization"))
    if broken is not None:
        text = "the message breaks the contract"
        return refuse(ErrorInfo(code="bad_request", message=text, details=broken.details))
    assert message is not None
    for scope in _scopes(message):
        if not principal.allows(scope):
            return refuse(_error("forbidden", f"the token lacks the scope {scope}"))
    may_read = principal.allows(READ)
    authorized = AuthorizedMessage(message, principal.actor, digest(canonical), may_read)
    return Admitted(entry, authorized)


def _scopes(message: Message) -> tuple[str, ...]:
    if isinstance(message, Batch):
        return (WRITE,)
    removes_tags = isinstance(message, SetTaskState) and message.clear is not None
    return (EXECUTIONS_WRITE, WRITE) if removes_tags else (EXECUTIONS_WRITE,)


def fail_admission(
    entry: StreamEntry, organization_id: UUID, error: Exception, now: datetime
) -> Unreadable:
    """Return what becomes of a message at whose admission the worker itself failed."""
    reason = type(error).__name__
    try:  # it may be the reading that fails
        message, _ = read_message(entry.message or b"")
    except Exception:
        return Unreadable(entry, DeadLetter.of(entry, reason, now))
    fault = _error("internal_error", "the worker failed to read this batch")
    record = error_record(organization_id, message.batch_id, fault).encode()
    return Unreadable(
        entry,
        DeadLetter.of(entry, reason, now, batch_id=message.batch_id),
        Refused(entry, message.reply_channel_name, record),
    )


def _error(code: ErrorCode, message: str) -> ErrorInfo:
    return ErrorInfo(code=code, message=message, details=[])
