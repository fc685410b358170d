"""The demonstration: sends a sample flow through the queue, prints and checks what comes back.

Each run replaces the ids of the sample's executions and batches, so that it can be repeated.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4, uuid5

import httpx
from rich.console import Console

from producers.cli import change_lines, result_line, tag_table
from producers.client import TagProducer
from producers.contract.channels import changes_channel, results_channel
from producers.contract.results import Change, ChangeEvent, ResultRecord
from producers.pubsub import Listener, LoopThread, PubSubMultiplexer
from producers.redis_client import open_async_redis
from worker.local.supervisor import StartupError

WAIT_SECONDS: Final = 30.0

Published = ResultRecord | ChangeEvent
Events = dict[tuple[UUID, int], ChangeEvent]
"""Change events by execution and revision: one that is published twice counts once."""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The outcome of a run.

    Args:
        summary: The last line to print.
        differences: Everything that is not as expected.
        execution: A flow execution of the run, to look at.
    """

    summary: str
    differences: list[str]
    execution: UUID


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=140)


@dataclass
class Demo:
    """A sample: the messages to send, and the expected outcome of each."""

    messages: list[dict[str, Any]]
    expected: list[Any]
    console: Console = field(default_factory=_console)

    @classmethod
    def load(cls, file: Path) -> Demo:
        """Read NAME.jsonl and NAME.expected.jsonl, a line per message. Raises `StartupError`."""
        try:
            messages, expected = (
                [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                for path in (file, file.with_suffix(".expected.jsonl"))
            )
        except (OSError, ValueError) as error:
            raise StartupError(f"the sample can't be read: {error}") from None
        if len(messages) != len(expected):
            raise StartupError(
                f"the sample has {len(messages)} messages, but {len(expected)} results"
            )
        return cls(messages, expected)

    def run(
        self, redis_url: str, endpoint_url: str, organization_id: UUID, token: str
    ) -> DemoReport:
        """Send the sample, print results and changes as they arrive, and compare them."""
        run = uuid4()
        messages = [_renamed(message, run) for message in self.messages]
        executions = list(dict.fromkeys(_executions(messages)))
        channels = [
            results_channel(organization_id, str(run)),
            *(changes_channel(organization_id, execution) for execution in executions),
        ]
        records: list[ResultRecord] = []
        events: Events = {}
        with _collect(redis_url, channels) as received:
            with TagProducer(
                redis_url=redis_url, organization_id=organization_id, token=token
            ) as producer:
                producer.send([json.dumps({**m, "reply_to": str(run)}).encode() for m in messages])
            self._follow(received, records, events)
            tags, revisions = self._read(endpoint_url, token, executions)
            while len(events) < sum(revisions.values()) and (late := _next(received, 5)):
                self._show(late, records, events)
        operations = sum(len(message.get("tags", [])) for message in messages)
        return DemoReport(
            f"demo: {len(messages)} batches, {operations} operations, {len(records)} results, "
            f"{len(events)} change events, {len(tags)} active tags",
            [*self._compare(messages, records), *_compare_replay(events, tags)],
            executions[0],
        )

    def _follow(
        self,
        received: queue.Queue[Published],
        records: list[ResultRecord],
        events: Events,
    ) -> None:
        """Print what arrives until every message has a result, or nothing arrives for 30 s."""
        started = time.monotonic()
        while len(records) < len(self.messages) and (each := _next(received, WAIT_SECONDS)):
            if not records and isinstance(each, ResultRecord):
                self.console.print(f"\nfirst result after {time.monotonic() - started:.3f} s\n")
            self._show(each, records, events)

    def _show(self, each: Published, records: list[ResultRecord], events: Events) -> None:
        if isinstance(each, ResultRecord):
            records.append(each)
            self.console.print(f"result  {result_line(each)}")
        else:
            events[each.flow_execution_id, each.revision] = each
            for line in change_lines(each).splitlines():
                self.console.print(f"change  {line}")

    def _read(
        self, endpoint_url: str, token: str, executions: list[UUID]
    ) -> tuple[list[dict[str, Any]], dict[UUID, int]]:
        """Read the active tags of each execution over HTTP, and print them.

        Returns:
            The tags, and the revision of each execution that is registered.
        """
        tags: list[dict[str, Any]] = []
        revisions = {}
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(
            base_url=endpoint_url, headers=headers, timeout=10, trust_env=False
        ) as client:
            for execution in executions:
                response = client.get("/task-tags", params={"flow_execution_id": str(execution)})
                if response.status_code != 200:
                    continue  # the sample uses an execution that is not registered
                revisions[execution] = int(response.headers["etag"].strip('"'))
                self.console.print(f"\ntags of {execution}, revision {revisions[execution]}")
                self.console.print(tag_table(response.json()))
                tags += response.json()
        self.console.print()
        return tags, revisions

    def _compare(
        self, messages: list[dict[str, Any]], records: list[ResultRecord]
    ) -> Iterator[str]:
        if len(records) != len(messages):
            yield f"{len(messages)} batches, but {len(records)} results"
        for message, record, expected in zip(messages, records, self.expected, strict=False):
            if str(record.batch_id) != message["batch_id"]:
                yield f"batch {message['batch_id']} was answered out of order"
            elif _outcome(record) != expected:
                yield f"batch {record.batch_id}: {_outcome(record)} instead of {expected}"


def _outcome(record: ResultRecord) -> Any:
    if record.error is not None:
        return {"error": record.error.code}
    return record.statuses


def _compare_replay(events: Events, tags: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a difference if replaying the change events does not give the tags that were read."""
    replayed = {}
    for _, event in sorted(events.items()):
        for change in event.changes:
            if isinstance(change, Change) and change.change == "added":
                replayed[change.tag.id] = change.tag
            elif isinstance(change, Change):
                replayed.pop(change.tag.id, None)
    if {str(id) for id in replayed} != {tag["id"] for tag in tags}:
        yield "the change events do not add up to the tags that were read"


def _renamed(message: dict[str, Any], run: UUID) -> dict[str, Any]:
    """Return the message with this run's ids instead of the sample's."""

    def rename(value: Any) -> Any:
        if isinstance(value, list):
            return [rename(item) for item in value]
        if isinstance(value, dict):
            return {
                key: str(uuid5(run, item))
                if key in ("batch_id", "flow_execution_id")
                else rename(item)
                for key, item in value.items()
            }
        return value

    renamed: dict[str, Any] = rename(message)
    return renamed


def _executions(messages: list[dict[str, Any]]) -> Iterator[UUID]:
    for message in messages:
        for part in (message, *message.get("tags", [])):
            if "flow_execution_id" in part:
                yield UUID(part["flow_execution_id"])


def _next(received: queue.Queue[Published], seconds: float) -> Published | None:
    try:
        return received.get(timeout=seconds)
    except queue.Empty:
        return None


class _Collector(Listener):
    """Puts what is published on one channel into the common queue."""

    def __init__(self, received: queue.Queue[Published]) -> None:
        self.subscribed = threading.Event()
        self._received = received

    def on_subscribed(self) -> None:
        self.subscribed.set()

    def on_event(self, payload: bytes) -> None:
        model = ChangeEvent if b'"changes":' in payload else ResultRecord
        self._received.put(model.decode(payload))


@contextmanager
def _collect(redis_url: str, channels: list[str]) -> Iterator[queue.Queue[Published]]:
    """Collect what is published on the channels, in the order of publication."""
    received: queue.Queue[Published] = queue.Queue()
    collectors = [_Collector(received) for _ in channels]

    async def collect() -> None:
        async with open_async_redis(redis_url) as redis:
            pubsub = PubSubMultiplexer(redis)
            with ExitStack() as stack:
                for channel, collector in zip(channels, collectors, strict=True):
                    stack.enter_context(pubsub.listening(channel, collector))
                await pubsub.run()

    thread = LoopThread("demo")
    thread.submit(collect())
    try:
        if not all(collector.subscribed.wait(10) for collector in collectors):
            raise StartupError("Redis does not answer")
        yield received
    finally:
        thread.close()
