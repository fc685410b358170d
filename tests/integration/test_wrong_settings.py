"""Settings that can't work end a process in one line; a server that takes no writes is awaited."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from producers.client import TagProducer
from producers.contract.messages import register_execution
from producers.redis_client import open_redis
from tests.support.processes import await_line, settings_of, started
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.local.servers import Valkey, find_server_paths
from worker.local.stack import BEAT, ENDPOINT, WORKER, free_port
from worker.local.supervisor import Supervisor

SECRET = "hunter2"
MIGRATE = ["task-tags-admin", "migrate"]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey for these tests alone: nobody else works on it."""
    directory = tmp_path_factory.mktemp("valkey")
    with Supervisor(directory / "logs") as supervisor:
        valkey = Valkey(find_server_paths(directory))
        supervisor.start(valkey.child())
        yield valkey


def commands() -> dict[str, list[str]]:
    port = str(free_port(0))
    return {"worker": WORKER, "beat": BEAT, "endpoint": [*ENDPOINT, "--port", port]}


def test_malformed_urls_end_all_processes_in_one_line(servers: Servers, tmp_path: Path) -> None:
    """With an exit code of its own, without a traceback and without the password."""
    environment = settings_of(
        servers,
        TASK_TAGS_DATABASE_URL=f"postgresql://x:{SECRET}@host:port/x",
        TASK_TAGS_REDIS_URL=f"redis//x:{SECRET}@host",
    )
    assert_refused(environment, tmp_path, "DATABASE_URL: ", "REDIS_URL: ")


def test_options_that_a_url_cannot_have_end_all_processes_in_one_line(
    servers: Servers, tmp_path: Path
) -> None:
    """More of them are tried in tests/unit/test_settings.py."""
    environment = settings_of(
        servers,
        TASK_TAGS_DATABASE_URL=f"postgresql://x:{SECRET}@127.0.0.1:1/x?autocommit=1",
        TASK_TAGS_REDIS_URL=f"redis://x:{SECRET}@127.0.0.1:1?no_such=1",
    )
    reasons = ('DATABASE_URL: invalid connection option "autocommit"', "can't have no_such, only ")
    assert_refused(environment, tmp_path, *reasons)


def assert_refused(environment: dict[str, str], tmp_path: Path, *reasons: str) -> None:
    """All processes, and `migrate`, end with exit code 2 and one line, without the password."""
    with ExitStack() as running:
        processes = {}
        for name, words in (commands() | {"migrate": MIGRATE}).items():
            log = tmp_path / name
            processes[log] = running.enter_context(started(words, log, environment))
        for log, process in processes.items():
            code, lines = process.wait(20), log.read_text().splitlines()
            assert code == 2, (log.name, lines)
            assert len(lines) == 1, lines
            assert [reason for reason in reasons if reason not in lines[0]] == [], lines
            assert "Traceback" not in lines[0]
            assert SECRET not in lines[0]


def test_a_unix_url_with_user_password_and_options_works_for_all(
    servers: Servers, redis: Any, tmp_path: Path
) -> None:
    """They stand in its query, for it has no other place."""
    user, organization = f"user-{uuid4()}", uuid4()
    redis.execute_command("ACL", "SETUSER", user, "on", f">{SECRET}", "~*", "&*", "+@all")
    query = f"&username={user}&password={SECRET}&socket_timeout=5&client_name=of-the-test"
    url = servers.stack.redis_url.replace("db=0", "db=3") + query
    with ExitStack() as running:
        running.callback(redis.acl_deluser, user)
        for name, words in commands().items():
            environment = settings_of(servers, TASK_TAGS_REDIS_URL=url)
            running.enter_context(started(words, tmp_path / name, environment))
            await_line(tmp_path / name, '"ready"')
        with TagProducer(
            redis_url=url, organization_id=organization, token=servers.token(organization)
        ) as producer:
            assert producer.apply(register_execution(uuid4())).statuses == ["registered"]
        clients = [each["name"] for each in redis.client_list() if each["user"] == user]
        assert len(clients) >= 4
        assert set(clients) == {"of-the-test"}


