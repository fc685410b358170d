"""The Celery app: `celery -A worker worker`, `celery -A worker beat`."""

from __future__ import annotations

import gc
import logging
import sys
import time
from typing import Any

from celery import Task, signals
from celery.worker.request import Request
from sqlalchemy.exc import DBAPIError

from producers.connect import App
from worker import log
from worker.authorize import Authorizer
from worker.settings import InvalidSettings, load_settings
from worker.store import Store, UnsafeRole

logger = logging.getLogger(__name__)

try:
    settings = load_settings()
except InvalidSettings as error:
    sys.exit(str(error))


class DisposableRequest(Request):  # type: ignore[misc]
    """A request of a queue that is consumed without acknowledgement.

    kombu's Redis transport would send one all the same, and the worker would end if the connection broke at
    that moment.
    """

    def acknowledge(self) -> None:
        self.acknowledged = True


class DisposableTask(Task):  # type: ignore[misc]
    """A task whose message is gone once it is received: the inbox is the truth."""

    Request = DisposableRequest


app = App(
    "worker",
    settings.redis_url.get_secret_value(),
    include=["worker.tasks"],
    task_cls=DisposableTask,
)


@signals.setup_logging.connect
def _configure_logs(**_: Any) -> None:
    log.configure(settings.log_level)


@signals.worker_init.connect
def _check(**_: Any) -> None:
    """Refuse to run on settings that can't work, or as a role that sees through row-level security.

    A database that is away is waited for.
    """
    try:
        Authorizer(settings)
    except InvalidSettings as error:
        logger.critical(str(error))
        raise SystemExit(1) from None
    store = Store(settings.database_url.get_secret_value())
    said = False
    try:
        while True:
            try:
                return store.check()
            except UnsafeRole as error:
                logger.critical(str(error))
                raise SystemExit(1) from None
            except DBAPIError as error:
                if not said:
                    logger.warning("waiting for the database", extra={"error": str(error.orig)})
                    said = True
                time.sleep(0.5)
    finally:
        store.close()


@signals.worker_ready.connect
def _say_that_the_worker_is_ready(**_: Any) -> None:
    # A drain makes many objects and no cycles; looking through all modules for some, again and again, cost a
    # fifth of its time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    logger.info("ready")


@signals.beat_init.connect
def _say_that_beat_is_ready(**_: Any) -> None:
    logger.info("ready")
