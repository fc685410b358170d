"""The demonstration: sends a sample flow through the queue, prints and checks what comes back.

Each run replaces the ids of the sample's executions and batches, so that it can be repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4, uuid5

import httpx
from redis.client import PubSub
from rich.console import Console

from producers.client import TagProducer
from producers.console import change_lines, result_line, tag_table, task_table
from producers.contract.channels import changes_channel, results_channel
from producers.contract.cursors import Cursor
from producers.contract.results import Change, ChangeEvent, ResultRecord
from producers.endpoint import client_options
from producers.redis_client import open_redis
from producers.subscriber import Subscriber
from producers.tag_reader import TagReader
from worker.local.supervisor import StartupError

WAIT_SECONDS: Final = 30.0

_console: Final = Console(highlight=False, soft_wrap=True)


def _review(redis_url: str, endpoint_url: str, organization_id: UUID, token: str) -> None:
    """Print a work list of two tasks, and let a run wait for the reviewer of one of them."""
    execution, pending = uuid4(), ("review_status", "pending")
    with (
        TagProducer(redis_url=redis_url, organization_id=organization_id, token=token) as producer,
        Subscriber(
            redis_url=redis_url,
            organization_id=organization_id,
            endpoint_url=endpoint_url,
            token=token,
        ) as subscriber,
        TagReader(endpoint_url=endpoint_url, token=token) as reader,
        ThreadPoolExecutor(1) as threads,
    ):
        producer.register(execution, flow_id="invoices")
        for task_name in ("extract_data", "approve"):
            producer.batch().add(execution, task_name, *pending).apply()
        _console.print("work list: review_status: pending, the longest waiting first")
        _console.print(task_table(list(reader.work_list([pending], flow_execution_id=execution))))
        named = execution, "approve", "review_status"
        waiting = threads.submit(subscriber.wait_for, *named, "approved", WAIT_SECONDS)
        decide = producer.batch().when(*named, "pending").set(*named, "approved")
        decide.apply()
        tag = waiting.result()
        _console.print(f"\nwait: {tag.task_name} was {tag.tag} by {tag.created_by}\n")


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The outcome of a run.

    Args:
        summary: The last line to print.
        differences: Everything that is not as expected.
        execution: A flow execution of the run, to look at.
        task_name: One of its tasks.
    """

    summary: str
    differences: list[str]
    execution: UUID
    task_name: str


