"""How long does one organization's single batch wait, while another's queue is long?

python -m tests.load.fairness [--workers 2] [--waiting 50000]. Prints a table, asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from uuid import uuid4

from producers.client import TagProducer
from producers.contract.channels import inbox_key
from producers.contract.messages import TagBatch, add, register_execution
from tests.support.script_stack import make_batches, script_stack, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--waiting", type=int, default=50_000, help="batches of the busy organization"
    )
    arguments = parser.parse_args()
    with script_stack(workers=arguments.workers) as (directory, stack):
        token = tokens(directory)
        busy, small = uuid4(), uuid4()
        with (
            TagProducer(
                redis_url=stack.redis_url,
                organization_id=busy,
                token=token(busy),
                inbox_limit=arguments.waiting + 10,
            ) as many,
            TagProducer(
                redis_url=stack.redis_url, organization_id=small, token=token(small)
            ) as few,
        ):
            execution = uuid4()
            few.apply(register_execution(execution))
            idle = [once(few, execution, number) for number in range(100)]
            batches = make_batches(arguments.waiting)
            many.apply(register_execution(batches[0].tags[0].flow_execution_id))
            many.enqueue_many(batches)
            redis: Any = many._enqueuer.redis
            beside: list[float] = []
            waiting: list[int] = []
            while (left := redis.xlen(inbox_key(busy))) > 0:
                waiting.append(left)
                beside.append(once(few, execution, 1000 + len(beside)))
                time.sleep(0.05)
    print("\n| waiting in the other organization | single batches | p50 | p95 | slowest |")
    print("|---|---|---|---|---|")
    show("none", idle)
    show(f"{waiting[0]:,} down to 0", beside)


def once(producer: TagProducer, execution: Any, number: int) -> float:
    begin = time.perf_counter()
    producer.apply(TagBatch(tags=[add(execution, "t", "t", f"{number}")]))
    return time.perf_counter() - begin


def show(what: str, seconds: list[float]) -> None:
    cuts = statistics.quantiles(seconds, n=100)
    figures = " | ".join(f"{each * 1e3:.0f} ms" for each in (cuts[49], cuts[94], max(seconds)))
    print(f"| {what} | {len(seconds)} | {figures} |")


if __name__ == "__main__":
    main()