@pytest.mark.parametrize("database", ["99999", "-1"])
def test_a_redis_database_that_the_server_does_not_have_ends_all_processes(
    servers: Servers, tmp_path: Path, database: str
) -> None:
    """Nobody waits for it: it is a wrong setting, exit code 2."""
    url = servers.stack.redis_url.replace("db=0", f"db={database}")
    with ExitStack() as running:
        processes = {
            name: running.enter_context(
                started(words, tmp_path / name, settings_of(servers, TASK_TAGS_REDIS_URL=url))
            )
            for name, words in commands().items()
        }
        for name, process in processes.items():
            assert process.wait(60) == 2, name
            lines = (tmp_path / name).read_text().splitlines()
            said = "TASK_TAGS_REDIS_URL: it is refused: DB index is out of range"
            assert said in lines[-1], (name, lines)


def test_servers_that_take_no_writes_are_waited_for(
    servers: Servers, valkey: Valkey, tmp_path: Path
) -> None:
    """A replica ends nobody; sessions that are read-only by default are none of the product's."""
    redis: Any
    words = commands()
    organization = uuid4()
    token = servers.token(organization)
    read_only = "&options=-c%20default_transaction_read_only%3Don"
    environment = settings_of(
        servers,
        TASK_TAGS_REDIS_URL=valkey.url,
        TASK_TAGS_DATABASE_URL=servers.worker_url + read_only,
    )
    with ExitStack() as running, open_redis(valkey.url) as redis:
        redis.replicaof("127.0.0.1", "1")
        running.callback(redis.replicaof, "NO", "ONE")
        processes = [
            running.enter_context(started(words[name], tmp_path / name, environment))
            for name in words
        ]
        readyz = f"http://127.0.0.1:{words['endpoint'][-1]}/readyz"
        await_line(tmp_path / "worker", "waiting for Redis: You can't write against a read only")
        await_line(tmp_path / "beat", "read only replica")  # at its first message
        await_line(tmp_path / "endpoint", '"ready"')
        eventually(lambda: httpx.get(readyz).status_code == 503)
        assert [process.poll() for process in processes] == [None] * 3
        assert "Frequent restarts" not in (tmp_path / "worker").read_text()
        redis.replicaof("NO", "ONE")
        await_line(tmp_path / "worker", '"ready"')
        eventually(lambda: httpx.get(readyz).status_code == 200)
        with TagProducer(
            redis_url=valkey.url, organization_id=organization, token=token
        ) as producer:
            assert producer.apply(register_execution(uuid4())).statuses == ["registered"]
        assert [process.poll() for process in processes] == [None] * 3


NUMBERS = (
    *("INBOX_LIMIT", "LEASE_SECONDS", "GROUP_SIZE", "TRANSACTION_SECONDS", "ENDPOINT_CONNECTIONS"),
    *("DRAIN_BUDGET_SECONDS", "RETENTION_DAYS", "CHANGES_RETENTION_DAYS"),
)
OTHERS = ("REDIS_URL", "DATABASE_URL", "JWT_ALGORITHMS", "JWT_JWKS_URL", "LOG_LEVEL")
OF_PRODUCERS = ("REDIS_URL", "INBOX_LIMIT", "LEASE_SECONDS", "ORGANIZATION_ID", "ENDPOINT_URL")


@pytest.mark.parametrize("value", ["inf"])  # more are tried in tests/unit
def test_a_wrong_setting_is_named_by_every_process(
    servers: Servers, tmp_path: Path, value: str
) -> None:
    """In one line, with exit code 2: worker, beat, endpoint and the commands of both tools."""
    id = str(uuid4())
    words = commands() | {
        "rejected": ["task-tags-admin", "rejected", "list"],
        "enqueue": ["task-tags", "enqueue", "-"],
        "list": ["task-tags", "list", id],
        "watch": ["task-tags", "watch", id],
    }
    with ExitStack() as running:
        processes = {}
        for name, command in words.items():
            names = OF_PRODUCERS if command[0] == "task-tags" else (*NUMBERS, *OTHERS)
            wrong = {f"TASK_TAGS_{each}": value for each in names}
            process = running.enter_context(
                started(command, tmp_path / name, settings_of(servers, **wrong))
            )
            processes[name] = names, process
        for name, (names, process) in processes.items():
            code, lines = process.wait(60), (tmp_path / name).read_text().splitlines()
            assert (code, len(lines)) == (2, 1), (name, lines)
            assert [each for each in names if f"TASK_TAGS_{each}: " not in lines[0]] == []
