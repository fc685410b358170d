"""The messages on the Celery queue, in the form that kombu's Redis transport gives them.

Producers send drain messages without Celery, which takes half of the time of enqueuing a batch. The
form is Celery's message protocol, version 2
(https://docs.celeryq.dev/en/stable/internals/protocol.html), in the envelope of kombu's virtual
transports; a test compares it with what the installed Celery sends.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final
from uuid import UUID, uuid4

QUEUE: Final = "task-tags"
"""The Redis list, which has the name of the Celery queue in celeryconfig.py."""
DRAIN_TASK: Final = "task_tags.drain"
"""The Celery task that applies an inbox; its arguments are organization id and lease id."""
_MAX_BYTES: Final = 64 * 1024
"""A drain message has about 600."""


def drain_message(organization_id: UUID, lease_id: str) -> bytes:
    """Serialize a drain message, which the scripts of the inbox put on the queue."""
    return task_message(DRAIN_TASK, str(uuid4()), [str(organization_id), lease_id])


def organization_of(message: bytes) -> bytes | None:
    """Return the organization that a drain message names; None if it is anything else."""
    with suppress(Exception):  # it may be wrong in any way
        _, _, (organization_id, _) = read_task_message(message, {DRAIN_TASK: (2,)})
        return organization_id.encode()
    return None


def read_task_message(
    received: bytes, numbers_of_arguments: Mapping[str, tuple[int, ...]]
) -> tuple[str, str, list[str]]:
    """Return the Celery task's name, id and arguments, which are UUIDs, or raise any exception.

    Args:
        received: What a queue delivers.
        numbers_of_arguments: How many arguments each Celery task may have; others are refused.
    """
    if len(received) > _MAX_BYTES:
        raise ValueError(f"it is longer than {_MAX_BYTES} bytes")
    message = json.loads(received)
    headers, body = message["headers"], message["body"]
    task, id = headers["task"], headers["id"]
    if message["content-type"] != "application/json" or headers.get("compression"):
        raise ValueError("its body is not plain JSON")
    arguments, named, _ = json.loads(base64.b64decode(body))
    if not isinstance(id, str) or named != {} or len(arguments) not in numbers_of_arguments[task]:
        raise ValueError("its id or its arguments are wrong")
    return task, id, [str(UUID(each)) for each in arguments]


def task_message(task: str, id: str, arguments: Sequence[str]) -> bytes:
    """Serialize a task message."""
    body = json.dumps([arguments, {}, {}]).encode()
    message = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": id, "root_id": id},
        "properties": {
            "correlation_id": id,
            "delivery_tag": id,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }
    return json.dumps(message).encode()
