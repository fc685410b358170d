"""Measures the write side: throughput, cost, enqueue and latency, in interleaved rounds.

python -m tests.bench.write [--smoke] [--only "Celery;RQ"] [--rounds 1]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tests.bench import collector
from tests.bench import contenders as contest
from tests.bench.contenders import NAMES, Contender, Setting
from tests.bench.load import MILLION, PREFILLED, Batches, Load, prefill
from tests.bench.names import OURS, OWN_LOAD, SAME_RATE
from tests.bench.read import spread
from tests.bench.servers import EMPTY, BenchServers, servers
from tests.bench.session import Session, enqueue

TUNED_ON: Final = Load(10, 8, 0)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Which loads are run, and how long. `seconds` None takes the loads' own batches."""

    peers: Sequence[Load]
    ours: Sequence[Load]
    """More loads, that only the product runs."""
    seconds: float | None
    our_seconds: float
    """The same for the product, with the loads that all run. It takes organizations in turns of a
    quarter of a second, so at the end of a load the last one may be alone with one worker: that
    must not be a tenth of the load."""
    wide_seconds: float
    """The same for the loads that only the product runs. With ten operations and many organizations
    it is four times as long, for each of them to have several groups: growth is measured there."""
    tuning: Mapping[bool, int]
    """Batches of ten operations for each setting of the product (True) or a peer. Empty: none."""
    warm_up: int
    enqueued: int
    latency_seconds: float
    latency_samples: int
    """At least so many batches, however long that takes; at most four times as many."""


FULL: Final = Plan(
    peers=[Load(1, 8, 0), Load(10, 8, 0)],
    ours=[
        Load(operations, organizations, 0, prefilled)
        for prefilled in (0, PREFILLED)
        for organizations in (1, 8, 200)
        for operations in (1, 10, 100)
        if (prefilled, organizations, operations) not in {(0, 8, 1), (0, 8, 10)}
    ],
    seconds=0.8,
    our_seconds=2.5,
    wide_seconds=0.5,
    tuning={True: 5000, False: 200},
    warm_up=100,
    enqueued=2000,
    latency_seconds=1.0,
    latency_samples=25,
)
SMOKE: Final = Plan(
    peers=[Load(1, 8, 48), Load(10, 8, 48)],
    ours=[Load(10, 1, 48), Load(100, 8, 16), Load(1, 200, 200)],
    seconds=None,
    our_seconds=0,
    wide_seconds=0,
    tuning={},
    warm_up=16,
    enqueued=100,
    latency_seconds=0.2,
    latency_samples=10,
)


# --- All rounds ----------------------------------------------------------------------------------


@dataclass
class Rates:
    """What a contender reached while it was tuned, in batches a second."""

    one: float
    ten: float


