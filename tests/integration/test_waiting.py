"""The SDK waits for tags, and follows the organization, across restarts of what it depends on."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import TagProducer
from producers.contract.channels import position_key
from producers.contract.cursors import Cursor
from producers.contract.messages import TagBatch, add, register_execution, remove, set_tag
from producers.contract.results import ChangeEvent, Tag
from producers.errors import ChangesRefused, RevisionExpired, Unavailable, WaitTimeout
from producers.subscriber import Subscriber
from tests.support.servers import Servers
from tests.support.waiting import eventually


@pytest.fixture
def execution(producer: TagProducer) -> UUID:
    execution = uuid4()
    producer.apply(register_execution(execution, flow_id="import"))
    return execution


@pytest.fixture
def arguments(servers: Servers, organization: UUID, token: str) -> dict[str, Any]:
    return {
        "redis_url": servers.stack.redis_url,
        "organization_id": organization,
        "endpoint_url": servers.stack.endpoint_url,
        "token": token,
    }


@pytest.fixture
def subscriber(arguments: dict[str, Any]) -> Any:
    with Subscriber(**arguments) as subscriber:
        yield subscriber


def reviewed(execution: UUID, tag: str, task: str = "task") -> TagBatch:
    return TagBatch(tags=[set_tag(execution, task, "review_status", tag)])


def waiting_for(subscriber: Subscriber, *arguments: Any) -> Future[Tag]:
    """Begin a wait; return when it has begun."""
    found: Future[Tag] = Future()

    def wait() -> None:
        try:
            found.set_result(subscriber.wait_for(*arguments))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    eventually(lambda: subscriber._waits is not None and subscriber._waits._client is not None)
    return found


def test_a_tag_that_is_there_is_returned_at_once(
    subscriber: Subscriber, producer: TagProducer, execution: UUID
) -> None:
    """By its name, or by its type alone; with all fields."""
    producer.apply(reviewed(execution, "approved"))
    tag = subscriber.wait_for(execution, "task", "review_status", "approved", 10)
    assert (tag.tag, tag.flow_execution_id, tag.status) == ("approved", execution, "active")
    assert subscriber.wait_for(execution, "task", "review_status") == tag


def test_a_wait_ends_with_the_tag_that_it_is_for(
    subscriber: Subscriber, producer: TagProducer, execution: UUID
) -> None:
    """Not with one of another name, type, task or execution, nor with one that is gone again."""
    other = uuid4()
    producer.apply(register_execution(other))
    waiting = waiting_for(subscriber, execution, "task", "review_status", "approved")
    passing = [f(execution, "task", "review_status", "approved") for f in (add, remove)]
    for batch in (
        reviewed(execution, "pending"),
        reviewed(execution, "approved", "another task"),
        reviewed(other, "approved"),
        TagBatch(tags=[set_tag(execution, "task", "type", "approved")]),
        TagBatch(tags=passing),
    ):
        producer.apply(batch)
    time.sleep(0.3)  # nothing may happen
    assert not waiting.done()
    producer.apply(reviewed(execution, "approved"))
    assert waiting.result(10).tag == "approved"
    eventually(lambda: subscriber._waits._client is None)


def test_an_execution_is_named_by_a_text_too(
    subscriber: Subscriber, producer: TagProducer, execution: UUID
) -> None:
    """As everywhere in the SDK: in any spelling of a UUID; another text is a clear error."""
    text, found = str(execution).upper(), Future[ChangeEvent]()
    subscribed = threading.Event()

    def receive() -> None:
        for event in subscriber.changes(text, on_subscribed=subscribed.set):
            found.set_result(event)
            break

    threading.Thread(target=receive, daemon=True).start()
    assert subscribed.wait(10)
    waiting = waiting_for(subscriber, text, "task", "review_status", "approved")
    producer.apply(reviewed(execution, "approved"))
    assert waiting.result(10).flow_execution_id == execution
    assert found.result(10).flow_execution_id == execution
    for call in (
        lambda: subscriber.wait_for("x", "task", "review_status"),
        lambda: next(subscriber.changes("x")),
        lambda: next(subscriber.changes("x", after=0)),
    ):
        with pytest.raises(ChangesRefused, match="flow_execution_id: must be a UUID"):
            call()


def test_a_time_out_says_what_was_there(
    subscriber: Subscriber, producer: TagProducer, execution: UUID
) -> None:
    """The active tags of the type on the task."""
    producer.apply(reviewed(execution, "pending"))
    with pytest.raises(
        WaitTimeout, match=r"within 0.3 s; active tags of its type: pending"
    ) as late:
        subscriber.wait_for(execution, "task", "review_status", "approved", 0.3)
    assert [tag.tag for tag in late.value.found] == ["pending"]
    with pytest.raises(WaitTimeout, match="none"):
        subscriber.wait_for(execution, "none", "review_status", timeout=0.3)


def test_a_wait_of_no_time_is_a_look(
    subscriber: Subscriber, producer: TagProducer, execution: UUID
) -> None:
    """It returns a tag that is active, and what is there instead otherwise."""
    producer.apply(reviewed(execution, "pending"))
    assert subscriber.wait_for(execution, "task", "review_status", timeout=0).tag == "pending"
    with pytest.raises(WaitTimeout, match="pending"):
        subscriber.wait_for(execution, "task", "review_status", "approved", timeout=0)


def test_what_can_not_be_waited_for_is_a_clear_error(
    arguments: dict[str, Any], servers: Servers, execution: UUID
) -> None:
    """An unknown execution, a token that may not read, an endpoint that is away."""
    named = execution, "task", "review_status"
    with Subscriber(**arguments) as subscriber:
        with pytest.raises(ChangesRefused, match="unknown"):
            subscriber.wait_for(uuid4(), "task", "review_status")
        for tag, words in (("x" * 300_000, "too long"), ("\udcff", "UTF-8"), ("", "not be empty")):
            with pytest.raises(ChangesRefused, match=words):
                subscriber.wait_for(*named, tag)
        for timeout in (-1, float("nan")):
            with pytest.raises(ValueError, match="0 or more"):
                subscriber.wait_for(*named, timeout=timeout)
        with pytest.raises(TypeError, match="must be a string, not int"):
            subscriber.wait_for(*named, 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="reply_to"):
            next(subscriber.results("a b"))
    with pytest.raises(RuntimeError, match="was closed"):
        subscriber.wait_for(*named)
    token = servers.token(arguments["organization_id"], "task-tags:write")
    with Subscriber(**arguments | {"token": token}) as subscriber:
        with pytest.raises(ChangesRefused, match="scope"):
            subscriber.wait_for(*named)
    with Subscriber(**arguments | {"endpoint_url": "http://127.0.0.1:1"}) as subscriber:
        with pytest.raises(Unavailable):
            subscriber.wait_for(*named)


def test_many_waits_share_one_stream(
    arguments: dict[str, Any], producer: TagProducer, organization: UUID
) -> None:
    """For asyncio: hundreds of waits on as many executions, each ends with its own approval."""
    executions = [uuid4() for _ in range(300)]
    producer.enqueue_many(register_execution(each) for each in executions)
    producer.apply(register_execution(uuid4()))

    async def main() -> list[Tag]:
        async with Subscriber(**arguments) as subscriber:
            waits = [
                asyncio.create_task(subscriber.await_for(each, "task", "review_status", "approved"))
                for each in executions
            ]
            await asyncio.sleep(0.5)  # some of the waits begin before their approvals, some behind
            await asyncio.to_thread(
                producer.enqueue_many, [reviewed(each, "approved") for each in executions]
            )
            return await asyncio.wait_for(asyncio.gather(*waits), 30)

    found = asyncio.run(main())
    assert [tag.flow_execution_id for tag in found] == executions


def test_all_changes_of_the_organization_are_followed(
    subscriber: Subscriber, producer: TagProducer, execution: UUID
) -> None:
    """From a cursor, with filters, and with the places that are reached."""
    other = uuid4()
    producer.apply(register_execution(other))
    for number in range(5):
        producer.apply(reviewed(execution, f"{number}"))
        producer.apply(reviewed(other, f"{number}"))
    events = first(subscriber.organization_changes(), 10)
    assert [event.position for event in events] == list(range(1, 11))
    later = first(subscriber.organization_changes(events[6].cursor or ""), 3)
    assert later == events[7:]
    reached: list[str] = []
    filtered = subscriber.organization_changes(flow_id=["import"], on_cursor=reached.append)
    assert first(filtered, 5) == events[::2]
    some = subscriber.organization_changes(tag=["1", "3"], tag_type=["review_status"])
    assert {event.revision for event in first(some, 8)} == {2, 3, 4, 5}  # added, and removed again
    assert Cursor.parse(reached[-1]).number == 9
    with pytest.raises(RevisionExpired) as expired:
        next(subscriber.organization_changes("3-abc"))
    assert expired.value.cursor == events[-1].cursor
    with pytest.raises(ChangesRefused, match="after"):
        next(subscriber.organization_changes("x"))


def first(events: Any, count: int) -> list[ChangeEvent]:
    return [next(events) for _ in range(count)]


def test_a_restore_ends_the_waits_that_it_makes_impossible_and_no_others(
    servers: Servers,
    redis: Any,
    subscriber: Subscriber,
    producer: TagProducer,
    organization: UUID,
    execution: UUID,
) -> None:
    """An execution that the restored database does not know is refused; others are waited for."""
    other = uuid4()
    producer.apply(register_execution(other))
    for tag in ("pending", "reviewed"):
        producer.apply(reviewed(execution, tag))
    gone = waiting_for(subscriber, other, "task", "review_status", "approved")
    goes_on = waiting_for(subscriber, execution, "task", "review_status", "approved")
    with servers.owner() as owner:
        of = {"o": organization, "e": other}
        owner.execute("delete from tag_changes where organization_id = %(o)s and position = 2", of)
        owner.execute("delete from flow_executions where flow_execution_id = %(e)s", of)
        owner.execute(
            "update organizations o set position = 1, changed_at = c.changed_at from tag_changes c "
            "where o.organization_id = %(o)s and c.organization_id = o.organization_id",
            of,
        )
    redis.delete(position_key(organization))  # else it is found after 30 s
    assert isinstance(gone.exception(20), ChangesRefused)
    assert not goes_on.done()
    producer.apply(reviewed(execution, "approved"))
    assert goes_on.result(20).tag == "approved"


def test_a_subscriber_that_is_closed_ends_its_waits(
    arguments: dict[str, Any], execution: UUID
) -> None:
    """And the iteration over all changes."""
    subscriber = Subscriber(**arguments)
    waiting = waiting_for(subscriber, execution, "task", "review_status")
    with ThreadPoolExecutor() as threads:
        following = threads.submit(list, subscriber.organization_changes("latest"))
        time.sleep(0.3)
        subscriber.close()
        assert following.result(5) == []
    assert isinstance(waiting.exception(5), CancelledError)
