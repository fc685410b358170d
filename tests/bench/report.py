"""What the figures of a benchmark mean: ratios and targets, docs/bench.md and docs/bench.svg."""

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
from tests.bench.names import CELERY, LIMIT, NAIVE, OURS, OWN_LOAD, PGBENCH, SAME_RATE

PEER_OPERATIONS: Final = (1, 10)
READ_TAGS: Final = 50

Results = dict[str, Any]
Spread = dict[str, Any]
"""A figure of all rounds: median, min, max, rounds."""

# --- Ratios --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A ratio of bench.json, what it means, and what is to be reached."""

    key: str
    words: str
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    def reached(self, ratio: float) -> bool:
        if self.least is not None:
            return ratio >= self.least
        return self.most is None or ratio <= self.most


TARGETS: Final = (
    Target(
        "throughput_ratio_to_best_peer",
        "batches/s ÷ the best peer's, the smaller of 1 and 10 operations",
        least=8,
    ),
    Target(
        "throughput_ratio_to_limit",
        "batches/s ÷ the limit's, 10 operations, 8 organizations",
        least=0.4,
    ),
    Target(
        "latency_p50_ratio_to_best_peer",
        "latency p50 ÷ the best peer's, all at the same rate",
        most=1.0,
    ),
    Target(
        "latency_p50_ratio_to_best_peer_at_own_load",
        "the same, each at 10 % of its own throughput",
        most=1.0,
    ),
    Target("enqueue_ratio_to_celery", "batches enqueued/s ÷ Celery's `apply_async`", least=5),
    Target("read_ratio_to_limit", f"reads/s ÷ pgbench's, {READ_TAGS} tags", least=0.3),
    Target("read_ratio_to_naive", f"reads/s ÷ FastAPI + ORM's, {READ_TAGS} tags", least=4),
    Target(
        "read_not_modified_ratio", f"reads/s with 304 ÷ full answers, {READ_TAGS} tags", least=2
    ),
    Target(
        "growth_ratio",
        "time for each batch of 10 operations, 1,000,000 tags and 200 organizations ÷ 0 and 8",
        most=1.3,
    ),
)


def ratios(results: Results) -> dict[str, float | None]:
    """Return the flat figures of bench.json; None is what was not measured."""
    limit = _under(results.get("limit"), "batches_per_second")
    full, unchanged = _read(results, OURS), _read(results, OURS, not_modified=True)
    enqueue = {row["contender"]: row["batches_per_second"] for row in results.get("enqueue", [])}
    each = {
        f"throughput_ratio_to_best_peer_{operations}": _ratio(
            _throughput(results, OURS, operations), _best_throughput(results, operations)
        )
        for operations in PEER_OPERATIONS
    }
    grown = _throughput(results, OURS, 10, organizations=200, prefilled=1_000_000)
    return {
        "throughput_ratio_to_best_peer": min(
            (r for r in each.values() if r is not None), default=None
        ),
        **each,
        "throughput_ratio_to_limit": _ratio(_throughput(results, OURS, 10), limit),
        "latency_p50_ratio_to_best_peer": _latency_ratio(results, SAME_RATE),
        "latency_p50_ratio_to_best_peer_at_own_load": _latency_ratio(results, OWN_LOAD),
        "enqueue_ratio_to_celery": _ratio(enqueue.get(OURS), enqueue.get(CELERY)),
        "read_ratio_to_limit": _ratio(full, _read(results, PGBENCH)),
        "read_ratio_to_naive": _ratio(full, _read(results, NAIVE)),
        "read_not_modified_ratio": _ratio(unchanged, full),
        "growth_ratio": _ratio(_throughput(results, OURS, 10), grown),  # time is the inverse
    }


def _ratio(above: Spread | None, below: Spread | None) -> float | None:
    """Return the median of the rounds' ratios: what slows a whole round then counts for both."""
    if above is None or below is None:
        return None
    pairs = list(zip(above["rounds"], below["rounds"], strict=False))
    if pairs and len(above["rounds"]) == len(below["rounds"]) and all(low for _, low in pairs):
        return float(statistics.median(high / low for high, low in pairs))
    return _median(above) / _median(below) if below["median"] else None


def _throughput(
    results: Results, contender: str, operations: int, organizations: int = 8, prefilled: int = 0
) -> Spread | None:
    row = _find(
        results.get("throughput", []),
        contender=contender,
        operations=operations,
        organizations=organizations,
        prefilled=prefilled,
    )
    return _under(row, "batches_per_second")


def _best_throughput(results: Results, operations: int) -> Spread | None:
    rows = _matching(
        results.get("throughput", []), operations=operations, organizations=8, prefilled=0
    )
    of_peers = [row["batches_per_second"] for row in rows if row["contender"] != OURS]
    return max(of_peers, key=_median, default=None)


def _latency_ratio(results: Results, load: str) -> float | None:
    rows = _matching(results.get("latency", []), load=load)
    of_peers = [row["p50_ms"] for row in rows if row["contender"] != OURS]
    ours = _under(_find(rows, contender=OURS), "p50_ms")
    return _ratio(ours, min(of_peers, key=_median, default=None))


