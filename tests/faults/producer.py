"""A flow runner of the harness, to be killed at any time: it journals messages, then sends them.

After a restart it sends what it can't know to be accepted once more, in order: that is always safe.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from producers.client import TagProducer
from producers.contract.encoding import parse_message
from producers.contract.messages import (
    ANY_METADATA,
    Message,
    SetTaskState,
    TagBatch,
    TagOperation,
    add,
    remove,
)
from producers.contract.values import Uuid7
from producers.errors import BatchRefused, InboxFull, ResultTimeout, Unavailable

UNKNOWN = UUID(int=404)
CALLS = ("enqueue", "enqueue_many", "apply")
_NO_CALL = ""


class Marked:
    """A producer that says in a file which of its calls it is inside of."""

    def __init__(self, producer: TagProducer, path: Path) -> None:
        self._producer = producer
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._mark(_NO_CALL)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        self._mark(name)
        try:
            return getattr(self._producer, name)(*arguments, **options)
        finally:
            self._mark(_NO_CALL)

    def _mark(self, name: str) -> None:
        os.pwrite(self._file, name.ljust(16).encode(), 0)


def call_file(journal: Path) -> Path:
    """Return where the flow runner that writes this journal says what it is doing."""
    return journal.with_suffix(".call")


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
    if choose.random() < 0.0003:  # each holds its organization up for 10 s
        return add(execution, "review", "status", "poison")
    if choose.random() < 0.55:
        return add(*name, metadata)
    return remove(*name, choose.choice([ANY_METADATA, metadata]))


def batches(choose: random.Random, executions: list[UUID], count: int) -> list[Message]:
    new_id = Uuid7()
    return [message(choose, executions, new_id()) for _ in range(count)]


def message(choose: random.Random, executions: list[UUID], batch_id: UUID) -> Message:
    if choose.random() < 0.1:
        return SetTaskState(
            batch_id=batch_id,
            reply_to="faults",
            flow_execution_id=choose.choice(executions),
            task_name=choose.choice(["extract", "review"]),
            state=choose.choice(["queued", "running", "completed", "failed"]),
        )
    tags = [operation(choose, executions) for _ in range(choose.choice([1, 2, 3, 10]))]
    return TagBatch(batch_id=batch_id, reply_to="faults", tags=tags)


def insist(producer: Marked, messages: list[Message]) -> None:
    """Enqueue until all are accepted. What may have been accepted before only comes again."""
    while messages:
        try:
            if len(messages) == 1:
                producer.call("enqueue", messages[0])
            else:
                producer.call("enqueue_many", messages)
        except InboxFull as full:
            messages = full.unsent
            time.sleep(0.1)
        except Unavailable:
            time.sleep(0.1)
        else:
            return


def apply(producer: Marked, message: Message) -> None:
    try:
        producer.call("apply", message, timeout=5)
    except (BatchRefused, ResultTimeout, Unavailable, InboxFull):
        insist(producer, [message])


def main() -> None:
    journal_path, seed, *ids = sys.argv[1:]
    executions = [UUID(each) for each in ids]
    choose = random.Random(f"{seed}-{time.time_ns()}")
    journal = Journal(Path(journal_path))
    with TagProducer() as opened:
        producer = Marked(opened, call_file(Path(journal_path)))
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
                apply(producer, fresh[0])
                insist(producer, fresh[1:])
            else:
                insist(producer, fresh)
            journal.accept(fresh)
            time.sleep(choose.random() * 0.1)


if __name__ == "__main__":
    main()
