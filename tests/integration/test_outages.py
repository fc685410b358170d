"""PostgreSQL and Valkey are killed while the product is in use: clear errors, then recovery."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from redis.exceptions import ResponseError
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from producers.client import TagProducer
from producers.contract.channels import changes_channel
from producers.contract.messages import TagBatch, add, register_execution
from producers.contract.results import ChangeEvent
from producers.errors import Unavailable
from producers.redis_client import open_async_redis, open_redis
from producers.subscriber import Subscriber
from tests.support.etag import revision_of
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.db.migrate import migrate
from worker.local.servers import Postgres, Valkey, find_server_paths, load_or_create_secret
from worker.local.stack import DATABASE, ENDPOINT, WORKER, Stack, command, free_port, run_stack
from worker.local.supervisor import ProcessSpec, Supervisor


@dataclass(frozen=True)
class Fragile:
    """A separate stack, whose supervisor restarts what a test kills."""

    stack: Stack
    directory: Path

    def pid(self, name: str) -> int:
        return next(p.pid for child, p in self.stack.supervisor.running if child.name == name)

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def restart(self) -> None:
        """Let the supervisor see what has ended, until all of it runs."""
        eventually(lambda: any(p.poll() is not None for _, p in self.stack.supervisor.running))
        eventually(self._runs)

    def _runs(self) -> bool:
        supervisor = self.stack.supervisor
        supervisor.restart_ended(lambda _: None)
        alive = all(process.poll() is None for _, process in supervisor.running)
        return alive and all(child.ready() for child, _ in supervisor.running)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    directory = tmp_path_factory.mktemp("fragile")
    with run_stack(directory, port=0, workers=1, say=lambda _: None) as stack:
        yield Fragile(stack, find_server_paths(directory).data)


@pytest.fixture
def producer(fragile: Fragile) -> Iterator[TagProducer]:
    stack = fragile.stack
    with TagProducer(
        redis_url=stack.redis_url, organization_id=stack.organization_id, token=stack.token
    ) as producer:
        yield producer


@pytest.fixture
def execution(producer: TagProducer) -> UUID:
    execution = uuid4()
    producer.apply(register_execution(execution))
    return execution


def tagging(execution: UUID, tag: str) -> TagBatch:
    return TagBatch(tags=[add(execution, "t", "t", tag)])


def read(fragile: Fragile, execution: UUID) -> httpx.Response:
    return httpx.get(
        f"{fragile.stack.endpoint_url}/task-tags",
        params={"flow_execution_id": str(execution)},
        headers={"Authorization": f"Bearer {fragile.stack.token}"},
        timeout=20,
    )


def test_batches_wait_while_postgresql_is_down_and_then_take_effect_in_order(
    fragile: Fragile, producer: TagProducer, execution: UUID
) -> None:
    """Enqueuing goes on; reading is 503, never an empty list; nothing is lost or reordered."""
    fragile.kill("postgresql")
    futures = [producer.submit(tagging(execution, f"{number}")) for number in range(20)]
    response = read(fragile, execution)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "unavailable"
    assert response.headers["retry-after"]
    readyz = f"{fragile.stack.endpoint_url}/readyz"  # its answer is a second old at most
    eventually(lambda: httpx.get(readyz).status_code == 503)
    assert httpx.get(f"{fragile.stack.endpoint_url}/healthz").status_code == 200
    assert not futures[-1].done()  # a backend may outlive its postmaster by a moment
    fragile.restart()
    for future in futures:
        assert [result.status for result in future.result(30).tags or []] == ["added"]
    tags = eventually(lambda: read(fragile, execution).json())
    assert [tag["tag"] for tag in tags] == [f"{number}" for number in range(20)]


def test_valkey_may_be_killed_and_nothing_accepted_is_lost(
    fragile: Fragile, producer: TagProducer, execution: UUID
) -> None:
    """`apply` continues, a subscriber gets what comes after, and the worker reconnects."""
    events: list[ChangeEvent] = []
    subscriber = Subscriber(
        redis_url=fragile.stack.redis_url, organization_id=fragile.stack.organization_id
    )

    def collect() -> None:
        for event in subscriber.changes(execution):
            events.append(event)

    thread = threading.Thread(target=collect)
    thread.start()
    channel = changes_channel(fragile.stack.organization_id, execution)
    with open_redis(fragile.stack.redis_url) as redis:
        eventually(lambda: dict(redis.pubsub_numsub(channel))[channel.encode()])
    producer.apply(tagging(execution, "before"))
    results: list[Any] = []
    applying = threading.Thread(
        target=lambda: results.append(producer.apply(tagging(execution, "during"), 60))
    )
    fragile.kill("valkey")
    applying.start()
    fragile.restart()
    applying.join()
    assert [result.status for result in results[0].tags] == ["added"]
    with open_redis(fragile.stack.redis_url) as redis:
        eventually(lambda: dict(redis.pubsub_numsub(channel))[channel.encode()])
    producer.apply(tagging(execution, "after"))
    eventually(lambda: [e for e in events if e.revision == 3])
    subscriber.close()
    thread.join()
    assert [tag["tag"] for tag in read(fragile, execution).json()] == ["before", "during", "after"]


def test_a_killed_worker_is_replaced_and_its_drain_goes_on(
    fragile: Fragile, producer: TagProducer, execution: UUID
) -> None:
    """SIGKILL during the work: the lease expires, and the rest is applied, once and in order."""
    names = [f"{number:03d}" for number in range(500)]
    producer.enqueue_many(tagging(execution, name) for name in names)
    fragile.kill("worker-1")
    fragile.restart()
    eventually(lambda: revision_of(read(fragile, execution)) == 500, 40)
    assert [tag["tag"] for tag in read(fragile, execution).json()] == names


def test_a_worker_ends_in_time_when_it_is_told_to(
    fragile: Fragile, producer: TagProducer, execution: UUID
) -> None:
    """SIGTERM under load: the transaction in hand is finished, the rest is handed over."""
    names = [f"{number:04d}" for number in range(2000)]
    producer.enqueue_many(tagging(execution, name) for name in names)
    process = next(p for child, p in fragile.stack.supervisor.running if child.name == "worker-1")
    process.terminate()
    assert process.wait(10) == 0
    fragile.restart()
    eventually(lambda: revision_of(read(fragile, execution)) == 2000, 40)
    assert [tag["tag"] for tag in read(fragile, execution).json()] == names


def test_a_worker_and_an_endpoint_may_start_before_their_servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """They wait, say each cause once, and work as soon as PostgreSQL and Valkey are there."""
    directory = tmp_path_factory.mktemp("early")
    with Supervisor(directory / "logs") as supervisor:
        home = find_server_paths(directory)
        valkey, postgres = (
            Valkey(home),
            Postgres(home, load_or_create_secret(directory, "postgres")),
        )
        environment = {
            "TASK_TAGS_REDIS_URL": valkey.url,
            "TASK_TAGS_JWT_SECRET": load_or_create_secret(directory, "jwt"),
        }
        port = free_port(0)
        commands = {
            "task_tags_worker": WORKER,
            "task_tags_endpoint": [*ENDPOINT, "--port", str(port)],
        }
        for role, words in commands.items():
            url = postgres.url(role, load_or_create_secret(directory, role), DATABASE)
            supervisor.start(
                ProcessSpec(
                    name=role,
                    argv=command(words),
                    ready=partial(_says, supervisor, role, "database"),
                    environment={**environment, "TASK_TAGS_DATABASE_URL": url},
                )
            )
        ready_url = f"http://127.0.0.1:{port}/readyz"
        assert httpx.get(ready_url).status_code == 503
        supervisor.start(postgres.child())
        postgres.create_database(DATABASE)
        passwords = {role: load_or_create_secret(directory, role) for role in commands}
        migrate(postgres.url(database=DATABASE), passwords)
        eventually(lambda: _says(supervisor, "task_tags_worker", "waiting for Redis"))
        supervisor.start(valkey.child())
        eventually(lambda: _says(supervisor, "task_tags_worker", '"message": "ready"'))
        eventually(lambda: httpx.get(ready_url).status_code == 200)
        log = supervisor.log("task_tags_worker").read_text()
        causes = re.findall("waiting for .*", log)
        assert len(set(causes)) == len(causes) >= 2, log
        assert all(process.poll() is None for _, process in supervisor.running)


def _says(supervisor: Supervisor, name: str, words: str) -> bool:
    log = supervisor.log(name)
    return log.exists() and words in log.read_text()


def test_an_endpoint_that_ends_lets_go_of_all_who_watch(
    fragile: Fragile, producer: TagProducer, execution: UUID
) -> None:
    """At once, with a close code for a WebSocket and the end of a stream; they may reconnect."""
    url = f"{fragile.stack.endpoint_url}/task-tags/changes"
    query = f"?flow_execution_id={execution}"
    headers = {"Authorization": f"Bearer {fragile.stack.token}"}
    producer.apply(tagging(execution, "x"))
    with (
        connect((url + query).replace("http", "ws"), additional_headers=headers) as watching,
        httpx.stream("GET", f"{url}/events{query}", headers=headers, timeout=20) as stream,
    ):
        lines = stream.iter_lines()
        assert '"revision":1' in watching.recv(20)
        assert any(line.startswith("data: ") for line in lines)
        process = next(
            process
            for child, process in fragile.stack.supervisor.running
            if child.name == "endpoint"
        )
        process.terminate()
        with pytest.raises(ConnectionClosed) as closed:
            watching.recv(20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert not [line for line in lines if line.startswith("data: ")]
        assert process.wait(5) == -signal.SIGTERM  # and not an error
    fragile.restart()
    producer.apply(tagging(execution, "y"))
    with connect(
        f"{url}{query}&after=1".replace("http", "ws"), additional_headers=headers
    ) as again:
        assert '"revision":2' in again.recv(20)


# --- Answers that are errors ---------------------------------------------------------------------


@contextmanager
def demoted(redis: Any) -> Iterator[None]:
    """Make the server the replica of one that does not answer, so writes get READONLY."""
    redis.replicaof("127.0.0.1", "1")
    try:
        yield
    finally:
        redis.replicaof("NO", "ONE")


@contextmanager
def forbidden(redis: Any) -> Iterator[None]:
    """The user may neither pop nor run scripts: NOPERM."""
    redis.execute_command("ACL", "SETUSER", "default", "-brpop", "-evalsha", "-eval")
    try:
        yield
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "+@all")


@pytest.mark.parametrize("answer", ["MOVED", "MOVED 1 injected", "ASK x y:z", "ERR"])
def test_an_error_that_redis_py_cannot_take_apart_is_an_error_of_redis(
    servers: Servers, answer: str
) -> None:
    """Not a ValueError, which ended workers and went through `except TaskTagsError`."""
    script = "return redis.error_reply(ARGV[1])"
    with open_redis(servers.stack.redis_url) as redis, pytest.raises(ResponseError):
        redis.eval(script, 0, answer)

    async def eval_there() -> None:
        async with open_async_redis(servers.stack.redis_url) as redis:
            await redis.eval(script, 0, answer)

    with pytest.raises(ResponseError):
        asyncio.run(eval_there())


@pytest.mark.parametrize("fault", [demoted, forbidden])
def test_an_error_as_answer_ends_nothing(
    fragile: Fragile, producer: TagProducer, execution: UUID, fault: Any
) -> None:
    """Worker, beat and endpoint run on, and go on once the server is well."""
    names = ("worker-1", "beat", "endpoint")
    pids = [fragile.pid(name) for name in names]
    log = fragile.stack.supervisor.log("worker-1")
    before = log.read_text().count("Connection to broker lost")
    with open_redis(fragile.stack.redis_url) as redis, fault(redis):
        futures = []
        with suppress(Unavailable):
            futures.append(producer.submit(tagging(execution, "during")))
        eventually(lambda: log.read_text().count("Connection to broker lost") > before)
        for name in names:
            running = next(p for c, p in fragile.stack.supervisor.running if c.name == name)
            assert running.poll() is None, name
    assert producer.apply(tagging(execution, "after"), 60).statuses == ["added"]
    for future in futures:
        assert future.result(60).statuses == ["added"]
    assert [fragile.pid(name) for name in names] == pids


def test_an_endpoint_is_not_ready_on_a_redis_that_takes_no_writes(fragile: Fragile) -> None:
    """A replica answers a ping, but no write; the answer is a second old at most."""
    readyz = f"{fragile.stack.endpoint_url}/readyz"
    eventually(lambda: httpx.get(readyz).status_code == 200)
    with open_redis(fragile.stack.redis_url) as redis, demoted(redis):
        eventually(lambda: httpx.get(readyz).status_code == 503)
    eventually(lambda: httpx.get(readyz).status_code == 200)
