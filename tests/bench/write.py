"""Measures the write side: throughput, cost, enqueue and latency, in interleaved rounds.

python -m tests.bench.write [--smoke | --full] [--only "Celery;RQ"] [--rounds 1] [--peer-loads]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from tests.bench import collector
from tests.bench import contenders as contest
from tests.bench.contenders import NAMES, Contender, Setting
from tests.bench.load import Batches, Load, prefill
from tests.bench.read import spread
from tests.bench.report import FAST_RATE, SLOW_RATE
from tests.bench.servers import BenchServers, servers
from tests.bench.session import Session, enqueue

TUNED_ON: Final = Load(10, 8)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Which loads are run, and how long.

    A load without batches takes as many as its contender applies in the plan's seconds.
    """

    peers: Sequence[Load]
    """Loads that all run."""
    grouping: Sequence[Load]
    """More loads, for those that apply many batches in one transaction."""
    ours: Sequence[Load]
    """More loads, that only the product runs."""
    seconds: float
    """Of a load of a peer with one transaction for each batch."""
    grouping_seconds: float
    """Of a load of the others. The product takes organizations in turns of a quarter of a second,
    so at the end of a load the last one may be alone with one worker: that must not be a tenth of
    the load."""
    tuning: Mapping[bool, int]
    """Batches of ten operations for each setting of those that group (True), or a peer. Empty:
    none."""
    warm_up: int
    enqueued: int
    latency_seconds: float

    def loads(self, contender: Contender) -> list[Load]:
        """Return what a contender runs; the rival that groups does so with both orders of batches,
        unless an organization is alone or has one batch.
        """
        if contender.ours:
            return [*self.peers, *self.grouping, *self.ours]
        if not contender.groups:
            return list(self.peers)
        both = [*self.peers, *self.grouping]
        in_turns = [load for load in both if 1 < load.organizations != load.batches]
        return [*in_turns, *(replace(load, by_organization=True) for load in both)]


