"""Calls of the inbox protocol's Lua scripts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final, cast

from redis import Redis
from redis.exceptions import NoScriptError, ResponseError

_INCLUDES: Final = {
    "append": ("_lease", "_shared"),
    "acquire": ("_lease", "_shared", "_read_head"),
    "ack_and_publish": ("_lease", "_shared", "_read_head"),
    "renew": ("_lease",),
    "requeue": ("_lease", "_shared"),
    "rescue": ("_lease", "_shared"),
    "claim_rescue": ("_shared",),
}


def run_script(redis: Redis, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Run one of the scripts. Raises what redis-py raises."""
    try:
        return redis.evalsha(script_sha(name), len(keys), *keys, *arguments)
    except NoScriptError:  # the server was restarted, or its scripts were flushed
        return redis.eval(script_source(name), len(keys), *keys, *arguments)


class SentScript:
    """A call of one of the scripts that was sent. All methods raise what redis-py raises."""

    def __init__(
        self, redis: Redis, name: str, keys: Sequence[str], arguments: Sequence[Any]
    ) -> None:
        self._redis, self._call = redis, (name, keys, arguments)
        self._connection = cast(Any, redis.connection_pool.get_connection())
        words: tuple[Any, ...] = (script_sha(name), len(keys), *keys, *arguments)
        try:
            self._connection.send_command("EVALSHA", *words)
        except BaseException:
            self.drop()
            raise

    def result(self) -> Any:
        """Wait for the answer. After an error of the server, call it again to repeat the call."""
        if self._connection is None:
            return run_script(self._redis, *self._call)
        try:
            answer = self._connection.read_response()
        except ResponseError as error:
            self._release()
            if isinstance(error, NoScriptError):
                return self.result()
            raise
        except BaseException:
            self.drop()
            raise
        self._release()
        return answer

    def drop(self) -> None:
        """Close the connection, unless there is an answer: the script may have run or not."""
        if self._connection is not None:
            self._connection.disconnect()
            self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        self._redis.connection_pool.release(connection)


@cache
def script_source(name: str) -> str:
    """Return a script, with the functions that it shares with others behind its first line."""
    scripts = files("producers.inbox").joinpath("scripts")
    own, *included = (
        scripts.joinpath(f"{each}.lua").read_text() for each in (name, *_INCLUDES.get(name, ()))
    )
    flags, newline, rest = own.partition("\n")
    if not flags.startswith("#!"):
        return "".join([*included, own])
    return "".join([flags, newline, *included, rest])


@cache
def script_sha(name: str) -> str:
    return hashlib.sha1(script_source(name).encode(), usedforsecurity=False).hexdigest()
