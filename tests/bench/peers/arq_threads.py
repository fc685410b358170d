"""arq: a synchronous job in a thread pool, as in arq's documentation; several processes."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import func

from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch
from tests.bench.peers.loop import LoopSender

REDIS = RedisSettings.from_dsn(os.environ["TASK_TAGS_REDIS_URL"])
THREADS = int(os.environ.get("BENCH_THREADS", "4"))
LOGGING: dict[str, Any] = {"version": 1, "loggers": {"arq": {"level": "WARNING"}}}

if "BENCH_ARQ_WORKER" in os.environ:  # arq takes the loop that there is
    asyncio.set_event_loop(uvloop.new_event_loop())


async def apply(ctx: dict[str, Any], message: bytes, token: str, organization_id: UUID) -> None:
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(ctx["pool"], apply_batch, message, token, organization_id)


async def start(ctx: dict[str, Any]) -> None:
    ctx["pool"] = ThreadPoolExecutor(THREADS)


class WorkerSettings:
    functions = (func(apply, name="apply", keep_result=0),)
    redis_settings = REDIS
    on_startup = start
    max_jobs = THREADS
    poll_delay = float(os.environ.get("BENCH_POLL", "0.01"))
    log_results = False


def commands(setting: Setting) -> list[list[str]]:
    options = ["--custom-log-dict", "tests.bench.peers.arq_threads.LOGGING"]
    one = python("arq", "tests.bench.peers.arq_threads.WorkerSettings", *options)
    return [one] * int(setting["processes"])


class Sender(LoopSender):
    """`enqueue_job`, many at once."""

    def __init__(self) -> None:
        super().__init__()
        self._pool: Any = self._loop.run(create_pool(REDIS))

    async def _enqueue(self, item: Item) -> None:
        await self._pool.enqueue_job("apply", item.batch.encode(), item.token, item.organization_id)

    def close(self) -> None:
        self._loop.run(self._pool.aclose())
        super().close()


CONTENDER = Contender(
    name="arq",
    settings=[
        {"processes": 2, "threads": 8, "poll": "0.01"},
        {"processes": 4, "threads": 4, "poll": "0.02"},
    ],
    commands=commands,
    sender=Sender,
    environment={"BENCH_ARQ_WORKER": "1"},
)
