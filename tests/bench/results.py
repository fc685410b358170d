"""Receives the results of a run for all contenders alike: one thread, one connection."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from uuid import UUID

from producers.contract.channels import results_channel
from producers.redis_client import open_redis
from tests.bench.load import REPLY_TO

_END = b""


class Missing(Exception):
    """Results did not come in time, or were refusals."""


class Results:
    """Counts the results of organizations: a context manager, subscribed once it is entered."""

    def __init__(
        self, redis_url: str, organizations: Iterable[UUID], *, timed: bool = False
    ) -> None:
        self._redis = open_redis(redis_url)
        self._channels = [results_channel(each, REPLY_TO) for each in organizations]
        self._stop, self._subscribed, self._reached = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._receive)
        self._timed = timed
        self._target = -1
        self.received = 0
        self.refused: list[bytes] = []
        self.at = 0.0
        """When the last awaited result came (perf_counter)."""
        self.times: dict[UUID, float] = {}
        """When the result of each batch came, if it is timed."""

    def __enter__(self) -> Results:
        self._thread.start()
        if not self._subscribed.wait(10):
            raise Missing("could not subscribe")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._redis.publish(self._channels[0], _END)  # the thread checks at each message
        self._thread.join()
        self._redis.close()

    def expect(self, count: int) -> None:
        """Await so many results more. Nothing may be on its way yet."""
        self._reached.clear()
        self._target = self.received + count

    def wait(self, seconds: float) -> float:
        """Wait for what is expected; return when the last of it came. Raises `Missing`."""
        if not self._reached.wait(seconds):
            raise Missing(f"{self._target - self.received} of {self._target} results are missing")
        if self.refused:
            raise Missing(f"{len(self.refused)} batches were refused: {self.refused[0]!r}")
        return self.at

    def _receive(self) -> None:
        waiting = len(self._channels)
        with self._redis.pubsub() as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(*self._channels)
            while not self._stop.is_set():
                message = pubsub.get_message(timeout=0.5)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    waiting -= 1
                    if waiting == 0:
                        self._subscribed.set()
                elif message["data"] != _END:
                    self._take(message["data"])

    def _take(self, payload: bytes) -> None:
        now = time.perf_counter()
        if self._timed:
            self.times[UUID(json.loads(payload)["batch_id"])] = now
        if b'"error"' in payload:
            self.refused.append(payload)
        self.received += 1
        if self.received == self._target:
            self.at = now
            self._reached.set()
