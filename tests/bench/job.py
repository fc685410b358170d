"""The job that peers do for a message: the product's rules and SQL, one transaction a batch.

Each thread has its own connections, made at its first job, so never before a fork.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime, timezone
from uuid import UUID

from redis import Redis

from producers.contract.values import Uuid7
from producers.inbox.protocol import StreamEntry
from producers.redis_client import open_redis
from tests.bench import collector
from worker.auth import Authorizer
from worker.db.repository import Repository
from worker.drain.admission import Admitted, Refused, admit
from worker.drain.application import apply_in_transaction
from worker.drain.blame import is_server_fault
from worker.drain.path import FIRST_BACKOFF_SECONDS, publications
from worker.settings import Settings, load_settings
from worker.snapshot import AuthorizedMessage, Outcome

_freeze = threading.Lock()


class Tools:
    """What the jobs of one thread share."""

    def __init__(self) -> None:
        settings: Settings = load_settings()
        self.redis: Redis = open_redis(settings.redis_url.get_secret_value())
        self.repository = Repository(settings.database_url.get_secret_value())
        self.authorizer = Authorizer(settings)
        self.new_id = Uuid7()
        freeze()


def freeze() -> None:
    """Freeze what exists at the start, once in each process, as the product does."""
    if _freeze.acquire(blocking=False):  # it is never released
        collector.freeze()


class _Lazy(threading.local):
    tools: Tools | None = None


_lazy = _Lazy()


def _tools() -> Tools:
    if _lazy.tools is None:
        _lazy.tools = Tools()
    return _lazy.tools


def apply_batch(message: bytes, token: str, organization_id: UUID) -> None:
    """Check one message, apply it in one transaction and publish what came of it."""
    tools = _tools()
    now = datetime.now(timezone.utc)
    entry = StreamEntry(f"{time.time_ns() // 1_000_000}-0".encode(), message, token.encode())
    match admit(entry, organization_id, tools.authorizer, now):
        case Admitted(message=authorized) as admitted:
            outcome = _apply(tools, organization_id, authorized)
            publish(tools.redis, organization_id, admitted.reply_to, outcome)
        case Refused(reply_to=reply_to, record=record):
            publish(tools.redis, organization_id, reply_to, Outcome(record))


def publish(redis: Redis, organization_id: UUID, reply_to: str, outcome: Outcome) -> None:
    """Publish change events and the result, in one round trip."""
    pipeline = redis.pipeline(transaction=False)
    for channel, payload in publications(organization_id, reply_to, outcome):
        pipeline.publish(channel, payload)
    pipeline.execute()


def _apply(tools: Tools, organization_id: UUID, authorized: AuthorizedMessage) -> Outcome:
    """Apply a request; what may pass (a lost connection) is tried again, as a drain does it."""
    while True:
        try:
            (outcome,), _ = apply_in_transaction(
                tools.repository, organization_id, [authorized], tools.new_id
            )
        except Exception as error:
            if not is_server_fault(error):
                raise
            time.sleep(FIRST_BACKOFF_SECONDS)
        else:
            return outcome
