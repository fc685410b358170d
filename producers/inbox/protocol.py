"""The inbox protocol: append, acquire, acknowledge and publish, requeue, claim.

An inbox is an organization's Redis stream of messages that are accepted and not yet applied. Its
lease is a key that says `queued <lease id>` or `running <run id>`: a drain of the inbox is in the
Celery queue, or working. Each delivery of a drain message is a run with an id of its own. Each step
is one Lua script, so no step is ever seen half done. The keys, the states and the argument why
nothing is lost are in docs/concepts/inbox-protocol.md; tests/unit/test_inbox_model.py searches
them.

Three facts carry it:

- Whatever frees the lease looks at the inbox in the same step, and an append looks at the lease in
  the step that adds the message. So no wake-up is lost.
- A drain works only while the lease says `running` with the id of its run. It yields to a running
  drain and takes over from one that is merely queued. So no two drains work at once.
- After a fault two drains may work for a moment. The transaction's lock and the stored batch ids
  make that harmless, and the older one ends at its next step.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any, Final, cast
from uuid import UUID

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError

from producers.contract.channels import dead_letters_key, failing_key, inbox_key, lease_key
from producers.contract.encoding import MAX_READABLE_BYTES
from producers.contract.messages import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

DEFAULT_LIMIT: Final = 10_000
LEASE_MS: Final = 8_000
DEAD_LETTER_LIMIT: Final = 10_000
_CHUNK_MESSAGES: Final = 200
_CHUNK_BYTES: Final = 1024 * 1024
MAX_LEASE_SECONDS: Final = 60
_INCLUDES: Final = {
    "append": ("_lease",),
    "acquire": ("_lease", "_read_head"),
    "ack_and_publish": ("_lease", "_read_head"),
    "requeue": ("_lease",),
    "claim_idle": ("_lease",),
}


@dataclass(frozen=True, slots=True)
class AppendResult:
    """How many of the messages were accepted (the first ones), and whether to send a drain."""

    count: int
    lease_taken: bool


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One stream entry as it was found; a missing field is None."""

    id: bytes
    message: bytes | None
    token: bytes | None
    accepted_ms: bytes | None = None

    @property
    def accepted_at(self) -> float:
        """When Redis accepted the message, in seconds since the epoch.

        It is a field of the entry, which older producers do not write: then it is the time in the
        id, which never runs back.
        """
        accepted_ms = self.accepted_ms if (self.accepted_ms or b"").isdigit() else None
        return int(accepted_ms or self.id.partition(b"-")[0]) / 1000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that is kept for an operator, without its token (worker/drain/dead_letters.py).

    `rejected_at` is in UTC, `attempts` says how often it was applied in vain, and `batch_id` is
    None if it could not be read.
    """

    message: bytes
    reason: str
    rejected_at: datetime
    attempts: int = 1
    batch_id: UUID | None = None

    @staticmethod
    def of(
        entry: StreamEntry,
        reason: str,
        rejected_at: datetime,
        attempts: int = 1,
        batch_id: UUID | None = None,
    ) -> DeadLetter:
        """Keep a message whole, or the first MiB of one that is larger than messages may be."""
        message = (entry.message or b"")[:MAX_MESSAGE_BYTES]
        return DeadLetter(message, reason, rejected_at, attempts, batch_id)

    def fields(self) -> dict[str, bytes | str]:
        """Return the fields of its stream entry."""
        fields: dict[str, bytes | str] = {
            "message": self.message,
            "reason": self.reason,
            "rejected_at": self.rejected_at.isoformat(timespec="milliseconds"),
            "attempts": str(self.attempts),
        }
        return fields if self.batch_id is None else {**fields, "batch_id": str(self.batch_id)}


class Inbox:
    """The inbox of one organization.

    Args:
        redis: A client that does not decode responses.
        limit: How many messages the inbox may hold.
        lease_ms: How long a lease lives without renewal, in milliseconds. Producers and workers
            must agree on it only roughly.
    """

    def __init__(
        self,
        redis: Redis,
        organization_id: UUID,
        *,
        limit: int = DEFAULT_LIMIT,
        lease_ms: int = LEASE_MS,
    ) -> None:
        self._redis = redis
        self._inbox = inbox_key(organization_id)
        self._lease = lease_key(organization_id)
        self._dead_letters = dead_letters_key(organization_id)
        self._failing = failing_key(organization_id)
        self._limit = limit
        self._lease_ms = lease_ms

    def append(self, chunk: Sequence[bytes], token: str, lease_id: str) -> AppendResult:
        """Accept messages in their order up to the limit, and take the lease if it is free.

        Args:
            chunk: One of `chunks`. After the first chunk that is not accepted whole the caller
                stops: so what is accepted is always the beginning, in one piece.
            lease_id: An id that is used for no other call.
        """
        count, taken = self._run(
            "append",
            [self._inbox, self._lease],
            [self._limit, lease_id, self._lease_ms, token, *chunk],
        )
        return AppendResult(count, bool(taken))

    def free_capacity(self) -> int:
        """Return how many messages the inbox would accept now."""
        waiting: int = self._redis.xlen(self._inbox)
        return max(0, self._limit - waiting)

    def release(self, lease_id: str) -> None:
        """Free the lease if its drain could not be sent."""
        self._run("release", [self._lease], [lease_id])

    def acquire(
        self, run_id: str, *, max_messages: int, max_bytes: int = MAX_READABLE_BYTES
    ) -> list[StreamEntry]:
        """Begin a drain, or go on after a failure; return what is at the head of the inbox.

        If nothing is returned, the run is over: the inbox is empty and the lease is free, or
        another drain is running.
        """
        return self._entries(
            self._run(
                "acquire",
                [self._inbox, self._lease],
                [run_id, self._lease_ms, max_messages, max_bytes],
            )
        )

    def ack_and_publish(
        self,
        run_id: str,
        entries: Sequence[StreamEntry],
        publications: Sequence[tuple[str, bytes]],
        dead_letters: Sequence[DeadLetter] = (),
        *,
        max_messages: int,
        max_bytes: int = MAX_READABLE_BYTES,
    ) -> list[StreamEntry]:
        """Publish what became of entries, remove them from the inbox, and return what comes next.

        It is one step: a result is published if and only if its entry is gone. If nothing is
        returned, the run is over, as for `acquire`.

        Args:
            publications: Pairs of channel and payload, in order.
        """
        arguments: list[Any] = [run_id, self._lease_ms, max_messages, max_bytes, DEAD_LETTER_LIMIT]
        arguments.append(len(entries))
        arguments.extend([entry.id for entry in entries])
        arguments.append(len(publications))
        arguments.extend(chain.from_iterable(publications))
        arguments.append(len(dead_letters))
        for dead_letter in dead_letters:
            fields = list(chain.from_iterable(dead_letter.fields().items()))
            arguments += [len(fields), *fields]
        keys = [self._inbox, self._lease, self._dead_letters, self._failing]
        return self._entries(self._run("ack_and_publish", keys, arguments))

    def add_dead_letter(self, dead_letter: DeadLetter) -> None:
        """Keep a message for an operator; its entry stays in the inbox until it is acknowledged."""
        fields = list(chain.from_iterable(dead_letter.fields().items()))
        self._run("add_dead_letter", [self._dead_letters], [DEAD_LETTER_LIMIT, *fields])

    def count_failure(self, entry: StreamEntry, error: str) -> tuple[int, int]:
        """Count a failure of an entry; return how many there were, and seconds since the first.

        The count survives processes, and is gone with its entry.
        """
        attempts, seconds = self._run("count_failure", [self._failing], [entry.id, error])
        return attempts, seconds

    def disconnect(self) -> None:
        """Close the connections, so that the next one goes through the URL and its names again."""
        self._redis.connection_pool.disconnect(inuse_connections=False)

    def requeue(self, run_id: str) -> bool:
        """Keep the lease for a drain that goes to the end of the queue; False: it is another's."""
        return bool(self._run("requeue", [self._lease], [run_id, self._lease_ms]))

    @staticmethod
    def _entries(found: Any) -> list[StreamEntry]:
        return [_entry(id, fields) for id, fields in found or ()]

    def _run(self, name: str, keys: list[str], args: list[Any]) -> Any:
        try:
            try:
                return self._redis.evalsha(_sha(name), len(keys), *keys, *args)
            except NoScriptError:  # the server was restarted, or its scripts were flushed
                return self._redis.eval(_source(name), len(keys), *keys, *args)
        except ResponseError as error:
            if name == "repair" or "WRONGTYPE" not in str(error) or not self.repair():
                raise
            return self._run(name, keys, args)

    def repair(self) -> bool:
        """Move keys of a wrong type out of the way, or delete a lease; return whether one was.

        A producer whose rights end at its own keys can't do that: a worker does, at the next wake.
        """
        keys = [self._lease, self._failing, self._inbox, self._dead_letters]
        try:
            wrong = self._run("repair", keys, [f":aside:{time.time_ns()}"])
        except NoPermissionError:
            return False
        for key in wrong:
            logger.error("a key had a wrong type: it was moved aside", extra={"key": key.decode()})
        return bool(wrong)


