"""The inbox protocol: append, acquire, acknowledge and publish, requeue.

An inbox is an organization's Redis stream of messages that are accepted and not yet applied. Its
lease is a key that says `queued <lease id>` or `running <run id>`: a drain of the inbox is in the
Celery queue, or working. Each delivery of a drain message is a run with a separate id. Each step
is one Lua script, which also sends the drain message, so no step is ever seen half done. The keys,
the states and the argument why nothing is lost are in docs/concepts/inbox-protocol.md;
tests/unit/test_inbox_model.py searches them.

Three facts carry it:

- Whatever frees the lease looks at the inbox in the same step, and an append looks at the lease in
  the step that adds the message. So no wake-up is lost.
- A drain works only while the lease says `running` with the id of its run. It yields to a running
  drain and takes over from one that is merely queued. So no two drains work at once.
- After a fault two drains may work for a moment. The transaction's lock and the stored batch ids
  make that harmless, and the older one ends at its next step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, Final, NamedTuple
from uuid import UUID

from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from producers.contract.channels import (
    dead_letters_key,
    failing_key,
    inbox_key,
    lease_key,
    position_key,
)
from producers.contract.encoding import MAX_READABLE_BYTES
from producers.contract.messages import MAX_MESSAGE_BYTES
from producers.inbox.drain_message import QUEUE, drain_message
from producers.inbox.script_calls import SentScript, run_script, script_sha

logger = logging.getLogger(__name__)

DEFAULT_LIMIT: Final = 10_000
LEASE_MS: Final = 8_000
DEAD_LETTER_LIMIT: Final = 10_000
QUEUE_SHARE: Final = 16
"""For each so many messages in the Celery queue, a drain takes one more of them."""
_CHUNK_MESSAGES: Final = 200
_SHARED_BYTES: Final = 256 * 1024
"""What is read of each inbox, if several are read at once."""
_CHUNK_BYTES: Final = 1024 * 1024
MAX_LEASE_SECONDS: Final = 60
WAITING: Final = "task-tags:waiting"
"""The set of organizations in whose inbox messages wait."""
SHARED_KEYS: Final = {WAITING: "set", "task-tags:wake": "string", QUEUE: "list"}
"""The keys that all organizations share, with their types."""


class Acquired(NamedTuple):
    """What a drain begins with."""

    entries: list[StreamEntry]
    """The head of the inbox."""
    rescue: bool
    """This run is to look for lost drains (rescue.py)."""
    others: list[bytes]
    """More messages from the Celery queue, which this run must take care of."""

    @staticmethod
    def read(answer: Any) -> Acquired:
        rescue, others, entries = answer
        return Acquired(_entries(entries), bool(rescue), others)


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


class Acknowledged:
    """Entries that are on their way out of the inbox (`Inbox.ack_and_publish`)."""

    def __init__(self, inbox: Inbox, sent: SentScript) -> None:
        self._inbox, self._sent = inbox, sent

    def following(self) -> list[StreamEntry] | None:
        """Wait until it is done; return what comes next, or None if the lease is another's.

        If there is nothing left in the run's hands and in the inbox, the run is over.
        """
        found = self._inbox.repairing(self._sent.result)
        return None if found is None else _entries(found)

    def drop(self) -> None:
        """Do not wait: it may be done or not."""
        self._sent.drop()


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
        self.redis = redis
        self._organization_id = organization_id
        self._inbox = inbox_key(organization_id)
        self._lease = lease_key(organization_id)
        self._dead_letters = dead_letters_key(organization_id)
        self._failing = failing_key(organization_id)
        self._position = position_key(organization_id)
        self._limit = limit
        self._lease_ms = lease_ms

    def append(self, chunk: Sequence[bytes], token: str, lease_id: str) -> int:
        """Accept messages in their order up to the limit; send a drain if the lease is free.

        Returns how many were accepted: the first ones. After the first chunk that is not accepted
        whole the caller stops: so what is accepted is always the beginning, in one piece.

        Args:
            chunk: One of `chunks`.
            lease_id: An id that is used for no other call.
        """
        drain = drain_message(self._organization_id, lease_id)
        count: int = self._run(
            "append",
            [self._inbox, self._lease],
            [self._limit, lease_id, self._lease_ms, token, drain, *chunk],
        )
        return count

    def free_capacity(self) -> int:
        """Return how many messages the inbox would accept now."""
        waiting: int = self.redis.xlen(self._inbox)
        return max(0, self._limit - waiting)

    def acquire(
        self,
        run_id: str,
        *,
        max_messages: int,
        max_bytes: int = MAX_READABLE_BYTES,
        others: int = 0,
    ) -> Acquired:
        """Begin a drain, or go on after a failure; return what is at the head of the inbox.

        If there is no entry, the run is over: the inbox is empty and the lease is free, or another
        drain is running.

        Args:
            others: How many more messages to take from the Celery queue, at most.
        """
        keys, arguments = self.acquire_arguments(run_id, max_messages, max_bytes, others)
        return Acquired.read(self._run("acquire", keys, arguments))

    def acquire_arguments(
        self, run_id: str, max_messages: int, max_bytes: int, others: int
    ) -> tuple[list[str], list[Any]]:
        """Return keys and arguments of the script."""
        arguments = [run_id, self._lease_ms, max_messages, max_bytes, others, QUEUE_SHARE]
        return [self._inbox, self._lease], arguments

    def ack_and_publish(
        self,
        run_id: str,
        entries: Sequence[StreamEntry],
        publications: Sequence[tuple[str, bytes]],
        dead_letters: Sequence[DeadLetter] = (),
        *,
        position: str | None = None,
        max_messages: int,
        max_bytes: int = MAX_READABLE_BYTES,
        after: bytes = b"",
    ) -> Acknowledged:
        """Publish what became of entries, remove them from the inbox, and read what comes next.

        It is one step: a result is published if and only if its entry is gone. This sends it; the
        returned object waits for the answer.

        Args:
            publications: Pairs of channel and payload, in order.
            position: The cursor of the organization's last change event, if there are new ones.
            after: The id of the last entry that the run has read, if there are more than these.
        """
        arguments: list[Any] = [run_id, self._lease_ms, max_messages, max_bytes, after]
        arguments += [DEAD_LETTER_LIMIT, position or ""]
        arguments.append(len(entries))
        arguments.extend([entry.id for entry in entries])
        arguments.append(len(publications))
        arguments.extend(chain.from_iterable(publications))
        arguments.append(len(dead_letters))
        for dead_letter in dead_letters:
            fields = list(chain.from_iterable(dead_letter.fields().items()))
            arguments += [len(fields), *fields]
        keys = [self._inbox, self._lease, self._dead_letters, self._failing, self._position]
        return Acknowledged(self, SentScript(self.redis, "ack_and_publish", keys, arguments))

    def add_dead_letter(self, entry: StreamEntry, dead_letter: DeadLetter) -> None:
        """Keep an entry for an operator, once; it is in the inbox until it is acknowledged."""
        fields = chain.from_iterable(dead_letter.fields().items())
        keys = [self._dead_letters, self._failing]
        self._run("add_dead_letter", keys, [DEAD_LETTER_LIMIT, entry.id, *fields])

    def count_failure(self, entry: StreamEntry, error: str, kind: str = "") -> tuple[int, int]:
        """Count a failure of an entry; return how many there were, and seconds since the first.

        Time-outs, the kind `_slow`, are counted apart. A count survives processes, and is gone with
        its entry.
        """
        attempts, seconds = self._run("count_failure", [self._failing], [entry.id, error, kind])
        return attempts, seconds

    def rebuild(self) -> int:
        """Move all messages, in their order, to a new stream with new ids; return how many.

        It is for a stream that has reached its last id, which Redis then refuses to go beyond.
        """
        count: int = self._run("rebuild", [self._inbox, f"{self._inbox}:rebuilt"], [])
        return count

    def disconnect(self) -> None:
        """Close the connections, so that the next one goes through the URL and its names again."""
        self.redis.connection_pool.disconnect(inuse_connections=False)

    def renew(self, run_id: str) -> None:
        """Keep the lease for its full time from now on, unless it is another's."""
        self._run("renew", [self._lease], [run_id, self._lease_ms])

    def requeue(self, run_id: str) -> None:
        """Send the drain to the end of the queue, with the lease, unless that is another's."""
        drain = drain_message(self._organization_id, run_id)
        self._run("requeue", [self._inbox, self._lease], [run_id, self._lease_ms, drain])

    def rescue_arguments(self, lease_id: str) -> tuple[list[str], list[Any]]:
        """Return keys and arguments of the script that sends a drain where one is missing."""
        drain = drain_message(self._organization_id, lease_id)
        return [self._inbox, self._lease], [lease_id, self._lease_ms, drain]

    def _run(self, name: str, keys: list[str], args: list[Any]) -> Any:
        return self.repairing(lambda: run_script(self.redis, name, keys, args))

    def repairing(self, run: Callable[[], Any]) -> Any:
        """Run a script; if a key can't be used, repair it, and run it again."""
        try:
            return run()
        except ResponseError as error:
            if "WRONGTYPE" not in str(error) and "last possible ID" not in str(error):
                raise
            self.repair()  # another process may have done it
            return run()

    def repair(self) -> bool:
        """Move keys that can't be used out of the way, or delete them; return whether one was so.

        A producer whose rights end at its own keys can't do that: a worker does, at a rescue.
        """
        with suppress(ResponseError):
            self.redis.sadd(WAITING, str(self._organization_id))
        types = {
            self._lease: "string",
            self._failing: "hash",
            self._position: "string",
            self._inbox: "stream",
            self._dead_letters: "log",
        }
        return repair_keys(self.redis, types | SHARED_KEYS)