@dataclass
class Run:
    """A run of the whole write side, and what it has found so far."""

    opened: BenchServers
    plan: Plan
    say: Say
    batches: Batches
    contenders: list[Contender]
    absent: dict[str, str]
    chosen: dict[str, Setting] = field(default_factory=dict)
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rates: dict[str, Rates] = field(default_factory=dict)
    figures: dict[tuple[str, ...], dict[str, list[float]]] = field(default_factory=dict)
    """Values of all rounds, by kind, contender and other keys of a row."""
    rows: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def each(self, step: Callable[[Contender], None]) -> None:
        """Do something for each contender in turn. A peer that fails is named and left out."""
        for contender in list(self.contenders):
            try:
                step(contender)
            except Exception as error:
                if contender.ours:
                    raise
                reason = f"{type(error).__name__}: {error}"
                self.say(f"{contender.name} is left out: {reason}")
                self.contenders.remove(contender)
                self.absent[contender.name] = reason

    def tune(self, contender: Contender) -> None:
        """Choose the setting that is the fastest with ten operations."""
        self.chosen[contender.name] = dict(contender.settings[0])
        self.tried[contender.name] = []
        if not self.plan.tuning:
            return
        best = 0.0
        batches = self.plan.tuning[contender.ours]
        for setting in contender.settings:
            self.opened.fresh()
            with Session(self.opened, self.batches, contender, setting, self.plan.warm_up) as begun:
                load = replace(TUNED_ON, batches=batches)
                ten = begun.throughput(load)["batches_per_second"]
                self.tried[contender.name].append({**setting, "batches_per_second": ten})
                self.say(f"tuning  {contender.name} {_words(setting)}: {ten:.0f} batches/s")
                if ten > best:
                    best = ten
                    one = begun.throughput(Load(1, 8, batches * 2))["batches_per_second"]
                    self.chosen[contender.name] = dict(setting)
                    self.rates[contender.name] = Rates(one, ten)

    def round(self, contender: Contender) -> None:
        """Run all that a contender has to do in one round."""
        if not contender.answers:
            rate = enqueue(self.opened, self.batches, contender, self.plan.enqueued)
            self.keep("enqueue", contender, {}, {"batches_per_second": rate})
        own = [load for load in self.plan.ours if contender.ours]
        self._loads(contender, [*self.plan.peers, *(load for load in own if not load.prefilled)])
        if prefilled := [load for load in own if load.prefilled]:
            self._loads(contender, prefilled)

    def _loads(self, contender: Contender, loads: Sequence[Load]) -> None:
        """Run loads on the same initial table with the same workers; latency on the empty one."""
        self.opened.fresh(MILLION if loads[0].prefilled else EMPTY)
        setting = self.chosen[contender.name]
        with Session(self.opened, self.batches, contender, setting, self.plan.warm_up) as begun:
            for load in loads:
                sized = self.length_prefixed(contender, load)
                found = begun.throughput(sized)
                self.keep("throughput", contender, _row(sized), found)
                speed = f"{found['batches_per_second']:.0f} batches/s"
                self.say(f"{contender.name}: {load}: {speed} ({sized.batches} batches)")
            if not loads[0].prefilled:
                self._latencies(contender, begun)

    def _latencies(self, contender: Contender, begun: Session) -> None:
        peers = [rates.one for name, rates in self.rates.items() if name != OURS]
        own = self.rates.get(contender.name, Rates(200, 200)).one
        for load, of in ((SAME_RATE, max(peers, default=own)), (OWN_LOAD, own)):
            if load == OWN_LOAD and contender.name not in self.rates:
                continue  # it was not tuned: a smoke run
            rate, least = of / 10, self.plan.latency_samples
            count = round(min(max(rate * self.plan.latency_seconds, least), least * 4))
            found = begun.latency(rate, count)
            self.keep("latency", contender, {"load": load, "rate": rate}, found)
            self.say(f"{contender.name}: latency at {rate:.0f}/s: p50 {found['p50_ms']:.1f} ms")

    def length_prefixed(self, contender: Contender, load: Load) -> Load:
        """Return the load with as many batches as this contender applies in the plan's seconds."""
        if self.plan.seconds is None:
            return load
        seconds = self.plan.our_seconds if contender.ours else self.plan.seconds
        if load in self.plan.ours:
            seconds = self.plan.wide_seconds
        rates = self.rates[contender.name]
        rate = {1: rates.one, 10: rates.ten, 100: rates.ten / 6}[load.operations]
        if load.organizations == 1:
            rate *= 0.7
        if load.operations == 10 and load.organizations > 100:
            seconds *= 4
        return replace(load, batches=max(round(rate * seconds / 100) * 100, 200))

    def keep(
        self, kind: str, contender: Contender, row: dict[str, Any], found: Mapping[str, float]
    ) -> None:
        key = (kind, contender.name, *(str(row[each]) for each in row if each not in _VARYING))
        self.rows[key] = {"contender": contender.name, **row}
        for name, value in found.items():
            self.figures.setdefault(key, {}).setdefault(name, []).append(value)

    def result(self) -> dict[str, Any]:
        kinds: dict[str, list[dict[str, Any]]] = {"throughput": [], "enqueue": [], "latency": []}
        for key, row in self.rows.items():
            if key[1] not in self.absent:
                found = {
                    name: spread([round(value, 4) for value in values])
                    for name, values in self.figures[key].items()
                }
                kinds[key[0]].append({**row, **found})
        settings = {
            name: {**setting, "tried": self.tried[name]}
            for name, setting in self.chosen.items()
            if name not in self.absent
        }
        return {"settings": settings, "absent": self.absent, **kinds}


