"""What Celery sees: drain, wake, purge. Each only fetches its tools and calls the room that does the work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from uuid import UUID, uuid4

from celery.worker import state
from redis import Redis

from producers.contract.values import Uuid7
from producers.inbox.drain_message import DRAIN_TASK, send_drain
from producers.inbox.protocol import Inbox, claim_idle, scan_inboxes
from producers.redis_client import open_redis
from worker.auth import Authorizer
from worker.broker import PURGE_TASK, WAKE_TASK
from worker.celery import app, settings
from worker.db.repository import Repository
from worker.drain.path import Drain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """What the tasks of one process share; made at the first task, so never before a fork."""

    redis: Redis
    repository: Repository
    authorizer: Authorizer
    new_id: Uuid7


@cache
def _tools() -> WorkerResources:
    redis = open_redis(settings.redis_url.get_secret_value())
    repository = Repository(settings.database_url.get_secret_value())
    return WorkerResources(redis, repository, Authorizer(settings), Uuid7())


@app.task(name=DRAIN_TASK)
def drain(organization_id: str, lease_id: str) -> None:
    """Apply what waits in an organization's inbox."""
    organization, lease = UUID(organization_id), UUID(lease_id)
    run = str(uuid4())
    logger.debug("drain", extra={"lease": str(lease), "run": run})
    tools = _tools()
    Drain(
        inbox=Inbox(tools.redis, organization, lease_ms=settings.lease_ms),
        organization_id=organization,
        run_id=run,
        repository=tools.repository,
        authorizer=tools.authorizer,
        requeue=lambda: send_drain(tools.redis, organization, run),
        group_size=settings.group_size,
        budget_seconds=settings.drain_budget_seconds,
        stopping=_stopping,
        new_id=tools.new_id,
    ).run()


@app.task(name=WAKE_TASK)
def wake() -> None:
    """Send a drain for every inbox where messages wait and nobody is on the way."""
    redis = _tools().redis
    organization_ids = list(scan_inboxes(redis))
    claims = claim_idle(redis, organization_ids, lambda: str(uuid4()), settings.lease_ms)
    for organization_id, lease_id in claims:
        send_drain(redis, organization_id, lease_id)
    if claims:
        logger.info("woke inboxes that were waiting", extra={"inboxes": len(claims)})


@app.task(name=PURGE_TASK)
def purge() -> None:
    """Forget results and changes older than their retention. Organizations are those that have an inbox."""
    tools = _tools()
    results = changes = 0
    for organization_id in scan_inboxes(tools.redis):
        results += tools.repository.purge_results(organization_id, settings.retention)
        if settings.changes_retention is not None:
            changes += tools.repository.purge_changes(organization_id, settings.changes_retention)
    logger.info("purged", extra={"results": results, "changes": changes})


def _stopping() -> bool:
    """Whether this process was told to end: the state that Celery's own consumer looks at."""
    return any(value not in (None, False) for value in (state.should_stop, state.should_terminate))
