"""make faults [SECONDS=600] [SEED=n] [PLANT=bug] [ONLY=regex]: inject faults, compare with a model.

The last line is `faults: seed=… batches=… injected=… kinds=… lost=0 doubled=0 reordered=0 gaps=0
missing_results=0 stuck=0 wrongly_refused=0 ended=0`; the exit code is 1 if any of these is not 0.
PLANT puts a known bug into the workers, which must be found; ONLY chooses faults by their names.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.check import Verdict, check, check_feed, check_watched
from tests.faults.harness import Harness, run_harness, settle, start_runners, stop
from tests.faults.history import history
from tests.faults.injections import INJECTIONS, inject
from tests.faults.mutants import PLANTS

FULL_SECONDS = 600.0
OFTEN = 10
CALM_SECONDS = 10.0
KINDS = (
    *("lost", "doubled", "reordered", "gaps", "missing_results", "stuck"),
    *("wrongly_refused", "ended"),
)


def main() -> int:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of connections that proxies close
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--plant", choices=["", *PLANTS], default="")
    parser.add_argument("--only", type=re.compile, default="")
    arguments = parser.parse_args()
    for name in [name for name in INJECTIONS if not re.search(arguments.only, name)]:
        del INJECTIONS[name]
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**9)
    print(
        f"seed {seed}, {arguments.seconds:g} s"
        f"{', planted: ' if arguments.plant else ''}{arguments.plant}"
    )
    choose, verdict = random.Random(seed), Verdict()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with run_harness(directory, seed, arguments.plant) as harness:
            if harness.disk is None:
                print(
                    "fill the disk: skipped, a small file system can't be mounted here", flush=True
                )
            if harness.clock is None:
                print("steps of clocks: skipped, libfaketime can't be had here", flush=True)
            start_runners(harness, arguments.seconds)
            run_without_faults(harness, verdict)
            injected = run_with_faults(harness, choose, arguments.seconds)
            stop(harness, "runner")
            settle(harness, verdict)
            stop(harness, "worker", "beat")  # one whose lease was taken away may still be at work
            batches = compare(harness, verdict)
            for story in harness.ended:
                verdict.add("ended", story)
            with harness.database() as connection:
                for batch_id in verdict.batch_ids:
                    verdict.stories += history(harness, connection, batch_id)
        for line in [f"  {count:4} x {name}" for name, count in sorted(injected.items())]:
            print(line)
        for story in verdict.stories:
            print(f"  {story}")
    counts = " ".join(f"{kind}={verdict.counts[kind]}" for kind in KINDS)
    head = f"seed={seed} batches={batches} injected={injected.total()} kinds={len(+injected)}"
    print(f"faults: {head} {counts}")
    return 1 if verdict.counts else 0


def run_without_faults(harness: Harness, verdict: Verdict) -> None:
    """Without a fault, messages never wait without a lease, and no rescue is needed."""
    end = time.monotonic() + CALM_SECONDS
    while time.monotonic() < end:
        time.sleep(0.02)
        if organization := harness.unattended():
            verdict.add("stuck", f"messages of {organization} waited without a lease")
    if harness.woken():
        verdict.add("stuck", "messages waited with nobody on the way, although nothing was broken")


def run_with_faults(harness: Harness, choose: random.Random, seconds: float) -> Counter[str]:
    """Inject all kinds of faults, in a new order each round. A full run does each often enough.

    What finds nothing to harm is tried again, for a third of the time more.
    """
    injected: Counter[str] = Counter()
    deck: list[str] = []
    begin = time.monotonic()
    enough = OFTEN if seconds >= FULL_SECONDS else 0
    while (passed := time.monotonic() - begin) < seconds or (
        passed < seconds * 4 / 3 and any(injected[name] < enough for name in possible(harness))
    ):
        if not deck:
            deck = choose.sample(list(INJECTIONS), len(INJECTIONS))
        name = deck.pop()
        harness.faults.append((time.time(), name))
        injected[name] += inject(name, harness, choose)
        harness.mend()
        time.sleep(choose.random() * 0.4)
        harness.mend()
    return injected


def possible(harness: Harness) -> list[str]:
    return [
        name
        for name in INJECTIONS
        if (harness.disk or name != "fill the disk")
        and (harness.clock or name != "step the clock of valkey")
    ]


def compare(harness: Harness, verdict: Verdict) -> int:
    batches = 0
    with harness.database() as connection:
        for organization in harness.organizations:
            batches += check(
                connection,
                organization.id,
                organization.sent(),
                organization.published,
                organization.flushed,
                verdict,
            )
            check_watched(connection, organization.id, organization.watched, verdict)
            check_feed(connection, organization.id, organization.followed, verdict)
    return batches


if __name__ == "__main__":
    sys.exit(main())