def _read(results: Results, contender: str, not_modified: bool = False) -> Spread | None:
    row = _find(
        results.get("read", []), contender=contender, tags=READ_TAGS, not_modified=not_modified
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
    parts = [_HEAD.format(rounds=results.get("rounds", "?")), *(s(results) for s in sections)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    (directory / "bench.svg").write_text(_chart(results))


_HEAD: Final = """# Benchmark

Written by `make bench`; don't edit. One run on one machine: every contender has the same PostgreSQL
and the same Valkey, and is measured in turn in each round. Figures are medians of the rounds
({rounds}), with the smallest and the largest in parentheses; a ratio is the median of the rounds'
ratios.

![bars of throughput, latency and reads](bench.svg)"""


def _reach(results: Results) -> str:
    found = ratios(results)
    rows = []
    for target in TARGETS:
        ratio = found[target.key]
        verdict = (
            "not measured" if ratio is None else ("yes" if target.reached(ratio) else "**no**")
        )
        rows.append([target.words, f"`{target.key}`", _number(ratio), target.wanted, verdict])
    each = [
        f"{operations} operation{'s' * (operations > 1)}: {_number(ratio)}"
        for operations in PEER_OPERATIONS
        if (ratio := found[f"throughput_ratio_to_best_peer_{operations}"]) is not None
    ]
    return "\n\n".join(
        [
            "## Ratios",
            _table(["what", "in `build/bench.json`", "ratio", "target", "reached"], rows, left=2),
            *([f"Throughput ÷ the best peer's, one by one: {'; '.join(each)}."] if each else []),
        ]
    )


def _throughputs(results: Results) -> str:
    rows = results.get("throughput", [])
    peers = _matching(rows, organizations=8, prefilled=0)
    by_peer = [
        [contender, *(_spread(_throughput(results, contender, n)) for n in PEER_OPERATIONS)]
        for contender in _contenders(peers)
    ]
    limit = results.get("limit")
    if limit is not None:
        escape_terminal = {limit["operations"]: _spread(limit["batches_per_second"])}
        by_peer.append([_LIMIT_WORDS, *(escape_terminal.get(n, "") for n in PEER_OPERATIONS)])
    loads = sorted(
        _matching(rows, contender=OURS),
        key=operator.itemgetter("prefilled", "organizations", "operations"),
    )
    every = [
        [
            *(f"{row[name]:,}" for name in ("prefilled", "organizations", "operations")),
            *(_spread(row.get(name)) for name in ("batches_per_second", "operations_per_second")),
        ]
        for row in loads
    ]
    heads = ["tags before", "organizations", "operations", "batches/s", "operations/s"]
    return _section(
        "Throughput",
        "Batches per second from the first enqueue to the last result received, "
        "with 8 organizations and an empty table.",
        _table(["", "batches/s, 1 operation", "batches/s, 10 operations"], by_peer),
        "task tags with every load:" if every else "",
        _table(heads, every, left=0),
    )


_LIMIT_WORDS: Final = "*limit: the same rows by COPY, one connection, 1,000 in a transaction*"


def _latencies(results: Results) -> str:
    rows = [
        [row["contender"], row["load"], f"{row['rate']:,.0f}/s"]
        + [_spread(row.get(name)) for name in ("p50_ms", "p95_ms", "p99_ms")]
        for row in sorted(results.get("latency", []), key=operator.itemgetter("load"), reverse=True)
    ]
    return _section(
        "Latency",
        "From enqueue to the result received, in ms: all at the same rate, "
        "and each at 10 % of its own throughput.",
        _table(["", "load", "batches/s", "p50", "p95", "p99"], rows, left=2),
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
    measured = _matching(results.get("throughput", []), organizations=8, prefilled=0)
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
            f"{row['tags']:,}{', 304' if row['not_modified'] else ''}",
            str(row["connections"]),
            *(_spread(row[name]) for name in ("requests_per_second", "p50_ms", "p95_ms")),
        ]
        for row in sorted(results.get("read", []), key=operator.itemgetter("not_modified", "tags"))
    ]
    return _section(
        "Reads",
        "`GET /task-tags` by keep-alive connections that ask again at once, "
        "one endpoint process unless it says otherwise. 304 is the answer to `If-None-Match`. "
        "pgbench is the limit: the endpoint's transaction with prepared statements and no HTTP, "
        "in one pipeline where that is faster.",
        _table(["", "tags", "connections", "requests/s", "p50, ms", "p95, ms"], rows),
    )


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
        [*filter(None, parts), f"To repeat it: `make bench`, with nothing else running.{took}"]
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
        _latency_panel(results),
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
    bars = [_bar(row["contender"], row["batches_per_second"]) for row in rows]
    limit = results.get("limit")
    if limit is not None and limit["operations"] == operations:
        bars.append(_bar(LIMIT, limit["batches_per_second"], "limit"))
    plural = "operation" if operations == 1 else "operations"
    return Panel(
        f"Throughput, batches of {operations} {plural}",
        "batches per second, 8 organizations; more is better",
        _sorted(bars, key=lambda bar: -bar.value),
    )


def _latency_panel(results: Results) -> Panel:
    rows = _matching(results.get("latency", []), load=SAME_RATE)
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
    rate = f"{rows[0]['rate']:,.0f} batches/s" if rows else ""
    return Panel(
        f"Latency at {rate}",
        "enqueue → result, ms: p50, and a thin line to p95; less is better",
        _sorted(bars, key=lambda bar: bar.value),
        cut=True,
    )


def _read_panel(results: Results) -> Panel:
    rows = _matching(results.get("read", []), tags=READ_TAGS)
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
