"""Servers that answer with errors, and a Redis that is demoted: nothing ends, nothing is lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from producers.client import TagProducer
from producers.contract.channels import inbox_key
from producers.contract.messages import TagBatch, add, register_execution
from producers.errors import RedisOutOfMemory, Unavailable
from producers.inbox.protocol import WAITING
from producers.redis_client import open_redis
from tests.support.api_errors import error_of
from tests.support.behind_proxies import BehindProxies, behind_proxies
from tests.support.moments import Harm
from tests.support.servers import Servers
from tests.support.waiting import eventually

REDIS_CODES: Final = (
    *("READONLY", "MASTERDOWN", "LOADING", "OOM", "NOPERM", "CLUSTERDOWN", "TRYAGAIN", "BUSY"),
    *("MISCONF", "UNBLOCKED", "MOVED 1 127.0.0.1:1", "ASK 1 127.0.0.1:1", "MOVED"),
)
SQL_STATES: Final = (
    *("XX000", "57P01", "57P03", "53300", "25006", "40001", "55000", "42501", "42P01", "26000"),
)


@pytest.fixture(scope="module")
def behind(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BehindProxies]:
    with behind_proxies(servers, tmp_path_factory.mktemp("behind")) as found:
        yield found
        found.assert_alive()


@pytest.fixture
def runner(behind: BehindProxies, organization: UUID, token: str) -> Iterator[TagProducer]:
    with TagProducer(
        redis_url=behind.redis_url("runner"), organization_id=organization, token=token
    ) as producer:
        yield producer


@pytest.fixture
def execution(runner: TagProducer) -> UUID:
    execution = uuid4()
    runner.apply(register_execution(execution))
    return execution


@pytest.fixture
def client(behind: BehindProxies, token: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=behind.endpoint_url, headers=headers, timeout=20) as client:
        yield client


def tagging(execution: UUID, tag: str) -> TagBatch:
    return TagBatch(tags=[add(execution, "t", "t", tag)])


def body(execution: UUID, tag: str) -> dict[str, Any]:
    return {"tags": [add(execution, "t", "t", tag).model_dump(mode="json")]}


def await_more(count: Callable[[], int], than: int) -> None:
    """Wait until a count has grown beyond a number."""
    eventually(lambda: count() > than)


def assert_unavailable(response: httpx.Response, about: object) -> None:
    assert response.status_code == 503, (about, response.text)
    assert error_of(response)["code"] == "unavailable"
    assert response.headers["retry-after"]


# --- Beat ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["send", "connect"])
def test_no_error_of_redis_ends_beat(behind: BehindProxies, moment: str) -> None:
    """Also where it comes more often than a message is tried; it sends its messages afterwards."""
    proxy = behind.proxies["beat"]
    for code in REDIS_CODES:
        harmed = proxy.harmed
        with proxy.harming(Harm(moment, "error", code)):
            if moment == "connect":
                proxy.cut()
            await_more(lambda: proxy.harmed, harmed + (3 if moment == "send" else 0))
        proxy.passed.clear()
        await_more(lambda: proxy.passed[proxy.target, "send"], 1)
        behind.assert_alive()


# --- The worker ----------------------------------------------------------------------------------


def test_a_worker_waits_for_a_postgresql_that_takes_no_connections(
    behind: BehindProxies, runner: TagProducer, execution: UUID
) -> None:
    """Whatever it says to that: no batch is refused for it, and they take effect in their order."""
    proxy = behind.proxies["database"]
    for code in (*SQL_STATES, "28P01", "3D000"):
        with proxy.harming(Harm("start", "error", code)):
            proxy.cut()
            harmed = proxy.harmed
            futures = [runner.submit(tagging(execution, f"{code} {n}")) for n in range(3)]
            await_more(lambda: proxy.harmed, harmed + 2)
        assert [each.result(20).statuses for each in futures] == [["added"]] * 3, code


# --- The SDK -------------------------------------------------------------------------------------


def test_every_error_of_redis_is_one_of_the_sdk(
    behind: BehindProxies, runner: TagProducer, execution: UUID
) -> None:
    """Nothing is accepted, and the same batch is as soon as the server is well."""
    proxy = behind.proxies["runner"]
    for code, fault in product(REDIS_CODES, ("error", "end")):
        batch = tagging(execution, f"{code} {fault}")
        with proxy.harming(Harm("append", fault, code)), pytest.raises(Unavailable) as caught:
            runner.enqueue(batch)
        assert isinstance(caught.value, RedisOutOfMemory) == (code == "OOM"), (code, fault)
        assert runner.apply(batch, 20).statuses == ["added"], (code, fault)


# --- The endpoint --------------------------------------------------------------------------------


def test_no_error_of_redis_is_a_500(
    behind: BehindProxies, client: httpx.Client, execution: UUID
) -> None:
    """At a write and at readyz: 503, and the next request is answered."""
    proxy = behind.proxies["endpoint"]
    for code, fault in product(REDIS_CODES, ("error", "end")):
        with proxy.harming(Harm("append", fault, code)):
            assert_unavailable(client.patch("/task-tags", json=body(execution, "x")), code)
        with proxy.harming(Harm("evaluate", fault, code)):
            assert_unavailable(client.get("/readyz"), code)
        answered = client.patch("/task-tags", json=body(execution, f"{code} {fault}"))
        assert answered.json() == {"tags": [{"status": "added"}]}, (code, fault)
        assert client.get("/readyz").status_code == 200, (code, fault)


def test_a_write_that_can_not_listen_is_answered_from_the_database(
    behind: BehindProxies, client: httpx.Client, execution: UUID
) -> None:
    """As soon as its result is stored; 202 if that can't be read either."""
    redis, database = behind.proxies["endpoint"], behind.proxies["database"]
    with redis.harming(Harm("subscribe", "error", "NOPERM")):
        redis.cut()
        written = client.patch("/task-tags", json=body(execution, "x"))
        assert written.json() == {"tags": [{"status": "added"}]}
        with database.harming(Harm("record", "error", "42P01")):
            prefer = {"Prefer": "wait=1"}
            written = client.patch("/task-tags", json=body(execution, "y"), headers=prefer)
        assert written.status_code == 202
        location = written.headers["location"]
        assert eventually(lambda: client.get(location).json()["tags"]) == [{"status": "added"}]


