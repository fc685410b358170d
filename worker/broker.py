"""The door of the Celery queue: what is no task message of ours is dropped here, before Celery parses it.

Producers may write to that queue, and half of the ways to get a message wrong end a Celery worker. So only the
task's name, its id, its arguments and its expiry are taken from what was received, and Celery sees a message that
was made anew from them: no callbacks, chains or chords, no compression, no time of arrival or time limit.
"""

from __future__ import annotations

import base64
import json
import logging
import runpy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlencode, urlsplit
from uuid import UUID

from celery import Celery
from celery.app.defaults import NAMESPACES, flatten
from kombu.transport import redis
from redis import Redis

from producers.inbox.drain_message import DRAIN_TASK, task_message

logger = logging.getLogger(__name__)

WAKE_TASK: Final = "task_tags.wake"
PURGE_TASK: Final = "task_tags.purge"
_CELERY_KEYS: Final = frozenset(name for name, _ in flatten(NAMESPACES))
_NUMBER_OF_ARGUMENTS: Final = {DRAIN_TASK: 2, WAKE_TASK: 0, PURGE_TASK: 0}
_MAX_BYTES: Final = 64 * 1024
"""Bytes; a drain message has about 600."""


class Channel(redis.Channel):
    """kombu's channel, with every message that comes from a queue screened."""

    def _create_client(self, asynchronous: bool = False) -> Any:
        client: Redis = super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        client.set_response_callback("BRPOP", _screen_answer)
        return client


class Transport(redis.Transport):
    """kombu's Redis transport with that channel."""

    Channel = Channel


class App(Celery):  # type: ignore[misc]
    """A Celery app whose broker is the product's Redis, whatever CELERY_BROKER_URL says.

    That variable, like a module named `celeryconfig`, may well be another application's. What it reads from the queue
    is looked at before Celery parses it.
    """

    def __init__(self, name: str, redis_url: str, **options: Any) -> None:
        super().__init__(name, set_as_current=False, **options)
        self.config_from_object(_settings())
        self._broker_url = broker_url(redis_url)

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        connection = super().connection_for_read(url or self._broker_url, **options)
        connection.transport_cls = Transport
        return connection

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self._broker_url, **options)


def _settings() -> dict[str, Any]:
    """Return the settings of the celeryconfig.py that was installed with this package."""
    settings = runpy.run_path(str(Path(__file__).parent.parent / "celeryconfig.py"))
    return {name: value for name, value in settings.items() if name in _CELERY_KEYS}


def broker_url(redis_url: str) -> str:
    """Return the URL as Celery spells it: a socket is `redis+socket://` there, and a database is a path or a virtual host."""
    parts = urlsplit(redis_url)
    query = parse_qs(parts.query)
    database = query.pop("db", [""])[0]
    if parts.scheme == "unix":
        return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database or 0}"
    rest = urlencode(query, doseq=True)
    return parts._replace(path=f"/{database}" if database else parts.path, query=rest).geturl()


def _screen_answer(answer: Any, **_: Any) -> Any:
    message = screened(answer[1]) if answer else None
    return None if message is None else (answer[0], message)  # None: nothing came in time


def screened(received: bytes) -> bytes | None:
    """Return a task message as Celery would have sent it; None, and a line in the log, for anything else."""
    try:
        task, id, arguments, expires = _read(received)
        return task_message(task, id, arguments, expires=expires)
    except Exception as error:  # it may be wrong in any way
        reason = f"{type(error).__name__}: {error}"[:200]
        logger.warning("dropped a malformed Celery message", extra={"reason": reason})
        return None


def _read(received: bytes) -> tuple[str, str, list[str], str | None]:
    """Return the task's name, its id, its arguments and its expiry. Raises any exception if they aren't there."""
    if len(received) > _MAX_BYTES:
        raise ValueError(f"it is longer than {_MAX_BYTES} bytes")
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
