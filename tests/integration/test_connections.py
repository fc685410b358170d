"""What one client does to its connections costs no other client anything, and no memory."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_websocket

from producers.client import TagProducer
from producers.contract.messages import register_execution
from tests.support.memory import open_files, resident
from tests.support.processes import await_line, endpoint_of, settings_of
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.local.stack import ENDPOINT, command

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"PATCH /task-tags HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
SECONDS = 20.0


def connect(servers: Servers) -> socket.socket:
    address = httpx.URL(servers.stack.endpoint_url)
    return socket.create_connection((address.host, address.port or 80), timeout=SECONDS)


def answers(connection: socket.socket) -> bytes:
    """Return all that is sent until the connection is closed."""
    received = b""
    with suppress(ConnectionResetError):
        while some := connection.recv(65536):
            received += some
    return received


# --- Ambiguous heads -----------------------------------------------------------------------------

UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("upgrade", ["", UPGRADE], ids=["request", "websocket"])
@pytest.mark.parametrize(
    ("fields", "is_refused"),
    [
        ("Host: x\r\n{token}", False),
        ("{token}", True),
        ("Host: x\r\nhost: y\r\n{token}", True),
        ("Host: x\r\n{token}Authorization: Bearer other\r\n", True),
    ],
    ids=["unambiguous", "no host", "two hosts", "two tokens"],
)
def test_a_head_that_can_be_read_in_two_ways_is_refused(
    servers: Servers, token: str, fields: str, is_refused: bool, upgrade: str
) -> None:
    """A proxy in front could go by the other host, or the other token."""
    named = fields.format(token=f"Authorization: Bearer {token}\r\n")
    head = f"GET /changes HTTP/1.1\r\n{named}{upgrade}\r\n"
    with connect(servers) as connection:
        connection.sendall(head.encode())
        if not is_refused:
            assert connection.recv(12) == (b"HTTP/1.1 101" if upgrade else b"HTTP/1.1 200")
            return
        received = answers(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b'"code": "bad_request"' in received


def test_http_1_0_needs_no_host(servers: Servers) -> None:
    """Probes of load balancers send none (https://www.rfc-editor.org/rfc/rfc9112#section-3.2)."""
    with connect(servers) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert answers(connection).startswith(b"HTTP/1.1 200 ")


# --- Requests in a row ---------------------------------------------------------------------------


def test_requests_in_a_row_are_answered_in_order(servers: Servers) -> None:
    """Hundreds that are sent at once; what is wrong with the last is said behind the others."""
    with connect(servers) as connection:
        connection.sendall(HEALTH * 500 + b"nonsense\r\n\r\n")
        received = answers(connection)
    assert received.count(b'{"status":"alive"}') == 500
    assert received.count(b"HTTP/1.1 ") == 501
    assert received.index(b"HTTP/1.1 400") > received.rindex(b"HTTP/1.1 200")


def test_bodies_in_a_row_are_read_one_after_the_other(servers: Servers, token: str) -> None:
    """Also where they are larger than what is read ahead."""
    head = f"PATCH /task-tags HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n".encode()
    body = b'{"tags": []}' + b" " * 200_000
    declared = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = (
        head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    )
    with connect(servers) as connection:
        connection.sendall((declared + HEALTH + chunked + HEALTH) * 6)
        received = b""
        while received.count(b"HTTP/1.1 ") < 24:
            received += connection.recv(65536)
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"400", b"200"] * 12


@pytest.mark.parametrize("url", ["http://", "http://[/", "http://a:99999/", "https://"])
def test_a_wrong_url_takes_nothing_back(servers: Servers, token: str, url: str) -> None:
    """The request before it is answered, and it is refused."""
    put = (
        f"PUT /flow-executions/{uuid4()} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        "Content-Length: 2\r\n\r\n{}"
    )
    wrong = f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n"
    for requests, statuses in ((wrong, [b"400"]), (put + wrong, [b"201", b"400"])):
        with connect(servers) as connection:
            connection.sendall(requests.encode())
            received = answers(connection)
        assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == statuses


