"""The Celery app: `celery -A worker worker`, `celery -A worker beat`."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread, Timer
from typing import Any, Final

from celery import Task, platforms, signals
from celery.worker.request import Request

from producers.errors import ConfigurationError
from producers.inbox.rescue import rebuild_waiting
from worker import log
from worker.auth import Authorizer
from worker.broker import create_app
from worker.settings import load_settings
from worker.startup import check_database, freeze_garbage_collector, ping, wait_for

logger = logging.getLogger(__name__)

STOP_SECONDS: Final = 4.5
"""After a signal, a process ends within 5 s."""
_ENDING: Final = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}

# Refused by servers that can't be written to, but not if memory is used up: drains free some.
_NEEDS_PRIMARY: Final = "#!lua flags=allow-oom\nreturn 1"

try:
    settings = load_settings()
except ConfigurationError as error:
    from producers.console import fail, open_streams  # here: workers don't need it

    open_streams()
    fail(2, error)


class NoAckRequest(Request):  # type: ignore[misc]
    """A delivery from a queue that is consumed without acknowledgement.

    kombu's Redis transport acknowledges it all the same, and if the connection breaks at that
    moment, the worker ends.
    """

    def acknowledge(self) -> None:
        self.acknowledged = True


class NoAckTask(Task):  # type: ignore[misc]
    """A Celery task whose message is not acknowledged: what is to be done is in the inbox."""

    Request = NoAckRequest


app = create_app(
    "worker",
    settings.redis_url.get_secret_value(),
    include=["worker.tasks"],
    task_cls=NoAckTask,
)


@signals.setup_logging.connect
def _configure_logs(**_: Any) -> None:
    log.configure(settings.log_level)


@signals.worker_init.connect
def _watch_for_the_end(**_: Any) -> None:
    """End this process 4.5 s after a signal, whatever it waits for: what is not done is done again.

    A drain ends earlier by itself. But Celery waits for a Redis or a log that hangs as long as that
    hangs, and Python runs no handler while it waits for code in C. So a thread waits for signals.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    Thread(target=_end_in_time, args=(reader, writer), name="end", daemon=True).start()


def _end_in_time(reader: socket.socket, _writer: socket.socket) -> None:
    """Wait for signals as long as the process lives: both sockets stay open."""
    is_ending = False
    while numbers := set(reader.recv(64)):
        if is_ending or not numbers & _ENDING:
            continue
        is_ending = True
        for timer in (  # two, because the log may be what hangs
            Timer(STOP_SECONDS, logger.warning, ["ending: something does not answer"]),
            Timer(STOP_SECONDS + 0.1, os._exit, [0]),
        ):
            timer.daemon = True
            timer.start()


@signals.worker_init.connect
def _check_worker(**_: Any) -> None:
    """End on settings that can't work or an unsafe role; wait for servers that can't be used."""
    platforms.signals.update(SIGTERM=_end, SIGINT=_end)  # Celery sets its own later
    with _ending_on_wrong_settings():
        Authorizer(settings)
        wait_for("the database", partial(check_database, settings))
        wait_for("Redis", partial(ping, settings, _use_redis))


def _end(*_: object) -> None:
    raise SystemExit


def _use_redis(redis: Any) -> None:
    redis.eval(_NEEDS_PRIMARY, 0)
    rebuild_waiting(redis, settings.lease_ms)


@signals.beat_init.connect
def _check_beat(sender: Any, **_: Any) -> None:
    """End at a signal, whatever is going on; end on settings that can't work; wait for Redis.

    Celery's own handler closes the connection, which may be in use at that moment; what this raises
    is caught and logged there, and the signal is lost.
    """

    def end(*_: object) -> None:
        sender.stop()
        raise SystemExit

    platforms.signals.update(SIGTERM=end, SIGINT=end)
    with _ending_on_wrong_settings():
        wait_for("Redis", partial(ping, settings))
    logger.info("ready")


@contextmanager
def _ending_on_wrong_settings() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Celery would log it and go on
        logger.critical(str(error))
        raise SystemExit(2 if isinstance(error, ConfigurationError) else 1) from None


@signals.worker_ready.connect
def _on_ready(**_: Any) -> None:
    freeze_garbage_collector()
    logger.info("ready")
