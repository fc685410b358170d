"""The one owner of the inbox protocol (design, section 3): append, take, read, remove, release, hand over.

An inbox is an organization's Redis stream of messages that are accepted and not yet applied. Its lease is
a key that says `queued <lease id>` or `running <run id>`: a drain of this inbox is in the Celery queue, or
at work. Each delivery of a drain message is a run with an id of its own. Each step is one Lua script (or one
MULTI), so no step is ever seen half done.

Why no wake-up is lost: `append` adds the message and looks at the lease in one step, and `release` looks at
the inbox and frees the lease in one step. Whichever comes first, either the appender finds the lease free
and sends a drain, or the drain finds the message and goes on.

Why no two drains work at once, but for faults: a drain works only while the lease says `running` with the
id of its run. `take` yields to whoever is running, and takes over from whoever is merely queued. So a drain
message that comes twice, late, or under an id that was superseded while it waited in a long queue is either
the first to arrive, and drains, or ends at once. (Were a drain bound to the very id that it was sent
with, a queue longer than the lease would supersede each drain before its turn, and nothing would ever be
drained.)

Why faults do no harm: a lease that runs out (its worker died or stood still) is free, so the next append,
or `claim` from `task_tags.wake`, sends another drain. Two may then be at work for a moment. The transaction's
lock and the stored batch ids make that harmless, and the older one ends at its next `read`, `release` or
`hand_over`. A step that is repeated because its answer was lost finds what it did the first time, and
says the same. `remove` needs no lease: it names ids whose batches are committed. Ids never come again, for
the stream is never deleted, so what was appended since can't be removed by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any, Final, cast
from uuid import UUID

from redis import Redis
from redis.commands.core import Script

from producers.messages import (
    MAX_READABLE_BYTES,
    inbox_key,
    lease_key,
    rejected_key,
)

DRAIN_TASK: Final = "task_tags.drain"
"""The Celery task that is sent to whoever got the lease, with the organization's id and the lease id."""
DEFAULT_LIMIT: Final = 10_000
LEASE_MS: Final = 8_000
REJECTED_LIMIT: Final = 10_000
_CHUNK_MESSAGES: Final = 200
_CHUNK_BYTES: Final = 1024 * 1024


class LeaseLost(Exception):
    """Another drain has the lease now: this one must stop."""