@pytest.mark.parametrize("protocol", ["h2c", "TLS/1.0", "websockets"])
def test_an_upgrade_to_another_protocol_is_ignored(
    servers: Servers, token: str, protocol: str
) -> None:
    """As Java's client sends it with its first request, which may be a write."""
    put = (
        f"PUT /flow-executions/{uuid4()} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocol}\r\nContent-Length: 2\r\n\r\n"
    )
    with connect(servers) as connection:
        connection.sendall(put.encode())
        connection.sendall(b"{}" + HEALTH + b"nonsense\r\n\r\n")
        received = answers(connection)
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"201", b"200", b"400"]


def test_a_head_has_a_limited_number_of_lines(servers: Servers) -> None:
    """However short they are: each costs time."""
    for lines, status in ((100, b"200"), (200, b"431"), (10_000, b"431")):
        with connect(servers) as connection:
            connection.sendall(
                b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * lines + b"\r\n"
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 " + status)


def test_a_lost_connection_is_noticed_behind_a_waiting_request(
    servers: Servers, http: httpx.Client, token: str
) -> None:
    """Its file is closed at once, not when the wait ends."""
    path = f"/flow-executions/{uuid4()}"
    assert http.put(path, json={}).status_code == 201
    read = f"/task-tags?flow_execution_id={path.rpartition('/')[2]}"
    waiting = (
        f"GET {read} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"If-None-Match: *\r\nPrefer: wait=60\r\n\r\n"
    )
    pid = endpoint_of(servers)
    before = open_files(pid)
    with ExitStack() as opened:
        for _ in range(50):
            connection = opened.enter_context(connect(servers))
            connection.sendall(waiting.encode() * 3)
        eventually(lambda: open_files(pid) >= before + 50)
    eventually(lambda: open_files(pid) < before + 25)


def test_answers_that_are_not_read_stop_the_reading_of_requests(servers: Servers) -> None:
    """One connection sends requests and reads nothing: no memory, and others are answered."""
    before = resident(endpoint_of(servers))
    with connect(servers) as connection:
        connection.settimeout(1)
        sent, end = 0, time.monotonic() + SECONDS
        with suppress(OSError):  # it is no longer read, and then closed
            while time.monotonic() < end:
                sent += connection.send(HEALTH * 2000)
        assert time.monotonic() < end
        assert httpx.get(f"{servers.stack.endpoint_url}/healthz").status_code == 200
        assert resident(endpoint_of(servers)) - before < 30


# --- Bodies in chunks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"1\r\nx\r\n" * 100_000,
        b"1;" + b"x" * 100_000 + b"\r\nx\r\n",
        b"1\r\nx\r\n0\r\n" + b"Trailer: x\r\n" * 10_000,
        b"10000\r\n" + b"x" * 65536 + b"\r\n",
    ],
    ids=["small chunks", "an extension", "trailers", "too many bytes"],
)
def test_what_frames_a_body_is_bounded(servers: Servers, token: str, body: bytes) -> None:
    """413 or 400 while it is still sent, and the connection is closed."""
    head = CHUNKED.replace(b"Host: x", f"Host: x\r\nAuthorization: Bearer {token}".encode())
    with connect(servers) as connection:
        connection.sendall(head)
        with suppress(OSError):
            for _ in range(20):
                connection.sendall(body)
        received = answers(connection)
    assert received.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), received[:200]
    assert received.count(b"HTTP/1.1 ") == 1
    error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] in ("body_too_large", "bad_request")


def test_a_trailer_is_no_header(servers: Servers, token: str) -> None:
    """A token in a trailer proves nothing."""
    request = CHUNKED + f"0\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    with connect(servers) as connection:
        connection.sendall(request)
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


