"""The whole path with a real Celery worker: from a flow runner to a reader and a watcher."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from producers.client import AsyncTagProducer, TagProducer
from producers.contract.channels import inbox_key, lease_key
from producers.contract.messages import TagBatch, add, register_execution, remove
from producers.contract.results import ChangeEvent, ResultRecord
from producers.errors import (
    BatchIdInUse,
    ConfigurationError,
    Conflict,
    Forbidden,
    InboxFull,
    NotFound,
    ProducerClosed,
    RedisOutOfMemory,
    ResultTimeout,
    Unauthorized,
    Unavailable,
)
from producers.inbox.drain_message import DRAIN_TASK, QUEUE
from producers.inbox.protocol import Inbox
from producers.pubsub import EventQueue, PubSubMultiplexer
from producers.redis_client import open_async_redis, open_redis
from producers.subscriber import Subscriber
from tests.support.etag import revision_of
from tests.support.malformed import celery_messages
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.broker import Channel, create_app


@pytest.fixture
def execution(producer: TagProducer) -> UUID:
    execution = uuid4()
    producer.register(execution)
    return execution


def collect(received: Iterator[Any], into: list[Any]) -> None:
    for each in received:  # one by one: `extend` would show nothing until the end
        into.append(each)


def eventually_subscribed(servers: Servers, channel: str) -> None:
    """Wait until a subscription to a channel has reached the server."""
    with open_redis(servers.stack.redis_url) as client:
        redis: Any = client
        eventually(lambda: redis.pubsub_numsub(channel)[0][1])


@contextmanager
def following(servers: Servers, organization: UUID, execution: UUID) -> Iterator[list[ChangeEvent]]:
    """Collect the change events of an execution while the block runs."""
    events: list[ChangeEvent] = []
    subscriber = Subscriber(redis_url=servers.stack.redis_url, organization_id=organization)
    thread = threading.Thread(target=lambda: collect(subscriber.changes(execution), events))
    thread.start()
    eventually_subscribed(servers, f"task-tags:{{{organization}}}:changes:{execution}")
    try:
        yield events
    finally:
        subscriber.close()
        thread.join()


def test_a_batch_goes_all_the_way(
    servers: Servers,
    producer: TagProducer,
    http: httpx.Client,
    organization: UUID,
    execution: UUID,
) -> None:
    """Enqueued by a flow runner, applied by a worker, sent to a watcher, read over HTTP."""
    with following(servers, organization, execution) as events:
        record = (
            producer.batch()
            .add(execution, "extract_data", "review_status", "reviewed", {"reviewer": "ada"})
            .add(execution, "extract_data", "quality", "quality_checked")
            .remove(execution, "extract_data", "quality", "quality_checked")
            .apply()
        )
        eventually(lambda: events)
    assert [result.status for result in record.tags or []] == ["added", "added", "removed"]
    assert record.organization_id == organization
    (event,) = events
    assert (event.revision, event.changed_by, event.batch_id) == (1, "ada", record.batch_id)
    assert [change.change for change in event.changes] == ["added", "added", "removed"]
    response = http.get("/task-tags", params={"flow_execution_id": str(execution)})
    (tag,) = response.json()
    assert (tag["tag"], tag["tag_metadata"]) == ("reviewed", {"reviewer": "ada"})
    assert tag == json.loads(event.encode())["changes"][0]["tag"]
    stored = http.get(f"/task-tags/batches/{record.batch_id}")
    assert ResultRecord.decode(stored.content) == record


def test_three_lines_tag_a_task(producer: TagProducer, http: httpx.Client) -> None:
    """What the README shows a flow runner."""
    execution = uuid4()
    producer.register(execution)
    producer.batch().add(execution, "extract_data", "review_status", "reviewed").enqueue()
    query = {"flow_execution_id": str(execution)}
    eventually(lambda: '"reviewed"' in http.get("/task-tags", params=query).text)


def test_many_batches_take_effect_in_the_order_in_which_they_were_enqueued(
    producer: TagProducer, http: httpx.Client, execution: UUID
) -> None:
    """A thousand batches in one call: readers see them in that order."""
    names = [f"{number:04d}" for number in range(1000)]
    ids = producer.enqueue_many(
        TagBatch(tags=[add(execution, "task", "order", name)]) for name in names
    )
    assert len(ids) == 1000
    producer.apply(TagBatch(tags=[remove(execution, "task", "order", "none")]))
    response = http.get("/task-tags", params={"flow_execution_id": str(execution)})
    assert [tag["tag"] for tag in response.json()] == names
    assert revision_of(response) == 1000


def test_fifty_producers_send_the_same_batch_at_once(
    producer: TagProducer, http: httpx.Client, execution: UUID
) -> None:
    """One effect, and everybody gets the same answer."""
    batch = TagBatch(tags=[add(execution, "task", "type", "x")])
    futures = [producer.submit(batch) for _ in range(50)]
    records = [future.result(20) for future in futures]
    assert len({record.encode() for record in records}) == 1
    response = http.get("/task-tags", params={"flow_execution_id": str(execution)})
    assert (len(response.json()), revision_of(response)) == (1, 1)


def test_each_refusal_has_its_own_exception(
    servers: Servers, organization: UUID, producer: TagProducer, execution: UUID
) -> None:
    """A flow runner can decide by the type what to do."""
    good = TagBatch(tags=[add(execution, "task", "type", "x")])
    producer.apply(good)

    def with_token(token: str) -> TagProducer:
        return TagProducer(
            redis_url=servers.stack.redis_url, organization_id=organization, token=token
        )

    with pytest.raises(NotFound) as caught:
        producer.apply(TagBatch(tags=[add(uuid4(), "task", "type", "x")]))
    assert caught.value.record.error is not None
    with pytest.raises(Conflict):
        producer.apply(TagBatch(batch_id=good.batch_id, tags=[add(execution, "t", "t", "y")]))
    for token, expected in (
        ("garbage", Unauthorized),
        (servers.token(uuid4()), Forbidden),
        (servers.token(organization, "task-tags:read"), Forbidden),
    ):
        with with_token(token) as other, pytest.raises(expected):
            other.apply(TagBatch(tags=[add(execution, "task", "type", "x")]))


def test_a_bad_message_in_the_stream_is_answered_on_its_channel(
    servers: Servers, producer: TagProducer, organization: UUID
) -> None:
    """From a producer without the SDK: the worker validates, and the next message is applied."""
    reply_to = f"test-{uuid4()}"
    received: list[ResultRecord] = []
    subscriber = Subscriber(redis_url=servers.stack.redis_url, organization_id=organization)
    thread = threading.Thread(target=lambda: collect(subscriber.results(reply_to), received))
    thread.start()
    eventually_subscribed(servers, f"task-tags:{{{organization}}}:results:{reply_to}")
    bad = {"schema_version": 1, "kind": "tag_batch", "batch_id": str(uuid4()), "tags": "x"}
    producer.send([b"hello", json.dumps({**bad, "reply_to": reply_to}).encode()])
    assert producer.apply(register_execution(uuid4())).flow_execution
    eventually(lambda: received)
    subscriber.close()
    thread.join()
    assert received[0].error is not None
    assert received[0].error.code == "bad_request"


def test_asyncio_flow_runners_have_the_same_methods(
    servers: Servers, organization: UUID, token: str
) -> None:
    """Awaiting many results at once takes no thread for each."""

    async def run() -> list[ResultRecord]:
        execution = uuid4()
        async with AsyncTagProducer(
            redis_url=servers.stack.redis_url, organization_id=organization, token=token
        ) as producer:
            await producer.register(execution)
            subscriber = Subscriber(redis_url=servers.stack.redis_url, organization_id=organization)
            changes = subscriber.achanges(execution)
            first = asyncio.ensure_future(changes.__anext__())
            channel = f"task-tags:{{{organization}}}:changes:{execution}"
            await asyncio.to_thread(eventually_subscribed, servers, channel)
            batches = [TagBatch(tags=[add(execution, "t", "t", f"{i}")]) for i in range(100)]
            records = await asyncio.gather(*[producer.apply(batch) for batch in batches])
            assert (await first).revision == 1
            await changes.aclose()  # type: ignore[attr-defined]
            subscriber.close()
            await producer.enqueue_many(batches)
            submitted = await producer.submit(batches[0])
            assert (await submitted).statuses == ["added"]
            with pytest.raises(NotFound):
                await producer.apply(TagBatch(tags=[add(uuid4(), "t", "t", "x")]))
            return list(records)

    records = asyncio.run(run())
    assert all(record.tags and record.tags[0].status == "added" for record in records)


def test_a_full_inbox_gives_back_what_was_not_sent(
    servers: Servers, organization: UUID, token: str, quiet_redis: Any
) -> None:
    """InboxFull has the last batches, in their order; those that were accepted stay accepted."""
    quiet = TagProducer(
        redis_url=servers.stack.redis_url.replace("?db=0", "?db=1"),
        organization_id=organization,
        token=token,
        inbox_limit=3,
    )
    batches = [TagBatch(tags=[add(uuid4(), "t", "t", "x")]) for _ in range(5)]
    with quiet, pytest.raises(InboxFull) as caught:
        quiet.enqueue_many(batches)
    assert caught.value.unsent == batches[3:]
    assert quiet_redis.xlen(inbox_key(organization)) == 3


class Quiet:
    """A producer on the database without a worker, and a drain that removes what a test wants."""

    def __init__(self, servers: Servers, redis: Any, organization: UUID, token: str) -> None:
        self.arguments: dict[str, Any] = {
            "redis_url": servers.stack.redis_url.replace("?db=0", "?db=1"),
            "organization_id": organization,
            "token": token,
            "inbox_limit": 3,
        }
        self.inbox = Inbox(redis, organization)
        self.seen: list[bytes | None] = []

    def remove_messages(self, until: int, pause: float = 0.02) -> None:
        """Remove two messages every `pause` seconds, until so many have been removed."""
        while len(self.seen) < until:
            time.sleep(pause)
            if entries := self.inbox.acquire("run", max_messages=2).entries:
                self.seen.extend(entry.message for entry in entries)
                self.inbox.ack_and_publish("run", entries, [], max_messages=1).following()


@pytest.fixture
def quiet(servers: Servers, quiet_redis: Any, organization: UUID, token: str) -> Quiet:
    return Quiet(servers, quiet_redis, organization, token)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_waits_for_space_keeps_the_order(quiet: Quiet, asynchronous: bool) -> None:
    """A bound of 3, and 40 batches in one call: all go in while a drain removes some, each once."""
    batches = [TagBatch(tags=[add(uuid4(), "t", "t", f"{i}")]) for i in range(40)]

    async def enqueue() -> list[UUID]:
        async with AsyncTagProducer(**quiet.arguments) as producer:
            return await producer.enqueue_many(batches, block=20)

    drain = threading.Thread(target=quiet.remove_messages, args=(40,))
    drain.start()
    if asynchronous:
        ids = asyncio.run(enqueue())
    else:
        with TagProducer(**quiet.arguments) as producer:
            ids = producer.enqueue_many(batches, block=20)
    drain.join()
    assert ids == [batch.batch_id for batch in batches]
    assert quiet.seen == [batch.encode() for batch in batches]


def test_who_waited_for_space_in_vain_gets_the_rest_back(quiet: Quiet) -> None:
    """The time-out is for the whole call, also if there is space for some batches meanwhile."""
    batches = [TagBatch(tags=[add(uuid4(), "t", "t", "x")]) for _ in range(9)]
    drain = threading.Thread(target=quiet.remove_messages, args=(5, 0.6))
    drain.start()
    with TagProducer(**quiet.arguments) as producer, pytest.raises(InboxFull) as caught:
        producer.enqueue_many(batches, block=0.9)
    drain.join()
    assert caught.value.unsent == batches[5:]
    assert quiet.seen == [batch.encode() for batch in batches[:5]]


def test_a_producer_that_is_closed_no_longer_waits_for_space(quiet: Quiet) -> None:
    """The call ends at once, and says so."""
    producer = TagProducer(**quiet.arguments)
    closing = threading.Timer(0.2, producer.close)
    closing.start()
    with pytest.raises(ProducerClosed):
        producer.enqueue_many([register_execution(uuid4()) for _ in range(9)], block=60)
    closing.join()


def test_a_redis_without_memory_has_its_own_error(quiet: Quiet, quiet_redis: Any) -> None:
    """Waiting would not help, so it is an error at once; with memory the batch is accepted."""
    batch = register_execution(uuid4())
    with TagProducer(**quiet.arguments) as producer:
        quiet_redis.config_set("maxmemory", 1)
        begin = time.monotonic()
        try:
            with pytest.raises(RedisOutOfMemory):
                producer.enqueue_many([batch], block=20)
        finally:
            quiet_redis.config_set("maxmemory", 0)
        assert time.monotonic() - begin < 10
        assert producer.enqueue(batch) == batch.batch_id


def test_no_result_in_time_says_so(
    servers: Servers, organization: UUID, token: str, quiet_redis: Any
) -> None:
    """No worker uses that database: `apply` ends after its time-out, `close` ends all waiting."""
    url = servers.stack.redis_url.replace("?db=0", "?db=1")
    producer = TagProducer(redis_url=url, organization_id=organization, token=token)
    with pytest.raises(ResultTimeout):
        producer.apply(register_execution(uuid4()), timeout=0.2)
    future = producer.submit(register_execution(uuid4()))
    producer.close()
    with pytest.raises(ProducerClosed):
        future.result(5)


def test_a_result_that_was_lost_is_asked_for_again(
    servers: Servers,
    producer: TagProducer,
    redis: Any,
    execution: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection is cut before the result comes: the batch is sent again, in effect once."""
    producer.apply(TagBatch(tags=[add(execution, "t", "t", "first")]))
    batch = TagBatch(tags=[add(execution, "t", "t", "x")])
    original = Inbox.append

    def append_and_cut(*arguments: Any) -> Any:
        monkeypatch.setattr(Inbox, "append", original)
        redis.client_kill_filter(_type="pubsub")
        return original(*arguments)

    monkeypatch.setattr(Inbox, "append", append_and_cut)
    record = producer.apply(batch)
    assert [result.status for result in record.tags or []] == ["added"]


