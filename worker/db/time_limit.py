"""Bounds how long a transaction waits for a server that hangs with a live connection.

PostgreSQL's own time-outs do not help when the server, or the network, is silent. A thread watches
the clock, cancels the statement at the server, whose locks would be held otherwise, and ends the
connection: what follows is what follows a lost connection.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import psycopg

logger = logging.getLogger(__name__)

DEFAULT_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 1.0
"""How long a wait may go on once the process is to end."""
_CANCEL_SECONDS: Final = 1.5
_POLL_SECONDS: Final = 0.2


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
        self._watched: tuple[psycopg.Connection, float] | None = None
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
        self._watched = connection, time.monotonic()

    def end(self) -> None:
        with self._lock:  # the thread may be ending it just now
            self._watched = None

    def _run(self) -> None:
        stopped_at: float | None = None
        while True:
            time.sleep(_POLL_SECONDS)
            if stopped_at is None and self._stopping():
                stopped_at = time.monotonic()
            with self._lock:
                if self._watched is None:
                    continue
                connection, began = self._watched
                end = began + self._seconds
                if stopped_at is not None:
                    end = min(end, max(began, stopped_at) + _STOP_SECONDS)
                if time.monotonic() > end:
                    logger.warning("a transaction took too long: its connection is closed")
                    self._watched = None
                    self.was_exceeded = stopped_at is None
                    _give_up(connection)


def _give_up(connection: psycopg.Connection) -> None:
    """Cancel what a connection waits for at the server, as far as it answers, and shut it down."""
    with suppress(Exception):
        connection.cancel_safe(timeout=_CANCEL_SECONDS)
    with suppress(OSError), socket.socket(fileno=os.dup(connection.pgconn.socket)) as raw:
        raw.shutdown(socket.SHUT_RDWR)
