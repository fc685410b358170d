"""Servers that hang with a live connection: every wait is bounded, also after SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID, uuid4

import psycopg
import pytest
from redis import Redis
from sqlalchemy import make_url

from producers.contract.channels import inbox_key, lease_key
from producers.contract.messages import register_execution
from producers.inbox.protocol import Inbox
from tests.support.moments import Harm, PostgresMoments
from tests.support.processes import await_line, settings_of, started
from tests.support.proxy import Proxy
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, Tenant, large_batch, slow, tagging
from tests.support.waiting import eventually
from worker.api import queries
from worker.db.repository import Repository, Transaction
from worker.db.time_limit import TimeLimit
from worker.drain.blame import is_timeout
from worker.local.servers import Valkey, find_server_paths
from worker.local.stack import WORKER, command
from worker.local.supervisor import Supervisor

TALKING: Final = "for i in 1..30 loop perform pg_sleep(0.1); raise notice 'working'; end loop"


def backend(repository: Repository) -> int:
    """Return the process id of the server process behind a repository's connection."""
    with repository._connection() as pipeline:
        return pipeline.connection.info.backend_pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class FirstStatements(PostgresMoments):
    """Tells the statement that checks the role, and the commit that psycopg sends by itself."""

    def _moment(self, message: bytes) -> str:
        if b"pg_has_role" in message:
            return "check"
        return "commit" if b"COMMIT" in message else ""


@contextmanager
def hanging(url: str, directory: Path, moment: str) -> Iterator[str]:
    """Yield the URL of a proxy that passes on what comes before a moment."""
    parts = make_url(url)
    listen = directory / ".s.PGSQL.5432"
    proxy = Proxy(listen, Path(str(parts.query["host"])) / listen.name, FirstStatements)
    with closing(proxy), proxy.harming(Harm(moment, "hang", "", seconds=60)):
        yield parts.set(query={"host": str(directory)}).render_as_string(hide_password=False)
        assert proxy.harmed or proxy.passed[proxy.target, "check"]


def test_the_check_of_the_role_commits_nothing_without_a_limit(
    servers: Servers, tmp_path: Path
) -> None:
    """psycopg would commit behind the check, and wait for ever for a server that hangs."""
    with (
        hanging(servers.worker_url, tmp_path, "commit") as url,
        closing(Repository(url)) as repository,
    ):
        checking = threading.Thread(target=repository.check, daemon=True)
        checking.start()
        checking.join(30)
        assert not checking.is_alive()


