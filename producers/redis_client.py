"""Opens Redis; every process of the product does it here, with the same time-outs."""

from __future__ import annotations

from typing import Any, Final

from redis import Redis
from redis import asyncio as async_redis
from redis.connection import parse_url

_TIMEOUTS: Final[dict[str, Any]] = {
    "socket_timeout": 10,  # seconds, like the other two
    "socket_connect_timeout": 2,
    "health_check_interval": 10,
}


def open_redis(url: str, **options: Any) -> Redis:
    """Return a client for `redis://`, `rediss://` or `unix://`. It connects at its first use.

    It speaks RESP2: redis-py formats a log line for each push message of RESP3, logged or not,
    which took two thirds of the time to receive a change event.
    """
    client: Redis = Redis.from_url(url, **_options(url, _TIMEOUTS | options))
    return client


def open_async_redis(url: str, **options: Any) -> async_redis.Redis:
    """Return a client for asyncio. It connects at its first use."""
    timeouts = {**_TIMEOUTS, "health_check_interval": 0}  # it would send pings into subscriptions
    client: async_redis.Redis = async_redis.Redis.from_url(url, **_options(url, timeouts | options))
    return client


def url_options(url: str) -> dict[str, Any]:
    """Return the options of a connection that a URL has, as redis-py reads it."""
    return dict(parse_url(url))  # type: ignore[no-untyped-call]


def _options(url: str, options: dict[str, Any]) -> dict[str, Any]:
    keepalive = {} if url.startswith("unix://") else {"socket_keepalive": True}
    return {"protocol": 2, **options, **keepalive}
