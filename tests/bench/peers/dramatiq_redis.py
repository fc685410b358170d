"""Dramatiq on Redis: an actor, processes of several threads, the broker's default middleware."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import apply_batch


def apply(message: str, token: str, organization_id: str) -> None:
    apply_batch(message.encode(), token, UUID(organization_id))


def make_actor() -> Any:
    make_broker: Any = RedisBroker
    broker = make_broker(url=os.environ["TASK_TAGS_REDIS_URL"])
    return dramatiq.actor(broker=broker, actor_name="apply")(apply)


actor = make_actor()
broker = actor.broker


def commands(setting: Setting) -> list[list[str]]:
    options = ["--processes", setting["processes"], "--threads", setting["threads"]]
    return [
        python("dramatiq", "tests.bench.peers.dramatiq_redis:broker", *options, "--skip-logging")
    ]


class Sender:
    """`send`: Dramatiq has no call for many."""

    def __init__(self) -> None:
        self._actor = make_actor()

    def send(self, items: Sequence[Item]) -> None:
        for item in items:
            self.send_one(item)

    def send_one(self, item: Item) -> None:
        self._actor.send(item.batch.encode().decode(), item.token, str(item.organization_id))

    def close(self) -> None:
        self._actor.broker.close()


CONTENDER = Contender(
    name="Dramatiq",
    settings=[
        {"processes": 2, "threads": 4},
        {"processes": 2, "threads": 8},
    ],
    commands=commands,
    sender=Sender,
    environment={
        "dramatiq_worker_timeout": "20"
    },  # ms: the longest pause between looks at the queue
)
