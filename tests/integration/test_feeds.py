"""WebSocket and Server-Sent Events: every change once and in order, also if pub/sub fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from redis import Redis
from websockets.exceptions import ConnectionClosed

from producers.client import TagProducer
from producers.contract.channels import positions_channel
from producers.contract.cursors import Cursor
from producers.contract.messages import SetTaskState, TagBatch, add, register_execution
from tests.support.change_source import SECONDS, ChangeSource, batch, nothing_more, refused, take
from tests.support.memory import resident
from tests.support.processes import endpoint_of
from tests.support.servers import Servers
from tests.support.tenant import applied
from tests.support.waiting import eventually
from worker.auth import SCOPES, sign_token
from worker.db.repository import Repository


@pytest.fixture
def source(
    servers: Servers, repository: Repository, redis: Redis, organization: UUID
) -> ChangeSource:
    return ChangeSource(servers, repository, redis, organization)


@pytest.fixture
def execution(source: ChangeSource) -> UUID:
    return source.execution()


def data(lines: Iterator[str], count: int) -> list[tuple[int, int]]:
    """Return id and revision of the next events of a stream."""
    found: list[tuple[int, int]] = []
    id = 0
    for line in lines:
        if line.startswith("id: "):
            id = Cursor.parse(line[4:]).number
        elif line.startswith("data: "):
            found.append((id, json.loads(line[6:])["revision"]))
            if len(found) == count:
                break
    return found


# --- What is watched -----------------------------------------------------------------------------


def test_first_what_is_stored_then_what_comes(source: ChangeSource, execution: UUID) -> None:
    """From the revision after `after`; each event is what was published, byte for byte."""
    stored = [source.change(execution) for _ in range(3)]
    with source.watch(execution) as all_, source.watch(execution, after=2) as later:
        assert [all_.recv(SECONDS) for _ in stored] == [event.decode() for event in stored]
        assert take(later, 1) == [3]
        event = source.change(execution)
        assert all_.recv(SECONDS) == later.recv(SECONDS) == event.decode()


def test_through_the_whole_path(
    servers: Servers, source: ChangeSource, producer: TagProducer
) -> None:
    """A watcher sees what a flow runner enqueues, also beside watchers of other executions."""
    one, two = uuid4(), uuid4()
    for each in (one, two):
        producer.apply(register_execution(each))
    with source.watch(one) as watching, source.watch(two) as other:
        producer.enqueue_many(batch(each, f"{n}") for n in range(50) for each in (one, two))
        assert take(watching, 50) == take(other, 50) == list(range(1, 51))
        producer.enqueue(SetTaskState(flow_execution_id=one, task_name="task", state="running"))
        (change,) = json.loads(watching.recv(SECONDS))["changes"]
        assert (change["change"], change["task"]["state"]) == ("state", "running")
        nothing_more(other)


def test_what_was_not_published_is_read(source: ChangeSource, execution: UUID) -> None:
    """With the next announcement, or when the key of the position is compared."""
    with source.watch(execution) as watching, source.stream(execution) as lines:
        source.change(execution)
        assert take(watching, 1) == [1]
        for _ in range(3):
            source.change(execution, publish=False)
        source.change(execution)
        assert take(watching, 4) == [2, 3, 4, 5]
        source.change(execution, publish=False)
        assert take(watching, 1) == [6]
        assert data(lines, 6) == [(n, n) for n in range(1, 7)]


def test_what_comes_twice_or_late_is_sent_once(source: ChangeSource, execution: UUID) -> None:
    """In the order of revisions, however often they are announced."""
    for _ in range(6):
        source.change(execution, publish=False)
    with source.watch(execution, after=3) as watching:
        for _ in range(7):
            source.announce(execution)
        assert take(watching, 3) == [4, 5, 6]
        source.change(execution)
        source.announce(execution)
        assert take(watching, 1) == [7]
        nothing_more(watching)


@pytest.mark.parametrize(
    "published",
    [b" ", b"hello", b"[]", b'{"flow_executions": 1}', b'{"flow_executions": [null]}', b"\xff"],
)
def test_what_is_no_announcement_is_passed_over(
    source: ChangeSource, execution: UUID, published: bytes
) -> None:
    """Watchers get the events and nothing else that is published on the channel."""
    with source.watch(execution) as watching:
        source.change(execution)
        assert take(watching, 1) == [1]
        source.announce(payload=published)
        source.change(execution)
        assert take(watching, 1) == [2]


def test_a_revision_that_there_is_not_is_not_believed(
    source: ChangeSource, execution: UUID
) -> None:
    """The table is right: what claims to come later is not sent, and what really comes is."""
    with source.watch(execution) as watching:
        source.change(execution)
        assert take(watching, 1) == [1]
        source.announce(payload=b'{"cursor": "9-zz", "flow_executions": null}')
        for revision in (2, 3):
            source.change(execution)
            assert take(watching, 1) == [revision]
        nothing_more(watching)


def test_a_lost_subscription_loses_nothing(source: ChangeSource, execution: UUID) -> None:
    """Connections to Redis are cut while changes are made: each change comes, once and in order."""
    with source.watch(execution) as watching, source.stream(execution) as lines:
        for _ in range(10):
            source.change(execution)
            source.redis.client_kill_filter(_type="pubsub")
            source.change(execution)
        assert take(watching, 20) == list(range(1, 21))
        assert data(lines, 20) == [(n, n) for n in range(1, 21)]


def test_watchers_may_come_at_any_moment(source: ChangeSource, execution: UUID) -> None:
    """Watchers connect while changes are made: each gets all of them, without gap or repetition."""
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            source.change(execution)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ExitStack() as stack:
            for _ in range(20):
                watching = stack.enter_context(source.watch(execution))
                assert take(watching, 5) == [1, 2, 3, 4, 5]
            assert take(watching, 20) == list(range(6, 26))
            done.set()
    finally:
        done.set()
        changing.join()


def test_one_subscription_for_each_organization(source: ChangeSource, execution: UUID) -> None:
    """However many watch its executions; none is left when they are gone."""
    with ExitStack() as stack:
        for each in [source.execution(), *[execution] * 9]:
            watching = stack.enter_context(source.watch(each))
        source.change(execution)
        assert take(watching, 1) == [1]
        assert subscribers(source) == 1
    eventually(lambda: subscribers(source) == 0)


def test_filters_leave_the_changes_that_fit(source: ChangeSource, execution: UUID) -> None:
    """Over both transports; the ids of a stream's events are revisions."""
    for tag_type in ("a", "b", "c", "a"):
        source.change(execution, tag_type=tag_type)
    with source.watch(execution, tag_type=["a", "c"]) as watching:
        assert take(watching, 3) == [1, 3, 4]
        source.change(execution, tag_type="b")
        source.change(execution, tag_type="c")
        assert take(watching, 1) == [6]
    with source.stream(execution, tag=["2", "4"]) as lines:
        assert data(lines, 2) == [(2, 2), (4, 4)]


