"""A flow runner of the harness, to be killed at any time: it journals messages, then sends them.

After a restart it sends what it can't know to be accepted once more, in order: that is always safe.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from base64 import urlsafe_b64decode as b64decode
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from producers.client import TagProducer
from producers.contract.encoding import parse_message
from producers.contract.messages import (
    ANY_METADATA,
    Condition,
    Message,
    SetTaskState,
    TagBatch,
    TagOperation,
    add,
    remove,
    set_tag,
    unless,
    when,
)
from producers.contract.values import Uuid7
from producers.errors import BatchRefused, InboxFull, ResultTimeout, Unavailable
from producers.settings import load_settings
from worker.api.writes import _batch_id
from worker.auth import Principal

UNKNOWN = UUID(int=404)
CALLS = ("enqueue", "enqueue_many", "apply")
_NO_CALL = ""


class HttpProducer:
    """Sends messages through the endpoint, each under the Idempotency-Key that gives its id."""

    def __init__(self) -> None:
        settings = load_settings()
        headers = {"Authorization": f"Bearer {settings.required_token}"}
        self._client = httpx.Client(base_url=settings.endpoint_url, headers=headers, timeout=15)

    def __enter__(self) -> HttpProducer:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def enqueue(self, message: Message) -> None:
        """Send a message until it was accepted or answered. Raises `Unavailable`."""
        self.send(message, "respond-async")

    def enqueue_many(self, messages: list[Message]) -> None:
        for number, message in enumerate(messages):
            try:
                self.enqueue(message)
            except Unavailable:
                raise InboxFull(messages[number:]) from None

    def apply(self, message: Message, timeout: float) -> None:
        self.send(message, f"wait={timeout:g}")

    def send(self, message: Message, prefer: str) -> None:
        fields = json.loads(message.encode())
        names = ("tags", "conditions", "flow_execution_id", "task_name", "state", "clear")
        body = {name: fields[name] for name in names if name in fields}
        method, path = ("PATCH", "/task-tags") if "tags" in body else ("PUT", "/task-executions")
        headers = {"Prefer": prefer, "Idempotency-Key": key_of(message)}
        try:
            response = self._client.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise Unavailable(str(error)) from error
        if response.status_code == 429 or response.status_code >= 500:
            raise Unavailable(response.text)


def key_of(message: Message) -> str:
    """Return the key under which a message is sent; its batch id is made from it."""
    assert message.reply_to is not None
    return message.reply_to


class Marked:
    """A producer that says in a file which of its calls it is inside of."""

    def __init__(self, producer: TagProducer | HttpProducer, path: Path) -> None:
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
    if choose.random() < 0.00006:  # each holds its organization up for 10 s
        return add(execution, "review", "status", "poison")
    how = choose.random()
    if how < 0.5:
        return add(*name, metadata)
    if how < 0.6:
        return set_tag(*name, metadata)
    return remove(*name, choose.choice([ANY_METADATA, metadata]))


def condition(choose: random.Random, executions: list[UUID]) -> Condition:
    tag = choose.choice([None, "a", "b"])
    named = (choose.choice(executions), choose.choice(["extract", "review"]), "status", tag)
    return when(*named) if choose.random() < 0.7 else unless(*named)


def batches(
    choose: random.Random, executions: list[UUID], count: int, caller: Principal | None
) -> list[Message]:
    """Make new messages, for HTTP if there is a caller: then the id is that of the key."""
    new_id = Uuid7()
    made: list[Message] = []
    for _ in range(count):
        batch_id, key = new_id(), "faults"
        if caller is not None:
            key = str(batch_id)
            batch_id = _batch_id(key, caller)
        made.append(message(choose, executions, batch_id, key))
    return made


def message(
    choose: random.Random, executions: list[UUID], batch_id: UUID, reply_to: str
) -> Message:
    if choose.random() < 0.1:
        return SetTaskState(
            batch_id=batch_id,
            reply_to=reply_to,
            flow_execution_id=choose.choice(executions),
            task_name=choose.choice(["extract", "review"]),
            state=choose.choice(["queued", "running", "completed", "failed"]),
            clear=choose.choice([None, None, ["status"], ["status", "none"]]),
        )
    tags = [operation(choose, executions) for _ in range(choose.choice([1, 2, 3, 10]))]
    conditions = [condition(choose, executions)] if choose.random() < 0.2 else []
    return TagBatch(batch_id=batch_id, reply_to=reply_to, tags=tags, conditions=conditions)


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
    pause = float(os.environ["FAULTS_PAUSE"])
    choose = random.Random(f"{seed}-{time.time_ns()}")
    journal = Journal(Path(journal_path))
    settings, caller = load_settings(), None
    if "FAULTS_OVER_HTTP" in os.environ:
        claims = settings.required_token.split(".")[1]
        caller = Principal.model_validate_json(b64decode(claims + "=" * (-len(claims) % 4)))
    with TagProducer() if caller is None else HttpProducer() as opened:
        producer = Marked(opened, call_file(Path(journal_path)))
        unsettled = list(journal.open.values())
        insist(producer, unsettled)
        journal.accept(unsettled)
        while True:
            how = choose.random()
            if how < 0.15 and journal.known:
                insist(producer, [choose.choice(journal.known[-200:])])  # the same batch again
                continue
            fresh = batches(choose, executions, choose.choice([1, 1, 5, 20]), caller)
            journal.intend(fresh)
            if how < 0.3:
                apply(producer, fresh[0])
                insist(producer, fresh[1:])
            else:
                insist(producer, fresh)
            journal.accept(fresh)
            time.sleep(choose.random() * pause)


if __name__ == "__main__":
    main()
