"""Measures the whole path on this machine and prints it: latency, throughput, memory. Asserts nothing.

python -m tests.measure [--workers 2] [--batches 1000]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
from pydantic import SecretStr

from producers.client import TagProducer, registration
from producers.connect import open_redis
from producers.messages import TagBatch, add, results_channel
from producers.subscriber import Signal, listen
from worker.authorize import SCOPES, mint
from worker.embedded import secret
from worker.settings import Settings
from worker.stack import Stack, running

ORGANIZATIONS = 8
OPERATIONS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1000, help="for each organization")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with stack_of_its_own(workers=arguments.workers) as (directory, stack):
        token = tokens(directory)
        latency(stack, token(stack.organization_id))
        for _ in range(arguments.rounds):
            organizations = {(id_ := uuid4()): token(id_) for _ in range(ORGANIZATIONS)}
            throughput(stack, organizations, arguments.batches)
        read(stack)
        memory(stack)


@contextmanager
def stack_of_its_own(workers: int) -> Iterator[tuple[Path, Stack]]:
    """Run a stack on a directory that is removed afterwards; yield both."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        with running(directory, port=0, workers=workers, say=print) as stack:
            yield directory, stack


def tokens(directory: Path) -> Callable[[UUID], str]:
    """Return what signs a token for any organization of the stack on a state directory."""
    key = Settings.model_construct(jwt_secret=SecretStr(secret(directory, "jwt")))
    return lambda organization_id: mint(
        key,
        organization_id=organization_id,
        actor="measure",
        scopes=SCOPES,
        lifetime=timedelta(hours=3),
    )


def latency(stack: Stack, token: str) -> None:
    """One batch at a time on an idle system, from enqueue to result."""
    execution = uuid4()
    with TagProducer(
        redis_url=stack.redis_url, organization_id=stack.organization_id, token=token
    ) as producer:
        producer.apply(registration(execution))
        seconds = []
        for number in range(200):
            batch = TagBatch(tags=[add(execution, "extract_data", "review_status", f"t{number}")])
            begin = time.perf_counter()
            producer.apply(batch)
            seconds.append(time.perf_counter() - begin)
            time.sleep(0.005)
    cuts = statistics.quantiles(seconds, n=100)
    print(
        f"latency     p50 {cuts[49] * 1e3:.1f} ms  p95 {cuts[94] * 1e3:.1f} ms  p99 {cuts[98] * 1e3:.1f} ms"
    )


def throughput(stack: Stack, organizations: dict[UUID, str], batches: int) -> None:
    """All organizations at once, as fast as one process enqueues, until the last result is received."""
    work = {organization: make_batches(batches) for organization in organizations}
    producers = {
        id_: TagProducer(redis_url=stack.redis_url, organization_id=id_, token=token)
        for id_, token in organizations.items()
    }
    for id_, producer in producers.items():
        producer.apply(registration(work[id_][0].tags[0].flow_execution_id))
    expected = ORGANIZATIONS * batches
    with counting(stack, organizations, expected) as all_received:
        begin = time.perf_counter()
        for start in range(0, batches, 100):
            for id_, producer in producers.items():
                producer.enqueue_many(work[id_][start : start + 100])
        enqueued = time.perf_counter()
        all_received()
        end = time.perf_counter()
    print(
        f"throughput  {expected / (end - begin):.0f} batches/s of {OPERATIONS} operations, "
        f"{ORGANIZATIONS} organizations x {batches}; enqueued in {enqueued - begin:.2f} s, "
        f"applied in {end - begin:.2f} s"
    )
    for producer in producers.values():
        producer.close()


def make_batches(count: int) -> list[TagBatch]:
    execution = uuid4()
    return [
        TagBatch(
            reply_to="measure",
            tags=[
                add(execution, f"task-{i}", "review_status", f"t{number}", {"reviewer": "ada"})
                for i in range(OPERATIONS)
            ],
        )
        for number in range(count)
    ]


@contextmanager
def counting(
    stack: Stack, organizations: Iterable[UUID], expected: int
) -> Iterator[Callable[[], None]]:
    """Subscribe to the results of organizations; what it yields waits until all are received."""
    channels = [results_channel(organization, "measure") for organization in organizations]
    stop, subscribed = threading.Event(), threading.Event()
    redis = open_redis(stack.redis_url)

    def collect() -> None:
        received, waiting = 0, len(channels)
        for heard in listen(redis, channels, stop):
            received += isinstance(heard, bytes)
            waiting -= heard is Signal.SUBSCRIBED
            if not waiting:
                subscribed.set()
            if received == expected:
                return

    thread = threading.Thread(target=collect)
    thread.start()
    subscribed.wait()
    yield thread.join
    redis.close()


def read(stack: Stack) -> None:
    """The endpoint, one request after the other."""
    execution = uuid4()
    with TagProducer(
        redis_url=stack.redis_url, organization_id=stack.organization_id, token=stack.token
    ) as producer:
        producer.apply(registration(execution))
        producer.apply(TagBatch(tags=[add(execution, f"task-{i}", "t", "x") for i in range(50)]))
    with httpx.Client(
        base_url=stack.endpoint_url, headers={"Authorization": f"Bearer {stack.token}"}
    ) as client:
        seconds = []
        for _ in range(300):
            begin = time.perf_counter()
            client.get("/task-tags", params={"flow_execution_id": str(execution)})
            seconds.append(time.perf_counter() - begin)
    print(f"read        p50 {statistics.median(seconds) * 1e3:.1f} ms (50 tags)")


def memory(stack: Stack) -> None:
    """Resident memory of each process of the stack."""
    for child, process in stack.supervisor.running:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        resident = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        print(f"memory      {child.name:<11} peak {int(resident.split()[1]) / 1024:.0f} MB")


if __name__ == "__main__":
    main()
