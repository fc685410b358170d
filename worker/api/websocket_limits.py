"""Limits of a WebSocket, below the application: frames, and clients that do not read.

uvicorn has no settings for them (worker/api/limits.py has those of HTTP).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from worker.api.limits import ADMITTED, CLOSE_SECONDS, IdleClose, WriteStallTimer, refusal

MAX_FRAME_BYTES: Final = 64 * 1024
TOO_SLOW: Final = 1013
_PIECE_BYTES: Final = 1024
_MAX_FRAMES: Final = 20
"""How many may come at once; then `_FRAMES_A_SECOND` apply."""
_FRAMES_A_SECOND: Final = 10
_SMALL_BYTES: Final = 1024
"""Larger frames are not counted: the size of a message and the reading of the next are limited."""


class LimitedWebSocket(WebSocketsSansIOProtocol):
    """Gives a connection up if its client reads nothing, or stays connected after the close."""

    _stall: WriteStallTimer
    _cutting: asyncio.TimerHandle | None = None
    _closing: IdleClose | None = None
    _frames_left: float = _MAX_FRAMES
    _counted_at = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        ADMITTED.upgrade(self)
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
        """Send the close frame, and discard what the client still sends before disconnecting."""
        assert self.conn.close_sent is not None
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.resume_reading()
        self._closing = IdleClose(self.transport)
        self._cut_soon()
        # Without it, the end of the task closes the connection, which resets it while more is sent.
        self.close_timer = self._cutting

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["state"]["on_authenticated"] = partial(ADMITTED.authenticated, self)

    def handle_events(self) -> None:
        """Handle what was parsed, unless that is more small frames than anyone needs."""
        now = self.loop.time()
        left = self._frames_left + (now - self._counted_at) * _FRAMES_A_SECOND
        small = [
            each for each in self.conn.events if len(getattr(each, "data", b"")) < _SMALL_BYTES
        ]
        self._frames_left, self._counted_at = min(_MAX_FRAMES, left) - len(small), now
        if self._frames_left >= 0:
            super().handle_events()
        elif not self.close_sent:
            self.conn.fail(1008, "too many frames")
            self.handle_parser_exception()

    def data_received(self, data: bytes) -> None:
        if self._closing is not None:
            self._closing.received()
            return
        for start in range(0, len(data), _PIECE_BYTES):
            self._receive(data[start : start + _PIECE_BYTES])

    def _receive(self, data: bytes) -> None:
        if self._closing is not None:
            self._closing.received()
        else:
            super().data_received(data)
            if not self.handshake_initiated:  # a complete head that is no handshake
                self.transport.write(refusal(400, "Bad Request", "bad_request"))
                self.transport.close()
                self._cut_soon()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self._cut_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        ADMITTED.leave(self)
        self._stall.end()
        for timer in (self._cutting, self._closing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
