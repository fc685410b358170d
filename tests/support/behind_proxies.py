"""A worker, a beat and an endpoint behind proxies, on a primary Valkey and its replica.

PostgreSQL is that of all tests. Beat sends ten messages a second, and the endpoint looks at its
servers at each `/readyz`, so that a test sees many of both in little time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from producers.redis_client import open_redis
from tests.support.moments import PostgresMoments, RedisMoments
from tests.support.processes import settings_of
from tests.support.proxy import Proxy
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.local.servers import Valkey, find_server_paths
from worker.local.stack import WORKER, command, free_port
from worker.local.supervisor import ProcessSpec, Supervisor

BEAT: Final = ["celery", "-A", "tests.support.quick_beat", "beat"]
ENDPOINT: Final = """
import worker.api.health
worker.api.health._FRESH_SECONDS = 0.0
from worker.cli import main
main()
"""
PARTIES: Final = ("worker", "beat", "endpoint", "runner")
"""Each has a way of its own to Redis."""


@dataclass(frozen=True)
class BehindProxies:
    """Processes that reach their servers through proxies."""

    supervisor: Supervisor
    proxies: dict[str, Proxy]
    valkeys: list[Valkey]
    """The primary, and its replica."""
    endpoint_url: str

    def redis_url(self, party: str) -> str:
        return f"unix://{quote(str(self.proxies[party].listen))}?db=0"

    def log(self, name: str) -> str:
        return self.supervisor.log(name).read_text(errors="replace")

    def assert_alive(self) -> None:
        """Check that nothing has ended, and that nothing is an error that nobody expects."""
        for child, process in self.supervisor.running:
            assert process.poll() is None, f"{child.name}: {self.log(child.name)[-3000:]}"
        assert "Traceback" not in self.log("endpoint"), self.log("endpoint")[-3000:]

    def demote(self, how: str = "", meanwhile: Callable[[], None] = lambda: None) -> None:
        """Let primary and replica change places; connections to both stay open.

        Writes wait until the replica has all that was acknowledged; then the old primary refuses
        them. If it is "cut off", it can't reach the new one; if that is found "late", subscribers
        come back to it before, and something else may be done.
        """
        primary, replica = self.valkeys
        with open_redis(primary.url) as old, open_redis(replica.url) as new:
            new.replicaof("127.0.0.1", _config(old, "port"))  # unless it was cut off
            old.client_pause(10_000, all=False)
            eventually(lambda: _is_replicated(old, new))
            new.replicaof("NO", "ONE")
            old.replicaof("127.0.0.1", 1 if how else _config(new, "port"))
            if how == "late":
                runner = self.proxies["runner"]
                seen = runner.passed[primary.socket, "subscribe"]
                eventually(lambda: runner.passed[primary.socket, "subscribe"] > seen, 30)
                meanwhile()
            for party in PARTIES:
                self.proxies[party].target = replica.socket
            old.client_unpause()
        self.valkeys.reverse()


def _is_replicated(primary: Any, replica: Any) -> bool:
    """Whether a replica has what its primary had a moment before."""
    offset = primary.info("replication")["master_repl_offset"]
    found = replica.info("replication")
    return bool(found["master_link_status"] == "up" and found["slave_repl_offset"] >= offset)


def _config(redis: Any, name: str) -> str:
    return str(redis.config_get(name)[name])


@contextmanager
def behind_proxies(servers: Servers, directory: Path) -> Iterator[BehindProxies]:
    """Start everything on a directory; end it with the block."""
    homes = []
    for name in ("one", "two"):
        (directory / name).mkdir()
        homes.append(find_server_paths(directory / name))
    valkeys = [Valkey(home) for home in homes]
    children = [each.child() for each in valkeys]
    children[1].name = "replica"
    socket = unquote(servers.endpoint_url.partition("?host=")[2].partition("&")[0])
    database = homes[0].sockets / ".s.PGSQL.5432"
    with Supervisor(directory / "logs") as supervisor:
        supervisor.start(*children)
        with open_redis(valkeys[0].url) as one, open_redis(valkeys[1].url) as two:
            for each in (one, two):
                each.config_set("port", free_port(0))
            one.config_set("repl-diskless-sync-delay", 0)
            two.replicaof("127.0.0.1", _config(one, "port"))
        proxies = {
            name: Proxy(homes[0].sockets / f"{name}.sock", valkeys[0].socket, RedisMoments)
            for name in PARTIES
        }
        proxies["database"] = Proxy(database, Path(socket) / database.name, PostgresMoments)
        port = free_port(0)
        found = BehindProxies(supervisor, proxies, valkeys, f"http://127.0.0.1:{port}")

        def proxied(url: str) -> str:
            there, here = (quote(path, safe="") for path in (socket, str(database.parent)))
            assert there in url
            return url.replace(there, here)

        def start(name: str, argv: list[str], ready: Any, **changes: str) -> ProcessSpec:
            changes["TASK_TAGS_REDIS_URL"] = found.redis_url(name)
            return ProcessSpec(name, argv, ready, environment=settings_of(servers, **changes))

        supervisor.start(
            start(
                "worker",
                command(WORKER),
                lambda: '"ready"' in found.log("worker"),
                TASK_TAGS_DATABASE_URL=proxied(servers.worker_url),
            ),
            start("beat", command(BEAT), lambda: '"ready"' in found.log("beat")),
            start(
                "endpoint",
                [sys.executable, "-c", ENDPOINT, "endpoint", "--port", str(port)],
                lambda: _is_ready(port),
                TASK_TAGS_DATABASE_URL=proxied(servers.endpoint_url),
            ),
        )
        try:
            yield found
        finally:
            for each in proxies.values():
                each.close()


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
