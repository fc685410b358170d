"""A separate database for a test that looks at a whole one, on the servers of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.local.stack import DATABASE

if TYPE_CHECKING:
    from tests.support.servers import Servers


@contextmanager
def own_database(servers: Servers, name: str) -> Iterator[Servers]:
    """Create an empty database, yield the servers with URLs of it, and drop it."""

    def inside(url: str) -> str:  # not by SQLAlchemy, which writes + for a space
        return url.replace(f"/{DATABASE}?", f"/{name}?")

    with servers.owner() as connection:
        connection.execute(f"create database {name}".encode())
        try:
            yield replace(
                servers,
                owner_url=inside(servers.owner_url),
                worker_url=inside(servers.worker_url),
                endpoint_url=inside(servers.endpoint_url),
            )
        finally:
            connection.execute(f"drop database {name} with (force)".encode())
