"""What a process does as it starts: wrong settings end it; it waits for servers."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import psycopg
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from producers.errors import ConfigurationError
from producers.redis_client import open_redis
from worker.db.connection import UnsafeRole
from worker.db.repository import Repository
from worker.settings import Settings

logger = logging.getLogger(__name__)

# libpq gives no SQLSTATE for a connection that was refused.
_REFUSALS: Final = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "not permitted to log in",
    "does not exist",
)


def freeze_garbage_collector() -> None:
    """Exempt what exists from garbage collection, and collect seldom from now on.

    Drains and requests make many objects and no cycles. Searching all modules for some took a fifth
    of a drain's time, and let others wait for a request with many small objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def check_servers(settings: Settings) -> None:
    """Try both servers once. Raises `ConfigurationError` if one refuses the credentials or role.

    Whatever else fails is no fault of the settings, and may pass.
    """
    for reach in (check_database, ping):
        with suppress(psycopg.Error, RedisError, OSError):
            reach(settings)


def check_database(settings: Settings) -> None:
    """Connect to PostgreSQL. Raises `ConfigurationError`, and what psycopg raises."""
    repository = Repository(settings.database_url.get_secret_value())
    try:
        repository.check()
    except UnsafeRole as error:
        raise ConfigurationError(str(error)) from error
    except psycopg.OperationalError as error:
        if any(refusal in str(error) for refusal in _REFUSALS):
            text = " ".join(str(error).split())
            raise ConfigurationError(f"TASK_TAGS_DATABASE_URL: it is refused: {text}") from error
        raise
    finally:
        repository.close()


def ping(settings: Settings, then: Callable[[Any], None] = lambda _: None) -> None:
    """Connect to Redis, and do something with it. Raises `ConfigurationError`, or as redis-py."""
    with open_redis(settings.redis_url.get_secret_value(), socket_timeout=3) as redis:
        try:
            redis.ping()
        except (AuthenticationError, ResponseError) as error:
            if isinstance(error, ResponseError) and "DB index" not in str(error):
                raise
            raise ConfigurationError(f"TASK_TAGS_REDIS_URL: it is refused: {error}") from error
        then(redis)


def wait_for(what: str, reach: Callable[[], Any]) -> None:
    """Retry until a server answers, with a backoff of up to a second; log each new cause.

    Raises `ConfigurationError` if its first answer is a refusal. One that has just come up may
    refuse for a while, until its database and roles are made.
    """
    seconds, causes = 0.05, set[str]()
    while True:
        try:
            reach()
            return
        except (psycopg.Error, RedisError, ConfigurationError) as error:
            if not causes and isinstance(error, ConfigurationError):
                raise
            if (cause := str(error) or type(error).__name__) not in causes:
                causes.add(cause)
                logger.warning(f"waiting for {what}: {cause}")
            time.sleep(seconds)
            seconds = min(seconds * 2, 1.0)
