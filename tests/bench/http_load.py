"""A light HTTP client for load: keep-alive connections of one process, with one request each.

It shares the machine with what it measures, so it loads only the standard library and reads little
of an answer. Standard input has one JSON object, the arguments of `run_load`; standard output gets
one, its result.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

_BUFFER: Final = bytearray(1 << 20)


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    sent: float = 0.0
    head: bytearray = field(default_factory=bytearray)
    missing: int | None = None
    """Bytes of the body that have not come yet; None while the head is not complete."""

    def send(self, request: bytes) -> None:
        self.head.clear()
        self.missing = None
        self.sent = perf_counter()
        self.socket.sendall(request)

    def receive(self, status: bytes) -> bool:
        """Take what has come; return whether the answer is complete. Raises for another status."""
        count = self.socket.recv_into(_BUFFER)
        if not count:
            raise ConnectionError("the server closed a connection")
        if self.missing is None:
            self.head += memoryview(_BUFFER)[:count]
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return False
            if not self.head.startswith(status):
                raise ValueError(f"unexpected answer: {bytes(self.head[:200])!r}")
            self.missing = end + 4 + _content_length(bytes(self.head[:end]).lower())
            count = len(self.head)
        self.missing -= count
        return self.missing == 0


def _content_length(head: bytes) -> int:
    """Return 0 if there is none, as in a 304."""
    return int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r")[0] or 0)


def run_load(
    ports: list[int], request: str, status: int, connections: int, seconds: float, warm_up: float
) -> dict[str, float]:
    """Send one request repeatedly, over connections to all ports. Times are in seconds."""
    data, wanted = request.encode(), b"HTTP/1.1 %d " % status
    latencies: list[float] = []
    with _opened(ports, connections) as (poll, by_number):
        for connection in by_number.values():
            connection.send(data)
        begin = perf_counter() + warm_up
        now, end = 0.0, begin + seconds
        while now < end:
            for number, _ in poll.poll(5) or _silent():
                connection = by_number[number]
                if connection.receive(wanted):
                    now = perf_counter()
                    if now >= begin:
                        latencies.append(now - connection.sent)
                    connection.send(data)
    latencies.sort()
    return {
        "requests_per_second": len(latencies) / (now - begin),
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p95_ms": 1e3 * latencies[len(latencies) * 95 // 100],
    }


@contextmanager
def _opened(ports: list[int], count: int) -> Iterator[tuple[select.epoll, dict[int, _Connection]]]:
    with select.epoll() as poll:
        sockets = [
            socket.create_connection(("127.0.0.1", ports[i % len(ports)])) for i in range(count)
        ]
        for opened in sockets:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            poll.register(opened, select.EPOLLIN)
        yield poll, {opened.fileno(): _Connection(opened) for opened in sockets}
        for opened in sockets:
            opened.close()


def _silent() -> list[tuple[int, int]]:
    raise TimeoutError("no answer for 5 s")


if __name__ == "__main__":
    json.dump(run_load(**json.load(sys.stdin)), sys.stdout)
