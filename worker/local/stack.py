"""The local stack: its processes, how each is started, and in which order they become ready.

docker-compose.yml runs the same commands; tests/unit/test_compose.py compares them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final
from uuid import UUID

from pydantic import SecretStr
from redis import RedisError
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from producers.redis_client import open_redis
from worker.auth import SCOPES, sign_token
from worker.db.migrate import migrate
from worker.db.tables import ROLES
from worker.local.servers import (
    Postgres,
    Valkey,
    find_server_paths,
    is_of_a_stack,
    load_or_create_secret,
    lock_directory,
)
from worker.local.supervisor import ProcessSpec, StartupError, Supervisor
from worker.settings import Settings

DEVELOPMENT_ORGANIZATION: Final = UUID("01970000-0000-7000-8000-0000000000a0")
DATABASE: Final = "task_tags"
TOKEN_DAYS: Final = 7

WORKER: Final = ["celery", "-A", "worker", "worker", "--without-gossip", "--without-mingle"]
BEAT: Final = ["celery", "-A", "worker", "beat"]
ENDPOINT: Final = ["task-tags-admin", "endpoint"]


@dataclass(frozen=True)
class Stack:
    """A running stack, with what a client needs to use it."""

    redis_url: str
    endpoint_url: str
    organization_id: UUID
    token: str
    supervisor: Supervisor
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """The settings of producers and of the command line."""
        return {
            "TASK_TAGS_REDIS_URL": self.redis_url,
            "TASK_TAGS_ENDPOINT_URL": self.endpoint_url,
            "TASK_TAGS_ORGANIZATION_ID": str(self.organization_id),
            "TASK_TAGS_TOKEN": self.token,
        }


@contextmanager
def run_stack(
    directory: Path,
    *,
    port: int,
    workers: int,
    say: Callable[[str], None],
    external_database_url: str | None = None,
    external_redis_url: str | None = None,
) -> Iterator[Stack]:
    """Start all processes on a state directory; stop them when the block ends.

    Args:
        directory: Has data, logs and secrets. Only one stack at a time can run on it.
        port: The endpoint's port; 0 takes a free one.
        workers: The number of worker processes.
        say: Receives lines about the progress.
        external_database_url: A PostgreSQL server to use instead of starting one. Its role must own
            the tables.
        external_redis_url: A Redis server to use instead of starting one.

    Raises:
        StartupError: With one line that says why.
    """
    directory = directory.absolute()
    with lock_directory(directory) as lock, Supervisor(directory / "logs") as supervisor:
        port = free_port(port)
        try:
            lock.write(f" http://127.0.0.1:{port}")
            lock.flush()
            redis_url, owner_url = _servers(
                directory, supervisor, say, external_database_url, external_redis_url
            )
            yield _start(directory, supervisor, port, workers, say, redis_url, owner_url)
        finally:
            say("stopping")


def _start(
    directory: Path,
    supervisor: Supervisor,
    port: int,
    workers: int,
    say: Callable[[str], None],
    redis_url: str,
    owner_url: str,
) -> Stack:
    """Start what uses the servers. Beat may not be ready yet when this returns."""
    try:
        migrate(owner_url, {role: load_or_create_secret(directory, role) for role in ROLES})
    except DBAPIError as error:
        raise StartupError(f"the database can't be migrated: {error.orig}") from None
    say("migrations  done")
    as_worker, as_endpoint = (_environment(role, owner_url, redis_url, directory) for role in ROLES)
    names = [f"worker-{number}" for number in range(1, workers + 1)]
    argv = command(WORKER)
    supervisor.start(
        *(_celery(supervisor, name, [*argv, "-n", f"{name}@%h"], as_worker) for name in names),
        ProcessSpec(
            name="endpoint",
            argv=[*command(ENDPOINT), "--host", "127.0.0.1", "--port", str(port)],
            # What answers may be another stack's.
            ready=lambda: _says_ready(supervisor, "endpoint") and _is_ready(port),
            environment=as_endpoint,
        ),
        say=say,
    )
    # Only what goes wrong needs it: it does not make the others start later.
    supervisor.spawn(_celery(supervisor, "beat", command(BEAT), as_worker))
    token = sign_token(
        signing_settings(directory),
        organization_id=DEVELOPMENT_ORGANIZATION,
        actor="developer",
        scopes=SCOPES,
        lifetime=timedelta(days=TOKEN_DAYS),
    )
    url = f"http://127.0.0.1:{port}"
    return Stack(redis_url, url, DEVELOPMENT_ORGANIZATION, token, supervisor, directory)


def signing_settings(directory: Path) -> Settings:
    """Return the settings that sign and verify the tokens of a state directory."""
    return Settings.model_construct(jwt_secret=SecretStr(load_or_create_secret(directory, "jwt")))


def _servers(
    directory: Path,
    supervisor: Supervisor,
    say: Callable[[str], None],
    external_database_url: str | None,
    external_redis_url: str | None,
) -> tuple[str, str]:
    """Start the embedded servers that are needed.

    Returns:
        The URL of Redis, and the database URL of the tables' owner.
    """
    home = find_server_paths(directory)
    valkey, postgres = Valkey(home), Postgres(home, load_or_create_secret(directory, "postgres"))
    redis_url, owner_url = external_redis_url, external_database_url
    children = []
    if redis_url in (None, valkey.url):  # `up` prints it for users to export
        children.append(valkey.child())
        redis_url = valkey.url
    else:
        _check_redis(redis_url)
        say("redis       that of TASK_TAGS_REDIS_URL")
    if owner_url is None:
        children.append(postgres.child())
        owner_url = postgres.url(database=DATABASE)
    else:
        say("postgresql  that of TASK_TAGS_DATABASE_URL")
    supervisor.start(*children, say=say)
    if external_database_url is None:
        postgres.create_database(DATABASE)
    return redis_url, owner_url


def _check_redis(url: str) -> None:
    """Raise `StartupError` if the server can't be reached, or is that of another local stack.

    Two stacks on one server would take each other's messages.
    """
    if is_of_a_stack(url):
        raise StartupError(
            "TASK_TAGS_REDIS_URL is the server of another local stack, which needs it for itself: "
            "unset TASK_TAGS_REDIS_URL"
        )
    try:
        with open_redis(url) as client:
            client.ping()
    except (RedisError, OSError) as error:
        raise StartupError(f"TASK_TAGS_REDIS_URL can't be reached: {error}") from None


def _celery(
    supervisor: Supervisor, name: str, argv: list[str], environment: dict[str, str]
) -> ProcessSpec:
    return ProcessSpec(name, argv, lambda: _says_ready(supervisor, name), environment=environment)


def _says_ready(supervisor: Supervisor, name: str) -> bool:
    """Return whether a child's log has an entry that says so."""
    return '"message": "ready"' in supervisor.log(name).read_text(errors="replace")


