"""Ten thousand runs that wait for people: the delay of an approval, and what waiting costs.

python -m tests.load.waiters [--waiters 10000] [--rate 100] [--restarts 0]. Each
waiter waits on an execution of its own, of ten organizations, in another process than the endpoint,
with one stream for each organization. Approvals are sent by PATCH at the rate. With restarts, the
endpoint and Valkey are killed in turn meanwhile, so many times each. Prints a table; exit code 1 if
a waiter missed its approval, or returned with the tag of another batch.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import psycopg

from producers.client import TagProducer
from producers.contract.messages import register_execution
from producers.subscriber import Subscriber
from tests.support.memory import resident
from tests.support.script_stack import script_stack, tokens
from worker.local.servers import Postgres, find_server_paths, load_or_create_secret
from worker.local.stack import DATABASE, Stack

ORGANIZATIONS: Final = 10
IDLE_SECONDS: Final = 15.0
DEADLINE: Final = 60.0
NAMED: Final = ("review", "review_status", "approved")
Runs = dict[UUID, list[UUID]]
"""The executions that are waited for, by organization."""


def wait(endpoint_url: str, redis_url: str, keys: dict[UUID, str], runs: Runs, say: Any) -> None:
    """Wait for all approvals in this process; say when each wait has returned, and with what."""

    async def one(subscriber: Subscriber, execution: UUID) -> None:
        tag = await subscriber.await_for(execution, *NAMED)
        say.send((execution, time.time(), tag.created_at.timestamp(), tag.tag_metadata))

    async def main() -> None:
        subscribers = {
            organization: Subscriber(
                endpoint_url=endpoint_url,
                redis_url=redis_url,
                organization_id=organization,
                token=keys[organization],
            )
            for organization in runs
        }
        waits = [
            one(subscribers[organization], execution)
            for organization, executions in runs.items()
            for execution in executions
        ]
        await asyncio.gather(*waits)
        for subscriber in subscribers.values():
            await asyncio.to_thread(subscriber.close)

    asyncio.run(main())


def committed(owner: psycopg.Connection) -> int:
    """Return how many transactions the database has committed."""
    owner.execute("select pg_stat_clear_snapshot()")
    row = owner.execute(
        "select xact_commit from pg_stat_database where datname = current_database()"
    ).fetchone()
    assert row is not None
    return int(row[0])


def approve(endpoint_url: str, keys: dict[UUID, str], runs: Runs, rate: float) -> None:
    """Approve each execution by PATCH, in turn over the organizations, until it is accepted."""
    turns = [
        (organization, execution)
        for executions in zip(*runs.values(), strict=True)
        for organization, execution in zip(runs, executions, strict=True)
    ]
    begin = time.monotonic()
    with httpx.Client(base_url=endpoint_url, timeout=15, trust_env=False) as client:
        for number, (organization, execution) in enumerate(turns):
            time.sleep(max(0.0, begin + number / rate - time.monotonic()))
            operation = dict(zip(("task_name", "tag_type", "tag"), NAMED, strict=True))
            tag = {"operation": "add", "flow_execution_id": str(execution), **operation}
            body = {"tags": [{**tag, "tag_metadata": str(execution)}]}
            headers = {
                "Authorization": f"Bearer {keys[organization]}",
                "Idempotency-Key": str(execution),
                "Prefer": "respond-async",
            }
            while True:
                try:
                    answer = client.patch("/task-tags", json=body, headers=headers)
                except httpx.TransportError:
                    time.sleep(0.2)
                    continue
                if answer.status_code < 500:
                    break
                time.sleep(0.2)


def restart(stack: Stack, times: int, over: float) -> None:
    """Kill the endpoint and Valkey in turn, and start them again."""
    for number in range(2 * times):
        end = time.monotonic() + over / (2 * times + 1)
        while time.monotonic() < end:
            stack.supervisor.restart_ended(lambda _: None)
            time.sleep(0.1)
        name = ("endpoint", "valkey")[number % 2]
        running = list(stack.supervisor.running)
        process = next(process for child, process in running if child.name == name)
        process.kill()
        process.wait()
        stack.supervisor._quick_exits.clear()  # here they are meant to end often
    while True:
        stack.supervisor.restart_ended(lambda _: None)
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiters", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--restarts", type=int, default=0)
    arguments = parser.parse_args()
    each = arguments.waiters // ORGANIZATIONS
    runs: Runs = {uuid4(): [uuid4() for _ in range(each)] for _ in range(ORGANIZATIONS)}
    with script_stack(1) as (directory, stack):
        sign = tokens(directory)
        keys = {organization: sign(organization) for organization in runs}
        for organization, executions in runs.items():
            with TagProducer(
                redis_url=stack.redis_url, organization_id=organization, token=keys[organization]
            ) as producer:
                producer.enqueue_many(map(register_execution, executions), block=60)
                producer.apply(register_execution(executions[-1]))
        secret = load_or_create_secret(directory, "postgres")
        url = Postgres(find_server_paths(directory), secret).url(database=DATABASE)
        with psycopg.connect(url, autocommit=True) as owner:
            return measure(stack, owner, keys, runs, arguments)


def measure(
    stack: Stack,
    owner: psycopg.Connection,
    keys: dict[UUID, str],
    runs: Runs,
    arguments: argparse.Namespace,
) -> int:
    pids = {child.name: process.pid for child, process in stack.supervisor.running}
    before = resident(pids["endpoint"])
    hear, say = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(
        target=wait, args=(stack.endpoint_url, stack.redis_url, keys, runs, say)
    )
    child.start()
    await_quiet(owner)
    counted, began = committed(owner), time.monotonic()
    time.sleep(IDLE_SECONDS)
    a_second = (committed(owner) - counted) / (time.monotonic() - began)
    total = sum(map(len, runs.values()))
    grown = resident(pids["endpoint"]) - before
    print(f"\n| | |\n|---|---|\n| {total:,} waits: memory of the endpoint | +{grown:.0f} MB |")
    assert child.pid is not None
    print(f"| memory of the process that waits | {resident(child.pid):.0f} MB |")
    print(f"| transactions a second while nothing happens | {a_second:.1f} |", flush=True)
    if arguments.restarts:
        over = total / arguments.rate
        threading.Thread(
            target=restart, args=(stack, arguments.restarts, over), daemon=True
        ).start()
    threading.Thread(
        target=approve, args=(stack.endpoint_url, keys, runs, arguments.rate), daemon=True
    ).start()
    delays, wrong = receive(hear, total, total / arguments.rate + DEADLINE)
    child.kill()
    missed = total - len(delays)
    delays.sort()
    places = (0.5, 0.95, 0.99, 1.0)
    p50, p95, p99, slowest = (1e3 * delays[max(0, int(len(delays) * q) - 1)] for q in places)
    print(
        f"| {arguments.rate:g} approvals a second: from the transaction to the end of the wait, "
        f"p50 / p95 / p99 / slowest | {p50:.0f} / {p95:.0f} / {p99:.0f} / {slowest:.0f} ms |"
    )
    print(
        f"waiters: waits={total} restarts={arguments.restarts} missed={missed} wrong={wrong} "
        f"p95_ms={p95:.0f} slowest_ms={slowest:.0f} idle_transactions={a_second:.1f}"
    )
    return 1 if missed or wrong else 0


def await_quiet(owner: psycopg.Connection) -> None:
    """Wait until the waits have begun: the database has little to do."""
    end, last = time.monotonic() + DEADLINE, math.inf
    time.sleep(5)
    while time.monotonic() < end and last > 100:
        counted = committed(owner)
        time.sleep(3)
        last = committed(owner) - counted


def receive(hear: Connection, total: int, seconds: float) -> tuple[list[float], int]:
    """Return the delays of the waits that returned in time, and how many had a wrong tag."""
    delays: list[float] = []
    wrong, end = 0, time.monotonic() + seconds
    while len(delays) < total and hear.poll(max(0.0, end - time.monotonic())):
        execution, returned, created, metadata = hear.recv()
        delays.append(returned - created)
        wrong += metadata != str(execution)
    return delays, wrong


if __name__ == "__main__":
    sys.exit(main())
