"""Procrastinate: jobs in PostgreSQL with LISTEN; a synchronous task in a thread of a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import procrastinate

from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch
from tests.bench.peers.loop import chunks


def apply(message: str, token: str, organization_id: str) -> None:
    apply_batch(message.encode(), token, UUID(organization_id))


def make_app(connector: Any) -> Any:
    made: Any = procrastinate.App(connector=connector)
    made.task(name="apply", queue="apply")(apply)
    return made


def _sync_app() -> Any:
    return make_app(procrastinate.SyncPsycopgConnector(conninfo=os.environ["BENCH_OWNER_URL"]))


app = make_app(procrastinate.PsycopgConnector(conninfo=os.environ["BENCH_OWNER_URL"]))


def prepare() -> None:
    with _sync_app().open() as opened:
        opened.schema_manager.apply_schema()


def commands(setting: Setting) -> list[list[str]]:
    options = ["--concurrency", setting["concurrency"], "--delete-jobs", "successful"]
    one = python("procrastinate", "--app", "tests.bench.peers.procrastinate_threads.app", "worker")
    return [[*one, *(str(option) for option in options)]] * int(setting["processes"])


class Sender:
    """`batch_defer`, which inserts jobs with one statement."""

    def __init__(self) -> None:
        self._app = _sync_app()
        self._app.open()
        self._task = self._app.tasks["apply"]

    def send(self, items: Sequence[Item]) -> None:
        for chunk in chunks(items):
            self._task.batch_defer(*(_arguments(item) for item in chunk))

    def send_one(self, item: Item) -> None:
        self._task.defer(**_arguments(item))

    def close(self) -> None:
        self._app.close()


def _arguments(item: Item) -> dict[str, str]:
    return {
        "message": item.batch.encode().decode(),
        "token": item.token,
        "organization_id": str(item.organization_id),
    }


CONTENDER = Contender(
    name="Procrastinate",
    settings=[
        {"processes": 2, "concurrency": 4},
        {"processes": 2, "concurrency": 6},
    ],
    commands=commands,
    sender=Sender,
    prepare=prepare,
    queue_in_database=True,
)
