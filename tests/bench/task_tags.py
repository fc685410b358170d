"""The product as a contender: its own workers, beat, and a TagProducer for each organization.

For thousands of organizations, which would be as many connections, it enqueues as the endpoint
does: with one `Enqueuer` for all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from uuid import UUID

from producers.client import TagProducer
from producers.enqueuer import Enqueuer
from tests.bench.contenders import Contender, Item, Setting
from tests.bench.names import OURS
from worker.local.stack import BEAT, WORKER, command

CHUNK = 100
"""So many batches of an organization are enqueued before those of the next one."""
ROOM_SECONDS = 60.0
MOST_PRODUCERS = 200


def commands(setting: Setting) -> list[list[str]]:
    workers = [
        [*command(WORKER), "-n", f"worker-{number}@%h"]
        for number in range(int(setting["processes"]))
    ]
    return [*workers, command(BEAT)]


class Producers:
    """One producer for each organization, as each would have its own."""

    def __init__(self) -> None:
        self._producers: dict[UUID, TagProducer] = {}

    def send(self, items: Sequence[Item]) -> None:
        grouped: dict[UUID, list[Item]] = {}
        for item in items:
            grouped.setdefault(item.organization_id, []).append(item)
        if len(grouped) > MOST_PRODUCERS:
            self._send_on_one_connection(grouped)
            return
        producers = {id: self._producer(of_one[0]) for id, of_one in grouped.items()}
        longest = max(len(of_one) for of_one in grouped.values())
        for start in range(0, longest, CHUNK):
            for organization_id, of_one in grouped.items():
                if chunk := [item.batch for item in of_one[start : start + CHUNK]]:
                    producers[organization_id].enqueue_many(chunk, block=ROOM_SECONDS)

    def _send_on_one_connection(self, grouped: dict[UUID, list[Item]]) -> None:
        with closing(Enqueuer(os.environ["TASK_TAGS_REDIS_URL"])) as enqueuer:
            for organization_id, of_one in grouped.items():
                encoded = [item.batch.encode() for item in of_one]
                enqueuer.enqueue(organization_id, encoded, of_one[0].token)

    def send_one(self, item: Item) -> None:
        self._producer(item).enqueue(item.batch)

    def close(self) -> None:
        for producer in self._producers.values():
            producer.close()

    def _producer(self, item: Item) -> TagProducer:
        producer = self._producers.get(item.organization_id)
        if producer is None:
            producer = self._producers[item.organization_id] = TagProducer(
                redis_url=os.environ["TASK_TAGS_REDIS_URL"],
                organization_id=item.organization_id,
                token=item.token,
            )
        return producer


CONTENDER = Contender(
    name=OURS,
    settings=[{"processes": 2}, {"processes": 4}],
    commands=commands,
    sender=Producers,
    ours=True,
)
