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

QUEUE: Final = "task-tags"
"""The Redis list, which has the name of the Celery queue in celeryconfig.py."""
DRAIN_TASK: Final = "task_tags.drain"
"""The Celery task that applies an inbox; its arguments are organization id and lease id."""


def drain_message(organization_id: UUID, lease_id: str) -> bytes:
    """Serialize a drain message, which the scripts of the inbox put on the queue."""
    return task_message(DRAIN_TASK, str(uuid4()), [str(organization_id), lease_id])


def organization_of(message: bytes) -> bytes | None:
    """Return the organization that a drain message names; None if it is anything else."""
    try:
        fields = json.loads(message)
        if fields["headers"]["task"] == DRAIN_TASK:
            return bytes(json.loads(base64.b64decode(fields["body"]))[0][0], "ascii")
    except (ValueError, LookupError, TypeError, RecursionError):  # it may be wrong in any way
        pass
    return None


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
