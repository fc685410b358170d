"""How long until the next result, after the only worker, Valkey or PostgreSQL was killed?

python -m tests.load.recovery [--rounds 5]. Default settings, one worker. Prints a table and asserts
nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from uuid import UUID, uuid4

import httpx

from producers.client import TagProducer
from producers.contract.messages import TagBatch, add, register_execution
from tests.support.etag import revision_of
from tests.support.script_stack import script_stack
from tests.support.waiting import eventually
from worker.local.stack import Stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with script_stack(workers=1) as (_, stack):
        print("\n| killed | until it answers again | from then to the next result | slowest |")
        print("|---|---|---|---|")
        for what in ("worker-1", "valkey", "postgresql"):
            measured = [once(stack, what) for _ in range(rounds)]
            down, after = zip(*measured, strict=True)
            print(
                f"| {what} | {statistics.median(down):.1f} s | {statistics.median(after):.1f} s "
                f"| {max(after):.1f} s |"
            )


def once(stack: Stack, what: str) -> tuple[float, float]:
    """Kill a part while batches wait; return its time away, and the time to the next result."""
    execution = uuid4()
    with TagProducer(
        redis_url=stack.redis_url, organization_id=stack.organization_id, token=stack.token
    ) as producer:
        producer.apply(register_execution(execution))
        producer.enqueue_many(batch(execution, f"{number}") for number in range(3000))
        child, process = next(each for each in stack.supervisor.running if each[0].name == what)
        killed_at = revision(stack, execution) or 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        begin = time.monotonic()
        before = revision(stack, execution) or killed_at
        if what == "worker-1":
            stack.supervisor.log(child.name).unlink()  # so that "ready" is this start's
        stack.supervisor.restart_ended(lambda _: None)
        eventually(child.ready, 60)
        answers = time.monotonic()
        eventually(lambda: (revision(stack, execution) or 0) > before, 60)
        return answers - begin, time.monotonic() - answers


def revision(stack: Stack, execution: UUID) -> int | None:
    """Return how far the execution has come, as a reader sees it; None if it cannot be read."""
    response = httpx.get(
        f"{stack.endpoint_url}/task-tags",
        params={"flow_execution_id": str(execution), "task_name": "none"},
        headers={"Authorization": f"Bearer {stack.token}"},
        trust_env=False,
    )
    return revision_of(response) if response.status_code == 200 else None


def batch(execution: UUID, tag: str) -> TagBatch:
    return TagBatch(tags=[add(execution, "t", "t", tag)])


if __name__ == "__main__":
    main()
