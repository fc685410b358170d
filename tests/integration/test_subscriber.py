"""The change feed: stored changes over HTTP, and every change once and in order by pub/sub."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from producers.client import TagProducer
from producers.contract.channels import changes_channel
from producers.contract.cursors import Cursor, microseconds
from producers.contract.messages import TagBatch, add, register_execution
from producers.contract.results import ChangeEvent, ResultRecord
from producers.errors import ChangesRefused, RevisionExpired, Unavailable
from producers.subscriber import Subscriber
from tests.support.servers import Servers
from tests.support.tenant import applied
from tests.support.waiting import eventually
from worker.db.repository import Repository


def batch(execution: UUID, tag: str, **fields: Any) -> TagBatch:
    return TagBatch(tags=[add(execution, "task", "type", tag, fields.pop("metadata", None))])


def read(http: httpx.Client, execution: UUID, **query: Any) -> httpx.Response:
    return http.get("/task-tags/changes", params={"flow_execution_id": str(execution), **query})


def revisions(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [event["revision"] for event in response.json()]


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.fixture
def changed(repository: Repository, organization: UUID) -> UUID:
    """An execution with five changes, stored but not published."""
    execution = uuid4()
    tags = [batch(execution, f"{number}") for number in range(5)]
    applied(repository, organization, register_execution(execution), *tags)
    return execution


# --- Over HTTP -----------------------------------------------------------------------------------


def test_stored_changes_are_read_in_order_from_any_revision(
    http: httpx.Client, changed: UUID
) -> None:
    """Pages follow one another by the last revision; after the last one there is nothing."""
    assert revisions(read(http, changed)) == [1, 2, 3, 4, 5]
    assert revisions(read(http, changed, after=2)) == [3, 4, 5]
    assert revisions(read(http, changed, after=1, limit=2)) == [2, 3]
    assert revisions(read(http, changed, after=5)) == []


def test_what_is_stored_is_what_was_published(
    servers: Servers, http: httpx.Client, producer: TagProducer, organization: UUID
) -> None:
    """The audit trail: who changed what, when, in which batch."""
    execution = uuid4()
    producer.register(execution)
    redis: Any = producer._enqueuer.redis
    with redis.pubsub() as pubsub:
        pubsub.subscribe(changes_channel(organization, execution))
        eventually(lambda: pubsub.get_message(timeout=1))
        record = producer.apply(batch(execution, "x", metadata={"b": 1e300, "a": "é"}))
        published = eventually(lambda: pubsub.get_message(timeout=1))["data"]
    (event,) = read(http, execution).json()
    assert event == json.loads(published)
    assert (event["batch_id"], event["changed_by"]) == (str(record.batch_id), "ada")


def test_unknown_and_foreign_executions_are_answered_alike(
    servers: Servers, http: httpx.Client, changed: UUID
) -> None:
    """Also here another organization's execution does not exist."""
    token = servers.token(uuid4())
    foreign = read_as(servers, token, changed)
    unknown = read(http, uuid4())
    assert code(foreign) == code(unknown) == (404, "not_found")
    assert foreign.json()["error"] == unknown.json()["error"]


def read_as(servers: Servers, token: str, execution: UUID) -> httpx.Response:
    return httpx.get(
        f"{servers.stack.endpoint_url}/task-tags/changes",
        params={"flow_execution_id": str(execution)},
        headers={"Authorization": f"Bearer {token}"},
    )


@pytest.mark.parametrize(
    "query",
    [
        {"after": -1},
        {"after": "abc"},
        {"after": "1.0"},
        {"after": "+1"},
        {"after": ""},
        {"after": 10**30},
        {"after": 6},
        {"limit": 0},
        {"limit": -1},
        {"limit": 1001},
        {"limit": 10**9},
        {"limit": "abc"},
        {"unknown": 1},
        {"after": [1, 1]},
    ],
)
def test_wrong_parameters_are_refused(
    http: httpx.Client, changed: UUID, query: dict[str, Any]
) -> None:
    """Each by its name; a revision that the execution has not reached is wrong as well."""
    response = read(http, changed, **query)
    assert code(response) == (400, "bad_request")
    (detail,) = response.json()["error"]["details"]
    assert detail["field"] == next(iter(query))


def test_purged_changes_are_gone(
    http: httpx.Client, repository: Repository, organization: UUID, changed: UUID
) -> None:
    """410 for a reader that would miss some; one that has seen them can continue."""
    eventually(lambda: repository.purge_changes(organization, timedelta(0)) == 4)
    assert code(read(http, changed, after=3)) == (410, "gone")
    assert revisions(read(http, changed, after=4)) == [5]  # the organization's last one stays
    applied(repository, organization, batch(changed, "new"))
    assert revisions(read(http, changed, after=5)) == [6]
    assert code(read(http, changed, after=3)) == (410, "gone")


def test_an_answer_ends_after_a_mebibyte_but_has_one_event(
    http: httpx.Client, repository: Repository, organization: UUID
) -> None:
    """However large events are, they come in pieces, and all of them come."""
    execution = uuid4()
    large = [
        TagBatch(
            tags=[add(execution, "task", f"{n}", f"{i}", "x" * 8000) for i in range(n * 60 % 101)]
        )
        for n in range(1, 5)
    ]
    applied(repository, organization, register_execution(execution), *large)
    seen: list[int] = []
    while page := revisions(read(http, execution, after=len(seen))):
        assert len(page) < 4
        seen += page
    assert seen == [1, 2, 3, 4]


# --- Following -----------------------------------------------------------------------------------