# --- Server-Sent Events --------------------------------------------------------------------------


def test_a_stream_goes_on_where_it_was(source: ChangeSource, execution: UUID) -> None:
    """Last-Event-ID goes before `after`, for a browser repeats its request with the first URL."""
    for _ in range(4):
        source.change(execution)
    with source.stream(execution, after=1) as lines:
        assert data(lines, 3) == [(2, 2), (3, 3), (4, 4)]
    with source.stream(execution, last="3", after=1) as lines:
        assert data(lines, 1) == [(4, 4)]
        source.change(execution)
        assert data(lines, 1) == [(5, 5)]


@pytest.mark.parametrize(
    ("status", "code", "last", "query"),
    [
        (400, "bad_request", "x", {}),
        (400, "bad_request", "-1", {}),
        (400, "bad_request", "9", {}),
        (400, "bad_request", "01", {}),
        (400, "bad_request", "latest", {}),
        (410, "gone", "9-abc", {}),
        (410, "gone", "0-abc", {}),
        (400, "bad_request", "", {"after": 9}),
        (400, "bad_request", "", {"unknown": 1}),
        (404, "not_found", "", {"flow_execution_id": str(uuid4())}),
    ],
)
def test_a_stream_that_can_not_begin_is_an_error(
    source: ChangeSource, execution: UUID, status: int, code: str, last: str, query: dict[str, Any]
) -> None:
    """It has a status and the body of every error, and is no stream."""
    url = source.url(execution, **query).replace("/changes?", "/changes/events?")
    headers = {
        "Authorization": f"Bearer {source.token}",
        **({"Last-Event-ID": last} if last else {}),
    }
    response = httpx.get(url, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


# --- Who may watch -------------------------------------------------------------------------------


def short_lived(source: ChangeSource, seconds: float) -> str:
    """A token that expires so many seconds from now, leeway included."""
    return sign_token(
        source.servers.settings,
        organization_id=source.organization,
        actor="ada",
        scopes=SCOPES,
        lifetime=timedelta(seconds=seconds - 30),
    )


def test_a_browser_sends_its_token_in_the_first_frame(
    source: ChangeSource, execution: UUID
) -> None:
    """As it can't send headers; there is no other way, and never the URL."""
    source.change(execution)
    with source.watch_with(json.dumps({"token": source.token}), execution) as watching:
        assert take(watching, 1) == [1]
    with source.watch(execution, token=source.token) as watching:
        assert refused(watching) == (4400, "bad_request")


def test_the_token_is_checked(source: ChangeSource, execution: UUID) -> None:
    """Signature, time, scope and organization; a foreign execution is as unknown as any."""
    write_only = source.servers.token(source.organization, "task-tags:write")
    foreign = source.servers.token(uuid4())
    for token, expected in (
        ("x", (4401, "unauthorized")),
        ("", (4401, "unauthorized")),
        (short_lived(source, -5), (4401, "unauthorized")),
        (write_only, (4403, "forbidden")),
        (foreign, (4404, "not_found")),
    ):
        with source.watch_with(json.dumps({"token": token}), execution) as watching:
            assert refused(watching) == expected
    with source.watch(uuid4()) as watching:
        assert refused(watching) == (4404, "not_found")


def test_who_watches_is_let_go_when_the_token_expires(
    source: ChangeSource, execution: UUID
) -> None:
    """With a close code, over both transports; a new token in time keeps a watcher connected."""
    source.change(execution)
    soon = json.dumps({"token": short_lived(source, 2.5)})
    with source.watch_with(soon, execution) as ends, source.watch_with(soon, execution) as goes_on:
        with source.watch_with(soon, execution) as of_others:
            assert take(ends, 1) == take(goes_on, 1) == take(of_others, 1) == [1]
            goes_on.send(json.dumps({"token": source.token}))
            of_others.send(json.dumps({"token": source.servers.token(uuid4())}))
            assert refused(of_others) == (4403, "forbidden")
        source.token = short_lived(source, 2.5)
        with source.stream(execution) as lines:
            assert data(lines, 1) == [(1, 1)]
            assert refused(ends) == (4401, "unauthorized")
            rest = list(lines)
        assert "event: error" in rest
        (error,) = (json.loads(line[6:]) for line in rest if line.startswith("data: "))
        assert error["error"]["code"] == "unauthorized"
        source.change(execution)
        assert take(goes_on, 1) == [2]


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        {"after": -1},
        {"after": "abc"},
        {"after": 10**30},
        {"after": 6},
        {"limit": 5},
        {"unknown": 1},
        {"after": [1, 1]},
        {"flow_execution_id": "x"},
    ],
)
def test_wrong_parameters_are_refused(
    source: ChangeSource, execution: UUID, query: dict[str, Any]
) -> None:
    """With the code for it, and what is wrong with which parameter."""
    with source.watch(execution, **query) as watching:
        error = json.loads(watching.recv(SECONDS))["error"]
        assert error["details"][0]["field"] == next(iter(query))
        with pytest.raises(ConnectionClosed) as closed:
            watching.recv(SECONDS)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4400


