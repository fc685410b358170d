"""What an operator does with rejected messages: list them, look at one, enqueue it again, drop it.

It owns what becomes of the streams `task-tags:{organization}:rejected`; worker/drain/path.py fills them (design,
section 4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final, cast
from uuid import UUID

from redis import Redis

from producers.contract.channels import dead_letters_key
from producers.contract.errors import ErrorInfo
from producers.contract.results import ResultRecord
from producers.errors import InboxFull
from producers.inbox.protocol import StreamEntry, scan_organizations
from worker.auth import Authorizer
from worker.db.repository import Repository
from worker.drain.path import admit

_PAGE: Final = 10
"""Entries read at a time: each may have a message of a mebibyte."""
_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class DeadLetterNotFound(Exception):
    """No rejected message has this id: list them again."""


class RetryRefused(Exception):
    """The worker would refuse the message as it is, or with this token. It is still kept."""


@dataclass(frozen=True, slots=True)
class DeadLetterEntry:
    """A message that is kept for an operator; its token is not."""

    organization_id: UUID
    id: str
    message: bytes
    reason: str
    rejected_at: str
    """ISO 8601, UTC."""
    attempts: int
    batch_id: str | None

    def summary(self) -> dict[str, Any]:
        """Return what a list says of it: all but the message."""
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
        """The message as text; bytes that are no UTF-8 are escaped."""
        return self.message.decode(errors="backslashreplace")


def organizations(redis: Redis) -> list[UUID]:
    """Return every organization that ever had a rejected message."""
    return sorted(set(scan_organizations(redis, dead_letters_key)))


def rejected_messages(redis: Redis, organization_id: UUID) -> Iterator[DeadLetterEntry]:
    """Yield an organization's rejected messages, the oldest first."""
    after = "-"
    while page := _range(redis, organization_id, after, "+"):
        yield from page
        after = f"({page[-1].id}"


def find(redis: Redis, organization_id: UUID, id: str) -> DeadLetterEntry:
    """Return one rejected message. Raises `DeadLetterNotFound`."""
    known = _ID.fullmatch(id)
    if known and all(int(part) < 2**64 for part in known.groups()):
        for found in _range(redis, organization_id, id, id):
            return found
    raise DeadLetterNotFound(f"there is no rejected message {id}")


def drop(redis: Redis, rejected: DeadLetterEntry) -> None:
    """Forget a rejected message for good."""
    redis.xdel(dead_letters_key(rejected.organization_id), rejected.id)


@dataclass(frozen=True, slots=True)
class DeadLetterRetrier:
    """Who enqueues rejected messages again, and signs for them: `token` and `send` are the operator's own.

    `send` appends messages to the organization's inbox and returns how many were accepted.
    """

    redis: Redis
    store: Repository
    authorizer: Authorizer
    token: str
    send: Callable[[Sequence[bytes]], int]

    def retry(self, rejected: DeadLetterEntry, now: datetime) -> UUID:
        """Enqueue a rejected message again and return its batch id. `now`: the Redis server's time, UTC.

        The stored failure goes first, or the message would only be answered with it, and the rejected entry
        goes last, so a crash in between leaves the message to be retried; enqueued twice, it takes effect
        once, for a result other than `internal_error` is never forgotten. Raises `RetryRefused`, `InboxFull`
        or `Unavailable`; the message is then still kept.
        """
        received = admit(
            _as_accepted(rejected.message, self.token, now),
            rejected.organization_id,
            self.authorizer,
            now,
        )
        if received.rejection is not None:
            raise RetryRefused(f"it has no readable batch id: {received.rejection.reason}")
        if received.outcome is not None:  # enqueued, it would be answered so, and be gone
            raise RetryRefused(_refusal(received.outcome.record))
        assert received.request is not None
        message = received.request.message
        self.store.forget_failure(rejected.organization_id, message.batch_id)
        if not self.send([rejected.message]):
            raise InboxFull([message])
        drop(self.redis, rejected)
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
    return [_rejected(organization_id, *entry) for entry in cast(list[Any], found)]


def _rejected(organization_id: UUID, id: bytes, fields: dict[bytes, bytes]) -> DeadLetterEntry:
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
