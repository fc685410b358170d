"""The Celery tasks: drain, wake, purge. Each gets its resources and calls the module that works."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from uuid import UUID, uuid4

import psycopg
from celery.worker import state
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from producers.inbox.drain_message import DRAIN_TASK, QUEUE, task_message
from producers.inbox.protocol import Inbox
from producers.inbox.rescue import claim_rescue, rebuild_waiting, rescue
from producers.redis_client import open_redis
from worker.auth import Authorizer
from worker.broker import PURGE_TASK, WAKE_TASK, drains_among, next_drain
from worker.celery import app, settings
from worker.db.repository import Repository
from worker.db.time_limit import TimeLimit
from worker.drain.path import Drain
from worker.drain.together import drain_all
from worker.log import log_limited

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """What the Celery tasks of one process share; made at the first one, so never before a fork."""

    redis: Redis
    repository: Repository
    authorizer: Authorizer


@cache
def _resources() -> WorkerResources:
    # No wait is longer than this after SIGTERM; a step that is repeated does no harm.
    no_retry = Retry(NoBackoff(), 0)
    redis = open_redis(settings.redis_url.get_secret_value(), socket_timeout=3, retry=no_retry)
    time_limit = TimeLimit(settings.transaction_seconds, _stopping)
    repository = Repository(settings.database_url.get_secret_value(), time_limit)
    return WorkerResources(redis, repository, Authorizer(settings))


@app.task(name=DRAIN_TASK)
def drain(organization_id: str, _: str) -> None:
    """Apply what waits in an organization's inbox, and then in those whose drains come next.

    Celery takes longer for a message than a small drain for its work. So a worker takes drain
    messages itself until its budget is used up; then Celery has its turn, which answers remote
    control and ends the process.
    """
    resources, deadline = _resources(), time.monotonic() + settings.drain_budget_seconds
    organization: UUID | None = UUID(organization_id)
    while organization is not None:
        first = _drain(resources, organization, deadline)
        drain_all(
            first,
            lambda messages: [
                _drain(resources, other, deadline)
                for other in drains_among(resources.redis, messages)
            ],
        )
        organization = next_drain(resources.redis, deadline, _stopping)


def _drain(resources: WorkerResources, organization_id: UUID, deadline: float) -> Drain:
    run = str(uuid4())
    logger.debug("drain", extra={"organization": str(organization_id), "run": run})
    return Drain(
        inbox=Inbox(resources.redis, organization_id, lease_ms=settings.lease_ms),
        organization_id=organization_id,
        run_id=run,
        repository=resources.repository,
        authorizer=resources.authorizer,
        rescue=lambda: rescue(resources.redis, settings.lease_ms),
        group_size=settings.group_size,
        budget_seconds=max(0, deadline - time.monotonic()),
        stopping=_stopping,
    )


@app.task(name=WAKE_TASK)
def wake() -> None:
    """Do what a drain does when it begins: look for drains that were lost, if nobody just did."""
    redis = _resources().redis
    try:
        if claim_rescue(redis):
            rescue(redis, settings.lease_ms)
    except RedisError:  # it may no longer be the right server: the next step connects again
        redis.connection_pool.disconnect(inuse_connections=False)
        raise


@app.task(name=PURGE_TASK)
def purge(after: str | None = None) -> None:
    """Delete results and changes beyond their retention, of the organizations after an id.

    A purge goes to the end of the Celery queue when its time is up, as a drain does, and goes on
    where it ended. What fails for an organization, or for their list, is tried again an hour later.

    Beat sends it hourly, and an hour is also how long an inbox may be missing in the set of those
    that wait.
    """
    resources, last = _resources(), UUID(int=0) if after is None else UUID(after)
    if after is None:
        rebuild_waiting(resources.redis, settings.lease_ms)
    deadline = time.monotonic() + settings.drain_budget_seconds

    def is_over() -> bool:
        return time.monotonic() > deadline or _stopping()

    while organizations := _list_organizations(resources.repository, last):
        for organization_id in organizations:
            is_done = True
            try:
                is_done = _purge_organization(resources.repository, organization_id, is_over)
            except psycopg.Error as error:
                extra = {"organization": str(organization_id), "error": type(error).__name__}
                logger.warning("an organization could not be purged", extra=extra)
            if is_done:
                last = organization_id
            if is_over():
                again = task_message(PURGE_TASK, str(uuid4()), [str(last)])
                resources.redis.lpush(QUEUE, again)
                return
    logger.info("purged")


def _list_organizations(repository: Repository, after: UUID) -> list[UUID]:
    """Return the next organizations; the server may be starting again, so it is tried 3 times."""
    for pause in (1.0, 2.0):
        try:
            return repository.organizations(after)
        except psycopg.Error as error:
            log_limited("organizations can't be listed; retrying", error=type(error).__name__)
            if not _stopping():
                time.sleep(pause)
            if _stopping():
                raise
    return repository.organizations(after)


def _purge_organization(
    repository: Repository, organization_id: UUID, is_over: Callable[[], bool]
) -> bool:
    """Delete what is beyond its retention, until the time is up; return whether that is all."""
    retentions = (
        (repository.purge_results, settings.retention),
        (repository.purge_changes, settings.changes_retention),
    )
    deleted, is_done = 0, True
    for purge_some, retention in retentions:
        while (
            is_done and retention is not None and (some := purge_some(organization_id, retention))
        ):
            deleted += some
            is_done = not is_over()
    if deleted:
        logger.info("purged", extra={"organization": str(organization_id), "rows": deleted})
    return is_done


def _stopping() -> bool:
    """Return whether this process is to end: the state that Celery's own consumer looks at."""
    values = (state.should_stop, state.should_terminate)
    return any(value is not None and value is not False for value in values)  # 0 is an exit code