def test_a_read_waits_no_longer_than_it_may_for_a_connection_either(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg would wait 10 s more for the server once it was cancelled."""
    monkeypatch.setattr(queries, "READ_SECONDS", 0.5)

    async def read(url: str) -> None:
        with closing(queries.Reader(url, 1)) as reader:
            await reader.check()

    with hanging(servers.endpoint_url, tmp_path, "check") as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            asyncio.run(read(url))
        assert time.monotonic() - began < 5


def test_a_transaction_on_a_silent_server_is_given_up(tenant: Tenant) -> None:
    """On the client's side; the next one is on a new connection, and what waits is applied."""
    repository = Repository(tenant.servers.worker_url, TimeLimit(1.0, lambda: False))
    tenant.send(tagging("a"))
    with stopped(backend(repository)):
        began = time.monotonic()
        tenant.drain(repository=repository, budget_seconds=30)
        assert time.monotonic() - began < 10
        assert tenant.tags() == ["a"]
    repository.close()


def test_a_group_that_takes_longer_than_a_transaction_may_is_made_smaller(tenant: Tenant) -> None:
    """Else it would begin again for ever; a turn is too short to find the size by halves."""
    repository = Repository(tenant.servers.worker_url, TimeLimit(1.0, lambda: False))
    tags = [f"{number:02}" for number in range(60)]
    with slow(tenant.servers, tenant.organization, "perform pg_sleep(0.05)", "write"):
        tenant.send(*map(tagging, tags))
        deadline = time.monotonic() + 60
        while len(tenant.outcomes()) < len(tags) and time.monotonic() < deadline:
            tenant.drain(repository=repository, budget_seconds=0.1)
    repository.close()
    assert tenant.outcomes() == [["added"]] * len(tags)
    assert tenant.tags() == tags


def test_the_statement_is_cancelled_at_the_server(servers: Servers) -> None:
    """Its locks would be held for as long as it runs otherwise."""
    repository = Repository(servers.worker_url, TimeLimit(1.0, lambda: False))
    pid = backend(repository)
    with pytest.raises(psycopg.Error):
        repository._execute(uuid4(), "select pg_sleep(20)")
    active = "select from pg_stat_activity where pid = %s and state = 'active'"
    with servers.owner() as owner:
        eventually(lambda: not owner.execute(active, [pid]).fetchall())
    repository.close()


def test_after_a_signal_no_wait_is_long(servers: Servers) -> None:
    """For any limit: one second, and the time that cancelling takes."""
    signalled = threading.Event()
    repository = Repository(servers.worker_url, TimeLimit(60.0, signalled.is_set))
    threading.Timer(0.3, signalled.set).start()
    began = time.monotonic()
    with pytest.raises(psycopg.Error):
        repository._execute(uuid4(), "select pg_sleep(30)")
    assert time.monotonic() - began < 10
    repository.close()


@pytest.mark.parametrize("silent", ["postgresql", "nothing"])
def test_a_worker_ends_soon_after_sigterm_in_a_drain(
    servers: Servers, quiet_redis: Redis, silent: str, tmp_path: Path
) -> None:
    """The real signal, with a database that hangs, and while messages keep coming."""
    organization, log = uuid4(), tmp_path / "log"
    url = servers.stack.redis_url.replace("?db=0", "?db=1")
    environment = {**os.environ, **settings_of(servers, TASK_TAGS_REDIS_URL=url)}
    inbox, token = Inbox(quiet_redis, organization), servers.token(organization)
    redis: Any = quiet_redis
    with log.open("wb") as output:
        worker = subprocess.Popen(command(WORKER), env=environment, stderr=output, cwd="/")
    try:
        eventually(lambda: '"ready"' in log.read_text())
        inbox.append([register_execution(uuid4()).encode()], token, str(uuid4()))
        eventually(lambda: not redis.xlen(inbox_key(organization)))
        if silent == "postgresql":
            with servers.owner() as owner:
                pids = owner.execute(
                    "select pid from pg_stat_activity where usename = 'task_tags_worker'"
                ).fetchall()
            for (pid,) in pids:
                os.kill(pid, signal.SIGSTOP)
        else:
            pids = []
        try:
            messages = [register_execution(uuid4()).encode() for _ in range(2000)]
            inbox.append(messages, token, str(uuid4()))
            eventually(lambda: (redis.get(lease_key(organization)) or b"").startswith(b"running"))
            began = time.monotonic()
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
            assert time.monotonic() - began < 15  # 5 s on a quiet machine
        finally:
            for (pid,) in pids:
                os.kill(pid, signal.SIGCONT)
    finally:
        worker.kill()
        worker.wait()


def test_a_transaction_that_was_cancelled_has_not_succeeded(servers: Servers) -> None:
    """Whatever PostgreSQL says, as of a commit that no longer waits for a standby."""
    repository = Repository(servers.worker_url, TimeLimit(0.5, lambda: False))

    def ignore(transaction: Transaction) -> None:
        assert transaction.now
        transaction._send(
            "do $$ begin perform pg_sleep(20); exception when query_canceled then null; end $$"
        )

    with pytest.raises(psycopg.OperationalError, match="was cancelled"):
        repository.transact(uuid4(), ignore)
    repository.close()


def test_the_row_is_free_once_a_cancelled_transaction_has_failed(servers: Servers) -> None:
    """Also if its statement is slow to notice; else a drain would find it locked, and hand over."""
    repository = Repository(servers.worker_url, TimeLimit(0.5, lambda: False))
    other, organization = repository.clone(), uuid4()

    def be_slow(transaction: Transaction) -> None:
        assert transaction.now
        length = "20000000 + 0 * pg_backend_pid()"  # which no plan can compute before
        deaf = f"length(translate(repeat('x', {length}), 'y', 'z'))"  # for a third of a second
        transaction._send(f"select {deaf} from generate_series(1, 100)")
        transaction.check()

    for _ in range(2):
        with pytest.raises(psycopg.errors.QueryCanceled):
            repository.transact(organization, be_slow)
        other.transact(organization, lambda it: it.check())
    repository.close()
    other.close()


def test_a_statement_is_cancelled_again_before_its_connection_is_closed(servers: Servers) -> None:
    """It may have been sent after the first time, which found the server idle."""
    repository = Repository(servers.worker_url, TimeLimit(0.5, lambda: False))
    organization, limit = uuid4(), repository._time_limit

    def begin_late(transaction: Transaction) -> None:
        assert transaction.now
        eventually(lambda: limit.was_exceeded)
        with limit._lock:  # the first request is through
            transaction._send("select pg_sleep(20)")
        transaction.check()

    with pytest.raises(psycopg.Error):
        repository.transact(organization, begin_late)
    eventually(lambda: _has_lock(repository, organization), seconds=8)
    repository.close()


def _has_lock(repository: Repository, organization: UUID) -> bool:
    try:
        repository.transact(organization, lambda it: it.check())
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def test_the_limit_holds_after_a_connection_that_was_lost(servers: Servers) -> None:
    """libpq has no socket of it any more."""
    limit = TimeLimit(0.5, lambda: False)
    with psycopg.connect(servers.worker_url) as lost:
        limit.begin(lost)
        lost.close()
        eventually(lambda: limit.was_exceeded)
        limit.end()
    repository = Repository(servers.worker_url, limit)
    began = time.monotonic()
    with pytest.raises(psycopg.Error):
        repository._execute(uuid4(), "select pg_sleep(30)")
    assert time.monotonic() - began < 15
    repository.close()


def drain_keeping_the_lease(tenant: Tenant) -> None:
    """Drain with a lease of 1.5 s, and assert that no other run gets it until the drain ends."""
    inbox = Inbox(tenant.redis, tenant.organization, lease_ms=1500)
    drain = threading.Thread(target=tenant.drain, kwargs={"inbox": inbox})
    key: Any = lease_key(tenant.organization)
    drain.start()
    try:
        eventually(lambda: tenant.redis.get(key) == b"running run")
        while drain.is_alive():
            assert not inbox.acquire("another", max_messages=1).entries
            time.sleep(0.05)
    finally:
        drain.join()


@pytest.mark.parametrize("statement", ["look-up", "write"])
@pytest.mark.parametrize("talking", [False, True], ids=["silent", "talking"])
def test_a_drain_keeps_its_lease_while_postgresql_works_for_it(
    tenant: Tenant, statement: Literal["look-up", "write"], talking: bool
) -> None:
    """Else another one would wait for the row, and begin with a full group if this one fails."""
    tenant.send(register_execution(EXECUTION))
    tenant.drain()
    tenant.published.clear()
    tenant.send(tagging("a"))
    work = TALKING if talking else "perform pg_sleep(3)"
    with slow(tenant.servers, tenant.organization, work, statement):
        drain_keeping_the_lease(tenant)
    assert tenant.outcomes() == [["added"]]


def test_a_drain_keeps_its_lease_while_it_still_sends_its_look_ups(tenant: Tenant) -> None:
    """They are larger than what a socket holds, and PostgreSQL works on the first of them."""
    tenant.send(register_execution(EXECUTION))
    tenant.drain()
    tenant.send(*map(large_batch, range(4)))
    with slow(tenant.servers, tenant.organization, "perform pg_sleep(1.5)", "look-up"):
        drain_keeping_the_lease(tenant)


def test_a_silent_connection_keeps_no_lease(tenant: Tenant) -> None:
    """PostgreSQL never answered that it has the lock; another worker's connection may be well."""
    silent = Repository(tenant.servers.worker_url, TimeLimit(60.0, lambda: False))
    inbox = Inbox(tenant.redis, tenant.organization, lease_ms=1500)
    arguments = {"inbox": inbox, "repository": silent, "run_id": "silent"}
    tenant.send(tagging("a"))
    pid = backend(silent)
    drain = threading.Thread(target=tenant.drain, kwargs=arguments)
    with stopped(pid):
        drain.start()
        key: Any = lease_key(tenant.organization)
        eventually(lambda: tenant.redis.get(key) == b"running silent")
        eventually(lambda: tenant.drain() == 1, seconds=20)
        assert tenant.tags() == ["a"]
    drain.join()
    silent.close()


def test_what_the_limit_ended_was_a_time_out(servers: Servers) -> None:
    """Also if the connection is lost, as when the server takes a moment to notice."""
    repository = Repository(servers.worker_url, TimeLimit(1.5, lambda: False))
    organization, lost = uuid4(), psycopg.OperationalError("server closed the connection")

    def sleep(transaction: Transaction) -> None:
        assert transaction.now
        transaction._send("select pg_sleep(30)")
        transaction.check()

    with pytest.raises(psycopg.Error):
        repository.transact(organization, sleep)
    assert is_timeout(lost, repository)
    assert repository.failed_statement == "select pg_sleep(30)"
    repository.transact(organization, lambda it: it.check())
    assert not is_timeout(lost, repository)
    repository.close()


def test_a_worker_ends_soon_after_sigterm_while_its_log_hangs(
    servers: Servers, tmp_path: Path
) -> None:
    """Celery's handler writes to standard output, before it does anything else."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    url = servers.stack.redis_url.replace("?db=0", "?db=1")
    environment = {**os.environ, **settings_of(servers, TASK_TAGS_REDIS_URL=url)}
    worker = subprocess.Popen(
        command(WORKER), env=environment, stdout=writer, stderr=writer, cwd="/"
    )
    said = b""

    def is_ready() -> bool:
        nonlocal said
        with suppress(BlockingIOError):
            said += os.read(reader, 65536)
        return b'"ready"' in said

    try:
        eventually(is_ready)
        os.set_blocking(writer, False)  # that of the worker as well, so it is set back
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b".")
        os.set_blocking(writer, True)
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert time.monotonic() - began < 15  # 5 s on a quiet machine
    finally:
        worker.kill()
        worker.wait()
        os.close(reader)
        os.close(writer)


def test_a_worker_ends_soon_after_sigterm_while_redis_hangs(
    servers: Servers, tmp_path: Path
) -> None:
    """Celery itself waits for it, however long that takes."""
    log = tmp_path / "log"
    valkey = Valkey(find_server_paths(tmp_path))
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(tmp_path / "logs"))
        supervisor.start(valkey.child())
        ((_, server),) = supervisor.running
        settings = settings_of(servers, TASK_TAGS_REDIS_URL=valkey.url)
        worker = stack.enter_context(started(WORKER, log, settings))
        await_line(log, '"ready"')
        with stopped(server.pid):
            time.sleep(1.0)  # it waits for an answer
            began = time.monotonic()
            worker.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            worker.send_signal(signal.SIGTERM)  # somebody is impatient
            assert worker.wait(30) == 0
            assert time.monotonic() - began < 15  # 5 s on a quiet machine
        assert "wakeup fd" not in log.read_text()