@pytest.mark.parametrize(
    "frame",
    [
        *("", "x", "[]", "null", '"token"', "{}", '{"token": 1}', '{"token": "x", "more": 1}'),
        *(b"\x00", b"{}", "[" * 10_000),
    ],
)
def test_a_frame_that_is_not_a_token_is_refused(
    source: ChangeSource, execution: UUID, frame: str | bytes
) -> None:
    """The first one and any later one: not JSON, not an object, not text."""
    with source.watch_with(frame, execution) as watching:
        assert refused(watching) == (4400, "bad_request")
    with source.watch(execution) as watching:
        watching.send(frame)
        assert refused(watching) == (4400, "bad_request")


def test_a_frame_that_is_too_large_is_not_read(source: ChangeSource, execution: UUID) -> None:
    """A mebibyte, in one frame or in pieces: closed with 1009, and the endpoint goes on."""
    pieces: Sequence[Any] = ["x" * 2**20, ["x" * 1024] * 1024]
    for frame in pieces:
        with source.watch(execution) as watching:
            with suppress(ConnectionClosed):
                watching.send(frame)
            with pytest.raises(ConnectionClosed) as closed:
                watching.recv(SECONDS)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009


def test_who_sends_pings_and_does_not_read_is_let_go(source: ChangeSource) -> None:
    """Nor is there memory for the answers to it, before any token."""
    pid = endpoint_of(source.servers)
    before = resident(pid)
    with raw_watcher(source, uuid4(), token="") as flooding:
        ping = bytes([0x89, 0x80 + 125, 0, 0, 0, 0]) + bytes(125)
        flooding.settimeout(SECONDS)
        with suppress(OSError):
            while True:
                flooding.sendall(ping * 1000)
    assert resident(pid) - before < 40


