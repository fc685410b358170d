"""What the figures of a benchmark mean: ratios and targets, bench.md and bench.svg."""

from __future__ import annotations

import json
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.chart import Bar, Kind, Panel, draw
from tests.bench.names import CELERY, LIMIT, NAIVE, OURS, PGBENCH, PLAIN, RIVAL

OPERATIONS: Final = (1, 10)
ORGANIZATIONS: Final = (1, 8, 200)
READ_TAGS: Final = 50
SLOW_RATE: Final = 90
"""Batches a second at which the latency of all is measured."""
FAST_RATE: Final = 600
"""The same for those that apply a quarter more than that."""

Results = dict[str, Any]
Spread = dict[str, Any]
"""A figure of all rounds: median, min, max, rounds."""

# --- Ratios --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure of bench.json, what it means, and what is to be reached."""

    key: str
    words: str
    least: float | None = None
    most: float | None = None
    is_contest: bool = False
    """Whether it compares with another contender, so that 1 is a draw."""

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    def verdict(self, figure: float | None) -> str:
        if figure is None:
            return "not measured"
        if self.least is not None:
            reached, lost = figure >= self.least, figure < 1
        else:
            assert self.most is not None
            reached, lost = figure <= self.most, figure > 1
        return "**no, it loses**" if self.is_contest and lost else "yes" if reached else "**no**"


def _latency_targets() -> list[Target]:
    return [
        Target(
            f"latency_{cut}_ratio_to_best_at_{rate}",
            f"latency {cut} at {rate}/s ÷ the best of all others",
            most=1.0,
            is_contest=True,
        )
        for rate in (SLOW_RATE, FAST_RATE)
        for cut in ("p50", "p95")
    ]


TARGETS: Final = (
    Target(
        "throughput_ratio_to_best_single",
        "batches/s ÷ the best of those with one transaction for each batch, 8 organizations, "
        "the smaller of 1 and 10 operations",
        least=9,
        is_contest=True,
    ),
    Target(
        "throughput_ratio_to_best_grouping",
        f"batches/s ÷ the {RIVAL}'s, the smallest of 1, 8 and 200 organizations with 1 and 10 "
        "operations",
        least=1.15,
        is_contest=True,
    ),
    Target(
        "tiny_organizations_ratio_to_grouping",
        "the same, 10,000 organizations with one batch of 1 operation each",
        least=1.2,
        is_contest=True,
    ),
    Target(
        "throughput_ratio_to_limit",
        "batches/s ÷ the limit's, 10 operations, 8 organizations",
        least=0.55,
    ),
    Target(
        "one_organization_ratio_to_eight",
        "batches/s of 1 organization ÷ of 8, 10 operations",
        least=0.8,
    ),
    *_latency_targets(),
    Target(
        "cpu_ratio_at_90",
        "processor time of a batch at 90/s, with that of PostgreSQL and Valkey, ÷ the best of "
        "those with one transaction for each batch",
        most=0.7,
        is_contest=True,
    ),
    Target(
        "enqueue_ratio_to_celery",
        "batches enqueued/s ÷ Celery's `apply_async`",
        least=5,
        is_contest=True,
    ),
    Target("read_ratio_to_limit", f"reads/s ÷ pgbench's, {READ_TAGS} tags", least=0.7),
    Target(
        "read_ratio_to_plain", f"reads/s ÷ {PLAIN}'s, {READ_TAGS} tags", least=1, is_contest=True
    ),
    Target(
        "read_ratio_to_naive", f"reads/s ÷ {NAIVE}'s, {READ_TAGS} tags", least=4, is_contest=True
    ),
    Target(
        "read_not_modified_ratio", f"reads/s with 304 ÷ full answers, {READ_TAGS} tags", least=3
    ),
    Target(
        "growth_ratio",
        "time for each batch of 10 operations, 1,000,000 tags and 200 organizations ÷ 0 and 8",
        most=1.3,
    ),
    Target("growth_ratio_10m", "the same, 10,000,000 tags", most=1.2),
    Target("worker_memory_mb", "memory of a worker at the end, MB", most=130),
)