@dataclass
class Demo:
    """A sample: the messages to send, the expected outcome of each, and what was received."""

    run_id: UUID
    messages: list[dict[str, Any]]
    expected: list[Any]
    records: list[ResultRecord] = field(default_factory=list)
    events: dict[tuple[UUID, int], ChangeEvent] = field(default_factory=dict)
    """Change events by execution and revision: one that is published twice counts once."""

    @classmethod
    def load(cls, file: Path) -> Demo:
        """Read NAME.jsonl and NAME.expected.jsonl, a line per message. Raises `StartupError`."""
        run_id = uuid4()

        def rename(fields: dict[str, Any]) -> dict[str, Any]:
            """Replace the sample's ids with this run's."""
            ids = fields.keys() & {"batch_id", "flow_execution_id"}
            return fields | {name: str(uuid5(run_id, fields[name])) for name in ids}

        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            messages = [json.loads(line, object_hook=rename) for line in lines]
            lines = file.with_suffix(".expected.jsonl").read_text(encoding="utf-8").splitlines()
            expected = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise StartupError(f"the sample can't be read: {error}") from None
        if len(messages) != len(expected):
            raise StartupError(
                f"the sample has {len(messages)} messages, but {len(expected)} results"
            )
        return cls(run_id, messages, expected)

    def run(
        self, redis_url: str, endpoint_url: str, organization_id: UUID, token: str
    ) -> DemoReport:
        """Send the sample, print results and changes as they arrive, and compare them."""
        executions = list(dict.fromkeys(self._executions()))
        channels = [
            results_channel(organization_id, str(self.run_id)),
            *(changes_channel(organization_id, execution) for execution in executions),
        ]
        encoded = [json.dumps({**m, "reply_to": str(self.run_id)}).encode() for m in self.messages]
        # No health check: its answer would look like the end of a wait.
        with open_redis(redis_url, health_check_interval=0) as redis, redis.pubsub() as pubsub:
            pubsub.subscribe(*channels)
            if not all(pubsub.get_message(timeout=10) for _ in channels):
                raise StartupError("Redis does not answer")
            with TagProducer(
                redis_url=redis_url, organization_id=organization_id, token=token
            ) as producer:
                producer.send(encoded)
            started = time.monotonic()
            while len(self.records) < len(self.messages) and self._receive(pubsub, started):
                pass
            tags, last_revisions = self._read(endpoint_url, token, executions)
            while len(self.events) < last_revisions and self._receive(pubsub, started, 5):
                pass
        _review(redis_url, endpoint_url, organization_id, token)
        operations = sum(len(message.get("tags", [])) for message in self.messages)
        return DemoReport(
            f"demo: {len(self.messages)} batches, {operations} operations, {len(self.records)} "
            f"results, {len(self.events)} change events, {len(tags)} active tags",
            [*self._compare_results(), *self._compare_replay(tags)],
            executions[0],
            next(self._task_names(executions[0]), "review"),
        )

    def _task_names(self, execution: UUID) -> Iterator[str]:
        for message in self.messages:
            for operation in message.get("tags", []):
                if operation.get("flow_execution_id") == str(execution):
                    yield operation["task_name"]

    def _executions(self) -> Iterator[UUID]:
        for message in self.messages:
            for part in (message, *message.get("tags", [])):
                if "flow_execution_id" in part:
                    yield UUID(part["flow_execution_id"])

    def _receive(self, pubsub: PubSub, started: float, seconds: float = WAIT_SECONDS) -> bool:
        """Print the next result or change. Return False if there is none in so many seconds."""
        received = pubsub.get_message(timeout=seconds)
        if received is None:
            return False
        payload: bytes = received["data"]
        if b'"changes":' in payload:
            event = ChangeEvent.decode(payload)
            self.events[event.flow_execution_id, event.revision] = event
            for line in change_lines(event).splitlines():
                _console.print(f"change  {line}")
        else:
            if not self.records:
                _console.print(f"\nfirst result after {time.monotonic() - started:.3f} s\n")
            self.records.append(ResultRecord.decode(payload))
            _console.print(f"result  {result_line(self.records[-1])}")
        return True

    def _read(
        self, endpoint_url: str, token: str, executions: list[UUID]
    ) -> tuple[list[dict[str, Any]], int]:
        """Read the active tags of each execution over HTTP, and print them.

        Returns:
            The tags, and the sum of the executions' revisions: so many changes were published.
        """
        tags: list[dict[str, Any]] = []
        revisions = 0
        with httpx.Client(**client_options(endpoint_url, lambda: token)) as client:
            for execution in executions:
                response = client.get("/task-tags", params={"flow_execution_id": str(execution)})
                if response.status_code != 200:
                    continue  # the sample uses an execution that is not registered
                revision = Cursor.parse(response.headers["etag"].strip('"')).number
                _console.print(f"\ntags of {execution}, revision {revision}")
                _console.print(tag_table(response.json()))
                tags += response.json()
                revisions += revision
        _console.print()
        return tags, revisions

    def _compare_results(self) -> Iterator[str]:
        if len(self.records) != len(self.messages):
            yield f"{len(self.messages)} batches, but {len(self.records)} results"
        for message, record, expected in zip(
            self.messages, self.records, self.expected, strict=False
        ):
            outcome = record.statuses if record.error is None else {"error": record.error.code}
            if str(record.batch_id) != message["batch_id"]:
                yield f"batch {message['batch_id']} was answered out of order"
            elif outcome != expected:
                yield f"batch {record.batch_id}: {outcome} instead of {expected}"

    def _compare_replay(self, tags: list[dict[str, Any]]) -> Iterator[str]:
        """Yield a difference if replaying the change events does not give the tags read."""
        replayed = set()
        for _, event in sorted(self.events.items()):
            for change in event.changes:
                if isinstance(change, Change) and change.change == "added":
                    replayed.add(str(change.tag.id))
                elif isinstance(change, Change):
                    replayed.discard(str(change.tag.id))
        if replayed != {tag["id"] for tag in tags}:
            yield "the tags that result from the change events differ from the tags that were read"
