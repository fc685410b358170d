"""Plain Celery on Redis: one message a batch, no result backend, acknowledged early."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from celery import Celery

from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch


def apply(message: str, token: str, organization_id: str) -> None:
    apply_batch(message.encode(), token, UUID(organization_id))


def make_app() -> Any:
    url = os.environ["TASK_TAGS_REDIS_URL"].replace("unix://", "redis+socket://")
    app = Celery("bench", broker=url.replace("db=", "virtual_host="), set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "4")),
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"priority_steps": [0]},  # one BRPOP key, not four
    )

    app.task(name="apply", shared=False)(apply)
    return app


app = make_app()


def commands(setting: Setting) -> list[list[str]]:
    options = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING"]
    return [
        python(
            "celery",
            *("-A", "tests.bench.peers.plain_celery", "worker", "-n", f"peer-{node}@%h"),
            *("-P", setting["pool"], "-c", setting["concurrency"], *options),
        )
        for node in range(int(setting["nodes"]))
    ]


class Sender:
    """`apply_async` with one producer of the pool: Celery has no call for many."""

    def __init__(self) -> None:
        self._app = make_app()
        self._task = self._app.tasks["apply"]

    def send(self, items: Sequence[Item]) -> None:
        with self._app.producer_pool.acquire(block=True) as producer:
            for item in items:
                self._task.apply_async(args=_arguments(item), producer=producer)

    def send_one(self, item: Item) -> None:
        self._task.apply_async(args=_arguments(item))

    def close(self) -> None:
        self._app.close()


def _arguments(item: Item) -> tuple[str, str, str]:
    return item.batch.encode().decode(), item.token, str(item.organization_id)


CONTENDER = Contender(
    name="Celery",
    settings=[
        {"nodes": 1, "pool": "prefork", "concurrency": 4, "prefetch": 16},
        {"nodes": 2, "pool": "threads", "concurrency": 4, "prefetch": 4},
    ],
    commands=commands,
    sender=Sender,
)