@dataclass(frozen=True)
class Figure:
    """A figure of bench.json; None is what was not measured."""

    value: float | None
    where: str = ""
    """With which load it was so, or whose figure is compared with."""


def ratios(results: Results) -> dict[str, float | None]:
    """Return the flat figures of bench.json; None is what was not measured."""
    return {key: figure.value for key, figure in _figures(results).items()}


def _figures(results: Results) -> dict[str, Figure]:
    limit = _under(results.get("limit"), "batches_per_second")
    full, unchanged = _read(results, OURS), _read(results, OURS, not_modified=True)
    enqueue = {row["contender"]: row["batches_per_second"] for row in results.get("enqueue", [])}
    ten = _throughput(results, OURS, 10)
    grown = {
        tags: _throughput(results, OURS, 10, organizations=200, prefilled=tags)
        for tags in (1_000_000, 10_000_000)
    }
    memory = _under(_find(results.get("memory", []), contender=OURS), "worker_mb")
    return {
        **_to_singles(results),
        **_to_grouping(results),
        "throughput_ratio_to_limit": Figure(_ratio(ten, limit)),
        "one_organization_ratio_to_eight": Figure(
            _ratio(_throughput(results, OURS, 10, organizations=1), ten)
        ),
        **{
            f"latency_{cut}_ratio_to_best_at_{rate}": _to_least(results, rate, f"{cut}_ms")
            for rate in (SLOW_RATE, FAST_RATE)
            for cut in ("p50", "p95")
        },
        "cpu_ratio_at_90": _to_least(results, SLOW_RATE, "cpu_ms_per_batch", but=(RIVAL,)),
        "enqueue_ratio_to_celery": Figure(_ratio(enqueue.get(OURS), enqueue.get(CELERY))),
        "read_ratio_to_limit": Figure(_ratio(full, _read(results, PGBENCH))),
        "read_ratio_to_plain": Figure(_ratio(full, _read(results, PLAIN))),
        "read_ratio_to_naive": Figure(_ratio(full, _read(results, NAIVE))),
        "read_not_modified_ratio": Figure(_ratio(unchanged, full)),
        "growth_ratio": Figure(_ratio(ten, grown[1_000_000])),  # time is the inverse
        "growth_ratio_10m": Figure(_ratio(ten, grown[10_000_000])),
        "worker_memory_mb": Figure(None if memory is None else _median(memory)),
    }


def _to_singles(results: Results) -> dict[str, Figure]:
    """Compare with the best of those that have one transaction for each batch."""
    each = {}
    for operations in OPERATIONS:
        rows = _matching(
            results.get("throughput", []), operations=operations, organizations=8, prefilled=0
        )
        row = max(_others(rows, RIVAL), key=lambda row: _median(row[_RATE]), default=None)
        ratio = _ratio(_throughput(results, OURS, operations), _under(row, _RATE))
        where = f"{row['contender']}, {_operations(operations)}" if row else ""
        each[f"throughput_ratio_to_best_single_{operations}"] = Figure(ratio, where)
    return {"throughput_ratio_to_best_single": _smallest(each.values()), **each}


def _to_grouping(results: Results) -> dict[str, Figure]:
    """Compare with the rival that groups, with its batches in the order that is best for it."""

    def compare(operations: int, organizations: int) -> Figure:
        load: dict[str, Any] = {"operations": operations, "organizations": organizations}
        rival = _throughput(results, RIVAL, **load, by_organization=True)
        where = f"{_organizations(organizations)}, {_operations(operations)}"
        return Figure(_ratio(_throughput(results, OURS, **load), rival), where)

    each = {
        f"throughput_ratio_to_grouping_{organizations}_{operations}": compare(
            operations, organizations
        )
        for organizations in ORGANIZATIONS
        for operations in OPERATIONS
    }
    return {
        "throughput_ratio_to_best_grouping": _smallest(each.values()),
        **each,
        "tiny_organizations_ratio_to_grouping": Figure(compare(1, 10_000).value),
    }


