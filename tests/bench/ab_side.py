"""A side of `make ab`: builds a version, starts its stack, and measures it with a load generator.

All that is asked of a version is in this file and in ab_load.py, and old ones have it too: the
command `worker.cli up` and what it exports, the secret in the state directory, `TagProducer.send`,
results on their channel, and GET /task-tags.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import jwt

from tests.bench.read import Case, Data, Http
from worker.local.supervisor import ProcessSpec, Supervisor

REPOSITORY: Final = Path(__file__).parents[2]
BUILD: Final = REPOSITORY / "build" / "ab"
BUILD_SECONDS: Final = 900.0
LOAD_SECONDS: Final = 90.0
"""How long a load may take; the generator itself gives up earlier."""
STOP_SECONDS: Final = 5.0
WORKERS: Final = 2
ORGANIZATIONS: Final = 8
OPERATIONS: Final = 10
MOST_BATCHES: Final = 8000
"""Of one organization in one load: an inbox holds 10,000."""
READ: Final = Case(tags=50)
READ_WARM_UP: Final = 0.05


# --- Versions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """A commit that is checked out, and a Python that has what it needs."""

    name: str
    commit: str
    tree: Path
    python: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process, and all that it starts, import this version's modules."""
        return {"PYTHONPATH": str(self.tree)}


def build(name: str, revision: str) -> Version:
    """Check a commit out below build/ab and install its lock, or take what is there already."""
    commit = _run("git", "rev-parse", "--verify", f"{revision}^{{commit}}")
    tree = BUILD / commit[:12]
    if not _is_whole(tree, commit):
        shutil.rmtree(tree, ignore_errors=True)
        _run("git", "worktree", "add", "--quiet", "--detach", "-f", "-f", str(tree), commit)
    lock = tree / "requirements.lock"
    # The project itself is not installed, so versions with the same lock share an environment.
    environment = BUILD / f"venv-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        print(f"ab: installing into {environment.relative_to(REPOSITORY)}", flush=True)
        _run(sys.executable, "-m", "venv", "--clear", str(environment))
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*pip, "--require-hashes", "-r", str(lock))
        (environment / "ready").touch()
    return Version(name, commit, tree, python)


def _is_whole(tree: Path, commit: str) -> bool:
    """Whether this is a worktree of the commit, with all of its files as they were."""
    if not (tree / ".git").is_file():
        return False
    git = ("git", "-C", str(tree))
    try:
        changes = _run(*git, "status", "--porcelain", "--untracked-files=no")
        return not changes and _run(*git, "rev-parse", "HEAD") == commit
    except RuntimeError:
        return False


def _run(*argv: str) -> str:
    done = subprocess.run(
        argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=BUILD_SECONDS
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{shlex.join(argv)} failed: {last[-1]}")
    return done.stdout.strip()


# --- Stacks --------------------------------------------------------------------------------------


def start_spec(version: Version, directory: Path, supervisor: Supervisor) -> ProcessSpec:
    """Return how to start a version's stack; it is ready when it has printed how to use it."""
    data = directory / version.name
    up = ["-m", "worker.cli", "up", "--data-dir", str(data), "--port", "0"]
    return ProcessSpec(
        name=f"stack-{version.name}",
        argv=[str(version.python), *up, "--workers", str(WORKERS)],
        ready=lambda: len(_urls(version, supervisor)) == 2,
        environment=version.environment,
    )


def _urls(version: Version, supervisor: Supervisor) -> list[str]:
    """Return the URLs of Redis and of the endpoint, once the stack has printed them."""
    log = supervisor.log(f"stack-{version.name}")
    said = log.read_text(errors="replace") if log.exists() else ""
    found = (
        re.search(rf"^ *export TASK_TAGS_{name}_URL=(.*)\n", said, re.MULTILINE)
        for name in ("REDIS", "ENDPOINT")
    )
    return [shlex.split(each[1])[0] for each in found if each]


class LoadProcess:
    """A generator of loads (ab_load.py) that runs with a version's Python and modules."""

    def __init__(self, version: Version, log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(version.python), "-P", str(Path(__file__).with_name("ab_load.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **version.environment},
                cwd="/",
                start_new_session=True,  # Ctrl-C is not for it
            )

    def ask(self, line: Any) -> float:
        """Hand over one line and return the figure that comes back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and its log says why
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        answered, _, _ = select.select([self._process.stdout], [], [], LOAD_SECONDS)
        answer = self._process.stdout.readline() if answered else b""
        if not answer:
            last = self._log.read_text(errors="replace").strip().splitlines() or ["no answer"]
            raise RuntimeError(f"a load could not be run: {last[-1]} (see {self._log})")
        return float(answer)

    def close(self) -> None:
        """End it: it does when its input ends, and is killed otherwise."""
        try:
            self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@dataclass(frozen=True)
class Side:
    """A version at work: its stack, and what measures it."""

    process: LoadProcess
    reader: Http

    def throughput(self, organizations: int, batches: int) -> float:
        """Return the batches a second, each of ten operations."""
        batches = min(batches, MOST_BATCHES * organizations)
        load = {"organizations": organizations, "operations": OPERATIONS, "batches": batches}
        return self.process.ask(["throughput", load])

    def latency(self, organizations: int, rate: float, batches: int) -> float:
        """Return the median milliseconds from append to result, of batches of one operation."""
        load = {"organizations": organizations, "rate": rate, "batches": batches}
        return self.process.ask(["latency", load])

    def reads(self, seconds: float) -> float:
        """Return the requests a second for the tags of one execution."""
        return self.reader.measure(READ, seconds, READ_WARM_UP).requests_per_second


@contextmanager
def open_side(version: Version, directory: Path, supervisor: Supervisor) -> Iterator[Side]:
    """Connect a generator of loads to a version's running stack, and store the tags to be read."""
    redis_url, endpoint_url = _urls(version, supervisor)
    secret = json.loads((directory / version.name / "secrets.json").read_text())["jwt"]
    tokens = {str(each): _token(secret, each) for each in (uuid4() for _ in range(ORGANIZATIONS))}
    organization, token = next(iter(tokens.items()))
    data = Data(UUID(organization), token, {READ.tags: uuid4()})
    process = LoadProcess(version, supervisor.log(f"load-{version.name}"))
    try:
        process.ask({"redis_url": redis_url, "tokens": tokens})
        execution = str(data.executions[READ.tags])
        process.ask(["fill", {"tags": READ.tags, "flow_execution_id": execution}])
        url, headers = f"{endpoint_url}{data.path(READ)}", data.headers(READ)
        answer = httpx.get(url, headers=headers, trust_env=False, timeout=10)
        if answer.status_code != 200 or len(answer.json()) != READ.tags:
            raise RuntimeError(f"the tags of {version.name} can't be read: {answer.text[:200]}")
        port = urlsplit(endpoint_url).port or 80
        yield Side(process, Http(version.name, data, [port], (READ,)))
    finally:
        process.close()


def _token(secret: str, organization_id: UUID) -> str:
    claims = {
        "sub": "ab",
        "org": str(organization_id),
        "scope": "task-tags:read task-tags:write flow-executions:write",
        "exp": int(time.time()) + 3600,
    }
    return jwt.encode(claims, secret, algorithm="HS256")
