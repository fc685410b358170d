"""make bench: the product beside what else could do the job, on the same servers, in one run.

Writes bench.json, bench.md and bench.svg to build/. A full run has more loads and longer ones, and
writes the last two to docs/. A smoke run is short and writes to build/smoke/: it shows that the
benchmark works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from producers.redis_client import open_redis
from tests.bench import copy_baseline, read, report, write
from tests.bench.servers import BenchServers, servers

PACKAGES: Final = (
    *("celery", "kombu", "redis", "sqlalchemy", "psycopg", "pydantic", "fastapi", "uvicorn"),
    *("dramatiq", "rq", "arq", "taskiq", "taskiq-redis", "streaq", "procrastinate", "dbos"),
    *("asyncpg", "psycopg-pool"),
)
LIMIT_BATCHES: Final = 8_000
REPOSITORY: Final = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--smoke", action="store_true", help="one short round of everything")
    kind.add_argument("--full", action="store_true", help="what is published")
    parser.add_argument("--rounds", type=int, help="3 by default, 5 of a full run")
    arguments = parser.parse_args()
    mode = "smoke" if arguments.smoke else "full" if arguments.full else "normal"
    rounds = arguments.rounds or {"smoke": 1, "normal": 3, "full": 5}[mode]
    begin = time.monotonic()
    with servers() as opened:
        results = {**circumstances(opened), **measure(opened, rounds, mode)}
    results |= {"mode": mode, "rounds": rounds, "seconds": round(time.monotonic() - begin)}
    build = REPOSITORY / "build" / ("smoke" if arguments.smoke else "")
    docs = REPOSITORY / "docs" if arguments.full else build
    build.mkdir(parents=True, exist_ok=True)
    found = report.ratios(results)
    (build / "bench.json").write_text(json.dumps({**found, **results}, indent=1) + "\n")
    report.write(results, docs)
    for name, ratio in found.items():
        print(f"{name:<44} {'-' if ratio is None else f'{ratio:.2f}'}")
    for name, reason in results["absent"].items():
        print(f"not measured: {name}: {reason}")
    print(f"bench: {results['seconds']} s, {build / 'bench.json'}, {docs / 'bench.md'}")
    return 1 if arguments.smoke and results["absent"] else 0


def measure(opened: BenchServers, rounds: int, mode: str) -> dict[str, Any]:
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {line}", flush=True)

    batches = 200 if mode == "smoke" else LIMIT_BATCHES
    written = copy_baseline.Limit(opened, batches, operations=10, say=say)
    plan = {"smoke": write.SMOKE, "normal": write.NORMAL, "full": write.FULL}[mode]
    return {
        **write.run(opened, rounds, plan=plan, say=say, first=written.round),
        **written.result(),
        **read.run(opened, rounds, say, pages=mode != "normal"),
    }


def circumstances(opened: BenchServers) -> dict[str, Any]:
    """Return what the figures depend on: the machine, and the versions of what was measured."""
    with opened.owner() as connection, open_redis(opened.redis_url) as redis:
        row = connection.execute("show server_version").fetchone()
        assert row is not None
        information: Any = redis.info("server")
    found = {"Python": platform.python_version(), "PostgreSQL": row[0]}
    found["Valkey"] = information.get("valkey_version", information["redis_version"])
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }
    return {"machine": machine, "versions": found}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
