"""Limits of a connection, below the application: large headers, slow clients, broken requests.

uvicorn has no settings for them. Answers have the shape of all errors of the endpoint.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MAX_HEAD_BYTES: Final = 32 * 1024
MAX_BODY_BYTES: Final = 1024 * 1024
MAX_FRAME_BYTES: Final = 64 * 1024
REQUEST_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 5.0
"""A closed connection is aborted if the client does not read the rest in this time."""
STALL_SECONDS: Final = 5.0
"""A connection is given up if its client reads nothing of what is buffered for this time."""
TOO_SLOW: Final = 1013
IDLE_SECONDS: Final = 0.25
"""After a faulty frame, a connection is closed when nothing has arrived for this time."""


def error_body(code: str, message: str, details: list[Any], request_id: str) -> bytes:
    """Return an error as JSON (docs/concepts/contract.md#rule-14)."""
    error = {"message": message, "code": code, "details": details}
    return json.dumps({"error": error, "request_id": request_id}, ensure_ascii=False).encode()


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


class LimitedProtocol(HttpToolsProtocol):
    """Closes a connection that breaks a limit.

    A request must be complete in 10 s, its head has at most 32 KiB, and the client must read the
    answer.
    """

    _stall: WriteStallTimer
    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._stall = WriteStallTimer(transport, transport.abort)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._stall.end()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.end()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._start_deadline()

    def on_headers_complete(self) -> None:
        self._in_head = False
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", "headers_too_large")
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_deadline()
        self._in_head, self._head_bytes = True, 0
        if not self._refused:
            super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._stop_deadline()
        self._stall.end()
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", "bad_request")

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._too_slow)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self._in_head and self._head_bytes and not self._refused:
            self._refuse(408, "Request Timeout", "request_timeout")
        else:
            self.transport.close()

    def _refuse(self, status: int, reason: str, code: str) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.transport.write(_refusal(status, reason, code))
        self.transport.close()


def _refusal(status: int, reason: str, code: str) -> bytes:
    """Return a whole HTTP response, for a request that does not reach the application."""
    request_id = str(uuid4())
    body = error_body(code, reason.lower(), [], request_id)
    head = (
        f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


class LimitedWebSocket(WebSocketsSansIOProtocol):
    """Gives a connection up if its client reads nothing, or stays connected after the close."""

    _stall: WriteStallTimer
    _cutting: asyncio.TimerHandle | None = None
    _refused_at: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stall = WriteStallTimer(transport, self._too_slow)

    def pause_writing(self) -> None:
        """Stop reading, too: the answer to each ping would go into the buffer."""
        super().pause_writing()
        self.transport.pause_reading()
        self._stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.end()
        if not self.read_paused:
            self.transport.resume_reading()

    def _too_slow(self) -> None:
        """Write a close frame behind the buffered data, although writing is paused; disconnect."""
        if not self.close_sent and not self.disconnected:
            self.conn.send_close(TOO_SLOW, "too slow: connect again with after")
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": TOO_SLOW})
        self._cut_soon()

    def _cut_soon(self) -> None:
        if not self.disconnected and self._cutting is None:
            self._cutting = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def handle_parser_exception(self) -> None:
        """Send the close frame, and discard what the client still sends before disconnecting.

        With unread data, disconnecting would reset the connection, and the client could lose the
        close frame.
        """
        assert self.conn.close_sent is not None
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self._refused_at = self.loop.time()
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(IDLE_SECONDS, self.transport.close)
        self._cut_soon()

    def data_received(self, data: bytes) -> None:
        if self._refused_at is None:
            super().data_received(data)
            if not self.handshake_initiated:  # a complete head that is no handshake
                self.transport.write(_refusal(400, "Bad Request", "bad_request"))
                self.transport.close()
                self._cut_soon()
        elif self.close_timer is not None and self.loop.time() < self._refused_at + CLOSE_SECONDS:
            self.close_timer.cancel()
            self.close_timer = self.loop.call_later(IDLE_SECONDS, self.transport.close)

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self._cut_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stall.end()
        if self._cutting is not None:
            self._cutting.cancel()
        super().connection_lost(exc)
