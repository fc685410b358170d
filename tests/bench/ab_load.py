"""The load generator of `make ab`: runs with the modules of one version and drives its stack.

It relies on what every version has: `producers.client.TagProducer`, the JSON of messages, and the
channels of results. Standard input has a line of JSON for each request: first the arguments of
`Generator`, then names of its methods with their arguments. Standard output gets a figure for each.
"""

from __future__ import annotations

import json
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final
from uuid import UUID, uuid4

from redis import Redis

from producers.client import TagProducer

REPLY_TO: Final = "ab"
CHUNK: Final = 100
"""So many batches of an organization are enqueued before those of the next one."""
EXECUTIONS: Final = 5
"""Flow executions of each organization in one load."""
RESULT_SECONDS: Final = 30.0

Messages = list[tuple[str, bytes]]
"""Organizations, and a message of each."""


class Generator:
    """Sends loads and hears their results. `tokens`: by organization; `redis_url`: of the stack."""

    def __init__(self, redis_url: str, tokens: dict[str, str]) -> None:
        self._organizations = list(tokens)
        self._producers = {
            each: TagProducer(redis_url=redis_url, organization_id=each, token=token)
            for each, token in tokens.items()
        }
        self._channels = [f"task-tags:{{{each}}}:results:{REPLY_TO}" for each in tokens]
        self._redis: Any = Redis.from_url(redis_url)
        self._times: list[tuple[float, bytes]] = []
        """When each result of the load came (perf_counter), and what it was."""
        self._target = -1
        self._reached, self._subscribed = threading.Event(), threading.Event()
        threading.Thread(target=self._hear, daemon=True).start()
        if not self._subscribed.wait(RESULT_SECONDS):
            raise TimeoutError("could not subscribe to results")

    def throughput(self, organizations: int, operations: int, batches: int) -> float:
        """Return the batches a second, from the first append to the last result."""
        messages = self._prepare(organizations, operations, batches)
        begin = self._send(messages)
        return batches / (self._times[-1][0] - begin)

    def latency(self, organizations: int, rate: float, batches: int) -> float:
        """Send batches of one operation at a rate; return the median milliseconds to a result."""
        messages = self._prepare(organizations, 1, batches)
        sent: dict[str, float] = {}
        self._expect(batches)
        start = time.perf_counter()
        for number, (organization, message) in enumerate(messages):
            time.sleep(max(0, start + number / rate - time.perf_counter()))
            batch_id = _batch_id(message)
            sent[batch_id] = time.perf_counter()
            self._append(organization, [message])
        self._wait()
        return 1e3 * statistics.median(at - sent[_batch_id(result)] for at, result in self._times)

    def fill(self, tags: int, flow_execution_id: str) -> float:
        """Register an execution of the first organization and give it tags, for what reads them."""
        first = self._organizations[0]
        batches = [(first, _tag_batch(flow_execution_id, 1, n)) for n in range(tags)]
        self._send([(first, _registration(flow_execution_id)), *batches])
        return tags

    def _prepare(self, organizations: int, operations: int, batches: int) -> Messages:
        """Make batches for new executions, and register these, which also wakes the workers."""
        chosen = self._organizations[:organizations]
        executions = {each: [str(uuid4()) for _ in range(EXECUTIONS)] for each in chosen}
        messages: Messages = []
        for number in range(batches):
            turn, of = divmod(number, organizations)
            execution = executions[chosen[of]][turn % EXECUTIONS]
            messages.append((chosen[of], _tag_batch(execution, operations, number)))
        self._send([(of, _registration(each)) for of in chosen for each in executions[of]])
        return messages

    def _send(self, messages: Messages) -> float:
        """Append messages and wait for their results; return when the first append began."""
        grouped: dict[str, list[bytes]] = {}
        for organization, message in messages:
            grouped.setdefault(organization, []).append(message)
        turns = [(each, _chunks(of_one)) for each, of_one in grouped.items()]
        longest = max(len(of_one) for of_one in grouped.values())
        self._expect(len(messages))
        begin = time.perf_counter()
        for _ in range(0, longest, CHUNK):
            for organization, chunks in turns:
                if chunk := next(chunks, None):
                    self._append(organization, chunk)
        self._wait()
        return begin

    def _append(self, organization: str, encoded: Sequence[bytes]) -> None:
        if self._producers[organization].send(encoded) != len(encoded):
            raise RuntimeError("an inbox is full")

    def _expect(self, count: int) -> None:
        """Forget earlier results, and await so many. Nothing may be on its way yet."""
        self._times.clear()
        self._reached.clear()
        self._target = count

    def _wait(self) -> None:
        if not self._reached.wait(RESULT_SECONDS):
            raise TimeoutError(f"{self._target - len(self._times)} results are missing")
        for _, result in self._times:
            if b'"error"' in result:
                raise RuntimeError(f"a batch was refused: {result.decode()[:300]}")

    def _hear(self) -> None:
        pubsub = self._redis.pubsub()
        pubsub.subscribe(*self._channels)
        subscribed = 0
        for heard in pubsub.listen():
            if heard["type"] == "message":
                self._times.append((time.perf_counter(), heard["data"]))
                if len(self._times) == self._target:
                    self._reached.set()
            elif heard["type"] == "subscribe":
                subscribed += 1
                if subscribed == len(self._channels):
                    self._subscribed.set()


def _chunks(messages: list[bytes]) -> Iterator[list[bytes]]:
    return (messages[start : start + CHUNK] for start in range(0, len(messages), CHUNK))


# --- Messages, spelled as producers spell them ---------------------------------------------------


def _registration(flow_execution_id: str) -> bytes:
    return _message(
        {"kind": "flow_execution", "flow_execution_id": flow_execution_id, "task_names": None}
    )


def _tag_batch(flow_execution_id: str, operations: int, number: int) -> bytes:
    """Return a batch that adds a tag to each of some tasks; each number is another tag."""
    tags = [
        {
            "operation": "add",
            "flow_execution_id": flow_execution_id,
            "task_name": f"task-{task}",
            "tag_type": "review_status",
            "tag": f"reviewed-{number}",
            "tag_metadata": {"reviewer": "ada"},
        }
        for task in range(operations)
    ]
    return _message({"kind": "tag_batch", "tags": tags})


def _message(fields: dict[str, Any]) -> bytes:
    head = {"schema_version": 1, "batch_id": _uuid7(), "reply_to": REPLY_TO}
    return json.dumps({**head, **fields}, separators=(",", ":")).encode()


def _uuid7() -> str:
    """Return an id that begins with the time, as the ids of batches do."""
    low = 0b10 << 62 | secrets.randbits(62)
    return str(
        UUID(int=time.time_ns() // 1_000_000 << 80 | 7 << 76 | secrets.randbits(12) << 64 | low)
    )


def _batch_id(encoded: bytes) -> str:
    """Return the id of a message or of a result."""
    id: str = json.loads(encoded)["batch_id"]
    return id


def main() -> None:
    generator = Generator(**json.loads(sys.stdin.readline()))
    print(0, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(getattr(generator, name)(**arguments), flush=True)


if __name__ == "__main__":
    main()
