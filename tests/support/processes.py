"""Processes of the product that a test starts by itself, with settings of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.local.stack import command


def settings_of(servers: Servers, **changes: str) -> dict[str, str]:
    """Return the environment of a worker or beat on the servers of all tests, with changes."""
    secret = servers.settings.jwt_secret
    assert secret is not None
    return {
        "TASK_TAGS_DATABASE_URL": servers.worker_url,
        "TASK_TAGS_REDIS_URL": servers.stack.redis_url,
        "TASK_TAGS_JWT_SECRET": secret.get_secret_value(),
        "PYTHONWARNINGS": "ignore",  # Celery has one for root
        **changes,
    }


def endpoint_of(servers: Servers) -> int:
    """Return the process id of the endpoint of all tests."""
    running = servers.stack.supervisor.running
    return next(process.pid for child, process in running if child.name == "endpoint")


@contextmanager
def started(
    words: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the block ends; its standard error goes to `log`."""
    with log.open("wb") as stderr, log.with_suffix(".stdout").open("wb") as stdout:
        process = subprocess.Popen(
            _command(words),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd="/",
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _command(words: list[str]) -> list[str]:
    if words[0] == "task-tags":
        return [sys.executable, "-c", "from producers.cli import main; main()", *words[1:]]
    return command(words)


def await_line(log: Path, words: str, seconds: float = 20) -> None:
    """Wait until a log says something; show the log if it does not."""
    try:
        eventually(lambda: words in log.read_text(errors="replace"), seconds)
    except AssertionError:
        raise AssertionError(f"no {words!r} in {log.read_text(errors='replace')[-2000:]}") from None
