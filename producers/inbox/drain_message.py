"""The messages on the Celery queue, in the form that kombu's Redis transport gives them.

Producers send drain messages without Celery, which takes half of the time of enqueuing a batch. The
form is Celery's message protocol, version 2
(https://docs.celeryq.dev/en/stable/internals/protocol.html), in the envelope of kombu's virtual
transports; a test compares it with what the installed Celery sends.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Final
from uuid import UUID, uuid4

from redis import Redis

QUEUE: Final = "task-tags"
"""The Redis list, which has the name of the Celery queue in celeryconfig.py."""
DRAIN_TASK: Final = "task_tags.drain"
"""The Celery task that applies an inbox; its arguments are organization id and lease id."""


def send_drain(redis: Redis, organization_id: UUID, lease_id: str) -> None:
    """Put a drain message on the queue. Raises what redis-py raises."""
    send_task(redis, DRAIN_TASK, [str(organization_id), lease_id])


def send_task(redis: Redis, task: str, arguments: Sequence[str]) -> None:
    """Put a task message on the queue. Raises what redis-py raises."""
    redis.lpush(QUEUE, task_message(task, str(uuid4()), arguments))


def task_message(
    task: str, id: str, arguments: Sequence[str], *, expires: str | None = None
) -> bytes:
    """Serialize a task message. `expires`: when it is to be dropped, in ISO 8601."""
    body = json.dumps([arguments, {}, {}]).encode()
    message = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": id, "root_id": id, "expires": expires},
        "properties": {
            "correlation_id": id,
            "delivery_tag": id,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }
    return json.dumps(message).encode()
