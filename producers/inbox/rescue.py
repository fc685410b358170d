"""Sends again the drains that were lost, with a worker or with a Redis that came back older.

Each drain and each wake message asks whether it is to do that (claim_rescue.lua): one of them does,
every five seconds. Its work grows with the inboxes that wait, not with all that there are: their
organizations are in a set, which the scripts keep (docs/concepts/inbox-protocol.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Final, cast
from uuid import UUID, uuid4

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import RedisError

from producers.contract.channels import inbox_key
from producers.inbox.drain_message import QUEUE, organization_of
from producers.inbox.protocol import WAITING, Inbox, repair_keys
from producers.inbox.script_calls import run_script, script_source

logger = logging.getLogger(__name__)

_MAX_MEMBER_BYTES: Final = 200
"""A member of the set that is an organization takes about half of that, with its overhead."""
_MAX_INBOXES: Final = 10_000
"""Of more inboxes, each turn checks a random sample, so that no turn takes long."""
_MAX_QUEUED: Final = 20_000
"""A longer queue is not read: nothing is sent while it is as long as the set of those that wait."""
_MAX_QUEUED_BYTES: Final = 1024
"""A drain message takes half of that, with its overhead."""


def claim_rescue(redis: Redis) -> bool:
    """Return whether the caller is to look for lost drains now."""
    return bool(run_script(redis, "claim_rescue", [], [str(uuid4())]))


def rescue(redis: Redis, lease_ms: int) -> None:
    """Send a drain for every inbox in which messages wait and none is queued or running.

    In a long queue, a drain waits for longer than its lease lives. So what is in the queue counts,
    too, and it does not grow by drains that it has already.
    """
    repair_keys(redis)
    if _is_too_large(redis):
        logger.error("the set of waiting inboxes has members that are too large: it is rebuilt")
        redis.unlink(WAITING)
        rebuild_waiting(redis, lease_ms)
        return
    names = {
        name: _organization_id(name)
        for name in cast("list[bytes]", redis.srandmember(WAITING, _MAX_INBOXES))
    }
    if strange := [name for name, found in names.items() if found is None]:
        redis.srem(WAITING, *strange)
    length, size = redis.llen(QUEUE), redis.memory_usage(QUEUE, samples=0) or 0
    if length <= _MAX_QUEUED and size <= (length + 1) * _MAX_QUEUED_BYTES:
        for message in cast("list[bytes]", redis.lrange(QUEUE, 0, -1)):
            names.pop(organization_of(message) or b"", None)
    elif length >= redis.scard(WAITING):
        return
    sent = rescue_some(redis, [found for found in names.values() if found], lease_ms)
    if sent:
        logger.info("sent lost drain messages again", extra={"inboxes": len(sent)})


def _is_too_large(redis: Redis) -> bool:
    """Return whether the set has members that are no organizations, too large to be read."""
    size = redis.memory_usage(WAITING, samples=0) or 0
    return size > 1024 * 1024 + redis.scard(WAITING) * _MAX_MEMBER_BYTES


def rescue_some(redis: Redis, organization_ids: Iterable[UUID], lease_ms: int) -> list[UUID]:
    """Send a drain for each of these organizations that needs one; return for which one was sent.

    It brings the set of those that wait up to date for them, too.
    """
    inboxes = {each: Inbox(redis, each, lease_ms=lease_ms) for each in organization_ids}
    script = Script(redis, script_source("rescue"))
    with redis.pipeline(transaction=False) as pipe:
        for inbox in inboxes.values():
            script(*inbox.rescue_arguments(str(uuid4())), client=pipe)
        answers = pipe.execute(raise_on_error=False)
    sent = []
    for (organization_id, inbox), answer in zip(inboxes.items(), answers, strict=True):
        if isinstance(answer, RedisError):  # as for a key of a wrong type: the others go on
            inbox.repair()
        elif answer:
            sent.append(organization_id)
    return sent


def rebuild_waiting(redis: Redis, lease_ms: int) -> None:
    """Look at every inbox: the set may have been lost, or a producer may not know it."""
    organization_ids = scan_organizations(redis, inbox_key)
    while some := list(islice(organization_ids, _MAX_INBOXES)):
        rescue_some(redis, some, lease_ms)


def scan_organizations(
    redis: Redis, key_of: Callable[[UUID], str], type: str | None = None
) -> Iterator[UUID]:
    """Yield every organization that has a key of this name, of any type or of one."""
    pattern = key_of(cast(UUID, "*"))
    for key in redis.scan_iter(match=pattern, count=1000, _type=type):
        if organization_id := _organization_id(key.partition(b"{")[2].partition(b"}")[0]):
            yield organization_id


def _organization_id(name: bytes) -> UUID | None:
    """Return the organization of this name; None if somebody else has written it."""
    with suppress(ValueError):
        organization_id = UUID(name.decode())
        if str(organization_id).encode() == name:
            return organization_id
    return None