def test_an_outage_does_not_change_the_order(
    producer: TagProducer, execution: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that cannot be enqueued is an error at once, and never enqueued after later ones."""
    producer.apply(TagBatch(tags=[add(execution, "t", "t", "first")]))
    original = Inbox.append

    def away(*_: Any) -> Any:
        monkeypatch.setattr(Inbox, "append", original)
        raise RedisConnectionError("away")

    monkeypatch.setattr(Inbox, "append", away)
    with pytest.raises(Unavailable):
        producer.submit(TagBatch(tags=[add(execution, "t", "t", "x")]))
    monkeypatch.setattr(Inbox, "append", away)
    record = producer.apply(TagBatch(tags=[remove(execution, "t", "t", "x")]))  # tries again itself
    assert [result.status for result in record.tags or []] == ["not_found"]


def test_two_batches_under_one_id_are_distinguished(
    servers: Servers, organization: UUID, token: str, quiet_redis: Any
) -> None:
    """While the first is awaited, the second is refused here, and never gets the first's result."""
    url = servers.stack.redis_url.replace("?db=0", "?db=1")
    with TagProducer(redis_url=url, organization_id=organization, token=token) as producer:
        first = TagBatch(tags=[add(uuid4(), "t", "t", "x")])
        producer.submit(first)
        producer.submit(first)
        with pytest.raises(BatchIdInUse):
            producer.submit(TagBatch(batch_id=first.batch_id, tags=[add(uuid4(), "t", "t", "y")]))


def test_garbage_on_a_channel_is_skipped(
    producer: TagProducer, redis: Any, organization: UUID
) -> None:
    """Other publications on a channel do not stop those who listen."""
    producer.apply(register_execution(uuid4()))
    for garbage in (b"", b"garbage", b"{}", b"\xff"):
        redis.publish(producer._listener._channel, garbage)
    assert producer.apply(register_execution(uuid4())).flow_execution is not None


def test_waiting_long_does_not_fill_the_inbox(
    servers: Servers,
    organization: UUID,
    token: str,
    quiet_redis: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time a batch is asked for again, the next time is twice as far away."""
    url = servers.stack.redis_url.replace("?db=0", "?db=1")
    clock = [1000.0]
    monkeypatch.setattr("producers.client.time.monotonic", lambda: clock[0])
    with TagProducer(redis_url=url, organization_id=organization, token=token) as producer:
        producer.submit(register_execution(uuid4()))
        copies = []
        for _ in range(600):
            clock[0] += 1
            producer._listener.resend_overdue()
            copies.append(quiet_redis.xlen(inbox_key(organization)))
    assert 8 <= copies[-1] <= 16
    assert copies[:20].count(1) == 4


def test_another_applications_celery_settings_are_not_ours(servers: Servers, space: Path) -> None:
    """Another Celery application on the machine has its own broker and `celeryconfig`."""
    (space / "celeryconfig.py").write_text(
        "task_default_queue = 'mine'\nbroker_url = 'memory://'\n"
    )
    program = (
        "import os; from worker.broker import create_app\n"
        "app = create_app('test', os.environ['TASK_TAGS_REDIS_URL'])\n"
        "while not (pong := app.control.ping(timeout=1)): pass\n"
        "print(app.conf.task_default_queue, pong)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=space,
        env={
            **os.environ,
            **servers.stack.environment,
            "CELERY_BROKER_URL": "memory://",
            "CELERY_CONFIG_MODULE": "celeryconfig",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.match(r"task-tags \[\{.*pong", done.stdout), done.stderr


class Silent(socketserver.BaseRequestHandler):
    """Confirms a subscription and says nothing any more; it knows no HELLO."""

    def handle(self) -> None:
        while request := self.request.recv(4096):
            if b"SUBSCRIBE" in request:
                self.request.sendall(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n")
            elif b"HELLO" in request:
                self.request.sendall(b"-ERR unknown command\r\n")


def test_a_silent_server_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps the connection and says nothing any more: the listener connects again."""
    monkeypatch.setattr("producers.pubsub.PING_SECONDS", 0.2)
    monkeypatch.setattr("producers.pubsub.SILENCE_SECONDS", 0.6)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            asyncio.run(_subscribe_twice(f"redis://127.0.0.1:{server.server_address[1]}"))
        finally:
            server.shutdown()
            thread.join()


async def _subscribe_twice(url: str) -> None:
    options = {"lib_name": None, "lib_version": None, "retry": Retry(NoBackoff(), 0)}
    async with open_async_redis(url, **options) as redis:
        subscribed: list[None] = []
        pubsub, events = PubSubMultiplexer(redis), EventQueue(lambda: subscribed.append(None))
        with pubsub.listening("c", events):
            async with pubsub.running():
                while len(subscribed) < 2:
                    await events.take(1)


def test_a_drain_message_that_was_lost_is_sent_again(
    producer: TagProducer, redis: Any, organization: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain or beat's `wake` finds the inbox that has messages and no lease; none is lost."""
    with monkeypatch.context() as patched:
        patched.setattr("producers.inbox.protocol.drain_message", lambda *_: b"no drain message")
        future = producer.submit(register_execution(uuid4()))
    redis.delete(lease_key(organization))
    assert future.result(20).flow_execution is not None


def test_stale_drain_messages_do_no_harm(
    servers: Servers, producer: TagProducer, organization: UUID
) -> None:
    """A lease that is not the current one, an organization that doesn't exist."""
    celery = create_app("test", servers.stack.redis_url)
    for arguments in ((str(organization), str(uuid4())), (str(uuid4()), str(uuid4()))):
        celery.send_task(DRAIN_TASK, args=arguments)
    assert producer.apply(register_execution(uuid4())).flow_execution is not None
    celery.close()


def test_malformed_celery_messages_are_dropped_and_hold_nobody_up(
    servers: Servers, producer: TagProducer, redis: Any
) -> None:
    """The worker survives all that is put on the queue, and answers the next batch within 1 s."""
    (worker,) = [p for child, p in servers.stack.supervisor.running if child.name == "worker-1"]
    for what, message in celery_messages().items():
        redis.lpush(QUEUE, message)
        begin = time.monotonic()
        assert producer.apply(register_execution(uuid4())).flow_execution is not None, what
        assert time.monotonic() - begin < 1, what
        assert worker.poll() is None, what
    log = servers.stack.supervisor.log("worker-1").read_text()
    assert "malformed Celery messages are dropped" in log  # once a minute for each kind of error


def test_remote_control_answers(servers: Servers) -> None:
    """`celery inspect` and Flower can look at the workers."""
    celery = create_app("test", servers.stack.redis_url)
    pong = eventually(lambda: celery.control.ping(timeout=1))
    tasks = celery.control.inspect(timeout=2).registered()
    celery.close()
    assert list(pong[0].values()) == [{"ok": "pong"}]
    (names,) = tasks.values()
    assert {"task_tags.drain", "task_tags.wake", "task_tags.purge"} <= set(names)


def test_nothing_is_kept_as_unacknowledged(
    servers: Servers, producer: TagProducer, redis: Any
) -> None:
    """Drain messages are taken without acknowledgement: there is nothing to restore or count."""
    producer.apply(register_execution(uuid4()))
    assert not [key for key in redis.scan_iter() if key.startswith(b"unacked")]


def test_a_redis_that_is_away_is_a_clear_error(organization: UUID, token: str) -> None:
    """Also when it never answered."""
    producer = TagProducer(
        redis_url="unix:///nowhere/valkey.sock", organization_id=organization, token=token
    )
    with pytest.raises(Unavailable, match="Redis"):
        producer.enqueue(register_execution(uuid4()))
    with pytest.raises(Unavailable, match="Redis"):
        producer.apply(register_execution(uuid4()), timeout=1)
    producer.close()


def test_settings_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The organization and the token have no defaults."""
    with pytest.raises(ConfigurationError, match="TASK_TAGS_ORGANIZATION_ID"):
        TagProducer()
    monkeypatch.setenv("TASK_TAGS_ORGANIZATION_ID", str(uuid4()))
    with pytest.raises(ConfigurationError, match="TASK_TAGS_TOKEN"):
        TagProducer()
    monkeypatch.setenv("TASK_TAGS_INBOX_LIMIT", "many")
    with pytest.raises(ConfigurationError, match="TASK_TAGS_INBOX_LIMIT"):
        TagProducer()


@pytest.mark.parametrize(
    "redis_url",
    [
        "redis://u:p@host:6379/2",
        "redis://host",
        "rediss://host/?db=2&ssl_cert_reqs=required",
        "rediss://host?ssl_ca_certs=/ca.pem",
        "unix:///run/a%20b/valkey.sock?db=3",
        "unix://u:p@/run/valkey.sock",
    ],
)
def test_celery_connects_as_the_sdk_does(redis_url: str) -> None:
    """One setting for the inbox, the channels and the broker, with the same meaning."""
    channel = object.__new__(Channel)
    client = create_app("test", redis_url).connection_for_read()
    channel.connection = SimpleNamespace(client=client, default_port=6379)
    for asynchronous in (False, True):
        connection: Any = ConnectionPool(**channel._connparams(asynchronous)).make_connection()
        wanted: Any = open_redis(redis_url).connection_pool.make_connection()
        assert isinstance(connection, type(wanted))
        for name in ("host", "port", "path", "db", "username", "password", "cert_reqs", "ca_certs"):
            assert getattr(connection, name, None) == getattr(wanted, name, None), name
