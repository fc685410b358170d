"""The Celery app: `celery -A worker worker`, `celery -A worker beat`."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from celery import Task, signals
from celery.worker.request import Request
from redis.exceptions import RedisError

from producers.errors import ConfigurationError
from producers.inbox.rescue import rebuild_waiting
from producers.redis_client import open_redis
from worker import log
from worker.auth import Authorizer
from worker.broker import create_app
from worker.db.repository import Repository
from worker.settings import load_settings

logger = logging.getLogger(__name__)

try:
    settings = load_settings()
except ConfigurationError as error:
    sys.exit(str(error))


class NoAckRequest(Request):  # type: ignore[misc]
    """A delivery from a queue that is consumed without acknowledgement.

    kombu's Redis transport acknowledges it all the same, and if the connection breaks at that
    moment, the worker ends.
    """

    def acknowledge(self) -> None:
        self.acknowledged = True


class NoAckTask(Task):  # type: ignore[misc]
    """A Celery task whose message is gone once it is received: the inbox is the truth."""

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
def _check(**_: Any) -> None:
    """End on settings that can't work or an unsafe role; wait for servers that can't be reached."""
    repository = Repository(settings.database_url.get_secret_value())
    try:
        Authorizer(settings)
        _wait_for("the database", repository.check, psycopg.OperationalError)
        with open_redis(settings.redis_url.get_secret_value()) as redis:
            _wait_for("Redis", partial(rebuild_waiting, redis, settings.lease_ms), RedisError)
    except Exception as error:  # Celery would log it and go on
        logger.critical(str(error))
        raise SystemExit(1) from None
    finally:
        repository.close()


def _wait_for(what: str, reach: Callable[[], Any], away: type[Exception]) -> None:
    """Retry until a server answers, with a backoff of up to a second; log it once."""
    seconds = 0.05
    while True:
        try:
            reach()
        except away as error:
            if seconds == 0.05:
                logger.warning(f"waiting for {what}: {error}")
            time.sleep(seconds)
            seconds = min(seconds * 2, 1.0)
        else:
            return


@signals.worker_ready.connect
def _freeze_garbage_collector(**_: Any) -> None:
    """Exempt what exists from garbage collection, and collect seldom from now on.

    A drain makes many objects and no cycles; searching all modules for some took a fifth of its
    time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    logger.info("ready")


@signals.beat_init.connect
def _log_ready(**_: Any) -> None:
    logger.info("ready")