def _smallest(figures: Iterable[Figure]) -> Figure:
    """Return the smallest figure, with all places where the others are better, or else its own."""
    known = [(each.value, each.where) for each in figures if each.value is not None]
    if not known:
        return Figure(None)
    lost = [f"{where}: {_number(value)}" for value, where in sorted(known) if value < 1]
    value, where = min(known)
    return Figure(value, "; ".join(lost) or where)


def _to_least(results: Results, rate: int, figure: str, but: Sequence[str] = ()) -> Figure:
    """Compare with the contender whose figure at a rate is the smallest."""
    rows = _matching(results.get("latency", []), rate=rate)
    least = min(_others(rows, *but), key=lambda row: _median(row[figure]), default=None)
    ratio = _ratio(_under(_find(rows, contender=OURS), figure), _under(least, figure))
    return Figure(ratio, least["contender"] if least else "")


_RATE: Final = "batches_per_second"


def _operations(number: int) -> str:
    return f"{number} operation{'s' * (number > 1)}"


def _organizations(number: int) -> str:
    return f"{number:,} organization{'s' * (number > 1)}"


def _others(rows: Iterable[Results], *but: str) -> list[Results]:
    return [row for row in rows if row["contender"] not in (OURS, *but)]


def _ratio(above: Spread | None, below: Spread | None) -> float | None:
    """Return the median of the rounds' ratios: what slows a whole round then counts for both."""
    if above is None or below is None:
        return None
    pairs = list(zip(above["rounds"], below["rounds"], strict=False))
    if pairs and len(above["rounds"]) == len(below["rounds"]) and all(low for _, low in pairs):
        return float(statistics.median(high / low for high, low in pairs))
    return _median(above) / _median(below) if below["median"] else None


def _throughput(
    results: Results,
    contender: str,
    operations: int,
    organizations: int = 8,
    prefilled: int = 0,
    by_organization: bool = False,
) -> Spread | None:
    row = _find(
        results.get("throughput", []),
        contender=contender,
        operations=operations,
        organizations=organizations,
        prefilled=prefilled,
        by_organization=by_organization,
    )
    return _under(row, _RATE)


def _read(results: Results, contender: str, not_modified: bool = False) -> Spread | None:
    row = _find(
        results.get("read", []),
        contender=contender,
        tags=READ_TAGS,
        not_modified=not_modified,
        kind="tags",
    )
    return _under(row, "requests_per_second")


def _matching(rows: Iterable[Results], **wanted: Any) -> list[Results]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _find(rows: Iterable[Results], **wanted: Any) -> Results | None:
    return next(iter(_matching(rows, **wanted)), None)


def _under(row: Results | None, figure: str) -> Spread | None:
    return None if row is None else row.get(figure)


def _median(figure: Spread) -> float:
    median: float = figure["median"]
    return median


# --- The document --------------------------------------------------------------------------------