def scan_inboxes(redis: Redis) -> Iterator[UUID]:
    """Yield every organization that has an inbox, which the names of the keys tell.

    So there is no list of them that could be lost, or that a producer would need the right to
    write.
    """
    return scan_organizations(redis, inbox_key)


def scan_organizations(
    redis: Redis, key_of: Callable[[UUID], str], type: str | None = None
) -> Iterator[UUID]:
    """Yield every organization that has a key of this name, of any type or of one."""
    pattern = key_of(cast(UUID, "*"))
    for key in redis.scan_iter(match=pattern, count=1000, _type=type):
        try:
            yield UUID(key.decode().partition("{")[2].partition("}")[0])
        except ValueError:
            continue  # a key of somebody else


def claim_idle(
    redis: Redis, organization_ids: Iterable[UUID], new_lease_id: Callable[[], str], lease_ms: int
) -> list[tuple[UUID, str]]:
    """Take the free leases of inboxes in which messages wait; return those to send drains for."""
    claims = [(organization_id, new_lease_id()) for organization_id in organization_ids]
    script = Script(redis, _source("claim_idle"))
    with redis.pipeline(transaction=False) as pipe:
        for organization_id, lease_id in claims:
            keys = [inbox_key(organization_id), lease_key(organization_id)]
            script(keys=keys, args=[lease_id, lease_ms], client=pipe)
        taken = pipe.execute(raise_on_error=False)
    won = []
    for claim, answer in zip(claims, taken, strict=True):
        if isinstance(answer, RedisError):  # as for a key of a wrong type: the others go on
            Inbox(redis, claim[0]).repair()
        elif answer:
            won.append(claim)
    return won


def chunks(messages: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield messages in chunks for one script call, which blocks the server for well under 1 ms."""
    chunk: list[bytes] = []
    size = 0
    for message in messages:
        if chunk and (len(chunk) == _CHUNK_MESSAGES or size + len(message) > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += len(message)
    if chunk:
        yield chunk


def _entry(id: bytes, fields: list[bytes]) -> StreamEntry:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    return StreamEntry(id, values.get(b"message"), values.get(b"token"), values.get(b"accepted_at"))


@cache
def _source(name: str) -> str:
    """Return a script, with the functions that it shares with others behind its first line."""
    scripts = files("producers.inbox").joinpath("scripts")
    own, *included = (
        scripts.joinpath(f"{each}.lua").read_text() for each in (name, *_INCLUDES.get(name, ()))
    )
    flags, newline, rest = own.partition("\n")
    if not flags.startswith("#!"):
        return "".join([*included, own])
    return "".join([flags, newline, *included, rest])


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(_source(name).encode(), usedforsecurity=False).hexdigest()
