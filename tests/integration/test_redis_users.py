"""docker/redis-users.acl on a real server: the SDK works with those rights, and has no others."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis.exceptions import NoPermissionError

from producers.client import TagProducer
from producers.contract.channels import (
    dead_letters_key,
    inbox_key,
    lease_key,
    position_key,
    results_channel,
)
from producers.contract.messages import TagBatch, add, register_execution
from producers.contract.results import ResultRecord
from producers.errors import Unavailable
from producers.redis_client import open_redis
from producers.subscriber import Subscriber
from tests.support.servers import Servers
from tests.support.waiting import eventually

ON_SHARED_KEYS = [
    *[("DEL", key) for key in ("task-tags", "task-tags:waiting", "task-tags:wake")],
    *[("SET", key, "x") for key in ("task-tags", "task-tags:waiting", "task-tags:wake")],
    ("GET", "task-tags:wake"),
    ("XADD", "task-tags", "*", "a", "b"),
    ("LRANGE", "task-tags", "0", "-1"),
    ("RPOP", "task-tags"),
    ("SREM", "task-tags:waiting", "x"),
    ("SMEMBERS", "task-tags:waiting"),
]
"""What neither a producer nor an endpoint may do."""
FILE = Path(__file__).parents[2] / "docker" / "redis-users.acl"
PLACEHOLDER = str(UUID(int=0))


@pytest.fixture
def urls(servers: Servers, redis: Any, organization: UUID) -> Iterator[dict[str, str]]:
    """URLs of the organization's producer and subscriber, and of an endpoint, as the file says."""
    made = {}
    for line in FILE.read_text().splitlines():
        if match := re.match(r"user ((producer|subscriber|endpoint)\S*) (.*)", line):
            user, kind, rules = (
                part.replace(PLACEHOLDER, str(organization)) for part in match.groups()
            )
            redis.execute_command("ACL", "SETUSER", user, "reset", *rules.split())
            password = f"{kind.upper()}_PASSWORD"
            made[kind] = servers.stack.redis_url.replace("unix://", f"unix://{user}:{password}@")
    yield made
    for kind in made:
        redis.acl_deluser(f"{kind}-{organization}", kind)


def test_a_confined_producer_can_do_its_work(
    urls: dict[str, str], organization: UUID, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Enqueue, send the drain, and receive the result."""
    with TagProducer(redis_url=urls["producer"], organization_id=organization, token=token) as it:
        assert it.apply(register_execution(uuid4())).flow_execution is not None
    assert "late" not in caplog.text  # the drain was sent, and beat did not have to help


@pytest.mark.parametrize("key_of", [inbox_key, lease_key])
def test_a_key_that_a_producer_may_not_repair_is_repaired_by_a_worker(
    urls: dict[str, str], organization: UUID, token: str, redis: Any, key_of: Any
) -> None:
    """At the next rescue, though no message could make the organization one that waits."""
    redis.lpush(key_of(organization), "x")

    def is_enqueued() -> bool:
        with suppress(Unavailable):
            producer.enqueue(register_execution(uuid4()))
            return True
        return False

    with TagProducer(
        redis_url=urls["producer"], organization_id=organization, token=token
    ) as producer:
        assert not is_enqueued()
        eventually(is_enqueued)


def test_it_can_do_nothing_to_another_organization(
    urls: dict[str, str], organization: UUID, token: str, redis: Any
) -> None:
    """Neither write to its inbox, nor listen, nor read what it has written itself."""
    other = uuid4()
    with TagProducer(redis_url=urls["producer"], organization_id=other, token=token) as it:
        with pytest.raises(Unavailable, match="NoPermissionError"):
            it.enqueue(register_execution(uuid4()))
    assert not redis.exists(inbox_key(other))
    with open_redis(urls["producer"]) as confined:
        client: Any = confined
        for command in (
            ("SUBSCRIBE", results_channel(other, "x")),
            ("PSUBSCRIBE", "*"),
            ("XRANGE", inbox_key(organization), "-", "+"),
            ("XREAD", "STREAMS", inbox_key(organization), "0"),
            ("XRANGE", dead_letters_key(organization), "-", "+"),
            ("DEL", "_kombu.binding.celery.pidbox"),
            ("PUBLISH", "/0.celery.pidbox", "{}"),
            ("PUBLISH", results_channel(organization, "x"), "{}"),
            *ON_SHARED_KEYS,
            ("RENAME", "task-tags", inbox_key(organization)),
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


def test_an_endpoint_can_write_to_all_and_listen_to_all(
    urls: dict[str, str], token: str, organization: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    """Its messages are applied, and it gets results; it cannot read inboxes or act as a worker."""
    with TagProducer(redis_url=urls["endpoint"], organization_id=organization, token=token) as it:
        assert it.apply(register_execution(uuid4())).statuses == ["registered"]
    assert "late" not in caplog.text
    with open_redis(urls["endpoint"]) as client:
        confined: Any = client
        confined.execute_command("XLEN", inbox_key(uuid4()))
        for command in (
            ("XRANGE", inbox_key(organization), "-", "+"),
            ("XRANGE", dead_letters_key(organization), "-", "+"),
            ("PUBLISH", results_channel(organization, "x"), "{}"),
            *ON_SHARED_KEYS,
            ("KEYS", "*"),
            ("FLUSHALL",),
        ):
            with pytest.raises(NoPermissionError):
                confined.execute_command(*command)


def test_a_subscriber_can_only_listen(
    urls: dict[str, str], organization: UUID, producer: TagProducer, redis: Any
) -> None:
    """To its own organization's channels."""
    message = register_execution(uuid4()).model_copy(update={"reply_to": "r"})
    url = urls["subscriber"]
    with Subscriber(redis_url=url, organization_id=organization) as subscriber:
        received: list[ResultRecord] = []
        thread = threading.Thread(
            target=lambda: received.append(next(subscriber.results("r"))), daemon=True
        )
        thread.start()
        channel = results_channel(organization, "r")
        eventually(lambda: redis.pubsub_numsub(channel)[0][1])
        producer.enqueue(message)
        thread.join(20)
        assert [record.batch_id for record in received] == [message.batch_id]

    with open_redis(url) as client:
        confined: Any = client
        for command in (("XLEN", inbox_key(organization)), ("LPUSH", "task-tags", "x")):
            with pytest.raises(NoPermissionError):
                confined.execute_command(*command)


def test_the_position_can_be_read(
    urls: dict[str, str], organization: UUID, producer: TagProducer
) -> None:
    """By the endpoint for all organizations, by a subscriber for its own; neither may write it."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    producer.apply(TagBatch(tags=[add(execution, "task", "type", "tag")]))
    key = position_key(organization)
    with open_redis(urls["endpoint"]) as endpoint, open_redis(urls["subscriber"]) as subscriber:
        found = subscriber.get(key)
        assert found is not None
        assert endpoint.mget([key, position_key(uuid4())]) == [found, None]
        with pytest.raises(NoPermissionError):
            subscriber.get(position_key(uuid4()))
        for client in (subscriber, endpoint):
            with pytest.raises(NoPermissionError):
                client.set(key, "9-abc")
