"""make bench: the product beside what else could do the job, on the same servers, in one run.

Writes build/bench.json, docs/bench.md and docs/bench.svg. A smoke run is short and writes all of it
to build/smoke/: it shows that the benchmark works, not how fast anything is.
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
    *("dramatiq", "rq", "arq", "taskiq", "taskiq-redis", "streaq", "procrastinate", "asyncpg"),
)
LIMIT_BATCHES: Final = 8_000
REPOSITORY: Final = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one short round of everything")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    begin = time.monotonic()
    with servers() as opened:
        results = {**circumstances(opened), **measure(opened, rounds, arguments.smoke)}
    results |= {"rounds": rounds, "seconds": round(time.monotonic() - begin)}
    build, docs = REPOSITORY / "build", REPOSITORY / "docs"
    if arguments.smoke:
        build = docs = build / "smoke"
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


def measure(opened: BenchServers, rounds: int, smoke: bool) -> dict[str, Any]:
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {line}", flush=True)

    written = copy_baseline.Limit(opened, 200 if smoke else LIMIT_BATCHES, operations=10, say=say)
    plan = write.SMOKE if smoke else write.FULL
    return {
        **write.run(opened, rounds, plan=plan, say=say, first=written.round),
        **written.result(),
        **read.run(opened, rounds, say, pages=smoke),
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