@dataclass(frozen=True, slots=True)
class Appended:
    """How many of the messages were accepted (the first ones), and whether a drain is to be sent."""

    count: int
    lease_taken: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One stream entry as it was found; a field that is missing is None."""

    id: bytes
    message: bytes | None
    token: bytes | None

    @property
    def accepted_at(self) -> float:
        """When Redis accepted the message, in seconds since the epoch: the time in the stream id."""
        return int(self.id.partition(b"-")[0]) / 1000


@dataclass(frozen=True, slots=True)
class Rejection:
    """A message that is kept out of the way for an operator, without its token (worker/rejected.py)."""

    message: bytes
    reason: str
    rejected_at: datetime
    """When, in UTC."""
    attempts: int = 1
    """How often its application was tried."""
    batch_id: UUID | None = None
    """None if it could not be read."""

    def fields(self) -> dict[str, bytes | str]:
        """Return what its stream entry holds."""
        fields: dict[str, bytes | str] = {
            "message": self.message,
            "reason": self.reason,
            "rejected_at": self.rejected_at.isoformat(timespec="milliseconds"),
            "attempts": str(self.attempts),
        }
        return fields if self.batch_id is None else {**fields, "batch_id": str(self.batch_id)}


@cache
def _source(name: str) -> str:
    return files("producers").joinpath("lua", f"{name}.lua").read_text()


class Inbox:
    """The inbox of one organization. `redis` must not decode responses.

    `limit`: how many messages it may hold. `lease_ms`: how long a lease lives without being renewed, in
    milliseconds; producers and workers must agree on it only roughly.
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
        self._rejected = rejected_key(organization_id)
        self._limit = limit
        self._lease_ms = lease_ms

    def append(self, chunk: Sequence[bytes], token: str, lease_id: str) -> Appended:
        """Accept messages in their order up to the bound, and take the lease if it is free.

        `chunk` is one of `chunks`, and `lease_id` is used for no other. Whoever appends several stops at the first that was not accepted whole:
        then what is accepted is always the beginning, in one piece.
        """
        count, taken = self._run(
            "append",
            [self._inbox, self._lease],
            [self._limit, lease_id, self._lease_ms, token, *chunk],
        )
        return Appended(count, bool(taken))

    def room(self) -> int:
        """Return how many messages the inbox would accept now."""
        waiting: int = self._redis.xlen(self._inbox)
        return max(0, self._limit - waiting)

    def give_back(self, lease_id: str) -> None:
        """Free the lease if its drain could not be sent."""
        self._run("give_back", [self._lease], [lease_id])

    def take(self, run_id: str) -> bool:
        """Begin a drain. False: another one is running, so there is nothing to do."""
        return bool(self._run("take", [self._lease], [run_id, self._lease_ms]))

    def read(self, run_id: str, *, most: int, most_bytes: int = MAX_READABLE_BYTES) -> list[Entry]:
        """Renew the lease and return the head of the inbox. Raises `LeaseLost`."""
        found = self._run(
            "read", [self._inbox, self._lease], [run_id, self._lease_ms, most, most_bytes]
        )
        if found is None:
            raise LeaseLost
        return [_entry(id, fields) for id, fields in found]

    def remove(
        self,
        entries: Iterable[Entry],
        publications: Iterable[tuple[str, bytes]],
        rejections: Iterable[Rejection] = (),
    ) -> None:
        """Publish what became of these entries and take them out of the inbox, in one MULTI."""
        with self._redis.pipeline(transaction=True) as multi:
            for channel, payload in publications:
                multi.publish(channel, payload)
            for rejection in rejections:
                self._keep(multi, rejection)
            multi.xdel(self._inbox, *[entry.id for entry in entries])
            multi.execute()

    def reject(self, rejection: Rejection) -> None:
        """Keep a message for an operator; its entry stays in the inbox until it is removed."""
        self._keep(self._redis, rejection)

    def release(self, run_id: str) -> bool:
        """End a drain that found the inbox empty. False: there is work again, so it has to go on."""
        return bool(self._run("release", [self._inbox, self._lease], [run_id]))

    def hand_over(self, run_id: str) -> bool:
        """Keep the lease for a drain that goes to the end of the queue. False: it is another's."""
        return bool(self._run("hand_over", [self._lease], [run_id, self._lease_ms]))

    def _keep(self, redis: Redis, rejection: Rejection) -> None:
        fields = cast(Any, rejection.fields())
        redis.xadd(self._rejected, fields, maxlen=REJECTED_LIMIT, approximate=True)

    def _run(self, name: str, keys: list[str], args: list[Any]) -> Any:
        return Script(self._redis, _source(name))(keys=keys, args=args)


def known_inboxes(redis: Redis) -> Iterator[UUID]:
    """Yield every organization that ever had a message: their inboxes are found by the names of the keys.

    So nobody has to keep a list of them, which could be lost, or which a producer would need the right
    to write to.
    """
    return organizations_with(redis, inbox_key)


def organizations_with(redis: Redis, key_of: Callable[[UUID], str]) -> Iterator[UUID]:
    """Yield every organization that has a stream of this name."""
    pattern = key_of(cast(UUID, "*"))
    for key in redis.scan_iter(match=pattern, count=1000, _type="stream"):
        try:
            yield UUID(key.decode().partition("{")[2].partition("}")[0])
        except ValueError:
            continue  # a key that somebody else made


def claim(
    redis: Redis, organization_ids: Iterable[UUID], new_lease_id: Callable[[], str], lease_ms: int
) -> list[tuple[UUID, str]]:
    """Take the lease of every inbox where messages wait and nobody has it; a drain is to be sent for each."""
    claims = [(organization_id, new_lease_id()) for organization_id in organization_ids]
    script = Script(redis, _source("claim"))
    with redis.pipeline(transaction=False) as pipe:
        for organization_id, lease_id in claims:
            keys = [inbox_key(organization_id), lease_key(organization_id)]
            script(keys=keys, args=[lease_id, lease_ms], client=pipe)
        taken = pipe.execute()
    return [pair for pair, won in zip(claims, taken, strict=True) if won]


def chunks(messages: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield messages in pieces that one script call takes: each call holds up the server for well under 1 ms."""
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


def _entry(id: bytes, fields: list[bytes]) -> Entry:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    return Entry(id, values.get(b"message"), values.get(b"token"))
