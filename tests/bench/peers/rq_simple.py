"""RQ: a pool of SimpleWorkers, as RQ recommends for jobs of a few milliseconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rq import Queue

from producers.redis_client import open_redis
from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch
from tests.bench.peers.loop import chunks

QUEUE = "default"


def commands(setting: Setting) -> list[list[str]]:
    options = ["--num-workers", setting["processes"], "--worker-class", "rq.SimpleWorker"]
    options += ["--logging-level", "WARNING", "--url", os.environ["TASK_TAGS_REDIS_URL"]]
    return [python("rq.cli", "worker-pool", QUEUE, *options)]


class Sender:
    """`enqueue_many`, which sends jobs in one pipeline; nothing is kept of those that succeed."""

    def __init__(self) -> None:
        self._redis = open_redis(os.environ["TASK_TAGS_REDIS_URL"])
        self._queue = Queue(QUEUE, connection=self._redis)

    def send(self, items: Sequence[Item]) -> None:
        for chunk in chunks(items):
            self._queue.enqueue_many(
                [
                    Queue.prepare_data(
                        apply_batch, args=_arguments(item), result_ttl=0, description="apply"
                    )
                    for item in chunk
                ]
            )

    def send_one(self, item: Item) -> None:
        self._queue.enqueue_call(
            apply_batch, args=_arguments(item), result_ttl=0, description="apply"
        )

    def close(self) -> None:
        self._redis.close()


def _arguments(item: Item) -> tuple[Any, ...]:
    return item.batch.encode(), item.token, item.organization_id


CONTENDER = Contender(
    name="RQ",
    settings=[{"processes": 2}, {"processes": 3}],
    commands=commands,
    sender=Sender,
)
