"""Drains that were lost are sent again: by one in five seconds, of those that wait, by no clock."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import TagProducer
from producers.contract.channels import inbox_key, lease_key
from producers.contract.messages import register_execution
from producers.inbox.drain_message import QUEUE, drain_message, organization_of, task_message
from producers.inbox.protocol import SHARED_KEYS, WAITING, Inbox, repair_keys
from producers.inbox.rescue import claim_rescue, rebuild_waiting, rescue
from tests.support.servers import Servers
from tests.support.tenant import Tenant, tagging
from tests.support.waiting import eventually
from worker.broker import WAKE_TASK

WAKE = "task-tags:wake"
LEASE_MS = 10_000


def waiting(redis: Any) -> set[bytes]:
    return set(redis.smembers(WAITING))


def lose_drain(redis: Any, organization: UUID) -> None:
    """Append a message whose drain message never arrives."""
    Inbox(redis, organization).append([tagging("a").encode()], "token", str(uuid4()))
    redis.delete(lease_key(organization))
    redis.delete(QUEUE)


def test_an_organization_is_in_the_set_while_messages_wait(tenant: Tenant) -> None:
    """The append into an empty inbox adds it; the script that finds the inbox empty removes it."""
    redis, name = tenant.redis, str(tenant.organization).encode()
    assert waiting(redis) == set()
    tenant.send(tagging("a"))
    assert waiting(redis) == {name}
    tenant.drain()
    assert waiting(redis) == set()


def test_what_works_on_an_inbox_adds_it(tenant: Tenant) -> None:
    """A producer of an older version does not: acquire, acknowledge and requeue make up for it."""
    redis, inbox, name = tenant.redis, tenant.inbox, str(tenant.organization).encode()
    tenant.send(tagging("a"), tagging("b"))
    redis.delete(WAITING)
    entries = inbox.acquire("run", max_messages=1).entries
    assert waiting(redis) == {name}
    redis.delete(WAITING)
    assert inbox.ack_and_publish("run", entries, [], max_messages=1).following()
    assert waiting(redis) == {name}
    redis.delete(WAITING)
    inbox.requeue("run")
    assert waiting(redis) == {name}


def test_a_drain_that_begins_rescues_others_once_in_five_seconds(
    tenant: Tenant, quiet_redis: Any
) -> None:
    """So no wake message has to overtake the drains in the queue."""
    redis, lost = quiet_redis, uuid4()
    lose_drain(redis, lost)
    rescues = 0

    def run_rescue() -> None:
        nonlocal rescues
        rescues += 1
        rescue(redis, LEASE_MS)

    redis.delete(WAKE)
    for _ in range(3):
        tenant.send(tagging("a"))
        redis.rpop(QUEUE)  # as a worker takes it
        tenant.drain(rescue=run_rescue)
    assert rescues == 1
    assert redis.get(lease_key(lost)).startswith(b"queued ")
    assert 0 < redis.pttl(WAKE) <= 5_000


@pytest.mark.parametrize("milliseconds", [None, 5_500, 3_600_000])
def test_a_claim_that_nobody_frees_is_free(quiet_redis: Any, milliseconds: int | None) -> None:
    """Without a time to live, or with a longer one, as after the server's clock was set back."""
    lose_drain(quiet_redis, uuid4())
    assert claim_rescue(quiet_redis)
    assert not claim_rescue(quiet_redis)
    quiet_redis.set(WAKE, "junk", px=milliseconds)
    assert claim_rescue(quiet_redis)


def test_a_long_queue_does_not_grow_by_drains_that_it_has(quiet_redis: Any) -> None:
    """Their leases have run out; the drain that is missing is sent, whatever else is there."""
    redis, organizations = quiet_redis, [uuid4() for _ in range(3)]
    for organization in organizations:
        lose_drain(redis, organization)
    queued = [drain_message(each, str(uuid4())) for each in organizations[1:] * 2]
    no_lease = drain_message(organizations[0], "x")  # workers drop it
    others = [task_message(WAKE_TASK, "x", []), b"junk", b'{"headers": []}', no_lease]
    redis.lpush(QUEUE, *queued, *others)
    rescue(redis, LEASE_MS)
    assert redis.llen(QUEUE) == len(queued) + len(others) + 1
    assert organization_of(redis.lindex(QUEUE, 0)) == str(organizations[0]).encode()
    rescue(redis, LEASE_MS)
    assert redis.llen(QUEUE) == len(queued) + len(others) + 1
    running = [uuid4() for _ in range(20)]
    redis.sadd(WAITING, *map(str, running))  # whose inboxes are empty here
    redis.delete(*map(lease_key, organizations))
    rescue(redis, LEASE_MS)
    assert redis.llen(QUEUE) == len(queued) + len(others) + 1


