"""The Celery queue: the task messages that are put on it, in the form that kombu's Redis transport gives them.

Producers send theirs without Celery, which took half of the time of sending a batch. Sources: Celery's message protocol,
version 2; kombu's transports `redis` and `virtual`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Final
from uuid import UUID, uuid4

from redis import Redis

QUEUE: Final = "task-tags"
"""The Redis list, and its name in celeryconfig.py."""
DRAIN_TASK: Final = "task_tags.drain"
"""The Celery task that is sent by whoever got the lease, with the organization's id and the lease id."""


def send_drain(redis: Redis, organization_id: UUID, lease_id: str) -> None:
    """Put a drain message on the queue. Raises what Redis raises."""
    arguments = [str(organization_id), lease_id]
    redis.lpush(QUEUE, task_message(DRAIN_TASK, str(uuid4()), arguments))


def task_message(
    task: str, id: str, arguments: Sequence[str], *, expires: str | None = None
) -> bytes:
    """Spell a task message out. `expires`: when it is to be dropped, in ISO 8601."""
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
