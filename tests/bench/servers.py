"""The servers of the benchmark: PostgreSQL, Valkey, and a fresh database for each run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg
from psycopg import sql

from producers.redis_client import open_redis
from worker.auth import SCOPES, sign_token
from worker.db.migrate import migrate
from worker.db.tables import ROLES
from worker.local.servers import (
    Postgres,
    Valkey,
    find_server_paths,
    load_or_create_secret,
    lock_directory,
)
from worker.local.stack import signing_settings
from worker.local.supervisor import Supervisor

WORKER: Final = ROLES[0]
ENDPOINT: Final = ROLES[1]
EMPTY: Final = "empty"
"""The database that each run's is a copy of, by default."""
RUN: Final = "run"


@dataclass(frozen=True)
class BenchServers:
    """The running servers and what a process needs to use them."""

    directory: Path
    supervisor: Supervisor
    postgres: Postgres
    redis_url: str
    passwords: dict[str, str]

    def database_url(self, role: str | None = None, database: str = RUN) -> str:
        """Return the URL of a database for a role; None is the owner, who sees all rows."""
        if role is None:
            return self.postgres.url(database=database)
        return self.postgres.url(role, self.passwords[role], database)

    def environment(self, role: str = WORKER) -> dict[str, str]:
        """Return the settings of a process of the product, or of one that does the same job."""
        return {
            "TASK_TAGS_REDIS_URL": self.redis_url,
            "TASK_TAGS_DATABASE_URL": self.database_url(role),
            "TASK_TAGS_JWT_SECRET": load_or_create_secret(self.directory, "jwt"),
        }

    def token(self, organization_id: UUID) -> str:
        settings = signing_settings(self.directory)
        return sign_token(
            settings,
            organization_id=organization_id,
            actor="bench",
            scopes=SCOPES,
            lifetime=timedelta(hours=3),
        )

    def fresh(self, template: str = EMPTY) -> None:
        """Empty Redis, and make the database of the next run: a copy of `template`."""
        self.copy(template, RUN)
        with open_redis(self.redis_url) as redis:
            redis.flushall()

    def copy(self, template: str, database: str) -> None:
        """Make a database as a copy of another one, in place of the one that was there."""
        with self.owner("postgres") as connection:
            name, source = sql.Identifier(database), sql.Identifier(template)
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))
            create = sql.SQL("create database {} template {} strategy file_copy")
            connection.execute(create.format(name, source))
            connection.execute("checkpoint")  # what was before is not to be paid for in the run

    def owner(self, database: str = RUN) -> psycopg.Connection:
        """Connect as the owner of everything."""
        return psycopg.connect(self.database_url(database=database), autocommit=True)


@contextmanager
def servers() -> Iterator[BenchServers]:
    """Start PostgreSQL and Valkey with the local stack's settings, on a new directory."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with lock_directory(directory), Supervisor(directory / "logs") as supervisor:
            home = find_server_paths(directory)
            valkey, postgres = (
                Valkey(home),
                Postgres(home, load_or_create_secret(directory, "postgres")),
            )
            supervisor.start(valkey.child(), postgres.child())
            postgres.create_database(EMPTY)
            passwords = {role: load_or_create_secret(directory, role) for role in ROLES}
            migrate(postgres.url(database=EMPTY), passwords)
            opened = BenchServers(directory, supervisor, postgres, valkey.url, passwords)
            opened.fresh()
            yield opened
