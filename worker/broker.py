"""The Celery app's broker: how it connects, and what may come from the Celery queue.

Producers may write to that queue, and many malformed messages would end a Celery worker.
So everything from a queue is screened before Celery parses it: only the Celery task's name, its id
and its arguments are kept, and Celery gets a message that is made from them, without callbacks,
chains, compression, arrival time, expiry or time limits.
"""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from celery import Celery
from celery.app.defaults import NAMESPACES, flatten
from kombu.transport import TRANSPORT_ALIASES, redis
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from producers.inbox.drain_message import DRAIN_TASK, QUEUE, read_task_message, task_message
from producers.inbox.protocol import repair_keys
from producers.redis_client import url_options
from worker.log import log_limited

WAKE_TASK: Final = "task_tags.wake"
PURGE_TASK: Final = "task_tags.purge"
_CELERY_KEYS: Final = frozenset(name for name, _ in flatten(NAMESPACES))
_NUMBERS_OF_ARGUMENTS: Final = {DRAIN_TASK: (2,), WAKE_TASK: (0,), PURGE_TASK: (0, 1)}
_MIN_SECONDS: Final = 0.001
"""The least time-out of a BRPOP: 0 would wait for ever."""
_MAX_SECONDS: Final = 1.0
"""The largest time-out of a BRPOP: less than the time-out of the client."""
_TCP_OPTIONS: Final = ("socket_connect_timeout", "socket_keepalive", "socket_keepalive_options")


def create_app(name: str, redis_url: str, **options: Any) -> Celery:
    """Return a Celery app whose broker is the product's Redis.

    Its settings are those of the celeryconfig.py that was installed with this package. Another
    application's `celeryconfig` module and CELERY_BROKER_URL variables do not matter.
    """
    for variable in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        os.environ.pop(variable, None)
    app = Celery(name, set_as_current=False, **options)
    installed = Path(__file__).with_name("celeryconfig.py")  # the wheel's; else a checkout's
    checkout = Path(__file__).parents[1] / "celeryconfig.py"
    settings = runpy.run_path(str(installed if installed.exists() else checkout))
    app.config_from_object(
        {
            **{key: value for key, value in settings.items() if key in _CELERY_KEYS},
            "broker_url": redis_url,
            "broker_transport": "worker.broker:Transport",
        }
    )
    return app


class Channel(redis.Channel):
    """kombu's channel: it connects as redis-py reads the URL, and screens what a queue delivers."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        options: dict[str, Any] = super()._connparams()  # type: ignore[no-untyped-call]
        options |= url_options(self.connection.client.hostname)
        if "path" in options:  # a unix socket
            options = {name: options[name] for name in options if name not in _TCP_OPTIONS}
        if asynchronous:
            options["connection_class"] = self._in_poller(options["connection_class"])
        return options

    def _in_poller(self, connection_class: Any) -> type:
        """Return a connection class that tells this channel's poller when it disconnects."""
        channel = self

        class Connection(connection_class):  # type: ignore[misc]
            def disconnect(self, *args: Any, **options: Any) -> None:
                super().disconnect(*args, **options)
                if channel._registered:
                    channel._on_connection_disconnect(self)  # type: ignore[no-untyped-call]

        return Connection

    def _create_client(self, asynchronous: bool = False) -> Any:
        client: Redis = super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        client.set_response_callback("BRPOP", _screen_answer)
        return client

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if "WRONGTYPE" in str(error):
                with self.conn_or_acquire() as client:
                    repair_keys(client)
            raise


class Transport(redis.Transport):
    """kombu's Redis transport with that channel."""

    Channel = Channel
    can_parse_url = True


TRANSPORT_ALIASES["unix"] = "worker.broker:Transport"  # `celery report` reads the URL by its scheme


def _screen_answer(answer: Any, **_: Any) -> Any:
    """Screen what comes from the workers' queue; replies to remote control have other queues."""
    if not answer or answer[0] != QUEUE.encode():
        return answer
    message = screened(answer[1])
    return None if message is None else (answer[0], message)  # None: nothing came in time


def next_drain(redis: Redis, deadline: float, stopping: Callable[[], bool]) -> UUID | None:
    """Take the next drain message from the queue, and return its organization.

    None: none came until the deadline, a monotonic time, or the process is to end, or what comes
    next is for Celery, and was put back. Whatever fails here, Celery has its own way to wait for
    Redis.
    """
    with suppress(RedisError, OSError):
        while not stopping() and (left := deadline - time.monotonic()) >= _MIN_SECONDS:
            answer: Any = redis.brpop([QUEUE], timeout=min(left, _MAX_SECONDS))
            message = None if answer is None else _read_or_drop(answer[1])
            if message is None:
                continue
            task, _, arguments = message
            if task != DRAIN_TASK:
                redis.rpush(QUEUE, task_message(*message))
                return None
            return UUID(arguments[0])
    return None


def drains_among(redis: Redis, messages: list[bytes]) -> list[UUID]:
    """Return the organizations of the drain messages among some; put the others back."""
    organizations: dict[UUID, None] = {}
    for received in messages:
        message = _read_or_drop(received)
        if message is None:
            continue
        task, _, arguments = message
        if task == DRAIN_TASK:
            organizations[UUID(arguments[0])] = None
        else:
            with suppress(RedisError, OSError):  # beat sends it again
                redis.rpush(QUEUE, task_message(*message))
    return list(organizations)


def screened(received: bytes) -> bytes | None:
    """Return a task message as Celery sends it; None, with a line in the log, for anything else."""
    message = _read_or_drop(received)
    return None if message is None else task_message(*message)


def _read_or_drop(received: bytes) -> tuple[str, str, list[str]] | None:
    """Return the Celery task's name, id and arguments; None, with a line in the log, if wrong."""
    try:
        return read_task_message(received, _NUMBERS_OF_ARGUMENTS)
    except Exception as error:  # it may be wrong in any way
        about = {"error": type(error).__name__, "reason": str(error)[:200]}
        log_limited("malformed Celery messages are dropped", **about)
        return None
