"""Limits of connections, below the application: their number, sizes, slow clients, broken requests.

uvicorn has no settings for them. Answers have the shape of all errors of the endpoint.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import Callable
from functools import partial
from typing import Any, Final
from uuid import uuid4

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES: Final = 32 * 1024
MAX_HEAD_LINES: Final = 128
MAX_BODY_BYTES: Final = 1024 * 1024
MAX_FRAMING_BYTES: Final = 32 * 1024
"""Of a body in chunks: their sizes and extensions, line breaks and trailers."""
MAX_WAITING: Final = 8
"""Requests of a connection that may wait for the answer to the one before them."""
REQUEST_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 5.0
"""A closed connection is aborted if the client does not read the rest in this time."""
STALL_SECONDS: Final = 5.0
"""A connection is given up if its client reads nothing of what is buffered for this time."""
IDLE_SECONDS: Final = 0.25
"""After a refusal, a connection is closed when nothing has arrived for this time."""
PIECE_BYTES: Final = 16 * 1024
"""The most bytes of a body that are parsed before its limits are looked at."""
_MAX_FILES: Final = 65_536
RESERVED_FILES: Final = 128
_MAX_REFUSING: Final = 64
"""Connections beyond the limit that are answered with 503; they use reserved files."""
_MIN_CONNECTIONS: Final = 16
_UPGRADE: Final = re.compile(rb"(?im)^upgrade:(?![ \t]*websocket[ \t]*\r?$)[^\r\n]*\r?\n")
_MAX_UNAUTHENTICATED: Final = 1000


def error_body(code: str, message: str, details: list[Any], request_id: str, **more: str) -> bytes:
    """Return an error as JSON (docs/concepts/contract.md#rule-14)."""
    error = {"message": message, "code": code, "details": details, **more}
    return json.dumps({"error": error, "request_id": request_id}, ensure_ascii=False).encode()


class ConnectionLimits:
    """Limits how many connections are open, and how many of them without a valid token so far."""

    max_connections = _MAX_FILES
    max_unauthenticated = _MAX_UNAUTHENTICATED

    def __init__(self) -> None:
        self._unauthenticated: set[Any] = set()

    def set(self, reserved_files: int) -> None:
        """Raise the process' limit of open files, and keep some of them for other uses."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        self.max_connections = max(_MIN_CONNECTIONS, wanted - reserved_files)
        self.max_unauthenticated = min(_MAX_UNAUTHENTICATED, self.max_connections // 2)

    def admit(self, protocol: object, connections: int) -> bool:
        """Return whether a new connection may stay; it is not authenticated yet."""
        if connections > self.max_connections:
            return False
        if len(self._unauthenticated) >= self.max_unauthenticated:
            return False
        self._unauthenticated.add(protocol)
        return True

    def authenticated(self, protocol: object) -> None:
        self._unauthenticated.discard(protocol)

    leave = authenticated

    def upgrade(self, protocol: object) -> None:
        """Count a connection that has become a WebSocket. It is admitted already."""
        self._unauthenticated.add(protocol)


ADMITTED: Final = ConnectionLimits()
"""The connections of this process."""


class WriteStallTimer:
    """Gives a connection up if its client reads nothing.

    While writing is paused, the buffer must get smaller every 5 s.
    """

    def __init__(self, transport: asyncio.Transport, give_up: Callable[[], None]) -> None:
        self._transport = transport
        self._give_up = give_up
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        size = self._transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STALL_SECONDS, self._look, size)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, before: int) -> None:
        if self._transport.get_write_buffer_size() < before:
            self.begin()
        else:
            self._give_up()


class IdleClose:
    """Closes a connection once its client has stopped sending, at most 5 s later.

    With unread data, closing would reset the connection, and the client could lose the answer.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + CLOSE_SECONDS
        self._has_received = False
        self._timer = self._loop.call_later(IDLE_SECONDS, self._look)

    def received(self) -> None:
        """Wait a little longer: data was received, and discarded."""
        self._has_received = True

    def _look(self) -> None:
        if self._has_received and self._loop.time() < self._until:
            self._has_received = False
            self._timer = self._loop.call_later(IDLE_SECONDS, self._look)
        else:
            self._transport.close()

    def cancel(self) -> None:
        self._timer.cancel()


class HeldFlow(FlowControl):
    """Flow control that does not resume reading while requests of the connection are queued."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class ClosingTransport:
    """The transport of one answer. If the body of its request is not read yet, it closes gently."""

    def __init__(self, protocol: LimitedProtocol, is_read: Callable[[], bool]) -> None:
        self._protocol = protocol
        self._is_read = is_read
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        if self._is_read():
            self._protocol.transport.close()
        else:
            self._protocol.close_gently()


class LimitedProtocol(HttpToolsProtocol):
    """Closes a connection that breaks a limit, behind the answers that are under way.

    A request must be complete in 10 s, its head has at most 32 KiB and 128 lines, its body 1 MiB,
    what frames the body's chunks 32 KiB, and the client must read the answers. At most 8 requests
    wait for the one before them; until then, nothing more is read.
    """

    _stall: WriteStallTimer
    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _head_lines = 0
    _body_bytes = 0
    _wire_bytes = 0
    _declared: int | None = None
    _in_head = True
    _refused = False
    _refusal = b""
    _running: RequestResponseCycle | None = None
    _closing: IdleClose | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = bytearray()
        self.flow: HeldFlow = HeldFlow(transport)
        self._stall = WriteStallTimer(transport, transport.abort)
        self._start_deadline()
        connections = len(self.connections)
        if connections > ADMITTED.max_connections + _MAX_REFUSING:
            transport.abort()
        elif not ADMITTED.admit(self, connections):
            self._refuse(503, "Service Unavailable", "too_many_connections")

    def connection_lost(self, exc: Exception | None) -> None:
        ADMITTED.leave(self)
        self._stop_deadline()
        self._stall.end()
        if self._closing is not None:
            self._closing.cancel()
        super().connection_lost(exc)
        self.pipeline.clear()
        self._unread.clear()
        if self._running is not None and self._running.scope["method"] in ("GET", "HEAD"):
            self._task.cancel()  # nobody reads the answer

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.end()

    # --- Reading ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._closing is not None:
            self._closing.received()
        elif not self._refused:
            self._unread += data
            self._feed()

    def _feed(self) -> None:
        """Parse what was received, as far as there is room for requests."""
        while self._unread and not self._refused and self._has_room():
            end = self._piece_end()
            piece = bytes(self._unread[:end])
            del self._unread[:end]
            if self._in_head:
                self._head_bytes += len(piece)
                self._head_lines += piece.count(b"\n")
                piece = _without_upgrade(piece)
            else:
                self._wire_bytes += len(piece)
            if self._head_lines <= MAX_HEAD_LINES:
                super().data_received(piece)
            if self._in_head and (
                self._head_bytes > MAX_HEAD_BYTES or self._head_lines > MAX_HEAD_LINES
            ):
                self._refuse(431, "Request Header Fields Too Large", "headers_too_large")
            elif self._wire_bytes - self._body_bytes > MAX_FRAMING_BYTES:
                self._refuse_body()
        self.flow.held = bool(self._unread)
        if self.flow.held:
            self.flow.pause_reading()
        elif self.pipeline:  # uvicorn would not read on, and not notice a lost connection
            self.flow.resume_reading()

    def _has_room(self) -> bool:
        if not self.pipeline:
            return True
        waiting = sum(len(cycle.body) for cycle, _ in self.pipeline)
        return len(self.pipeline) < MAX_WAITING and waiting <= HIGH_WATER_LIMIT

    def _piece_end(self) -> int:
        """Return how many of the bytes to parse next: not beyond one request, if that is known."""
        if self._in_head:
            end = self._unread.find(b"\r\n\r\n")
            return len(self._unread) if end < 0 else end + 4
        if self._declared is not None:
            return max(1, self._declared - self._body_bytes)
        return PIECE_BYTES

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["on_authenticated"] = partial(ADMITTED.authenticated, self)
        self._body_bytes = self._wire_bytes = 0
        if self._deadline is None:
            self._start_deadline()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # otherwise it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", "headers_too_large")
        elif self._is_ambiguous():
            self._refuse(400, "Bad Request", "bad_request")
        elif len(self.pipeline) >= MAX_WAITING:  # small ones, behind a body in chunks
            self.cycle.keep_alive = False
            self._refused = True
        else:
            lengths = [value for name, value in self.headers if name == b"content-length"]
            self._declared = int(lengths[0]) if lengths else None
            super().on_headers_complete()  # which may find that the URL is wrong
            self._in_head = False
            if not self.parser.should_upgrade():
                cycle = self.cycle
                closing = ClosingTransport(self, lambda: not cycle.more_body)
                cycle.transport = closing  # type: ignore[assignment]

    def _is_ambiguous(self) -> bool:
        """Return whether a proxy could read another host or another token than this endpoint.

        Of `Host`, see https://www.rfc-editor.org/rfc/rfc9112#section-3.2; of fields that stand more
        than once, https://www.rfc-editor.org/rfc/rfc9110#section-5.3
        """
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        is_missing = not hosts and self.parser.get_http_version() == "1.1"
        return hosts > 1 or is_missing or names.count(b"authorization") > 1

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._refuse_body()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_deadline()
        self._in_head, self._head_bytes, self._head_lines, self._wire_bytes = True, 0, 0, 0
        self._body_bytes, self._declared = 0, None
        if not self._refused:
            super().on_message_complete()

    # --- Answering -------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._task = self.loop.create_task(cycle.run_asgi(app))
        self._task.add_done_callback(self.tasks.discard)
        self.tasks.add(self._task)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal and not self._is_answering():
            self._write_refusal()
        elif self._unread:
            self._feed()

    def _is_answering(self) -> bool:
        running = self._running
        return running is not None and not (running.response_complete or running.disconnected)

    def handle_websocket_upgrade(self) -> None:
        if self._refused:
            return
        self._unread.clear()  # no client may send frames before the handshake is answered
        ADMITTED.leave(self)
        self._stop_deadline()
        self._stall.end()
        super().handle_websocket_upgrade()

    # --- Refusing --------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", "bad_request")

    def _refuse_body(self) -> None:
        self._refuse(413, "Content Too Large", "body_too_large")

    def _refuse(self, status: int, reason: str, code: str) -> None:
        """Answer the request that is being read, behind those before it; read no more."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._unread.clear()
        self._stop_deadline()
        self._refusal = refusal(status, reason, code)
        if not self._in_head:
            self._withdraw()
        if not self._is_answering():
            self._write_refusal()

    def _withdraw(self) -> None:
        """Take back the request whose body is being read."""
        cycle = self.cycle
        if cycle.response_started:
            self._refusal = b""
        if cycle is not self._running:
            self.pipeline.popleft()
        cycle.disconnected = True
        cycle.message_event.set()

    def _write_refusal(self) -> None:
        self.transport.write(self._refusal)
        self._refusal = b""
        self.close_gently()

    def close_gently(self) -> None:
        """Send nothing more, and close the connection once its client has stopped sending."""
        self._refused, self.flow.held = True, False
        self._unread.clear()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._closing = IdleClose(self.transport)

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._too_slow)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self._unread:  # it is this side that does not read
            self._start_deadline()
        elif self._in_head and self._head_bytes:
            self._refuse(408, "Request Timeout", "request_timeout")
        else:
            self.transport.close()


def _without_upgrade(head: bytes) -> bytes:
    """Remove an upgrade to another protocol than WebSocket, of which nothing need come.

    The parser would take what follows for that protocol
    (https://www.rfc-editor.org/rfc/rfc9110#section-7.8).
    """
    return _UPGRADE.sub(b"", head) if b"pgrade:" in head.lower() else head


def refusal(status: int, reason: str, code: str) -> bytes:
    """Return a whole HTTP response, for a request that does not reach the application."""
    request_id = str(uuid4())
    body = error_body(code, reason.lower(), [], request_id)
    head = (
        f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
