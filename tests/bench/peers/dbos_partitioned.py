"""DBOS: workflows in PostgreSQL, on a queue with a partition for each organization.

Of a partition, one workflow runs at a time, so an organization's batches keep their order. Each
process polls the queue, and starts at most one workflow of each partition in a poll.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from dbos import DBOS, DBOSClient
from sqlalchemy import create_engine

from producers.contract.values import uuid7
from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch
from tests.bench.peers.loop import chunks
from worker.settings import driver_url

URL = os.environ["BENCH_OWNER_URL"]
QUEUE = "batches"
NAME = "bench"
VERSION = "1"


def apply(message: str, token: str, organization_id: str) -> None:
    apply_batch(message.encode(), token, UUID(organization_id))


def prepare() -> None:
    DBOS.migrate(URL)


def commands(setting: Setting) -> list[list[str]]:
    numbers = range(int(setting["processes"]))
    return [python("tests.bench.peers.dbos_partitioned", number) for number in numbers]


def work(executor_id: str) -> None:
    """Run workflows until the process is ended."""
    config: Any = {
        "name": NAME,
        "system_database_url": URL,
        "application_version": VERSION,
        "executor_id": executor_id,
        "max_executor_threads": int(os.environ["BENCH_THREADS"]),
        "run_migrations": False,
        "log_level": "WARNING",
    }
    DBOS(config=config)
    DBOS.workflow(name="apply")(apply)
    DBOS.launch()
    DBOS.register_queue(
        QUEUE, partition_concurrency=1, polling_interval_sec=float(os.environ["BENCH_POLL"])
    )
    threading.Event().wait()


class Sender:
    """`enqueue`, many in one transaction. DBOS sorts those of one millisecond by their ids."""

    def __init__(self) -> None:
        self._client = DBOSClient(system_database_url=URL)
        self._engine = create_engine(driver_url(URL))

    def send(self, items: Sequence[Item]) -> None:
        for chunk in chunks(items):
            with self._engine.begin() as connection:
                for item in chunk:
                    self._client.enqueue_in_transaction(connection, *_call(item))

    def send_one(self, item: Item) -> None:
        self._client.enqueue(*_call(item))

    def close(self) -> None:
        self._client.destroy()
        self._engine.dispose()


def _call(item: Item) -> tuple[Any, ...]:
    organization_id = str(item.organization_id)
    options = {
        "workflow_name": "apply",
        "workflow_id": str(uuid7()),
        "queue_name": QUEUE,
        "queue_partition_key": organization_id,
        "app_version": VERSION,
    }
    return options, item.batch.encode().decode(), item.token, organization_id


CONTENDER = Contender(
    name="DBOS",
    settings=[
        {"processes": 1, "threads": 8, "poll": "0.005"},
        {"processes": 2, "threads": 8, "poll": "0.01"},
    ],
    commands=commands,
    sender=Sender,
    prepare=prepare,
    queue_in_database=True,
)


if __name__ == "__main__":
    work(sys.argv[1])
