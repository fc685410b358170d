"""The one owner of the inbox protocol (design, section 3): append, take, remove, hand over, claim.

An inbox is an organization's Redis stream of messages that are accepted and not yet applied. Its lease is
a key that says `queued <lease id>` or `running <run id>`: a drain of this inbox is in the Celery queue, or
at work. Each delivery of a drain message is a run with an id of its own. Each step is one Lua script, so no
step is ever seen half done. `take` begins with what is at the head of the inbox, and `remove` goes on with what
is there next; either frees the lease if there is nothing, and then the run is over.

Why no wake-up is lost: `append` adds the message and looks at the lease in one step, and whatever frees the
lease looks at the inbox in the same step. Whichever comes first, either the appender finds the lease free
and sends a drain, or the drain finds the message and goes on.

Why no two drains work at once, but for faults: a drain works only while the lease says `running` with the
id of its run. `take` yields to whoever is running, and takes over from whoever is merely queued. So a drain
message that comes twice, late, or under an id that was superseded while it waited in a long queue is either
the first to arrive, and drains, or ends at once. (Were a drain bound to the very id that it was sent
with, a queue longer than the lease would supersede each drain before its turn, and nothing would ever be
drained.)

Why faults do no harm: a lease that runs out (its worker died or stood still) is free, so the next append,
or `claim` from `task_tags.wake`, sends another drain. Two may then be at work for a moment. The transaction's
lock and the stored batch ids make that harmless, and the older one ends at its next `remove` or `requeue`. A
step that is repeated because its answer was lost finds what it did the first time, and does no harm. `remove`
takes messages out whoever has the lease: it names ids whose batches are committed. Ids never come again, for
the stream is never deleted, so what was appended since can't be removed by mistake.
"""

from __future__ import annotations

import hashlib
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
from redis.exceptions import NoScriptError

from producers.contract.channels import dead_letters_key, inbox_key, lease_key
from producers.contract.encoding import MAX_READABLE_BYTES

DEFAULT_LIMIT: Final = 10_000
LEASE_MS: Final = 8_000
DEAD_LETTER_LIMIT: Final = 10_000
_CHUNK_MESSAGES: Final = 200
_CHUNK_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class AppendResult:
    """How many of the messages were accepted (the first ones), and whether a drain is to be sent."""

    count: int
    lease_taken: bool


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One stream entry as it was found; a field that is missing is None."""

    id: bytes
    message: bytes | None
    token: bytes | None

    @property
    def accepted_at(self) -> float:
        """When Redis accepted the message, in seconds since the epoch: the time in the stream id."""
        return int(self.id.partition(b"-")[0]) / 1000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that is kept out of the way for an operator, without its token (worker/drain/dead_letters.py)."""

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
    """Return a script; those that go on with the inbox begin with the function for it."""
    names = ["_read_head", name] if name in ("acquire", "ack_and_publish") else [name]
    return "".join(
        files("producers.inbox").joinpath("scripts", f"{each}.lua").read_text() for each in names
    )


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(_source(name).encode(), usedforsecurity=False).hexdigest()


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
        self._rejected = dead_letters_key(organization_id)
        self._limit = limit
        self._lease_ms = lease_ms

    def append(self, chunk: Sequence[bytes], token: str, lease_id: str) -> AppendResult:
        """Accept messages in their order up to the bound, and take the lease if it is free.

        `chunk` is one of `chunks`, and `lease_id` is used for no other. Whoever appends several stops at the first that was not accepted whole:
        then what is accepted is always the beginning, in one piece.
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
        """Begin a drain, or go on after a failure, with what is at the head of the inbox.

        Nothing: the run is over. The inbox was empty, and the lease is free; or another drain is running.
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
        rejections: Sequence[DeadLetter] = (),
        *,
        max_messages: int,
        max_bytes: int = MAX_READABLE_BYTES,
    ) -> list[StreamEntry]:
        """Publish what became of these entries, take them out of the inbox, and go on with what comes next.

        It is one step, so a result is published if and only if its entry is gone. Nothing: the run is over, as
        for `take`.
        """
        arguments: list[Any] = [run_id, self._lease_ms, max_messages, max_bytes, DEAD_LETTER_LIMIT]
        arguments.append(len(entries))
        arguments.extend([entry.id for entry in entries])
        arguments.append(len(publications))
        arguments.extend(chain.from_iterable(publications))
        arguments.append(len(rejections))
        for rejection in rejections:
            fields = list(chain.from_iterable(rejection.fields().items()))
            arguments += [len(fields), *fields]
        keys = [self._inbox, self._lease, self._rejected]
        return self._entries(self._run("ack_and_publish", keys, arguments))

    def reject(self, rejection: DeadLetter) -> None:
        """Keep a message for an operator; its entry stays in the inbox until it is removed."""
        fields = cast(Any, rejection.fields())
        self._redis.xadd(self._rejected, fields, maxlen=DEAD_LETTER_LIMIT, approximate=True)

    def requeue(self, run_id: str) -> bool:
        """Keep the lease for a drain that goes to the end of the queue. False: it is another's."""
        return bool(self._run("requeue", [self._lease], [run_id, self._lease_ms]))

    @staticmethod
    def _entries(found: Any) -> list[StreamEntry]:
        return [_entry(id, fields) for id, fields in found or ()]

    def _run(self, name: str, keys: list[str], args: list[Any]) -> Any:
        try:
            return self._redis.evalsha(_sha(name), len(keys), *keys, *args)
        except NoScriptError:  # the server has started since, or forgot it
            return self._redis.eval(_source(name), len(keys), *keys, *args)


def scan_inboxes(redis: Redis) -> Iterator[UUID]:
    """Yield every organization that ever had a message: their inboxes are found by the names of the keys.

    So nobody has to keep a list of them, which could be lost, or which a producer would need the right
    to write to.
    """
    return scan_organizations(redis, inbox_key)


def scan_organizations(redis: Redis, key_of: Callable[[UUID], str]) -> Iterator[UUID]:
    """Yield every organization that has a stream of this name."""
    pattern = key_of(cast(UUID, "*"))
    for key in redis.scan_iter(match=pattern, count=1000, _type="stream"):
        try:
            yield UUID(key.decode().partition("{")[2].partition("}")[0])
        except ValueError:
            continue  # a key that somebody else made


def claim_idle(
    redis: Redis, organization_ids: Iterable[UUID], new_lease_id: Callable[[], str], lease_ms: int
) -> list[tuple[UUID, str]]:
    """Take the lease of every inbox where messages wait and nobody has it; a drain is to be sent for each."""
    claims = [(organization_id, new_lease_id()) for organization_id in organization_ids]
    script = Script(redis, _source("claim_idle"))
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


def _entry(id: bytes, fields: list[bytes]) -> StreamEntry:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    return StreamEntry(id, values.get(b"message"), values.get(b"token"))