# --- Frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0x89, 0x8A, 0x01, 0x81], ids=["ping", "pong", "part", "text"])
def test_a_flood_of_frames_is_refused(servers: Servers, opcode: int) -> None:
    """Closed with 1008, after a few."""
    url = f"{servers.stack.endpoint_url.replace('http', 'ws', 1)}/task-tags/changes"
    watching = connect_websocket(f"{url}?flow_execution_id={uuid4()}")
    frame = bytes([opcode, 0x80, 0, 0, 0, 0])
    parts = bytes([0x00, 0x80, 0, 0, 0, 0]) if opcode == 0x01 else frame
    with watching, suppress(OSError):
        watching.socket.sendall(frame + parts * 10_000)
        with suppress(ConnectionClosed):
            while True:
                watching.recv(SECONDS)
        assert watching.close_code in (1008, 4400)  # 4400: an empty text is no token


def test_who_still_sends_when_a_websocket_is_refused_gets_the_close_frame(
    servers: Servers, producer: TagProducer, token: str
) -> None:
    """What comes behind a message that is too large is read: closing would reset the connection."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    handshake = (
        f"GET /task-tags/changes?flow_execution_id={execution} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {token}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    piece = bytes([0x80 | 126]) + (1024).to_bytes(2, "big") + bytes(4) + b"x" * 1024
    for _ in range(5):
        with connect(servers) as connection:
            connection.sendall(handshake.encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 101")
            connection.sendall(b"\x01" + piece)
            for _ in range(300):
                connection.sendall(b"\x00" + piece)
                time.sleep(0.0005)
            assert answers(connection)[2:4] == (1009).to_bytes(2, "big")


def test_a_handshake_begins_one_websocket_whatever_is_behind_it(servers: Servers) -> None:
    """Frames may be sent once it is answered: what comes before is not taken for a request."""
    handshake = (
        b"GET /task-tags/changes?flow_execution_id=x HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with connect(servers) as connection:
        connection.sendall(handshake * 2 + HEALTH * 1000)
        received = answers(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 101")


# --- Many connections ----------------------------------------------------------------------------


@contextmanager
def small_endpoint(servers: Servers, log: Path) -> Iterator[str]:
    """Run an endpoint that may open 300 files; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = settings_of(servers, TASK_TAGS_DATABASE_URL=servers.endpoint_url)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command([*ENDPOINT, "--port", str(port)]),
            env={**os.environ, **environment},
            stderr=output,
            cwd="/",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)),
        )
    try:
        await_line(log, '"ready"')
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: health(url) == 200)
        yield url
    finally:
        process.terminate()
        process.wait()


def health(url: str) -> int:
    """Return the status of an answer to a new connection; 0 if there is none."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").status_code
    return 0


def test_connections_are_limited_below_the_open_files(
    servers: Servers, token: str, tmp_path: Path, organization: UUID
) -> None:
    """The rest get 503; who is authenticated goes on, and new ones may come when others leave."""
    read = f"/task-tags?flow_execution_id={organization}"
    headers = {"Authorization": f"Bearer {token}"}
    with small_endpoint(servers, tmp_path / "log") as url, httpx.Client(base_url=url) as known:
        assert known.get(read, headers=headers).status_code == 404
        address = httpx.URL(url)
        with ExitStack() as opened:
            for _ in range(400):
                one = socket.create_connection((address.host, address.port or 80), timeout=SECONDS)
                opened.enter_context(one)
            eventually(lambda: health(url) == 503)
            assert known.get(read, headers=headers).status_code == 404
            assert known.get("/readyz").status_code == 200
        eventually(lambda: health(url) == 200)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_token_in_a_query_is_not_logged(servers: Servers, token: str, tmp_path: Path) -> None:
    """Neither of a request nor of a WebSocket: it is refused, and logs outlive tokens."""
    with small_endpoint(servers, tmp_path / "log") as url:
        query = f"/task-tags/changes?flow_execution_id={uuid4()}&token={token}"
        assert httpx.get(url + query).status_code == 401
        with connect_websocket(url.replace("http", "ws", 1) + query) as watching:
            assert "not a known parameter" in str(watching.recv(SECONDS))
    assert token[-20:] not in (tmp_path / "log").read_text()
