"""Many clients claim and decide while workers are killed: one winner each, and no stale approval.

python -m tests.load.decisions [--claims 100000] [--seed N]. The last line is
`decisions: seed=… claims=… winners=… kills=… wrong_winners=0 unknown_winners=0 stale=0`; the exit
code is 1 if one of the last three is not 0.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from uuid import UUID, uuid4

import psycopg

from producers.client import TagProducer
from producers.contract.messages import (
    Message,
    TagBatch,
    claim,
    register_execution,
    set_tag,
    set_task_state,
    when,
)
from producers.contract.results import ResultRecord
from producers.errors import PreconditionFailed
from tests.support.script_stack import script_stack, tokens
from worker.local.servers import Postgres, find_server_paths, load_or_create_secret
from worker.local.stack import DATABASE, Stack

WORKERS = 3
CLIENTS = 8
CLAIMS_OF_A_TASK = 4
PIECE = 200
RUNS = 1_000
RESULT_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    arguments = parser.parse_args()
    with script_stack(WORKERS) as (directory, stack), ExitStack() as opened:
        organization, execution = uuid4(), uuid4()
        token = tokens(directory)(organization)
        clients = [
            opened.enter_context(
                TagProducer(redis_url=stack.redis_url, organization_id=organization, token=token)
            )
            for _ in range(CLIENTS)
        ]
        clients[0].apply(register_execution(execution))
        kills, stop = Counter[str](), threading.Event()
        killer = threading.Thread(target=kill_workers, args=(stack, arguments.seed, stop, kills))
        killer.start()
        winners, wrong, unknown = claim_tasks(clients, execution, arguments.claims, arguments.seed)
        run_again(clients, execution, arguments.seed)
        stop.set()
        killer.join()
        paths = find_server_paths(directory)
        url = Postgres(paths, load_or_create_secret(directory, "postgres")).url(database=DATABASE)
        with psycopg.connect(url) as connection:
            stale = count_stale(connection, execution)
    print(
        f"decisions: seed={arguments.seed} claims={arguments.claims} winners={winners} "
        f"kills={kills.total()} wrong_winners={wrong} unknown_winners={unknown} stale={stale}"
    )
    return 1 if wrong or unknown or stale or not kills else 0


def kill_workers(stack: Stack, seed: int, stop: threading.Event, kills: Counter[str]) -> None:
    """Kill a random worker at random times; the supervisor starts it again."""
    choose = random.Random(seed)
    while not stop.wait(choose.uniform(1, 6)):
        running = [each for each in stack.supervisor.running if each[0].name.startswith("worker")]
        child, process = choose.choice(running)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills[child.name] += 1
        stack.supervisor._quick_exits.clear()  # here they are meant to end often
        stack.supervisor.restart_ended(lambda _: None)


def claim_tasks(
    clients: Sequence[TagProducer], execution: UUID, claims: int, seed: int
) -> tuple[int, int, int]:
    """Claim each task by several clients at once.

    Returns:
        The number of tasks, of those without exactly one winner, and of losers that were not given
        the winner's name.
    """
    choose = random.Random(seed)
    tasks = [f"task-{number}" for number in range(claims // CLAIMS_OF_A_TASK)]
    asked: dict[int, list[str]] = {number: [] for number in range(len(clients))}
    for task in tasks:
        for client in choose.sample(range(len(clients)), CLAIMS_OF_A_TASK):
            asked[client].append(task)

    def send(client: int) -> list[tuple[str, str, ResultRecord]]:
        name = f"client-{client}"
        batches = (claim(execution, task, name) for task in asked[client])
        records = results(clients[client], batches)
        return [(task, name, record) for task, record in zip(asked[client], records, strict=True)]

    with ThreadPoolExecutor(len(clients)) as pool:
        answers = [each for some in pool.map(send, asked) for each in some]
    won: dict[str, list[str]] = {}
    for task, name, record in answers:
        if record.error is None:
            won.setdefault(task, []).append(name)
    wrong = sum(len(won.get(task, [])) != 1 for task in tasks)
    unknown = 0
    for task, _, record in answers:
        if record.error is not None:
            found = record.error.details[0].found or []
            unknown += [each.tag for each in found] != won.get(task)
    return len(tasks), wrong, unknown


def results(client: TagProducer, messages: Iterator[Message]) -> Iterator[ResultRecord]:
    """Yield the results of messages, in their order; some hundreds are on the way at once."""
    waiting: list[Future[ResultRecord]] = []
    for message in messages:
        waiting.append(client.submit(message, block=RESULT_SECONDS))
        if len(waiting) == PIECE:
            yield waiting.pop(0).result(RESULT_SECONDS)
    for future in waiting:
        yield future.result(RESULT_SECONDS)


def run_again(clients: Sequence[TagProducer], execution: UUID, seed: int) -> None:
    """Run a task again and again, while reviewers approve the output that they saw last."""
    choose, current, done = random.Random(seed), [0], threading.Event()

    def review(client: TagProducer) -> None:
        while not done.is_set():
            seen = f"run-{max(0, current[0] - choose.choice([0, 0, 1, 2]))}"
            named = execution, "again", "output", seen
            approval = set_tag(execution, "again", "approval", "approved", seen)
            with suppress(PreconditionFailed):
                client.apply(TagBatch(tags=[approval], conditions=[when(*named)]), RESULT_SECONDS)

    reviewers = [threading.Thread(target=review, args=(client,)) for client in clients[1:4]]
    for reviewer in reviewers:
        reviewer.start()
    for number in range(1, RUNS + 1):
        clear = ["approval", "output"]
        clients[0].enqueue(set_task_state(execution, "again", "running", clear=clear))
        output = set_tag(execution, "again", "output", f"run-{number}")
        clients[0].apply(TagBatch(tags=[output]), timeout=RESULT_SECONDS)
        current[0] = number
    done.set()
    for reviewer in reviewers:
        reviewer.join()


def count_stale(connection: psycopg.Connection, execution: UUID) -> int:
    """Replay the change events: how often was there an approval of another output than today's?"""
    stale, output, approval = 0, None, None
    events = connection.execute(
        "select event from tag_changes where flow_execution_id = %s order by revision", [execution]
    )
    for (event,) in events:
        for change in event["changes"]:
            tag = change.get("tag")
            if tag is None or tag["task_name"] != "again":
                continue
            added = change["change"] == "added"
            if tag["tag_type"] == "output":
                output = tag["tag"] if added else None
            else:
                approval = tag["tag_metadata"] if added else None
        stale += approval is not None and approval != output
    return stale


if __name__ == "__main__":
    sys.exit(main())
