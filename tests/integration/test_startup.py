"""A process ends in one line on settings that cannot work, and waits for servers that may come."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from tests.support.processes import settings_of, started
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.local.servers import is_of_a_stack
from worker.local.stack import BEAT, ENDPOINT, WORKER, command
from worker.local.supervisor import ProcessSpec, Supervisor
from worker.startup import wait_for


def environment(servers: Servers, **changes: str) -> dict[str, str]:
    url = servers.stack.redis_url.replace("?db=0", "?db=2")
    return {**os.environ, **settings_of(servers, **{"TASK_TAGS_REDIS_URL": url, **changes})}


def wrong_password(servers: Servers) -> dict[str, str]:
    url = make_url(servers.worker_url).set(password="wrong")
    return {"TASK_TAGS_DATABASE_URL": url.render_as_string(hide_password=False)}


def no_such_database(servers: Servers) -> dict[str, str]:
    url = make_url(servers.worker_url).set(database="nowhere")
    return {"TASK_TAGS_DATABASE_URL": url.render_as_string(hide_password=False)}


def unsafe_role(servers: Servers) -> dict[str, str]:
    return {"TASK_TAGS_DATABASE_URL": servers.owner_url}


def wrong_redis_password(servers: Servers) -> dict[str, str]:
    return {"TASK_TAGS_REDIS_URL": servers.stack.redis_url.replace("unix://", "unix://x:wrong@")}


@pytest.mark.parametrize("fault", [wrong_password, no_such_database, unsafe_role])
@pytest.mark.parametrize("process", [WORKER, ENDPOINT])
def test_a_database_that_refuses_the_settings_ends_a_process(
    servers: Servers, process: Any, fault: Any
) -> None:
    """In one line that names the setting or the remedy, without a traceback."""
    variables = environment(servers, **fault(servers))
    ends_in_one_line(process, variables, "task_tags_worker|DATABASE_URL")


@pytest.mark.parametrize("process", [WORKER, BEAT, ENDPOINT])
def test_a_redis_that_refuses_the_settings_ends_a_process(servers: Servers, process: Any) -> None:
    """A wrong password is not waited out."""
    fault = wrong_redis_password(servers)
    ends_in_one_line(process, environment(servers, **fault), "TASK_TAGS_REDIS_URL")


def ends_in_one_line(process: Any, variables: dict[str, str], named: str) -> None:
    ended = subprocess.run(
        command(process), env=variables, capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert ended.returncode > 0, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "Traceback" not in line
    assert any(name in line for name in named.split("|")), line


@pytest.mark.parametrize("process", [WORKER, BEAT])
def test_a_server_that_is_away_is_waited_for(
    servers: Servers, process: Any, tmp_path: Path
) -> None:
    """It is said once, and the process goes on once the server is there."""
    log, late = tmp_path / "log", Path(servers.redis_socket)
    link = tmp_path / "valkey.sock"
    with started(process, log, environment(servers, TASK_TAGS_REDIS_URL=f"unix://{link}?db=2")):
        eventually(lambda: "waiting for Redis" in log.read_text())
        link.symlink_to(late)
        eventually(lambda: '"ready"' in log.read_text())
        assert log.read_text().count("waiting for Redis") == 1


@pytest.mark.parametrize("process", [WORKER, BEAT])
def test_a_process_that_waits_for_a_server_ends_at_sigterm(
    servers: Servers, process: Any, tmp_path: Path
) -> None:
    """By a handler: as the first process of a container, it would not end by default."""
    log = tmp_path / "log"
    variables = environment(servers, TASK_TAGS_REDIS_URL=f"unix://{tmp_path}/none?db=2")
    with started(process, log, variables) as running:
        eventually(lambda: "waiting for Redis" in log.read_text())
        running.terminate()
        assert running.wait(30) == 0
        assert "Traceback" not in log.read_text()


def test_the_server_of_another_stack_is_known_however_its_url_is_written(
    servers: Servers, tmp_path: Path
) -> None:
    """Two stacks on one server would take each other's messages; other paths are no error."""
    path = Path(servers.redis_socket)
    assert path.name == "valkey.sock"
    for end in ("", "?db=00", "?db=0&client_name=x"):
        assert is_of_a_stack(f"unix://{path.parent}/./{path.name}{end}")
    for other in (f"{path}?db=1", tmp_path / path.name, f"/{'a' * 300}/{path.name}", "/%00/x", ""):
        assert not is_of_a_stack(f"unix://{other}")
    assert not is_of_a_stack("redis://[::1")


def test_a_server_that_answers_with_any_error_is_waited_for() -> None:
    """Only a refusal of the settings ends a process as it starts."""
    errors = iter([psycopg.errors.InternalError_("x"), psycopg.errors.UndefinedTable("x")])

    def reach() -> None:
        if error := next(errors, None):
            raise error

    wait_for("the database", reach)
    assert next(errors, None) is None


def test_a_part_that_can_not_be_started_again_does_not_end_the_others(tmp_path: Path) -> None:
    """As when there is no file or process to be had: it is tried again."""
    logs, said = tmp_path / "logs", list[str]()
    with Supervisor(logs) as supervisor:
        for name, seconds in (("lasting", 60), ("short", 0)):
            supervisor.start(ProcessSpec(name, ["sleep", str(seconds)], ready=lambda: True))
        (_, lasting), (_, short) = supervisor.running
        short.wait()
        shutil.rmtree(logs)
        supervisor.restart_ended(said.append)
        assert "short can't be started" in said[-1]
        assert lasting.poll() is None
        logs.mkdir()
        assert supervisor.running[1][1] is short
