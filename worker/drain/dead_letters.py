"""Dead letters, as an operator handles them: list them, show one, enqueue it again, drop it.

They are in the streams `task-tags:{organization}:rejected`, which worker/drain/path.py writes
(docs/concepts/inbox-protocol.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final, assert_never, cast
from uuid import UUID

from redis import Redis

from producers.contract.channels import dead_letters_key
from producers.contract.encoding import parse_message
from producers.contract.errors import ErrorInfo
from producers.contract.results import ResultRecord
from producers.errors import InboxFull
from producers.inbox.protocol import StreamEntry
from producers.inbox.rescue import scan_organizations
from worker.auth import Authorizer
from worker.db.repository import Repository
from worker.drain.admission import Admitted, Refused, Unreadable, admit

_PAGE: Final = 10
"""Entries read at a time: each may hold a message of 1 MiB."""
_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class DeadLetterNotFound(Exception):
    """No dead letter has this id: list them again."""


class RetryRefused(Exception):
    """The worker would refuse the message, or this token. The dead letter is kept."""


@dataclass(frozen=True, slots=True)
class DeadLetterEntry:
    """A dead letter as it is stored; it has no token."""

    organization_id: UUID
    id: str
    message: bytes
    reason: str
    rejected_at: str
    """ISO 8601, UTC."""
    attempts: int
    batch_id: str | None

    def summary(self) -> dict[str, Any]:
        """Return what a list shows: everything but the message."""
        return {
            "organization_id": str(self.organization_id),
            "id": self.id,
            "rejected_at": self.rejected_at,
            "attempts": self.attempts,
            "batch_id": self.batch_id,
            "bytes": len(self.message),
            "reason": self.reason,
        }

    @property
    def text(self) -> str:
        """The message as text; bytes that are not UTF-8 are escaped."""
        return self.message.decode(errors="backslashreplace")


def organizations(redis: Redis) -> list[UUID]:
    """Return every organization that ever had a dead letter."""
    return sorted(set(scan_organizations(redis, dead_letters_key, "stream")))


def dead_letters(redis: Redis, organization_id: UUID) -> Iterator[DeadLetterEntry]:
    """Yield an organization's dead letters, the oldest first."""
    after = "-"
    while page := _range(redis, organization_id, after, "+"):
        yield from page
        after = f"({page[-1].id}"


def find(redis: Redis, organization_id: UUID, id: str) -> DeadLetterEntry:
    """Return one dead letter. Raises `DeadLetterNotFound`."""
    known = _ID.fullmatch(id)
    if known and all(int(part) < 2**64 for part in known.groups()):
        for found in _range(redis, organization_id, id, id):
            return found
    raise DeadLetterNotFound(f"there is no dead letter {id}")


def drop(redis: Redis, dead_letter: DeadLetterEntry) -> None:
    """Delete a dead letter."""
    redis.xdel(dead_letters_key(dead_letter.organization_id), dead_letter.id)


@dataclass(frozen=True, slots=True)
class DeadLetterRetrier:
    """Enqueues dead letters again, under the operator's own token.

    `send` appends messages to the organization's inbox and returns how many were accepted.
    """

    redis: Redis
    repository: Repository
    authorizer: Authorizer
    token: str
    send: Callable[[Sequence[bytes]], int]

    def retry(self, dead_letter: DeadLetterEntry, now: datetime) -> UUID:
        """Enqueue a dead letter again and return its batch id.

        The stored failure is deleted first, for it would be the answer, and the dead letter last: a
        crash in between leaves the message to be retried. Enqueued twice, it takes effect once, for
        no other result than `internal_error` is deleted.

        Args:
            now: The Redis server's time, UTC.

        Raises:
            RetryRefused, InboxFull, Unavailable: The dead letter is still kept.
        """
        entry = _as_accepted(dead_letter.message, self.token, now)
        match admit(entry, dead_letter.organization_id, self.authorizer, now):
            case Unreadable(dead_letter=unreadable):
                raise RetryRefused(f"it has no readable batch id: {unreadable.reason}")
            case Refused(record=record):  # enqueued, it would be answered so, and be gone
                raise RetryRefused(_refusal(record))
            case Admitted(message=authorized):
                message = authorized.message
            case other:
                assert_never(other)
        self.repository.forget_failure(dead_letter.organization_id, message.batch_id)
        if not self.send([dead_letter.message]):
            raise InboxFull([parse_message(dead_letter.message)])
        drop(self.redis, dead_letter)
        return message.batch_id


def server_time(redis: Redis) -> datetime:
    """Return the time by which Redis accepts messages."""
    seconds, microseconds = redis.time()
    return datetime.fromtimestamp(seconds, timezone.utc).replace(microsecond=microseconds)


def _as_accepted(message: bytes, token: str, now: datetime) -> StreamEntry:
    return StreamEntry(b"%d-0" % (now.timestamp() * 1000), message, token.encode(errors="replace"))


def _refusal(record: bytes) -> str:
    error = ResultRecord.decode(record).error
    assert isinstance(error, ErrorInfo)
    return f"the worker would refuse it: {error.code}: {error.message}"


def _range(redis: Redis, organization_id: UUID, first: str, last: str) -> list[DeadLetterEntry]:
    found = redis.xrange(dead_letters_key(organization_id), first, last, count=_PAGE)
    return [_dead_letter(organization_id, *entry) for entry in cast(list[Any], found)]


def _dead_letter(organization_id: UUID, id: bytes, fields: dict[bytes, bytes]) -> DeadLetterEntry:
    text = {name: value.decode(errors="backslashreplace") for name, value in fields.items()}
    attempts = text.get(b"attempts", "")
    return DeadLetterEntry(
        organization_id,
        id.decode(),
        fields.get(b"message", b""),
        text.get(b"reason", ""),
        text.get(b"rejected_at", ""),
        int(attempts) if re.fullmatch("[0-9]{1,9}", attempts) else 1,
        text.get(b"batch_id"),
    )
