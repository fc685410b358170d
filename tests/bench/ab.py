"""make ab: compares the speed of HEAD with that of another commit, on this machine, in one run.

Both versions' stacks run side by side, and one is idle while the other is measured. In each round
every load is run by both in the order A B B A, once or more often, and who begins changes with the
round. What counts is the ratio within a round, so a machine that is slower for a while slows both
down. A ratio over 1 says that HEAD is better.

The interval is the distribution-free (binomial) one of the median: the rounds' ratios in order,
without as many at each end as heads come at most in so many tosses of a coin, with a probability of
5 %. It has the median in it with a probability of 90 % or more.

A load fails if the upper end of its interval is below the bar; the exit code is then 1. It is 3 if
something could not be started or measured. Writes build/ab.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.bench.ab_side import BUILD, REPOSITORY, Side, build, open_side, start_spec
from worker.local.supervisor import StartupError, Stopped, Supervisor

ROUNDS: Final = 13
FULL_ROUNDS: Final = 21
LEAST_ROUNDS: Final = 7
LIMIT_SECONDS: Final = 320.0
"""No round is begun that would end later, once there are as many as there must be."""
THROUGHPUT_SECONDS: Final = 0.8
LATENCY_RATE: Final = 600
LATENCY_SECONDS: Final = 0.4
READ_SECONDS: Final = 0.3


@dataclass(frozen=True)
class Load:
    """What is measured: a number of organizations, or reads if there are none."""

    name: str
    unit: str
    organizations: int = 0
    repeats: int = 1
    """How often A B B A is run in each round: more often where a run is short."""

    def run(self, side: Side, batches: int) -> float:
        """Run the load once; return its figure."""
        if not self.organizations:
            return side.reads(READ_SECONDS)
        if self.lower_is_better:
            return side.latency(self.organizations, LATENCY_RATE, batches)
        return side.throughput(self.organizations, batches)

    @property
    def lower_is_better(self) -> bool:
        return self.unit == "ms"


LOADS: Final = (
    Load("throughput-8", "batches/s", 8),
    Load("throughput-1", "batches/s", 1),
    Load("latency", "ms", 4, repeats=2),
    Load("reads", "requests/s", repeats=2),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="the commit to compare HEAD with")
    parser.add_argument("--bar", type=float, default=0.95, help="the ratio that is still good")
    parser.add_argument("--full", action="store_true", help=f"up to {FULL_ROUNDS} rounds")
    arguments = parser.parse_args()
    for name in [each for each in os.environ if each.startswith("TASK_TAGS_")]:
        del os.environ[name]  # each stack has servers and secrets of its own
    try:
        return compare(arguments.base, arguments.bar, FULL_ROUNDS if arguments.full else ROUNDS)
    except Stopped as stopped:
        return 130 if str(stopped) == signal.SIGINT.name else 143
    except (StartupError, RuntimeError, subprocess.SubprocessError, httpx.HTTPError) as error:
        print(f"ab: {error}", file=sys.stderr)
        return 3


def compare(commit: str, bar: float, rounds: int) -> int:
    """Build, measure and report; return the exit code."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ab-")))
        directory.chmod(0o755)  # the servers may run as another user
        supervisor = stack.enter_context(Supervisor(BUILD / "logs"))
        versions = [build("base", commit), build("new", "HEAD")]
        print(f"ab: {versions[1].commit[:12]} against {versions[0].commit[:12]}", flush=True)
        begin = time.monotonic()
        supervisor.start(*(start_spec(each, directory, supervisor) for each in versions))
        sides = [stack.enter_context(open_side(each, directory, supervisor)) for each in versions]
        figures = measure(sides, rounds, begin)
    found = {load: Comparison(load, *figures[load], bar) for load in LOADS}
    report(found.values())
    result: dict[str, Any] = {each.name: each.commit for each in versions}
    result |= {"bar": bar, "seconds": round(time.monotonic() - begin)}
    result["loads"] = {load.name: each.result() for load, each in found.items()}
    (REPOSITORY / "build" / "ab.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(each.passed for each in found.values()) else 1


# --- Measurement ---------------------------------------------------------------------------------

Figures = Mapping[Load, tuple[list[float], list[float]]]
"""Of each load the figures of the base and of HEAD, one of each round."""


def measure(sides: Sequence[Side], rounds: int, begin: float) -> Figures:
    """Run all rounds, or as many as there is time for since `begin`."""
    batches = {load: _choose_batches(load, sides) for load in LOADS}
    figures: Figures = {load: ([], []) for load in LOADS}
    took = 0.0
    for number in range(rounds):
        started = time.monotonic()
        if number >= LEAST_ROUNDS and started + took - begin > LIMIT_SECONDS:
            break
        for load, kept in figures.items():
            order = (0, 1, 1, 0) if number % 2 == 0 else (1, 0, 0, 1)
            taken = [
                (index, load.run(sides[index], batches[load])) for index in order * load.repeats
            ]
            for index in (0, 1):
                kept[index].append(statistics.fmean(value for of, value in taken if of == index))
        words = (f"{load.name} {_ratios(load, *kept)[-1]:.3f}" for load, kept in figures.items())
        print(f"round {number + 1} of {rounds}: {', '.join(words)}", flush=True)
        took = time.monotonic() - started
    return figures


def _choose_batches(load: Load, sides: Sequence[Side]) -> int:
    """Warm both up, and return how many batches keep the slower one busy for the load's seconds."""
    batches = round(LATENCY_RATE * LATENCY_SECONDS)
    for _ in range(2):
        figure = min(load.run(side, batches) for side in sides)
        if load.unit == "batches/s":
            batches = math.ceil(figure * THROUGHPUT_SECONDS / 100) * 100
    return batches


def _ratios(load: Load, base: Sequence[float], new: Sequence[float]) -> list[float]:
    """Return the ratio of each round; over 1 is better."""
    pairs = zip(base, new, strict=True)
    return [b / n if load.lower_is_better else n / b for b, n in pairs]


def median_interval(values: Sequence[float], miss: float = 0.1) -> tuple[float, float]:
    """Return two of the values, between which the median is with a probability of 1 - `miss`."""
    cut, below = 0, 1 / 2 ** len(values)
    while below <= miss / 2:
        cut += 1
        below += math.comb(len(values), cut) / 2 ** len(values)
    ordered = sorted(values)
    return ordered[cut - 1], ordered[-cut]


# --- What is said --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The figures of one load, and what they come to."""

    load: Load
    base: Sequence[float]
    new: Sequence[float]
    bar: float

    @property
    def ratio(self) -> float:
        return statistics.median(_ratios(self.load, self.base, self.new))

    @property
    def interval(self) -> tuple[float, float]:
        return median_interval(_ratios(self.load, self.base, self.new))

    @property
    def passed(self) -> bool:
        return self.interval[1] >= self.bar

    def row(self) -> str:
        medians = "".join(f"{statistics.median(of):>10,.5g}" for of in (self.base, self.new))
        low, high = self.interval
        words = f"{self.load.name:<14}{medians}  {self.load.unit:<12}{self.ratio:>6.3f}"
        return f"{words}  {low:.3f} to {high:.3f}{'' if self.passed else f'  below {self.bar:g}'}"

    def result(self) -> dict[str, Any]:
        low, high = self.interval
        figures = {"unit": self.load.unit, "ratio": self.ratio, "low": low, "high": high}
        return {**figures, "passed": self.passed, "base": self.base, "new": self.new}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.load.name} ratio={self.ratio:.3f} [{low:.3f}, {high:.3f}]"


def report(found: Iterable[Comparison]) -> None:
    """Print a table of all loads, and one line for programs."""
    comparisons = list(found)
    print(f"\n{'load':<14}{'base':>10}{'HEAD':>10}  {'unit':<12}{'ratio':>6}  90 % interval")
    for each in comparisons:
        print(each.row())
    print(f"\nab: {' '.join(map(str, comparisons))}")


if __name__ == "__main__":
    sys.exit(main())
