"""Opens Redis and Celery from one URL; every process of the product does it here, with the same time-outs."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from redis import Redis

_TIMEOUTS: Final[dict[str, Any]] = {
    "socket_timeout": 10,  # seconds, as the next two
    "socket_connect_timeout": 2,
    "health_check_interval": 10,
}


def open_redis(url: str, **options: Any) -> Redis:
    """Return a client for `redis://`, `rediss://` or `unix://`. It connects when it is first used."""
    options = {**_TIMEOUTS, **options}
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    client: Redis = Redis.from_url(url, **options)
    return client


def open_celery(name: str, redis_url: str, **options: Any) -> Celery:
    """Return a Celery app with the settings of celeryconfig.py whose broker is this Redis."""
    app = Celery(name, broker=broker_url(redis_url), set_as_current=False, **options)
    app.config_from_object("celeryconfig")
    return app


def broker_url(redis_url: str) -> str:
    """Return the URL as Celery spells it: a socket is `redis+socket://` there."""
    if not redis_url.startswith("unix://"):
        return redis_url
    parts = urlsplit(redis_url)
    database = parse_qs(parts.query).get("db", ["0"])[0]
    user = f"{parts.netloc}" if parts.netloc else ""
    return f"redis+socket://{user}{parts.path}?virtual_host={database}"
