"""`rediss://` verifies the server's certificate, for all: SDK, worker and beat."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from producers.client import TagProducer
from producers.contract.messages import register_execution
from producers.errors import Unavailable
from tests.support.servers import Servers
from tests.support.tls import TlsListener, tls_listener
from tests.support.waiting import eventually
from worker.local.stack import BEAT, WORKER, command

USER, PASSWORD = "tls-user", "secret-of-the-test"


@pytest.fixture
def listener(servers: Servers, redis: Any, tmp_path: Path) -> Iterator[TlsListener]:
    """TLS in front of the Redis of the stack, with a user for it."""
    redis.execute_command(
        "ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", "~*", "&*", "+@all"
    )
    with tls_listener(tmp_path, servers.redis_socket) as listener:
        yield listener
    redis.acl_deluser(USER)


def url(listener: TlsListener, *, trusted: bool) -> str:
    query = f"&ssl_ca_certs={listener.ca}" if trusted else ""
    return f"rediss://{USER}:{PASSWORD}@127.0.0.1:{listener.port}?db=3{query}"


def test_the_sdk_tells_an_impostor_nothing(listener: TlsListener, token: str) -> None:
    """A certificate that nobody known has signed: no password, no batch."""
    organization = uuid4()
    untrusted = url(listener, trusted=False)
    with TagProducer(redis_url=untrusted, organization_id=organization, token=token) as producer:
        with pytest.raises(Unavailable, match="certificate"):
            producer.enqueue(register_execution(uuid4()))
    assert listener.received == []
    trusted = url(listener, trusted=True)
    with TagProducer(redis_url=trusted, organization_id=organization, token=token) as producer:
        producer.enqueue(register_execution(uuid4()))
    assert PASSWORD.encode() in b"".join(listener.received)


@pytest.mark.parametrize("process", [WORKER, BEAT])
def test_a_process_tells_an_impostor_nothing(
    listener: TlsListener, servers: Servers, process: Any, tmp_path: Path
) -> None:
    """Neither at its start nor by Celery's connection to the broker; with the CA, it works."""
    secret = servers.settings.jwt_secret
    assert secret is not None
    environment = {
        **os.environ,
        "TASK_TAGS_DATABASE_URL": servers.worker_url,
        "TASK_TAGS_JWT_SECRET": secret.get_secret_value(),
    }
    for trusted in (False, True):
        environment["TASK_TAGS_REDIS_URL"] = url(listener, trusted=trusted)
        log = tmp_path / f"{trusted}.log"
        with log.open("wb") as output:
            argv = command(process)
            running = subprocess.Popen(argv, env=environment, stderr=output, cwd="/")
        try:
            if trusted:
                eventually(lambda: '"ready"' in log.read_text())  # noqa: B023
                eventually(
                    lambda: any(
                        b"task_tags" in each or b"BRPOP" in each for each in listener.received
                    )
                )
                if process is WORKER:
                    organization = uuid4()
                    with TagProducer(
                        redis_url=environment["TASK_TAGS_REDIS_URL"],
                        organization_id=organization,
                        token=servers.token(organization),
                    ) as producer:
                        producer.enqueue(register_execution(uuid4()))
                    stored = "select from tag_batches where organization_id = %s"
                    with servers.owner() as owner:
                        eventually(lambda: owner.execute(stored, [organization]).fetchall())  # noqa: B023
            else:
                eventually(lambda: listener.failed > 2)
                assert listener.received == []
        finally:
            running.terminate()
            running.wait(30)


def test_the_broker_connection_tells_an_impostor_nothing(listener: TlsListener) -> None:
    """Celery's own connection, without what a process checks before."""
    code = (
        "import sys; from worker.broker import create_app; "
        "create_app('x', sys.argv[1]).connection().ensure_connection(max_retries=1)"
    )
    for trusted in (False, True):
        argv = [sys.executable, "-c", code, url(listener, trusted=trusted)]
        ended = subprocess.run(argv, capture_output=True, timeout=60)
        assert (ended.returncode == 0) == trusted, ended.stderr
        assert bool(listener.received) == trusted