_VARYING: Final = ("batches", "rate")
"""What is not part of a row's identity."""


def run(
    opened: BenchServers,
    rounds: int = 5,
    names: Iterable[str] = NAMES,
    plan: Plan = FULL,
    say: Say = print,
    first: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Tune contenders, then run whole rounds of all; return the figures.

    `first` is called in each round before the rest.
    """
    _prepare_this_process(opened)
    contenders, absent = contest.find(names)
    for name, reason in absent.items():
        say(f"{name} is left out: {reason}")
    going = Run(opened, plan, say, Batches(opened), contenders, absent)
    if any(load.prefilled for load in plan.ours) and any(each.ours for each in contenders):
        begin = time.monotonic()
        prefill(opened)
        say(f"a database of {PREFILLED:,} tags, made in {time.monotonic() - begin:.0f} s")
    going.each(going.tune)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        first()
        going.each(going.round)
    return going.result()


def _prepare_this_process(opened: BenchServers) -> None:
    """Set what contenders read from the environment, and freeze what exists at the start."""
    os.environ.update(opened.environment())
    os.environ["BENCH_OWNER_URL"] = opened.database_url()
    os.environ["BENCH_SOCKET"] = str(Path(opened.directory) / "direct.sock")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    collector.freeze()


def _row(load: Load) -> dict[str, Any]:
    return {
        "operations": load.operations,
        "organizations": load.organizations,
        "prefilled": load.prefilled,
        "batches": load.batches,
    }


def _words(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


# --- By hand -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny loads, no tuning")
    parser.add_argument("--only", help=f"some of: {', '.join(NAMES)}; separated by semicolons")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer-loads", action="store_true", help="only the loads that all run")
    arguments = parser.parse_args()
    names = arguments.only.split(";") if arguments.only else NAMES
    plan = SMOKE if arguments.smoke else FULL
    if arguments.peer_loads:
        plan = replace(plan, ours=[])
    begin = time.monotonic()
    with servers() as opened:
        result = run(opened, arguments.rounds, names, plan)
    print_result(result)
    print(f"{time.monotonic() - begin:.0f} s")


def print_result(result: Mapping[str, Any]) -> None:
    for name, setting in result["settings"].items():
        print(f"{name:<22} {_words({k: v for k, v in setting.items() if k != 'tried'})}")
    for row in result["throughput"]:
        print(
            f"{row['contender']:<22} {row['operations']:>4} ops {row['organizations']:>4} orgs "
            f"{row['prefilled']:>8} tags {row['batches']:>6} batches"
            + "".join(f"  {short} {row[name]['median']:.5g}" for name, short in _SHORT.items())
        )
    for row in result["enqueue"]:
        print(f"{row['contender']:<22} enqueue {row['batches_per_second']['median']:.0f}/s")
    for row in result["latency"]:
        cuts = "  ".join(f"p{p} {row[f'p{p}_ms']['median']:.1f} ms" for p in (50, 95, 99))
        print(f"{row['contender']:<22} {row['load']:<16} {row['rate']:>6.0f}/s  {cuts}")
    for name, reason in result["absent"].items():
        print(f"{name:<22} absent: {reason}")


_SHORT: Final = {
    "batches_per_second": "b/s",
    "cpu_seconds_per_1000": "cpu",
    "worker_cpu_seconds_per_1000": "worker cpu",
    "peak_memory_mb": "MB",
    "wal_bytes_per_batch": "WAL",
    "fsyncs_per_batch": "fsyncs",
}


if __name__ == "__main__":
    main()
