"""The rival that groups: what a user would write who wants speed, in one file and without a queue.

All organizations share one Redis stream. Processes of a consumer group take up to 100 entries, and
apply those of each organization in one transaction. An organization's batches keep their order
within a take; with several processes, a take may overtake the one before.

Rules and SQL are the product's of one day, frozen (tests/bench/rival/__init__.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
from redis import Redis
from redis.exceptions import ResponseError

from producers.contract.channels import changes_channel, results_channel
from producers.redis_client import open_redis
from tests.bench import collector
from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.names import RIVAL
from tests.bench.peers.loop import chunks
from tests.bench.rival.admission import Admission, Refused
from tests.bench.rival.repository import Repository
from tests.bench.rival.snapshot import AuthorizedMessage
from worker.auth import Authorizer
from worker.settings import load_settings

STREAM = "batches"
GROUP = "workers"
TAKE = 100
BLOCK_MS = 2000
RETRY_SECONDS = 0.05


class Worker:
    """One process of the consumer group."""

    def __init__(self, name: str) -> None:
        settings = load_settings()
        self.name = name
        self.redis = open_redis(settings.redis_url.get_secret_value())
        self.repository = Repository(settings.database_url.get_secret_value())
        self.admission = Admission(Authorizer(settings))

    def run(self) -> None:
        with suppress(ResponseError):  # the group exists
            self.redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        after = "0"  # first what this process took and did not finish
        while True:
            taken: Any = self.redis.xreadgroup(
                GROUP, self.name, {STREAM: after}, count=TAKE, block=BLOCK_MS
            )
            entries = taken[0][1] if taken else []
            if entries:
                self.process(entries)
            else:
                after = ">"

    def process(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        """Apply a take, one organization after the other, publish and remove it."""
        replies = self.redis.pipeline(transaction=False)
        groups: dict[UUID, list[AuthorizedMessage]] = {}
        for _, fields in entries:
            organization_id = UUID(bytes=fields[b"organization"])
            found = self.admission.admit(organization_id, fields[b"message"], fields[b"token"])
            if isinstance(found, Refused):
                replies.publish(results_channel(organization_id, found.reply_to), found.record)
            elif found is not None:
                groups.setdefault(organization_id, []).append(found)
        for organization_id, messages in groups.items():
            while messages:  # a transaction may end before what would make it too large
                messages = messages[self.apply(replies, organization_id, messages) :]
        ids = [id for id, _ in entries]
        replies.xack(STREAM, GROUP, *ids)
        replies.xdel(STREAM, *ids)
        replies.execute()

    def apply(
        self, replies: Redis, organization_id: UUID, messages: Sequence[AuthorizedMessage]
    ) -> int:
        """Apply batches in one transaction; return how many were applied, the first ones."""
        while True:
            try:
                decision = self.repository.apply(organization_id, messages)
                break
            except psycopg.OperationalError:  # a lost connection: again, on another one
                time.sleep(RETRY_SECONDS)
        for (message, *_), (record, events) in zip(messages, decision.outcomes, strict=False):
            for flow_execution_id, event in events:
                replies.publish(changes_channel(organization_id, flow_execution_id), event)
            replies.publish(results_channel(organization_id, message.reply_channel_name), record)
        return len(decision.outcomes)


def commands(setting: Setting) -> list[list[str]]:
    numbers = range(int(setting["processes"]))
    return [python("tests.bench.peers.grouping_stream", number) for number in numbers]


class Sender:
    """`XADD`, many in one pipeline."""

    def __init__(self) -> None:
        self._redis = open_redis(os.environ["TASK_TAGS_REDIS_URL"])

    def send(self, items: Sequence[Item]) -> None:
        for chunk in chunks(items):
            pipeline = self._redis.pipeline(transaction=False)
            for item in chunk:
                _add(pipeline, item)
            pipeline.execute()

    def send_one(self, item: Item) -> None:
        _add(self._redis, item)

    def close(self) -> None:
        self._redis.close()


def _add(redis: Redis, item: Item) -> None:
    organization = item.organization_id.bytes
    message = item.batch.encode()
    redis.xadd(STREAM, {"organization": organization, "message": message, "token": item.token})


CONTENDER = Contender(
    name=RIVAL,
    settings=[{"processes": 2}, {"processes": 1}, {"processes": 4}],
    commands=commands,
    sender=Sender,
    groups=True,
)


if __name__ == "__main__":
    worker = Worker(sys.argv[1])
    collector.freeze()
    worker.run()