def _environment(role: str, owner_url: str, redis_url: str, directory: Path) -> dict[str, str]:
    """Return the settings of a child. They override the environment that it inherits.

    It accepts the stack's own tokens only.
    """
    password = load_or_create_secret(directory, role)
    database_url = make_url(owner_url).set(username=role, password=password)
    level = "TASK_TAGS_LOG_LEVEL"
    others = ("ALGORITHMS", "PUBLIC_KEY", "JWKS_URL", "AUDIENCE", "ISSUER")
    return {
        "TASK_TAGS_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "TASK_TAGS_REDIS_URL": redis_url,
        "TASK_TAGS_JWT_SECRET": load_or_create_secret(directory, "jwt"),
        **{f"TASK_TAGS_JWT_{name}": "" for name in others},
        # `_says_ready` reads what is logged at INFO.
        level: "DEBUG" if os.environ.get(level, "").upper() == "DEBUG" else "INFO",
    }


def command(words: list[str]) -> list[str]:
    """Return a command that runs with this Python, wherever its scripts are installed."""
    module = {"celery": "celery", "task-tags-admin": "worker.cli"}[words[0]]
    return [sys.executable, "-m", module, *words[1:]]


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)  # httpx loads certificates each time
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def free_port(port: int) -> int:
    """Return `port`, or a free one for 0. Raises `StartupError` if it can't be used."""
    try:
        with socket.create_server(("127.0.0.1", port)) as probe:
            free: int = probe.getsockname()[1]
            return free
    except OSError as error:
        raise StartupError(
            f"port {port} can't be used ({os.strerror(error.errno or 0)}): choose another one with "
            "make run PORT=… or --port"
        ) from None