READS: Final = {
    "tags": "/task-tags?flow_execution_id={}",
    "task": "/task-tags?flow_execution_id={}&task_name=t",
    "page": "/task-tags?flow_execution_id={}&limit=1",
    "page_of_task": "/task-tags?flow_execution_id={}&task_name=t&limit=1",
    "tasks": "/task-executions?flow_execution_id={}",
    "work": "/task-executions?with=a:b",
    "work_of_execution": "/task-executions?with=a:b&flow_execution_id={}",
    "work_of_task": "/task-executions?with=a:b&flow_execution_id={}&task_name=t",
    "changes": "/task-tags/changes?flow_execution_id={}&after=0",
    "record": "/task-tags/batches/{}",
    "recovery": "/readyz",
}


def test_no_error_of_postgresql_is_a_500(
    behind: BehindProxies, client: httpx.Client, runner: TagProducer, execution: UUID
) -> None:
    """At each statement, and at the one that begins each transaction: 503."""
    batch = tagging(execution, "x")
    runner.apply(batch)
    proxy = behind.proxies["database"]
    for statement, path in READS.items():
        url = path.format(batch.batch_id if statement == "record" else execution)
        harms = [
            *product((statement, "scope"), ("error",), SQL_STATES),
            *((statement, "end", code) for code in ("57P01", "XX000")),
        ]
        for harm in harms:
            with proxy.harming(Harm(*harm)):
                assert_unavailable(client.get(url), harm)
            assert client.get(url).status_code == 200, harm


def test_a_postgresql_that_takes_no_connections_is_503(
    behind: BehindProxies, client: httpx.Client, execution: UUID
) -> None:
    """Whatever it says to that; the next request connects."""
    proxy = behind.proxies["database"]
    url = READS["tags"].format(execution)
    for code in (*SQL_STATES, "28P01", "3D000"):
        with proxy.harming(Harm("start", "error", code)):
            proxy.cut()
            eventually(lambda: client.get(url).status_code == 503)
            assert_unavailable(client.get(url), code)
            assert_unavailable(client.get("/readyz"), code)
        assert client.get(url).status_code == 200, code
        assert client.get("/readyz").status_code == 200, code


