"""taskiq on a Redis stream: a synchronous task in a receiver's thread pool; uvloop."""

from __future__ import annotations

import os
from typing import Any
from uuid import UUID

from taskiq_redis import RedisStreamBroker

from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch
from tests.bench.peers.loop import LoopSender


def apply(message: str, token: str, organization_id: str) -> None:
    apply_batch(message.encode(), token, UUID(organization_id))


def make_broker() -> Any:
    fetched = int(os.environ.get("BENCH_FETCH", "100"))
    made: Any = RedisStreamBroker(url=os.environ["TASK_TAGS_REDIS_URL"], xread_count=fetched)
    made.register_task(apply, task_name="apply")
    return made


broker = make_broker()


def commands(setting: Setting) -> list[list[str]]:
    options = ["--workers", setting["processes"], "--max-threadpool-threads", setting["threads"]]
    options += ["--max-async-tasks", int(setting["threads"]) * 2, "--log-level", "WARNING"]
    return [python("taskiq", "worker", "tests.bench.peers.taskiq_stream:broker", *options)]


class Sender(LoopSender):
    """`kiq`, many at once."""

    def __init__(self) -> None:
        super().__init__()
        self._broker = make_broker()
        self._loop.run(self._broker.startup())
        self._task = self._broker.find_task("apply")

    async def _enqueue(self, item: Item) -> None:
        await self._task.kiq(item.batch.encode().decode(), item.token, str(item.organization_id))

    def close(self) -> None:
        self._loop.run(self._broker.shutdown())
        super().close()


CONTENDER = Contender(
    name="taskiq",
    settings=[
        {"processes": 2, "threads": 8, "fetch": 100},
        {"processes": 4, "threads": 4, "fetch": 100},
    ],
    commands=commands,
    sender=Sender,
)
