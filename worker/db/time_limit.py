"""Bounds how long a transaction waits for a server that hangs with a live connection.

PostgreSQL's own time-outs do not help when the server, or the network, is silent. A thread watches
the clock and cancels the statement at the server, whose locks would be held otherwise. If the
server does not answer that soon, the thread ends the connection: what follows is what follows a
lost connection.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import psycopg

logger = logging.getLogger(__name__)

DEFAULT_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 1.0
"""How long a wait may go on once the process is to end."""
_CANCEL_SECONDS: Final = 1.5
_ANSWER_SECONDS: Final = 2.0
"""How long a cancelled statement may take to end: until then, its transaction holds its locks."""
_POLL_SECONDS: Final = 0.2


@dataclass(slots=True)
class _Watched:
    """A transaction under way."""

    connection: psycopg.Connection
    began: float
    end: float
    is_cancelled: bool = False
    is_closed: bool = False


class TimeLimit:
    """Ends the one transaction of a process that lasts too long.

    Args:
        seconds: The limit.
        stopping: Tells whether the process is to end; then the limit is one second.
    """

    def __init__(self, seconds: float, stopping: Callable[[], bool]) -> None:
        self._seconds = seconds
        self._stopping = stopping
        self._lock = threading.Lock()
        self._watched: _Watched | None = None
        self.was_exceeded = False
        """The last transaction lasted longer than `seconds`."""
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, connection: psycopg.Connection) -> Iterator[None]:
        """Limit what is done on a connection until the block ends."""
        self.begin(connection)
        try:
            yield
        finally:
            self.end()

    def begin(self, connection: psycopg.Connection) -> None:
        """Limit what is done on a connection from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="time-limit", daemon=True)
            self._thread.start()
        self.was_exceeded = False
        now = time.monotonic()
        self._watched = _Watched(connection, now, now + self._seconds)

    def end(self) -> bool:
        """Watch no longer; return whether the transaction was cancelled.

        Then its success is not to be relied on: PostgreSQL also says so of a commit for which it no
        longer waits until a standby has it.
        """
        with self._lock:  # the thread may be ending it just now
            watched, self._watched = self._watched, None
        return watched is not None and watched.is_cancelled

    def _run(self) -> None:
        stopped_at: float | None = None
        while True:
            time.sleep(_POLL_SECONDS)
            if stopped_at is None and self._stopping():
                stopped_at = time.monotonic()
            with self._lock:
                watched = self._watched
                if watched is None:
                    continue
                end = watched.end
                if stopped_at is not None:
                    end = min(end, max(watched.began, stopped_at) + _STOP_SECONDS)
                if watched.is_closed or time.monotonic() <= end:
                    continue
                self._give_up(watched, is_stopping=stopped_at is not None)
            what = "its connection is closed" if watched.is_closed else "it is cancelled"
            logger.warning(f"a transaction took too long: {what}")

    def _give_up(self, watched: _Watched, *, is_stopping: bool) -> None:
        """Cancel what a connection waits for; close it, if that was not the first time.

        It is closed at once if the process is to end, or the server can't be reached.
        """
        was_cancelled, watched.is_cancelled = watched.is_cancelled, True
        watched.is_closed = was_cancelled or is_stopping
        self.was_exceeded |= not is_stopping
        try:
            if not (was_cancelled and is_stopping):
                watched.connection.cancel_safe(timeout=_CANCEL_SECONDS)
        except Exception:
            watched.is_closed = True
        watched.end = time.monotonic() + _ANSWER_SECONDS
        if watched.is_closed:
            pgconn = watched.connection.pgconn
            with (
                suppress(OSError, psycopg.Error),  # libpq has closed it already
                socket.socket(fileno=os.dup(pgconn.socket)) as raw,
            ):
                raw.shutdown(socket.SHUT_RDWR)