def test_a_queue_of_large_messages_is_not_read(quiet_redis: Any) -> None:
    """A producer who may push to it could fill a worker's memory."""
    lose_drain(quiet_redis, uuid4())
    quiet_redis.lpush(QUEUE, b"x" * 1_000_000)
    rescue(quiet_redis, LEASE_MS)
    assert quiet_redis.llen(QUEUE) == 1


def test_names_that_do_not_belong_in_the_set_are_taken_out(quiet_redis: Any) -> None:
    """Some that are no organization, and some whose inbox is empty or does not exist."""
    lost, empty = uuid4(), uuid4()
    lose_drain(quiet_redis, lost)
    strange = [b"x", b"\xff\x00", str(uuid4()).upper().encode(), b"", b"{}"]
    quiet_redis.sadd(WAITING, str(empty), *strange)
    rescue(quiet_redis, LEASE_MS)
    assert waiting(quiet_redis) == {str(lost).encode()}
    assert quiet_redis.llen(QUEUE) == 1


def test_the_set_is_rebuilt_from_the_inboxes(quiet_redis: Any) -> None:
    """When it was lost: at the start of a worker, and hourly."""
    lost = {uuid4() for _ in range(5)}
    for organization in lost:
        lose_drain(quiet_redis, organization)
    quiet_redis.xadd("task-tags:{somebody}:inbox", {"message": "x"})
    quiet_redis.delete(WAITING)
    rebuild_waiting(quiet_redis, LEASE_MS)
    assert waiting(quiet_redis) == {str(each).encode() for each in lost}
    assert quiet_redis.llen(QUEUE) == 5


def test_shared_keys_of_a_wrong_type_are_deleted(tenant: Tenant) -> None:
    """They hold nothing that could be lost: appends and drains go on at once."""
    for key in SHARED_KEYS:
        tenant.redis.delete(key)
        tenant.redis.hset(key, "a", "b")
        tenant.send(tagging(key))
        assert tenant.drain() == 1
    tenant.redis.delete(QUEUE)
    tenant.redis.hset(QUEUE, "a", "b")
    assert repair_keys(tenant.redis)
    assert not tenant.redis.exists(QUEUE)
    tenant.redis.set(WAITING, "x")  # which a confined producer can't mend
    rescue(tenant.redis, LEASE_MS)
    assert not tenant.redis.exists(WAITING)


def test_a_queue_of_a_wrong_type_is_mended_by_a_worker(
    servers: Servers, redis: Any, producer: TagProducer
) -> None:
    """Its BRPOP is refused with WRONGTYPE, and it goes on."""
    with redis.pipeline() as pipe:
        pipe.delete(QUEUE)
        pipe.set(QUEUE, "x")
        pipe.execute()
    eventually(lambda: redis.type(QUEUE) != b"string")
    assert producer.apply(register_execution(uuid4())).statuses == ["registered"]


def test_thousands_of_lost_drains_are_found_at_once(quiet_redis: Any) -> None:
    """As after a Redis that came back without its leases."""
    organizations = [uuid4() for _ in range(3_000)]
    with quiet_redis.pipeline(transaction=False) as pipe:
        for organization in organizations:
            pipe.xadd(inbox_key(organization), {"message": "x"})
            pipe.sadd(WAITING, str(organization))
        pipe.execute()
    rescue(quiet_redis, LEASE_MS)
    assert quiet_redis.llen(QUEUE) == 3_000


def test_members_that_are_too_large_are_not_read(quiet_redis: Any, organization: UUID) -> None:
    """A user who may add to the set can neither fill a worker's memory nor hide an inbox."""
    redis = quiet_redis
    lose_drain(redis, organization)
    for number in range(30):
        redis.sadd(WAITING, *(b"%d-%d-" % (number, each) + b"x" * 100_000 for each in range(10)))
    rescue(redis, LEASE_MS)
    assert waiting(redis) == {str(organization).encode()}
    assert redis.llen(QUEUE) == 1
