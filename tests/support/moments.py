"""What a request on the wire is for: of Redis (RESP) and PostgreSQL (frontend protocol 3).

https://valkey.io/topics/protocol/, https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from producers.inbox.script_calls import script_sha

FAULTS: Final = ("error", "hang", "lose", "answer lost", "half an answer")
POSTGRES_MOMENTS: Final = ("begin", "lock", "look-up", "write", "commit")
REDIS_CODES: Final = (
    *("READONLY", "NOREPLICAS", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN", "BUSY", "MISCONF"),
    *("NOPERM", "UNBLOCKED", "EXECABORT", "LOADING", "OOM", "ERR", "ASK 1 127.0.0.1:1"),
    *("MOVED 1 127.0.0.1:1", "MOVED", "ASK nonsense"),
)
SQL_STATES: Final = (
    *("XX000", "XX001", "26000", "42P05", "55000", "23505", "54000", "72000", "3F000", "25P02"),
    *("P0001", "25006", "57P01", "57P03", "53300", "53200", "53100", "40001", "40P01", "0A000"),
)


@dataclass(frozen=True)
class Harm:
    """What happens to each request of a moment; `seconds` is for how long it hangs.

    After the fault `end`, which the harness does not use, the connection is closed.
    """

    moment: str
    fault: str
    code: str
    seconds: float = 3.0


class Moments(Protocol):
    """Cuts what a client sends into requests."""

    def split(self, data: bytes) -> Iterator[tuple[str, bytes]]: ...

    def error(self, code: str, request: bytes) -> tuple[bytes, bytes]:
        """Return the answer to the client and what the server gets instead of the request."""
        ...


class RedisMoments:
    """Commands, as arrays of bulk strings."""

    _of_script: Final = {
        script_sha("acquire").encode(): "acquire",
        script_sha("ack_and_publish").encode(): "publish",
        script_sha("requeue").encode(): "hand over",
        script_sha("append").encode(): "append",
    }
    _of_command: Final = {
        **dict.fromkeys((b"HELLO", b"AUTH", b"CLIENT", b"SELECT", b"PING"), "connect"),
        b"BRPOP": "take",
        b"LPUSH": "send",
        b"EVAL": "evaluate",
        b"SUBSCRIBE": "subscribe",
    }

    def __init__(self) -> None:
        self._buffer = b""

    def split(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        self._buffer += data
        while (found := self._command()) is not None:
            words, length = found
            request, self._buffer = self._buffer[:length], self._buffer[length:]
            script = words[1] if len(words) > 1 and words[0].upper() == b"EVALSHA" else b""
            moment = self._of_script.get(script) or self._of_command.get(words[0].upper(), "")
            yield moment, request

    def _command(self) -> tuple[list[bytes], int] | None:
        words: list[bytes] = []
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        at = end + 2
        for _ in range(int(self._buffer[1:end])):
            end = self._buffer.find(b"\r\n", at)
            if end < 0:
                return None
            length = int(self._buffer[at + 1 : end])
            if len(self._buffer) < end + 4 + length:
                return None
            words.append(self._buffer[end + 2 : end + 2 + min(length, 64)])
            at = end + 4 + length
        return words, at

    def error(self, code: str, request: bytes) -> tuple[bytes, bytes]:
        words = code if " " in code else f"{code} injected"
        return f"-{words}\r\n".encode(), b""


class PostgresMoments:
    """Messages of the frontend; a statement's moment is that of its Bind, or of its Query."""

    def __init__(self) -> None:
        self._buffer = b""
        self._started = False
        self._of_statement: dict[bytes, str] = {}

    def split(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        self._buffer += data
        while len(self._buffer) >= 5:
            head = 1 if self._started else 0
            length = head + struct.unpack_from("!i", self._buffer, head)[0]
            if len(self._buffer) < length:
                return
            message, self._buffer = self._buffer[:length], self._buffer[length:]
            self._started = True
            yield self._moment(message) if head else "start", message

    def _moment(self, message: bytes) -> str:
        if message[:1] == b"P":
            name, _, rest = message[5:].partition(b"\0")
            self._of_statement[name] = moment_of_sql(rest.partition(b"\0")[0])
        if message[:1] == b"B":
            _, _, rest = message[5:].partition(b"\0")
            name = rest.partition(b"\0")[0]
            return self._of_statement.get(name, name.decode())  # the endpoint prepares by SQL
        return ""

    def error(self, code: str, request: bytes) -> tuple[bytes, bytes]:
        """Let the server raise it, so that the state of the connection stays right.

        The first message has no kind: it is answered as by a server that ends the connection.
        """
        if not request[:1].isalpha():
            fields = (b"SFATAL", b"VFATAL", b"C" + code.encode(), b"Minjected")
            return _message(b"E", b"\0".join(fields) + b"\0\0"), b""
        sql = f"do $$ begin raise exception 'injected' using errcode = '{code}'; end $$"
        parse = _message(b"P", b"\0" + sql.encode() + b"\0" + struct.pack("!h", 0))
        bind = _message(b"B", b"\0\0" + struct.pack("!hhh", 0, 0, 0))
        return b"", parse + bind + _message(b"E", b"\0" + struct.pack("!i", 0))


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", 4 + len(body)) + body


def moment_of_sql(sql: bytes) -> str:
    """Return what a statement of the worker is for."""
    words = sql.lower().split()
    if not words:
        return ""
    if words[0] == b"delete" or b"delete from" in b" ".join(words):
        return "purge"
    if words[0] in (b"insert", b"update"):
        return "write"
    if words[0] in (b"begin", b"commit"):
        return words[0].decode()
    if b"for update" in b" ".join(words):
        return "lock"
    return "look-up" if words[0] == b"select" and b"set_config" not in sql else ""
