"""Opens Redis; every process of the product does it here, with the same time-outs."""

from __future__ import annotations

from typing import Any, Final

from redis import Redis

_TIMEOUTS: Final[dict[str, Any]] = {
    "socket_timeout": 10,  # seconds, as the next two
    "socket_connect_timeout": 2,
    "health_check_interval": 10,
}


def open_redis(url: str, **options: Any) -> Redis:
    """Return a client for `redis://`, `rediss://` or `unix://`. It connects when it is first used.

    It speaks RESP2: of RESP3's push messages redis-py makes a line of log, whether it is logged or not, which took two
    thirds of the time to hear a change event.
    """
    options = {**_TIMEOUTS, "protocol": 2, **options}
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    client: Redis = Redis.from_url(url, **options)
    return client