def test_who_watches_is_closed_or_goes_on(
    behind: BehindProxies, client: httpx.Client, runner: TagProducer, execution: UUID
) -> None:
    """An error at the beginning is said before it is closed; later ones are waited out."""
    url = f"{behind.endpoint_url}{READS['changes'].format(execution)}".replace("http", "ws", 1)
    headers = {"Authorization": client.headers["authorization"]}
    redis, database = behind.proxies["endpoint"], behind.proxies["database"]
    for code in SQL_STATES:
        with database.harming(Harm("changes", "error", code)):
            with connect(url, additional_headers=headers) as refused:
                assert json.loads(refused.recv(20))["error"]["code"] == "unavailable"
                with pytest.raises(ConnectionClosed):
                    refused.recv(20)
                assert refused.close_code == 1013
            events = client.get(url.replace("ws", "http", 1).replace("changes?", "changes/events?"))
            assert_unavailable(events, code)
    with connect(url, additional_headers=headers) as watching:
        for number, code in enumerate(REDIS_CODES):
            harmed = redis.harmed
            with redis.harming(Harm("subscribe", "error", code)):
                redis.cut()
                await_more(lambda: redis.harmed, harmed)
            runner.apply(tagging(execution, f"{number}"))
            assert json.loads(watching.recv(20))["revision"] == number + 1, code
        for number, code in enumerate(SQL_STATES, len(REDIS_CODES)):
            for statement in ("changes", "revisions"):
                with database.harming(Harm(statement, "error", code)):
                    runner.apply(tagging(execution, f"{number} {statement}"))
        found = [json.loads(watching.recv(20))["revision"] for _ in range(2 * len(SQL_STATES))]
        assert found == [len(REDIS_CODES) + 1 + place for place in range(2 * len(SQL_STATES))]


# --- A demotion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "cut off", "late"])
def test_all_find_the_new_primary_by_themselves(
    behind: BehindProxies,
    client: httpx.Client,
    runner: TagProducer,
    organization: UUID,
    execution: UUID,
    token: str,
    how: str,
) -> None:
    """Also those that were idle, on connections to a server that now is a replica and lives on."""
    assert client.patch("/task-tags", json=body(execution, "before")).status_code == 200
    newcomer = TagProducer(
        redis_url=behind.redis_url("runner"), organization_id=organization, token=token
    )

    def subscribe() -> None:
        with pytest.raises(Unavailable):
            newcomer.apply(tagging(execution, "early"), 10)

    behind.demote(how, subscribe)
    beat = behind.proxies["beat"]
    await_more(lambda: beat.passed[beat.target, "send"], 1)
    eventually(lambda: client.get("/readyz").status_code == 200)
    with open_redis(behind.valkeys[0].url) as redis:  # its drain was lost
        lost = {"message": tagging(execution, "lost").encode(), "token": token}
        redis.xadd(inbox_key(organization), lost)
        redis.sadd(WAITING, str(organization))
        redis.delete("task-tags:wake")
    url = READS["tags"].format(execution)
    eventually(lambda: [each["tag"] for each in client.get(url).json()] == ["before", "lost"])
    eventually(lambda: client.patch("/task-tags", json=body(execution, "x")).status_code == 200)
    assert runner.apply(tagging(execution, "y"), 30).statuses == ["added"]
    behind.assert_alive()


@pytest.mark.parametrize("how", ["", "cut off"])
def test_nothing_that_was_replicated_is_lost_or_applied_twice(
    behind: BehindProxies,
    client: httpx.Client,
    runner: TagProducer,
    execution: UUID,
    how: str,
) -> None:
    """Under load: batches take effect in their order, and a watcher sees each change."""
    watched = f"{behind.endpoint_url}{READS['changes'].format(execution)}".replace("http", "ws", 1)
    headers = {"Authorization": client.headers["authorization"]}
    tags: list[str] = []
    demoted = threading.Event()

    def enqueue() -> None:
        """Enqueue on both sides of the demotion, the same batch until it is accepted."""
        while not demoted.is_set():
            batch = tagging(execution, f"{len(tags)}")
            while True:
                with suppress(Unavailable):
                    runner.enqueue(batch)
                    break
            tags.append(f"{len(tags)}")

    with connect(watched, additional_headers=headers, max_queue=None) as watching:
        enqueuing = threading.Thread(target=enqueue)
        enqueuing.start()
        await_more(lambda: len(tags), 100)
        behind.demote(how)
        await_more(lambda: len(tags), len(tags) + 100)
        demoted.set()
        enqueuing.join()
        assert runner.apply(tagging(execution, "last"), 30).statuses == ["added"]
        stored = [each["tag"] for each in client.get(READS["tags"].format(execution)).json()]
        assert stored == [*tags, "last"]
        revisions = [json.loads(watching.recv(20))["revision"] for _ in stored]
        assert revisions == list(range(1, len(stored) + 1))
    behind.assert_alive()