def repair_keys(redis: Redis, types: Mapping[str, str] = SHARED_KEYS) -> bool:
    """Rename keys aside that should be streams and can't be used; delete others of a wrong type.

    Returns whether a key was wrong, and could be mended.
    """
    arguments = [f":aside:{time.time_ns()}", *types.values()]
    try:
        wrong = run_script(redis, "repair", list(types), arguments)
    except NoPermissionError:
        return False
    for key in wrong:
        logger.error("a key that can't be used was renamed or deleted", extra={"key": key.decode()})
    return bool(wrong)


def acquire_all(runs: Sequence[tuple[Inbox, str]], max_messages: int) -> list[Acquired]:
    """Begin several drains in one round trip; the arguments are inboxes and the ids of runs."""
    pipeline = runs[0][0].redis.pipeline(transaction=False)
    for inbox, run_id in runs:
        keys, arguments = inbox.acquire_arguments(run_id, max_messages, _SHARED_BYTES, 0)
        pipeline.evalsha(script_sha("acquire"), len(keys), *keys, *arguments)
    found: list[Acquired] = []
    for (inbox, run_id), answer in zip(runs, pipeline.execute(raise_on_error=False), strict=True):
        if isinstance(answer, ResponseError):  # it may be mended
            found.append(inbox.acquire(run_id, max_messages=max_messages, max_bytes=_SHARED_BYTES))
        elif isinstance(answer, Exception):
            raise answer
        else:
            found.append(Acquired.read(answer))
    return found


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


def _entries(found: Any) -> list[StreamEntry]:
    return [_entry(id, fields) for id, fields in found or ()]


def _entry(id: bytes, fields: list[bytes]) -> StreamEntry:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    return StreamEntry(id, values.get(b"message"), values.get(b"token"), values.get(b"accepted_at"))
