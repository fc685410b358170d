"""The running stack that tests use, and the ways into it that its users do not have."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from uuid import UUID

import psycopg

from worker.auth import SCOPES, sign_token
from worker.local.servers import Postgres, Valkey, find_server_paths, load_or_create_secret
from worker.local.stack import DATABASE, DEVELOPMENT_ORGANIZATION, Stack, signing_settings
from worker.local.supervisor import Supervisor
from worker.settings import Settings

RUNNING_STACK: Final = "RUNNING_STACK"
"""The variable that names the directory of a stack which many runs of tests use in turn."""


@dataclass(frozen=True)
class Servers:
    """The running stack, and the ways into it that its users don't have."""

    stack: Stack
    settings: Settings
    owner_url: str
    worker_url: str
    endpoint_url: str

    def token(self, organization_id: UUID, *scopes: str, sub: str = "ada") -> str:
        return sign_token(
            self.settings,
            organization_id=organization_id,
            actor=sub,
            scopes=scopes or SCOPES,
            lifetime=timedelta(hours=1),
        )

    @property
    def redis_socket(self) -> str:
        """The path of the socket, which is quoted in the URL."""
        return unquote(urlsplit(self.stack.redis_url).path)

    def owner(self) -> psycopg.Connection:
        return psycopg.connect(self.owner_url, autocommit=True)


def servers_of(stack: Stack) -> Servers:
    """Return the ways into a stack that has its own servers."""
    directory = stack.directory
    postgres = Postgres(find_server_paths(directory), load_or_create_secret(directory, "postgres"))
    worker, endpoint = (
        postgres.url(role, load_or_create_secret(directory, role), DATABASE)
        for role in ("task_tags_worker", "task_tags_endpoint")
    )
    owner = postgres.url(database=DATABASE)
    return Servers(stack, signing_settings(directory), owner, worker, endpoint)


def attached_stack(directory: Path) -> Stack:
    """Return the stack that another process runs on a directory."""
    _, _, endpoint_url = (directory / "lock").read_text().partition(" ")
    return Stack(
        Valkey(find_server_paths(directory)).url,
        endpoint_url,
        DEVELOPMENT_ORGANIZATION,
        "",
        Supervisor(directory / "logs"),
        directory,
    )