@pytest.mark.parametrize(
    "header", ["Content-Length: 5", "Transfer-Encoding: chunked", f"X-Long: {'x' * 9000}"]
)
def test_a_handshake_that_is_none_is_refused(source: ChangeSource, header: str) -> None:
    """At once, and its connection is closed."""
    with raw_watcher(source, uuid4(), header) as refused:
        answer = b""
        while chunk := refused.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 4")


def test_what_is_no_result_disturbs_nobody(
    source: ChangeSource, servers: Servers, producer: TagProducer
) -> None:
    """Other publications and lost connections do not delay answers."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    headers = {"Authorization": f"Bearer {source.token}"}
    with httpx.Client(base_url=servers.stack.endpoint_url, headers=headers) as http:

        def disturb() -> None:
            for channel in source.redis.pubsub_channels("task-tags:*:results:endpoint-*"):
                source.redis.publish(channel, b"no result")

        disturbing = Repeated(disturb)
        with disturbing:
            for number in range(10):
                fields = {"task_name": "t", "tag_type": "t", "tag": f"{number}"}
                operation = {"operation": "add", "flow_execution_id": str(execution), **fields}
                assert http.patch("/task-tags", json={"tags": [operation]}).status_code == 200
        assert disturbing.count
    with source.watch(execution, after=10) as watching:
        producer.enqueue(batch(execution, "more"))
        assert take(watching, 1) == [11]


class Repeated:
    """Does something again and again beside the test."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.count = 0
        self._act = act
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._done.wait(0.001):
            self._act()
            self.count += 1

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_watchers_may_come_and_go_while_connections_are_lost(
    source: ChangeSource, execution: UUID
) -> None:
    """Who is there in the end is subscribed, and nobody else is."""
    others = [source.execution() for _ in range(5)]
    with Repeated(lambda: cut(source)):
        for _ in range(10):
            with ExitStack() as stack:
                for each in others:
                    stack.enter_context(source.watch(each))
    with source.watch(execution) as watching:
        eventually(lambda: subscribers(source) == 1)
        source.change(execution)
        assert take(watching, 1) == [1]
    eventually(lambda: not subscribers(source))


def test_who_does_not_read_is_let_go(source: ChangeSource, execution: UUID) -> None:
    """No more is kept for it than its connection buffers; it gets a close code and may return."""
    large = {"text": "x" * 8000}
    endpoint = endpoint_of(source.servers)
    before = resident(endpoint)
    for _ in range(20):
        tags = [add(execution, "task", "type", f"{uuid4()}", large) for _ in range(50)]
        applied(source.repository, source.organization, TagBatch(tags=tags))
    slow = raw_watcher(source, execution)
    with source.watch(execution, after=20) as reads:
        for number in range(21, 61):
            tags = [add(execution, "task", "type", f"{uuid4()}", large) for _ in range(50)]
            applied(source.repository, source.organization, TagBatch(tags=tags))
            source.announce(execution)
            assert take(reads, 1) == [number]
    eventually(lambda: subscribers(source) == 0, 30)
    assert resident(endpoint) - before < 40  # 24 MB were on their way to it
    with slow:
        received = b""
        while chunk := slow.recv(1024 * 1024):
            received = received[-200:] + chunk
    assert (1013).to_bytes(2) + b"too slow" in received
    with source.watch(execution, after=59) as again:
        assert take(again, 1) == [60]


def raw_watcher(
    source: ChangeSource, execution: UUID, *headers: str, token: str | None = None
) -> socket.socket:
    """One that asks to watch, and then reads nothing."""
    url = httpx.URL(source.url(execution))
    head = [
        f"GET {url.raw_path.decode()} HTTP/1.1",
        f"Host: {url.host}",
        *([] if token == "" else [f"Authorization: Bearer {source.token}"]),
        *headers,
        *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    watcher = socket.socket()
    watcher.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    watcher.settimeout(SECONDS)
    watcher.connect((url.host, url.port))
    watcher.sendall("\r\n".join([*head, "", ""]).encode())
    return watcher


def subscribers(source: ChangeSource) -> int:
    channel = positions_channel(source.organization)
    ((_, count),) = source.redis.pubsub_numsub(channel)
    return int(count)


def cut(source: ChangeSource) -> None:
    source.redis.client_kill_filter(_type="pubsub")
