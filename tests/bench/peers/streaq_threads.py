"""streaq: a synchronous task in a thread of a worker; several processes; no results kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from streaq import Worker

from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch
from tests.bench.peers.loop import LoopSender, chunks


def apply(message: bytes, token: str, organization_id: UUID) -> None:
    apply_batch(message, token, organization_id)


def make_worker() -> tuple[Any, Any]:
    threads = int(os.environ.get("BENCH_THREADS", "4"))
    made: Any = Worker(
        redis_url=os.environ["TASK_TAGS_REDIS_URL"],
        concurrency=threads,
        prefetch=int(os.environ.get("BENCH_PREFETCH", threads)),
        anyio_kwargs={"use_uvloop": True},
    )
    return made, made.task(name="apply", ttl=0, silent=True)(apply)


worker, task = make_worker()


def commands(setting: Setting) -> list[list[str]]:
    one = python("streaq", "run", "tests.bench.peers.streaq_threads:worker")
    return [one] * int(setting["processes"])


class Sender(LoopSender):
    """`enqueue_many`, which sends tasks in one pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self._worker, self._task = make_worker()
        self._loop.hold(self._worker)

    async def _send(self, items: Sequence[Item]) -> None:
        for chunk in chunks(items):
            await self._worker.enqueue_many([self._made(item) for item in chunk])

    async def _enqueue(self, item: Item) -> None:
        await self._made(item)

    def _made(self, item: Item) -> Any:
        return self._task.enqueue(item.batch.encode(), item.token, item.organization_id)


CONTENDER = Contender(
    name="streaq",
    settings=[
        {"processes": 2, "threads": 4, "prefetch": 4},
        {"processes": 2, "threads": 8, "prefetch": 8},
    ],
    commands=commands,
    sender=Sender,
)
