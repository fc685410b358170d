"""A long run through one worker: does it keep its speed, and its memory, and leave nothing behind?

python -m tests.load.soak [--batches 1000000]. Prints a line for each tenth; exit code 1 if memory
grew by more than 10 % after the first tenth, or if keys or rows are left that should not be.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg

from producers.client import TagProducer
from producers.contract.channels import inbox_key
from producers.contract.messages import TagBatch, add, register_execution, remove
from producers.contract.values import Uuid7
from tests.support.memory import resident
from tests.support.script_stack import script_stack, tokens
from tests.support.waiting import eventually
from worker.local.servers import Postgres, find_server_paths, load_or_create_secret
from worker.local.stack import DATABASE, Stack

PIECE = 1_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=1_000_000)
    batches = parser.parse_args().batches
    with script_stack(workers=1) as (directory, stack):
        organization, execution = uuid4(), uuid4()
        token = tokens(directory)(organization)
        with TagProducer(
            redis_url=stack.redis_url, organization_id=organization, token=token
        ) as producer:
            producer.apply(register_execution(execution))
            sizes = soak(stack, producer, organization, execution, batches)
        faults = list(left_behind(directory, stack, organization, batches))
    growth = sizes[-1] / sizes[0] - 1
    if growth > 0.1:
        faults.append(f"the worker grew by {growth:.0%} after the first tenth")
    for fault in faults:
        print(f"wrong: {fault}")
    print(f"soak: batches={batches} growth={growth:+.1%} wrong={len(faults)}")
    return 1 if faults else 0


def soak(
    stack: Stack, producer: TagProducer, organization: UUID, execution: UUID, batches: int
) -> list[float]:
    """Send the batches, at most 10,000 waiting; return the worker's MB after each tenth."""
    redis: Any = producer._enqueuer.redis
    new_id, sizes = Uuid7(), []
    begin = last = time.monotonic()
    tenth = max(batches // 10, PIECE)
    for start in range(0, batches, PIECE):
        piece = [
            TagBatch(
                batch_id=new_id(),
                tags=[
                    (add if number % 2 == 0 else remove)(execution, f"t{number // 2 % 7}", "t", "x")
                ],
            )
            for number in range(start, min(start + PIECE, batches))
        ]
        eventually(lambda: redis.xlen(inbox_key(organization)) < 8 * PIECE, 120)
        producer.enqueue_many(piece)
        if (start + PIECE) % tenth == 0:
            eventually(lambda: redis.xlen(inbox_key(organization)) == 0, 120)
            now = time.monotonic()
            sizes.append(worker_memory(stack))
            speed, last = tenth / (now - last), now
            print(
                f"{start + PIECE:>10,}  {speed:7.0f} batches/s  worker {sizes[-1]:.1f} MB",
                flush=True,
            )
    print(f"{batches:,} batches in {time.monotonic() - begin:.0f} s")
    return sizes


def worker_memory(stack: Stack) -> float:
    pid = next(p.pid for child, p in stack.supervisor.running if child.name == "worker-1")
    return resident(pid)


def left_behind(directory: Path, stack: Stack, organization: UUID, batches: int) -> Any:
    """Yield every key and row that should not be there."""
    from producers.redis_client import open_redis

    expected = {inbox_key(organization), "_kombu.binding.task-tags"}
    with open_redis(stack.redis_url) as redis:
        for key in redis.scan_iter():
            if key.decode() not in expected and not key.startswith(b"_kombu.binding"):
                yield f"the key {key.decode()}"
    database = Postgres(
        find_server_paths(directory), load_or_create_secret(directory, "postgres")
    ).url(database=DATABASE)
    with psycopg.connect(database) as connection:
        for table, count in (("tag_batches", batches + 1), ("tag_changes", batches)):
            row = connection.execute(f"select count(*) from {table}".encode()).fetchone()
            if row != (count,):
                yield f"{table} has {row} rows instead of {count}"


if __name__ == "__main__":
    sys.exit(main())
