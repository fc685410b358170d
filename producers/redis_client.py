"""Opens Redis; every process of the product does it here, with the same time-outs."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from redis import Redis
from redis import asyncio as async_redis
from redis.asyncio.connection import DefaultParser as AsyncParser
from redis.connection import DefaultParser, parse_url
from redis.exceptions import ResponseError

from producers.errors import Unavailable

_TIMEOUTS: Final[dict[str, Any]] = {
    "socket_timeout": 10,  # seconds, like the other two
    "socket_connect_timeout": 2,
    "health_check_interval": 10,
}


_NUMBERS: Final = ("socket_timeout", "socket_connect_timeout")
_MAX_SECONDS: Final = 86_400
_URL_OPTIONS: Final = frozenset({"db", "username", "password", "client_name", *_NUMBERS})
_OF_TCP: Final = _URL_OPTIONS | {"socket_keepalive"}
_OF_TLS: Final = _OF_TCP | {
    *("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_password"),
    *("ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers", "ssl_min_version"),
}
_OPTIONS_BY_SCHEME: Final = {"redis": _OF_TCP, "rediss": _OF_TLS, "unix": _URL_OPTIONS}


def check_redis_url(url: str) -> None:
    """Raise `ValueError`, in words that may be printed, unless every process can use this URL.

    Its options are those that mean the same to the clients of both kinds and to Celery's.
    """
    try:
        parts = urlsplit(url)
        known = _OPTIONS_BY_SCHEME[parts.scheme]
        malformed = parts.port == 0 or not (parts.netloc or parts.path)
    except (KeyError, ValueError):  # its message may quote a part of the password
        malformed = True
    if malformed:
        raise ValueError("must be like redis://host:6379/0 or unix:///path?db=0")
    if parts.scheme != "unix" and not re.fullmatch("/?|/[0-9]+", parts.path):
        raise ValueError("must end in the number of a database, as in redis://host:6379/0")
    given = parse_qs(parts.query, keep_blank_values=True)
    for name, values in given.items():
        if name not in known:
            # With "@" in the query, this may be the end of a password that was not quoted.
            named = name if name.isidentifier() and "@" not in parts.query else "this option"
            raise ValueError(f"can't have {named}, only {', '.join(sorted(known))}")
        if len(values) > 1 or not values[0]:
            raise ValueError(f"must have one value for {name}")
    options = parse_url(url)  # type: ignore[no-untyped-call]  # raises
    for name in _NUMBERS:
        if not 0 < options.get(name, 1) <= _MAX_SECONDS:
            raise ValueError(f"must have a {name} above 0 and at most {_MAX_SECONDS} seconds")
    if given.get("ssl_cert_reqs", ["none"])[0] not in ("none", "optional", "required"):
        raise ValueError("must have none, optional or required as ssl_cert_reqs")


class _AnyError:
    """Reads an error that redis-py cannot take apart, such as a cut MOVED, as a plain error."""

    @classmethod
    def parse_error(cls, response: str) -> Exception:
        try:
            error: Exception = super().parse_error(response)  # type: ignore[misc]
        except ValueError:
            return ResponseError(response)
        return error


class _Parser(_AnyError, DefaultParser):  # type: ignore[misc, valid-type]
    pass


class _AsyncParser(_AnyError, AsyncParser):  # type: ignore[misc, valid-type]
    pass


def open_redis(url: str, **options: Any) -> Redis:
    """Return a client for `redis://`, `rediss://` or `unix://`. It connects at its first use.

    It speaks RESP2: redis-py formats a log line for each push message of RESP3, logged or not,
    which took two thirds of the time to receive a change event.
    """
    client: Redis = Redis.from_url(url, **_options(url, _TIMEOUTS | options, _Parser))
    return client


def open_async_redis(url: str, **options: Any) -> async_redis.Redis:
    """Return a client for asyncio. It connects at its first use."""
    timeouts = {**_TIMEOUTS, "health_check_interval": 0}  # it would send pings into subscriptions
    given = _options(url, timeouts | options, _AsyncParser)
    client: async_redis.Redis = async_redis.Redis.from_url(url, **given)
    return client


def url_options(url: str) -> dict[str, Any]:
    """Return the options of a connection that a URL has, as redis-py reads it."""
    return {"parser_class": _Parser, **parse_url(url)}  # type: ignore[no-untyped-call]


def _options(url: str, options: dict[str, Any], parser: type) -> dict[str, Any]:
    keepalive = {} if url.startswith("unix://") else {"socket_keepalive": True}
    return {"protocol": 2, "parser_class": parser, **options, **keepalive}


def redis_unavailable(error: Exception) -> Unavailable:
    """Return what a failed command raises; it names the setting that chose the server."""
    why = f"{type(error).__name__}: {error}"
    return Unavailable(f"Redis can't be used (TASK_TAGS_REDIS_URL): {why}")
