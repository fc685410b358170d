"""Opens Redis and Celery from one URL; every process of the product does it here, with the same time-outs."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

from celery import Celery
from celery.app.defaults import NAMESPACES, flatten
from redis import Redis

DRAIN_TASK: Final = "task_tags.drain"
"""The Celery task that is sent to whoever got the lease, with the organization's id and the lease id."""
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


_CELERY_KEYS: Final = frozenset(name for name, _ in flatten(NAMESPACES))


class App(Celery):  # type: ignore[misc]
    """A Celery app whose broker is the product's Redis, whatever CELERY_BROKER_URL says.

    That variable, like a module named `celeryconfig`, may well be another application's: a flow runner often
    is one.
    """

    def __init__(self, name: str, redis_url: str, **options: Any) -> None:
        super().__init__(name, set_as_current=False, **options)
        self.config_from_object(_settings())
        self._broker_url = broker_url(redis_url)

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_read(url or self._broker_url, **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self._broker_url, **options)


def _settings() -> dict[str, Any]:
    """Return the settings of the celeryconfig.py that was installed with this package."""
    settings = runpy.run_path(str(Path(__file__).parent.parent / "celeryconfig.py"))
    return {name: value for name, value in settings.items() if name in _CELERY_KEYS}


def broker_url(redis_url: str) -> str:
    """Return the URL as Celery spells it: a socket is `redis+socket://` there."""
    if not redis_url.startswith("unix://"):
        return redis_url
    parts = urlsplit(redis_url)
    database = parse_qs(parts.query).get("db", ["0"])[0]
    user = f"{parts.netloc}" if parts.netloc else ""
    return f"redis+socket://{user}{parts.path}?virtual_host={database}"


def send_drain(app: Celery, organization_id: UUID, lease_id: str) -> None:
    """Put a drain message on the Celery queue: what `send_task` would put there, in half its time.

    Source: Celery's message protocol, version 2. Raises kombu's `OperationalError`, or what Redis raises.
    """
    id = str(uuid4())
    with app.producer_or_acquire() as producer:
        producer.publish(
            [[str(organization_id), lease_id], {}, {}],
            exchange="",
            routing_key=app.conf.task_default_queue,
            serializer="json",
            headers={"lang": "py", "task": DRAIN_TASK, "id": id, "root_id": id},
            correlation_id=id,
            retry=True,
            retry_policy=app.conf.task_publish_retry_policy,
        )