def write(results: Results, directory: Path) -> None:
    """Write bench.md and bench.svg into a directory."""
    sections = (_reach, _throughputs, _latencies, _enqueues, _costs, _reads, _circumstances)
    head = _HEAD.format(rounds=results.get("rounds", "?"), command=_command(results))
    parts = [head, *(section(results) for section in sections)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    (directory / "bench.svg").write_text(_chart(results))


_HEAD: Final = """# Benchmark

Written by `{command}`; don't edit. One run on one machine: every contender has the same PostgreSQL
and the same Valkey, and is measured in turn in each round. Figures are medians of the rounds
({rounds}), with the smallest and the largest in parentheses; a ratio is the median of the rounds'
ratios.

![bars of throughput, latency and reads](bench.svg)"""


def _command(results: Results) -> str:
    options = {"full": " FULL=1", "smoke": " SMOKE=1"}
    return f"make bench{options.get(results.get('mode', ''), '')}"


def _reach(results: Results) -> str:
    found = _figures(results)
    rows = []
    for target in TARGETS:
        figure = found[target.key]
        rows.append(
            [
                target.words,
                f"`{target.key}`",
                figure.where,
                _number(figure.value),
                target.wanted,
                target.verdict(figure.value),
            ]
        )
    heads = ["what", "in `build/bench.json`", "against, or where", "figure", "target", "reached"]
    return _section(
        "Ratios",
        "Where task tags loses against another contender, *reached* says so.",
        _table(heads, rows, left=3),
        f"The {RIVAL} is what a user would write who wants speed and no queue: one Redis stream, "
        "and processes that take 100 entries and apply those of each organization in one "
        "transaction, with the rules and SQL that task tags had once "
        "(`tests/bench/peers/grouping_stream.py`). It is compared with its batches enqueued by "
        "organization, which is best for it. With several processes it keeps no order of an "
        "organization's batches. Only task tags and DBOS do.",
    )


def _throughputs(results: Results) -> str:
    rows = results.get("throughput", [])
    by_peer = []
    for contender in _contenders(_matching(rows, organizations=8, prefilled=0)):
        figures = [_throughput(results, contender, n) for n in OPERATIONS]
        by_peer.append([contender, *map(_spread, figures)])
    if any(row["by_organization"] for row in rows):
        figures = [_throughput(results, RIVAL, n, by_organization=True) for n in OPERATIONS]
        by_peer.append([_BY_ORGANIZATION, *map(_spread, figures)])
    limit = results.get("limit")
    if limit is not None:
        of_limit = {limit["operations"]: _spread(limit["batches_per_second"])}
        by_peer.append([_LIMIT_WORDS, *(of_limit.get(n, "") for n in OPERATIONS)])
    heads = [
        *("tags before", "organizations", "operations"),
        *(OURS, _BY_ORGANIZATION, RIVAL, f"{OURS} ÷ {_BY_ORGANIZATION}"),
    ]
    return _section(
        "Throughput",
        "Batches per second from the first enqueue to the last result received, "
        "with 8 organizations and an empty table. Organizations take turns, unless it says "
        "otherwise.",
        _table(["", "batches/s, 1 operation", "batches/s, 10 operations"], by_peer),
        "Batches per second with every load:",
        _table(heads, _every_load(results), left=0),
    )


def _every_load(results: Results) -> list[list[str]]:
    names = ("prefilled", "organizations", "operations")
    rows = _matching(results.get("throughput", []), contender=OURS)
    every = []
    for row in sorted(rows, key=operator.itemgetter(*names)):
        load = {name: row[name] for name in names}
        ours = _throughput(results, OURS, **load)
        best = _throughput(results, RIVAL, **load, by_organization=True)
        in_turns = _throughput(results, RIVAL, **load)
        ratio = _ratio(ours, best)
        figures = [*map(_spread, (ours, best, in_turns)), _number(ratio) if ratio else ""]
        every.append([*(f"{load[name]:,}" for name in names), *figures])
    return every


_BY_ORGANIZATION: Final = f"{RIVAL}, by organization"
_LIMIT_WORDS: Final = "*limit: the same rows by COPY, one connection, 1,000 in a transaction*"


def _latencies(results: Results) -> str:
    figures = ("p50_ms", "p95_ms", "p99_ms", "cpu_ms_per_batch")
    rows = [
        [row["contender"], f"{row['rate']:,}/s", *(_spread(row.get(name)) for name in figures)]
        for row in sorted(results.get("latency", []), key=operator.itemgetter("rate"))
    ]
    return _section(
        "Latency",
        "From enqueue to the result received, in ms, of single batches of 1 operation, and the "
        "processor time that one takes, in ms: user and system time of all processes of the "
        f"contender, PostgreSQL and Valkey. {FAST_RATE}/s is only for those that keep up.",
        _table(["", "batches/s", "p50", "p95", "p99", "CPU / batch"], rows),
    )


def _enqueues(results: Results) -> str:
    rows = [
        [row["contender"], _spread(row["batches_per_second"])] for row in results.get("enqueue", [])
    ]
    return _section(
        "Enqueue",
        "Batches per second that one producer hands over.",
        _table(["", "batches/s"], rows),
    )


_COSTS: Final = {
    "cpu_seconds_per_1000": "CPU s / 1,000 batches",
    "worker_cpu_seconds_per_1000": "of these, workers",
    "peak_memory_mb": "peak memory, MB",
    "wal_bytes_per_batch": "WAL bytes / batch",
    "fsyncs_per_batch": "fsyncs / batch",
}


def _costs(results: Results) -> str:
    """The cost of each batch. Peak memory is of all processes of a contender, no servers."""
    measured = _matching(
        results.get("throughput", []), organizations=8, prefilled=0, by_organization=False
    )
    rows = [
        [row["contender"], f"{row['operations']:,}", *(_spread(row.get(name)) for name in _COSTS)]
        for row in sorted(measured, key=operator.itemgetter("operations"))
        if any(row.get(name) for name in _COSTS)
    ]
    limit = results.get("limit")
    if limit is not None:
        wal = _spread(limit["wal_bytes_per_batch"])
        rows.append([_LIMIT_WORDS, f"{limit['operations']:,}", "", "", "", wal, ""])
    return _section(
        "Cost of a batch",
        "With 8 organizations and an empty table.",
        _table(["", "operations", *_COSTS.values()], rows),
    )


def _reads(results: Results) -> str:
    rows = [
        [
            row["contender"],
            _read_words(row),
            str(row["connections"]),
            *(_spread(row[name]) for name in ("requests_per_second", "p50_ms", "p95_ms")),
        ]
        for row in sorted(results.get("read", []), key=_read_words)
    ]
    return _section(
        "Reads",
        "`GET /task-tags`, or of a work list `GET /task-executions`, by keep-alive connections "
        "that ask again at once, one endpoint process unless it says otherwise. 304 is the answer "
        "to `If-None-Match`. "
        "pgbench is the limit: the endpoint's transaction with prepared statements and no HTTP, "
        "in one pipeline where that is faster.",
        _table(["", "read", "connections", "requests/s", "p50, ms", "p95, ms"], rows),
    )


def _read_words(row: Results) -> str:
    kind = {"page": ", a page of 100", "work list": "work list, a page of 50"}.get(row["kind"], "")
    tags = f"{row['tags']:,} tags" if row["kind"] != "work list" else ""
    return f"{tags}{kind}{', 304' if row['not_modified'] else ''}"


def _circumstances(results: Results) -> str:
    settings = {**results.get("settings", {}), **_reads_settings(results)}
    absent = results.get("absent", {})
    chosen = [
        [name, _words({k: v for k, v in setting.items() if k != "tried"})]
        for name, setting in settings.items()
    ]
    parts = [
        "## Circumstances",
        _list("Machine", results.get("machine", {})),
        _list("Versions", results.get("versions", {})),
        "Settings that were fastest here (all that were tried are in `build/bench.json`):",
        _table(["", "chosen"], chosen, left=2),
        _list("Not measured", absent) if absent else "Nothing that was to be measured is absent.",
    ]
    seconds = results.get("seconds")
    took = f" It took {seconds / 60:,.0f} minutes here." if seconds else ""
    return "\n\n".join(
        [
            *filter(None, parts),
            f"To repeat it: `{_command(results)}`, with nothing else running.{took}",
        ]
    )


def _reads_settings(results: Results) -> dict[str, Any]:
    return {f"{name} (read)": value for name, value in results.get("read_settings", {}).items()}


def _section(title: str, words: str, *parts: str) -> str:
    """Return a section, or nothing if there is nothing to show."""
    return "\n\n".join([f"## {title}", words, *filter(None, parts)]) if any(parts) else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first columns, `left` of them, are words and the others numbers."""
    if not rows:
        return ""
    marks = ["---" if number < left else "--:" for number in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows))


def _list(title: str, entries: dict[str, Any]) -> str:
    lines = [f"- {name}: {_words(value)}" for name, value in entries.items()]
    return "\n".join([f"{title}:", "", *lines]) if lines else ""


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _contenders(rows: Iterable[Results]) -> list[str]:
    """Return ours first, then the others as they come."""
    return sorted(dict.fromkeys(row["contender"] for row in rows), key=lambda name: name != OURS)


def _spread(figure: Spread | None) -> str:
    if figure is None:
        return ""
    if len(figure["rounds"]) < 2:
        return _number(figure["median"])
    return f"{_number(figure['median'])} ({_number(figure['min'])}–{_number(figure['max'])})"


def _number(value: float | None) -> str:
    """Return a number with three significant digits, or more before the decimal point."""
    if value is None:
        return "–"
    if not value:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


# --- The chart -----------------------------------------------------------------------------------


def _chart(results: Results) -> str:
    rounds = results.get("rounds", "?")
    panels = [
        _throughput_panel(results, 10),
        _throughput_panel(results, 1),
        _latency_panel(results, SLOW_RATE),
        _latency_panel(results, FAST_RATE),
        _read_panel(results),
    ]
    return draw(
        "task tags beside what else could do the job",
        f"One run on one machine; bars are medians of {rounds} rounds, "
        "thin lines go from the smallest to the largest.",
        [panel for panel in panels if panel.bars],
        _number,
    )


def _throughput_panel(results: Results, operations: int) -> Panel:
    rows = _matching(
        results.get("throughput", []), operations=operations, organizations=8, prefilled=0
    )
    bars = [_bar(_label(row), row["batches_per_second"]) for row in rows]
    limit = results.get("limit")
    if limit is not None and limit["operations"] == operations:
        bars.append(_bar(LIMIT, limit["batches_per_second"], "limit"))
    plural = "operation" if operations == 1 else "operations"
    return Panel(
        f"Throughput, batches of {operations} {plural}",
        "batches per second, 8 organizations; more is better",
        _sorted(bars, key=lambda bar: -bar.value),
    )


def _label(row: Results) -> str:
    return f"{row['contender']}{', sorted' if row['by_organization'] else ''}"


def _latency_panel(results: Results, rate: int) -> Panel:
    rows = _matching(results.get("latency", []), rate=rate)
    bars = [
        Bar(
            row["contender"],
            _median(row["p50_ms"]),
            _median(row["p50_ms"]),
            _median(row["p95_ms"]),
            "ours" if row["contender"] == OURS else "other",
        )
        for row in rows
    ]
    return Panel(
        f"Latency at {rate} batches/s",
        "enqueue → result, ms: p50, and a thin line to p95; less is better",
        _sorted(bars, key=lambda bar: bar.value),
        cut=True,
    )


def _read_panel(results: Results) -> Panel:
    rows = _matching(results.get("read", []), tags=READ_TAGS, kind="tags")
    bars = [
        _bar(
            f"{row['contender']}{', 304' if row['not_modified'] else ''}",
            row["requests_per_second"],
            _read_kind(row["contender"]),
        )
        for row in rows
        if row["contender"] == OURS or not row["not_modified"]
    ]
    return Panel(
        f"Reads of {READ_TAGS} tags",
        "requests per second; pgbench is the limit; more is better",
        _sorted(bars, key=lambda bar: -bar.value),
    )


def _read_kind(contender: str) -> Kind:
    if contender == PGBENCH:
        return "limit"
    return "ours" if contender.startswith(OURS) else "other"


def _bar(label: str, figure: Spread, kind: Kind | None = None) -> Bar:
    usual: Kind = "ours" if label == OURS else "other"
    return Bar(label, _median(figure), figure["min"], figure["max"], kind or usual)


def _sorted(bars: list[Bar], key: Callable[[Bar], float]) -> list[Bar]:
    """Return the best bar first."""
    return sorted(bars, key=key)
