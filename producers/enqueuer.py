"""Enqueues messages: appends them to an inbox. Every producer uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

from redis import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from producers.errors import RedisOutOfMemory, Unavailable
from producers.inbox.protocol import DEFAULT_LIMIT, LEASE_MS, Inbox, chunks
from producers.redis_client import open_redis, redis_unavailable


class Enqueuer:
    """Enqueues messages of any organization. Threads may share it; it connects at first use.

    Args:
        limit: How many messages an inbox may hold.
        lease_ms: See `Inbox`.
        options: Of the Redis client.
    """

    def __init__(
        self,
        redis_url: str,
        limit: int = DEFAULT_LIMIT,
        lease_ms: int = LEASE_MS,
        **options: Any,
    ) -> None:
        self.redis: Redis = open_redis(redis_url, **options)
        self._limit = limit
        self._lease_ms = lease_ms

    def enqueue(self, organization_id: UUID, encoded: Sequence[bytes], token: str) -> int:
        """Append serialized messages in their order; return how many were accepted: the first ones.

        Raises `RedisOutOfMemory` or `Unavailable`.
        """
        accepted = 0
        with self._redis_errors():
            inbox = self._inbox(organization_id)
            for chunk in chunks(encoded):
                appended = inbox.append(chunk, token, str(uuid4()))
                accepted += appended
                if appended < len(chunk):
                    break
        return accepted

    def free_capacity(self, organization_id: UUID) -> int:
        """Return how many messages the inbox would accept now. Raises `Unavailable`."""
        with self._redis_errors():
            return self._inbox(organization_id).free_capacity()

    @contextmanager
    def _redis_errors(self) -> Iterator[None]:
        """Turn what Redis raises into what the SDK raises.

        A server that answers with an error may no longer be the right one: the next call connects
        again, through the URL and its names.
        """
        try:
            yield
        except OutOfMemoryError as error:
            raise RedisOutOfMemory("Redis has no memory left: nothing more is accepted") from error
        except (RedisError, OSError) as error:
            self.redis.connection_pool.disconnect(inuse_connections=False)
            if "last possible ID" in str(error):
                remedy = "an operator has to run `task-tags-admin inbox rebuild`"
                raise Unavailable(f"the inbox has reached its last stream id: {remedy}") from error
            raise redis_unavailable(error) from error

    def close(self) -> None:
        self.redis.close()

    def _inbox(self, organization_id: UUID) -> Inbox:
        return Inbox(self.redis, organization_id, limit=self._limit, lease_ms=self._lease_ms)
