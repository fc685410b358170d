"""A flow runner of the harness, to be killed at any time: it journals what it means to send, then sends it.

After a restart it sends what it can't know to be accepted once more, in order: that is always safe.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from producers.client import TagProducer
from producers.errors import BatchRefused, InboxFull, NoResult, Unavailable
from producers.messages import (
    ANY_METADATA,
    Message,
    TagBatch,
    TagOperation,
    Uuid7,
    add,
    parse_message,
    remove,
)

UNKNOWN = UUID(int=404)


class Journal:
    """One line for each batch before it is sent, and one when it is known to be accepted."""

    def __init__(self, path: Path) -> None:
        self.open: dict[str, Message] = {}
        self.known: list[Message] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off when its writer was killed; what it says was not done yet
            if "accepted" in entry:
                for batch_id in entry["accepted"]:
                    self.open.pop(batch_id, None)
            else:
                message = parse_message(json.dumps(entry).encode())
                self.open[str(message.batch_id)] = message
                self.known.append(message)
        self._file = path.open("a")
        self._file.write("\n")

    def intend(self, messages: list[Message]) -> None:
        for message in messages:
            self._file.write(message.encode().decode() + "\n")
            self.known.append(message)
        self._file.flush()

    def accept(self, messages: list[Message]) -> None:
        accepted = [str(message.batch_id) for message in messages]
        self._file.write(json.dumps({"accepted": accepted}) + "\n")
        self._file.flush()


def operation(choose: random.Random, executions: list[UUID]) -> TagOperation:
    execution = UNKNOWN if choose.random() < 0.002 else choose.choice(executions)
    name = (execution, choose.choice(["extract", "review"]), "status", choose.choice("abcdef"))
    metadata: Any = choose.choice([None, None, 1, {"by": "ada"}])
    if choose.random() < 0.002:
        return add(execution, "review", "status", "poison")
    if choose.random() < 0.55:
        return add(*name, metadata)
    return remove(*name, choose.choice([ANY_METADATA, metadata]))


def batches(choose: random.Random, executions: list[UUID], count: int) -> list[Message]:
    new_id = Uuid7()
    return [
        TagBatch(
            batch_id=new_id(),
            reply_to="faults",
            tags=[operation(choose, executions) for _ in range(choose.choice([1, 2, 3, 10]))],
        )
        for _ in range(count)
    ]


def insist(producer: TagProducer, messages: list[Message]) -> None:
    """Enqueue until all are accepted. What may have been accepted before only comes again."""
    while messages:
        try:
            producer.enqueue_many(messages)
        except InboxFull as full:
            messages = full.unsent
            time.sleep(0.1)
        except Unavailable:
            time.sleep(0.1)
        else:
            return


def main() -> None:
    journal_path, seed, *ids = sys.argv[1:]
    executions = [UUID(each) for each in ids]
    choose = random.Random(f"{seed}-{time.time_ns()}")
    journal = Journal(Path(journal_path))
    with TagProducer() as producer:
        unsettled = list(journal.open.values())
        insist(producer, unsettled)
        journal.accept(unsettled)
        while True:
            how = choose.random()
            if how < 0.15 and journal.known:
                insist(producer, [choose.choice(journal.known[-200:])])  # the same batch again
                continue
            fresh = batches(choose, executions, choose.choice([1, 1, 5, 20]))
            journal.intend(fresh)
            if how < 0.3:
                fresh_one = fresh[:1]
                try:
                    producer.apply(fresh_one[0], timeout=5)
                except (BatchRefused, NoResult, Unavailable, InboxFull):
                    insist(producer, fresh_one)
                insist(producer, fresh[1:])
            else:
                insist(producer, fresh)
            journal.accept(fresh)
            time.sleep(choose.random() * 0.1)


if __name__ == "__main__":
    main()
