"""Celery's own commands work with these workers: inspect, status, report and events."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery.worker.control import Panel

from producers.client import TagProducer
from producers.contract.messages import register_execution
from tests.support.processes import settings_of
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.local.stack import command

NEED_MORE = {"hello", "query_task", "objgraph"}  # an argument; the last one a package
INSPECT = sorted({name for name, info in Panel.meta.items() if info.type == "inspect"} - NEED_MORE)


@pytest.fixture
def environment(servers: Servers) -> dict[str, str]:
    return {**os.environ, **settings_of(servers)}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    argv = command(["celery", "-A", "worker", *words])
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=60, cwd="/"
    )


ALL_IN_ONE_PROCESS = """
import json, sys
from celery.bin.celery import celery
from click.testing import CliRunner
worker, *subcommands = sys.argv[1:]
# With a destination it does not wait for others until the time is up.
options = ["--json", "--timeout", "10", "--destination", worker]
for each in subcommands:
    ended = CliRunner().invoke(celery, ["-A", "worker", "inspect", each, *options])
    print(json.dumps([each, ended.exit_code, ended.output]))
"""


def test_inspect_answers(environment: dict[str, str]) -> None:
    """Each subcommand of Celery that needs no argument, as JSON and without a traceback."""
    (worker,) = json.loads(run(environment, "inspect", "ping", "--json").stdout)
    assert {"active", "conf", "ping", "registered", "report", "stats"} <= set(INSPECT)
    ended = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE_PROCESS, worker, *INSPECT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    all_ended = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [subcommand for subcommand, _, _ in all_ended] == INSPECT, ended.stderr
    assert "Traceback" not in ended.stderr
    for subcommand, code, output in all_ended:
        assert (code, "Traceback" in output) == (0, False), (subcommand, output)
        answers: dict[str, Any] = json.loads(output)
        assert list(answers) == [worker], subcommand
        assert not any("error" in str(answer)[:20] for answer in answers.values()), answers


@pytest.mark.parametrize("words", [["status"], ["report"], ["inspect", "stats"]])
def test_status_and_report_answer(environment: dict[str, str], words: list[str]) -> None:
    """In words, without a traceback or a secret."""
    ended = run(environment, *words)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert environment["TASK_TAGS_JWT_SECRET"] not in ended.stdout
    assert ended.stdout.strip()


def test_events_are_dumped(
    environment: dict[str, str], producer: TagProducer, tmp_path: Path
) -> None:
    """Once they are enabled, each drain of an inbox is seen."""
    log = tmp_path / "events"
    with log.open("wb") as output:
        argv = command(["celery", "-A", "worker", "events", "--dump"])
        events = subprocess.Popen(argv, env=environment, stdout=output, stderr=output, cwd="/")
    try:
        assert run(environment, "control", "enable_events").returncode == 0

        def seen() -> bool:
            producer.apply(register_execution(uuid4()))
            return "task_tags.drain" in log.read_text()

        eventually(seen)
        assert "Traceback" not in log.read_text()
    finally:
        run(environment, "control", "disable_events")
        events.terminate()
        events.wait(30)


STEPPED_CLOCK = """
from datetime import timedelta
from celery.beat import Scheduler
from worker.celery import app

class Silent(Scheduler):
    def apply_async(self, entry, **_):
        self.reserve(entry)

scheduler, now = Silent(app), app.now
scheduler.tick()
app.now = lambda: now() - timedelta(hours=1)
for name in ("wake", "purge"):
    print(scheduler.schedule[name].is_due().next)
print(scheduler.tick())
"""


def test_a_step_of_the_clock_of_beat_delays_nothing(environment: dict[str, str]) -> None:
    """An hour back: a lost drain would wait as long in a system that is idle otherwise."""
    ended = subprocess.run(
        [sys.executable, "-c", STEPPED_CLOCK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    wake, purge, tick = map(float, ended.stdout.split())
    assert wake <= 5, ended.stderr
    assert purge <= 3600
    assert tick <= 5


DEAF_SCHEDULER = """
import time
from celery.beat import Scheduler

class Deaf(Scheduler):
    def tick(self):
        try:
            print("ticking", flush=True)
            time.sleep(60)
        except SystemExit:
            return 0.0
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_beat_ends_at_a_signal_also_where_it_is_caught(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """Code that beat runs may catch what Celery's handler of signals raises."""
    (tmp_path / "deaf.py").write_text(DEAF_SCHEDULER)
    with subprocess.Popen(
        command(["celery", "-A", "worker", "beat", "-S", "deaf:Deaf"]),
        env={**environment, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as beat:
        assert beat.stdout is not None
        while "ticking" not in beat.stdout.readline():
            pass
        beat.send_signal(number)
        try:
            assert beat.wait(20) == 0
        finally:
            beat.kill()
