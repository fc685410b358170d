"""The running stack that tests use, and the ways into it that its users do not have."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import unquote, urlsplit
from uuid import UUID

import psycopg

from worker.auth import SCOPES, sign_token
from worker.local.stack import Stack
from worker.settings import Settings


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
