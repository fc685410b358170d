"""The door of the Celery queue: what is no task message of ours is dropped here, before Celery parses it.

Producers may write to that queue, and half of the ways to get a message wrong end a Celery worker. So only the
task's name, its id, its arguments and its expiry are taken from what was received, and Celery sees a message that
was made anew from them: no callbacks, chains or chords, no compression, no time of arrival or time limit.
"""

from __future__ import annotations

import base64
import json
import logging
from datetime import datetime, timezone
from typing import Any, Final
from uuid import UUID

from kombu.transport import redis
from redis import Redis

from producers.connect import DRAIN_TASK

logger = logging.getLogger(__name__)

WAKE_TASK: Final = "task_tags.wake"
PURGE_TASK: Final = "task_tags.purge"
_NUMBER_OF_ARGUMENTS: Final = {DRAIN_TASK: 2, WAKE_TASK: 0, PURGE_TASK: 0}
_LONGEST: Final = 64 * 1024
"""Bytes; a drain message has about 700."""


class Channel(redis.Channel):
    """kombu's channel, with every message that comes from a queue screened."""

    def _create_client(self, asynchronous: bool = False) -> Any:
        client: Redis = super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        client.set_response_callback("BRPOP", _screen_answer)
        return client


class Transport(redis.Transport):
    """kombu's Redis transport with that channel."""

    Channel = Channel


def _screen_answer(answer: Any, **_: Any) -> Any:
    message = screened(answer[1]) if answer else None
    return None if message is None else (answer[0], message)  # None: nothing came in time


def screened(received: bytes) -> bytes | None:
    """Return a task message as Celery would have sent it; None, and a line in the log, for anything else."""
    try:
        return _made_anew(*_read(received))
    except Exception as error:  # it may be wrong in any way
        reason = f"{type(error).__name__}: {error}"[:200]
        logger.warning("dropped a malformed Celery message", extra={"reason": reason})
        return None


def _read(received: bytes) -> tuple[str, str, list[str], str | None]:
    """Return the task's name, its id, its arguments and its expiry. Raises any exception if they aren't there."""
    if len(received) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST} bytes")
    message = json.loads(received)
    headers, body = message["headers"], message["body"]
    task, id, expires = headers["task"], headers["id"], headers.get("expires")
    if message["content-type"] != "application/json" or headers.get("compression"):
        raise ValueError("its body is not plain JSON")
    arguments, named, _ = json.loads(base64.b64decode(body))
    if not isinstance(id, str) or named != {} or len(arguments) != _NUMBER_OF_ARGUMENTS[task]:
        raise ValueError("its id or its arguments are wrong")
    if expires is not None:
        expires = datetime.fromisoformat(expires).astimezone(timezone.utc).isoformat()
    return task, id, [str(UUID(each)) for each in arguments], expires


def _made_anew(task: str, id: str, arguments: list[str], expires: str | None) -> bytes:
    body = json.dumps([arguments, {}, {}]).encode()
    message = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": id, "root_id": id, "expires": expires},
        "properties": {
            "correlation_id": id,
            "delivery_tag": id,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "task-tags"},
        },
    }
    return json.dumps(message).encode()