@pytest.fixture
def follow(servers: Servers, organization: UUID, token: str) -> Iterator[Any]:
    """Follow an execution in a thread; return the list that its events are added to."""
    subscribers: list[Subscriber] = []
    threads: list[threading.Thread] = []

    def begin(execution: UUID, after: int | str = 0, **changes: Any) -> list[ChangeEvent]:
        events: list[ChangeEvent] = []
        arguments: dict[str, Any] = {
            "redis_url": servers.stack.redis_url,
            "organization_id": organization,
            "endpoint_url": servers.stack.endpoint_url,
            "token": token,
        }
        subscriber = Subscriber(**(arguments | changes))

        def collect() -> None:
            for event in subscriber.changes(execution, after):
                events.append(event)

        subscribers.append(subscriber)
        threads.append(threading.Thread(target=collect))
        threads[-1].start()
        return events

    yield begin
    for subscriber in subscribers:
        subscriber.close()
    for thread in threads:
        thread.join()


def revisions_of(events: Sequence[ChangeEvent]) -> list[int]:
    return [event.revision for event in events]


def test_a_watcher_gets_what_was_before_and_what_comes(
    follow: Any, producer: TagProducer, changed: UUID
) -> None:
    """From the revision it has seen, without a gap between stored and published events."""
    events = follow(changed, after=2)
    eventually(lambda: len(events) == 3)
    for number in range(20):
        producer.enqueue(batch(changed, f"live {number}"))
    eventually(lambda: len(events) == 23)
    assert revisions_of(events) == list(range(3, 26))
    assert events[17].place == str(Cursor(20, microseconds(events[17].changed_at)))
    again = follow(changed, after=events[17].place)
    eventually(lambda: len(again) == 5)
    assert again == events[18:]


def test_what_was_not_published_is_repaired_by_the_next_event(
    follow: Any, producer: TagProducer, repository: Repository, organization: UUID, changed: UUID
) -> None:
    """A lost event comes before the one behind it."""
    events = follow(changed)
    eventually(lambda: len(events) == 5)
    applied(repository, organization, batch(changed, "lost"))
    producer.apply(batch(changed, "published"))
    eventually(lambda: len(events) == 7)
    assert revisions_of(events) == list(range(1, 8))


def test_a_lost_connection_loses_no_change(
    follow: Any,
    producer: TagProducer,
    repository: Repository,
    organization: UUID,
    changed: UUID,
    redis: Any,
) -> None:
    """After a new subscription of the endpoint, missed events are there, and old ones are not."""
    events = follow(changed)
    eventually(lambda: len(events) == 5)
    applied(repository, organization, batch(changed, "while it was away"))
    redis.client_kill_filter(_type="pubsub")
    eventually(lambda: len(events) == 6)
    channel = changes_channel(organization, changed)
    redis.publish(channel, events[2].encode())
    redis.publish(channel, b"no event")
    producer.apply(batch(changed, "next"))
    eventually(lambda: len(events) == 7)
    assert revisions_of(events) == list(range(1, 8))


def test_asyncio_follows_as_well(
    servers: Servers, organization: UUID, token: str, changed: UUID
) -> None:
    """The same events, for `async for`; a function gives the token for each request."""
    asked: list[str] = []

    def give_token() -> str:
        asked.append(token)
        return f"{token}\n"

    async def main() -> list[int]:
        async with Subscriber(
            redis_url=servers.stack.redis_url,
            organization_id=organization,
            endpoint_url=servers.stack.endpoint_url,
            token=give_token,
        ) as subscriber:
            seen: list[int] = []
            async for event in subscriber.achanges(changed, after=1):
                seen.append(event.revision)
                if len(seen) == 4:
                    return seen
        return []

    assert asyncio.run(main()) == [2, 3, 4, 5]
    assert asked


def test_a_subscriber_says_when_it_is_subscribed(
    servers: Servers, organization: UUID, token: str, producer: TagProducer, redis: Any
) -> None:
    """At first and after a lost connection: a result that is published from then on arrives."""
    subscribed = threading.Semaphore(0)
    found: list[ResultRecord] = []
    with Subscriber(redis_url=servers.stack.redis_url, organization_id=organization) as subscriber:

        def collect() -> None:
            found.extend(subscriber.results("mine", on_subscribed=subscribed.release))

        thread = threading.Thread(target=collect)
        thread.start()
        for number in (1, 2):
            assert subscribed.acquire(timeout=30)
            message = register_execution(uuid4()).model_copy(update={"reply_to": "mine"})
            producer.enqueue(message)
            eventually(lambda: len(found) == number)  # noqa: B023
            redis.client_kill_filter(_type="pubsub")
    thread.join()


def test_what_can_not_be_followed_is_a_clear_error(
    servers: Servers, organization: UUID, token: str, repository: Repository, changed: UUID
) -> None:
    """A wrong token, execution or revision, purged changes, an endpoint that is away."""

    def first(after: int = 0, execution: UUID = changed, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "redis_url": servers.stack.redis_url,
            "organization_id": organization,
            "endpoint_url": servers.stack.endpoint_url,
            "token": token,
        }
        with Subscriber(**(arguments | changes)) as subscriber:
            return next(iter(subscriber.changes(execution, after)))

    assert first().revision == 1
    with pytest.raises(ChangesRefused, match="token"):
        first(token="garbage")
    with pytest.raises(ChangesRefused, match="execution is unknown"):
        first(execution=uuid4())
    with pytest.raises(ChangesRefused, match="beyond the last revision"):
        first(after=99)
    with pytest.raises(Unavailable, match="endpoint"):
        first(endpoint_url="http://127.0.0.1:1")
    eventually(lambda: repository.purge_changes(organization, timedelta(0)) == 4)
    with pytest.raises(RevisionExpired):
        first()
