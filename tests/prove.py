"""make prove [SECONDS=600] [SEED=n]: the long proofs, one after the other, with one seed
(a planted bug that is not found is tried with two more).

Random faults; each planted bug, which the fault harness must find; claims and decisions while
workers are killed; work lists that are followed while writers go on; random messages, read both
ways; planted mistakes, which tests must notice. The last line is `prove: seed=… faults=0
decisions=0 followers=0 reading=0 bugs_missed=0 mistakes_missed=0`; the exit code is 1 if any of
these is not 0.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from collections import Counter

from tests.faults.mutants import PLANTS

PLANT_SECONDS = 20
PLANT_TRIES = 3
"""Faults come at random, and few of them bring out some of the bugs in so short a time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    arguments = parser.parse_args()
    seed = ["--seed", str(arguments.seed)]
    counts: Counter[str] = Counter()
    counts["faults"] = run("tests.faults", "--seconds", f"{arguments.seconds:g}", *seed)
    for plant, (kind, only) in PLANTS.items():
        words = [f"--seconds={PLANT_SECONDS}", "--plant", plant, "--only", only]
        seeds = range(arguments.seed, arguments.seed + PLANT_TRIES)
        found = any(run("tests.faults", *words, f"--seed={each}", of=kind) for each in seeds)
        counts["bugs_missed"] += not found
    counts["decisions"] = run("tests.load.decisions", *seed)
    counts["followers"] = run("tests.load.followers", *seed)
    counts["reading"] = run("tests.load.reading", *seed)
    counts["mistakes_missed"] = int(run("tests.mutants") != 0)
    kinds = ("faults", "decisions", "followers", "reading", "bugs_missed", "mistakes_missed")
    print(
        f"prove: seed={arguments.seed} {' '.join(f'{kind}={counts[kind]}' for kind in kinds)}",
        flush=True,
    )
    return 1 if counts.total() else 0


def run(module: str, *words: str, of: str = "") -> int:
    """Run a proof, and show its last line.

    Returns:
        The count of this name in that line, or the exit code.
    """
    print(f"{module} {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", module, *words]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = (ended.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    if ended.returncode and not of:
        print(ended.stdout)
    print(f"  {last}", flush=True)
    if not of:
        return ended.returncode
    found = re.search(rf"\b{of}=(\d+)", last)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