NORMAL: Final = Plan(
    peers=[Load(1, 8), Load(10, 8)],
    grouping=[Load(operations, number) for number in (1, 200) for operations in (1, 10)],
    ours=[Load(100, 8), Load(10, 200, prefilled=1_000_000)],
    seconds=0.8,
    grouping_seconds=2.0,
    tuning={True: 5000, False: 200},
    warm_up=100,
    enqueued=2000,
    latency_seconds=2.0,
)
FULL: Final = replace(
    NORMAL,
    grouping=[*NORMAL.grouping, Load(1, 10_000, 10_000)],
    ours=[
        *(Load(100, number) for number in (1, 8, 200)),
        *(
            Load(operations, 200, prefilled=prefilled)
            for prefilled in (1_000_000, 10_000_000)
            for operations in (1, 10, 100)
        ),
    ],
    seconds=1.5,
    grouping_seconds=2.5,
    latency_seconds=5.0,
)
SMOKE: Final = Plan(
    peers=[Load(1, 8, 48), Load(10, 8, 48)],
    grouping=[Load(10, 1, 48), Load(1, 200, 300), Load(1, 300, 300)],
    ours=[Load(100, 8, 16), Load(10, 200, 200, prefilled=10_000)],
    seconds=0,
    grouping_seconds=0,
    tuning={},
    warm_up=16,
    enqueued=100,
    latency_seconds=0.3,
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
        """Choose the setting that is the fastest with ten operations, by 5 % over those before."""
        self.chosen[contender.name] = dict(contender.settings[0])
        self.tried[contender.name] = []
        if not self.plan.tuning:
            return
        best = 0.0
        batches = self.plan.tuning[contender.ours or contender.groups]
        for setting in contender.settings:
            self.opened.fresh()
            with Session(self.opened, self.batches, contender, setting, self.plan.warm_up) as begun:
                load = replace(TUNED_ON, batches=batches, by_organization=contender.groups)
                ten = begun.throughput(load)["batches_per_second"]
                self.tried[contender.name].append({**setting, "batches_per_second": ten})
                self.say(f"tuning  {contender.name} {_words(setting)}: {ten:.0f} batches/s")
                if ten > 1.05 * best:
                    best = ten
                    fewer = replace(load, operations=1, batches=batches * 2)
                    one = begun.throughput(fewer)["batches_per_second"]
                    self.chosen[contender.name] = dict(setting)
                    self.rates[contender.name] = Rates(one, ten)

    def round(self, contender: Contender) -> None:
        """Run all that a contender has to do in one round."""
        if not contender.answers:
            rate = enqueue(self.opened, self.batches, contender, self.plan.enqueued)
            self.keep("enqueue", contender, {}, {"batches_per_second": rate})
        for prefilled, loads in groupby(self.plan.loads(contender), lambda load: load.prefilled):
            self._loads(contender, list(loads), with_latency=not prefilled)

    def _loads(self, contender: Contender, loads: Sequence[Load], *, with_latency: bool) -> None:
        """Run loads on the same initial table with the same workers."""
        self.opened.fresh(loads[0].template)
        setting = self.chosen[contender.name]
        with Session(self.opened, self.batches, contender, setting, self.plan.warm_up) as begun:
            for load in loads:
                sized = self.sized(contender, load)
                found = begun.throughput(sized)
                self.keep("throughput", contender, asdict(sized), found)
                speed = f"{found['batches_per_second']:.0f} batches/s"
                self.say(f"{contender.name}: {load}: {speed} ({sized.batches} batches)")
            if with_latency:
                self._latencies(contender, begun)
                if contender.ours:
                    memory = {"worker_mb": begun.workers.memory_mb()}
                    self.keep("memory", contender, {}, memory)

    def _latencies(self, contender: Contender, begun: Session) -> None:
        for rate in (SLOW_RATE, FAST_RATE):
            if rate == FAST_RATE and not self._keeps_up(contender):
                continue
            found = begun.latency(rate, round(rate * self.plan.latency_seconds))
            self.keep("latency", contender, {"rate": rate}, found)
            self.say(f"{contender.name}: latency at {rate}/s: p50 {found['p50_ms']:.1f} ms")

    def _keeps_up(self, contender: Contender) -> bool:
        rates = self.rates.get(contender.name)
        if rates is None:  # it was not tuned: a smoke run
            return contender.ours or contender.groups
        return rates.one >= 1.25 * FAST_RATE

    def sized(self, contender: Contender, load: Load) -> Load:
        """Return the load with as many batches as this contender applies in the plan's seconds."""
        if load.batches:
            return load
        grouping = contender.ours or contender.groups
        seconds = self.plan.grouping_seconds if grouping else self.plan.seconds
        rates = self.rates[contender.name]
        rate = {1: rates.one, 10: rates.ten, 100: rates.ten / 6}[load.operations]
        if load.organizations == 1:
            rate *= 0.7
        if contender.groups and load.organizations > 100 and not load.by_organization:
            rate /= 6  # nearly every batch has a transaction
        return replace(load, batches=max(round(rate * seconds / 100) * 100, 200))

    def keep(
        self, kind: str, contender: Contender, row: dict[str, Any], found: Mapping[str, float]
    ) -> None:
        key = (kind, contender.name, *(str(row[each]) for each in row if each not in _VARYING))
        self.rows[key] = {"contender": contender.name, **row}
        for name, value in found.items():
            self.figures.setdefault(key, {}).setdefault(name, []).append(value)

    def result(self) -> dict[str, Any]:
        kinds: dict[str, list[dict[str, Any]]] = {
            kind: [] for kind in ("throughput", "enqueue", "latency", "memory")
        }
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


_VARYING: Final = ("batches",)
"""What is not part of a row's identity."""


def run(
    opened: BenchServers,
    rounds: int = 5,
    names: Iterable[str] = NAMES,
    plan: Plan = NORMAL,
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
    templates = {load.template: load for load in plan.ours if load.prefilled}
    for load in templates.values() if any(each.ours for each in contenders) else ():
        begin = time.monotonic()
        prefill(opened, load)
        say(f"a database of {load.prefilled:,} tags, made in {time.monotonic() - begin:.0f} s")
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


def _words(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


# --- By hand -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny loads, no tuning")
    parser.add_argument("--full", action="store_true", help="more loads, and longer ones")
    parser.add_argument("--only", help=f"some of: {', '.join(NAMES)}; separated by semicolons")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer-loads", action="store_true", help="only the loads that all run")
    arguments = parser.parse_args()
    names = arguments.only.split(";") if arguments.only else NAMES
    plan = SMOKE if arguments.smoke else FULL if arguments.full else NORMAL
    if arguments.peer_loads:
        plan = replace(plan, grouping=[], ours=[])
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
            f"{row['contender']:<22} {row['operations']:>4} ops {row['organizations']:>5} orgs"
            f"{' sorted' if row['by_organization'] else '':<7} "
            f"{row['prefilled']:>8} tags {row['batches']:>6} batches"
            + "".join(f"  {short} {row[name]['median']:.5g}" for name, short in _SHORT.items())
        )
    for row in result["enqueue"]:
        print(f"{row['contender']:<22} enqueue {row['batches_per_second']['median']:.0f}/s")
    for row in result["latency"]:
        cuts = "  ".join(f"p{p} {row[f'p{p}_ms']['median']:.1f} ms" for p in (50, 95, 99))
        cpu = f"cpu {row['cpu_ms_per_batch']['median']:.2f} ms"
        print(f"{row['contender']:<22} {row['rate']:>6.0f}/s  {cuts}  {cpu}")
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
