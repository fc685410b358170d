"""make faults [SECONDS=600] [SEED=n] [PLANT=bug]: break things at random, then compare with the model.

The last line is `faults: seed=… batches=… injected=… lost=0 doubled=0 reordered=0 gaps=0 missing_results=0
stuck=0`; the exit code is 1 if any of these is not 0. PLANT puts a known bug into the workers, which must be found.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.check import Verdict, check
from tests.faults.history import history
from tests.faults.injections import INJECTIONS, inject
from tests.faults.mutants import PLANTS
from tests.faults.world import World, settle, start_runners, stop, world

FULL_SECONDS = 600.0
OFTEN = 20
CALM_SECONDS = 10.0
KINDS = ("lost", "doubled", "reordered", "gaps", "missing_results", "stuck")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--plant", choices=["", *PLANTS], default="")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**9)
    print(
        f"seed {seed}, {arguments.seconds:g} s{', planted: ' if arguments.plant else ''}{arguments.plant}"
    )
    choose, verdict = random.Random(seed), Verdict()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with world(directory, seed, arguments.plant) as opened:
            if opened.disk is None:
                print(
                    "fill the disk: skipped, a small file system can't be mounted here", flush=True
                )
            start_runners(opened)
            run_without_faults(opened, verdict)
            injected = run_with_faults(opened, choose, arguments.seconds)
            stop(opened, "runner")
            settle(opened, verdict)
            stop(opened, "worker", "beat")  # one whose lease was taken away may still be at work
            batches = compare(opened, verdict)
            with opened.database() as connection:
                for batch_id in verdict.batch_ids:
                    verdict.stories += history(opened, connection, batch_id)
        for line in [f"  {count:4} x {name}" for name, count in sorted(injected.items())]:
            print(line)
        for story in verdict.stories:
            print(f"  {story}")
    counts = " ".join(f"{kind}={verdict.counts[kind]}" for kind in KINDS)
    print(f"faults: seed={seed} batches={batches} injected={injected.total()} {counts}")
    return 1 if verdict.counts else 0


def run_without_faults(opened: World, verdict: Verdict) -> None:
    """Without a fault, beat never has to help: no wake-up is lost."""
    end = time.monotonic() + CALM_SECONDS
    while time.monotonic() < end:
        time.sleep(0.1)
    if opened.woken():
        verdict.add("stuck", "messages waited with nobody on the way, although nothing was broken")


def run_with_faults(opened: World, choose: random.Random, seconds: float) -> Counter[str]:
    """Do all kinds of faults in turn, shuffled anew each round. A full run does each often enough."""
    injected: Counter[str] = Counter()
    deck: list[str] = []
    end = time.monotonic() + seconds
    enough = OFTEN if seconds >= FULL_SECONDS else 0
    while time.monotonic() < end or any(injected[name] < enough for name in possible(opened)):
        if not deck:
            deck = choose.sample(list(INJECTIONS), len(INJECTIONS))
        name = deck.pop()
        opened.faults.append((time.time(), name))
        injected[name] += inject(name, opened, choose)
        opened.mend()
        time.sleep(choose.random() * 0.4)
        opened.mend()
    return injected


def possible(opened: World) -> list[str]:
    return [name for name in INJECTIONS if opened.disk is not None or name != "fill the disk"]


def compare(opened: World, verdict: Verdict) -> int:
    batches = 0
    with opened.database() as connection:
        for tenant in opened.tenants:
            batches += check(
                connection, tenant.organization, tenant.sent(), tenant.heard, tenant.gone, verdict
            )
    return batches


if __name__ == "__main__":
    sys.exit(main())
