"""The SDK's readers: all pages of work lists and tags, and what the endpoint refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from producers import work_list
from producers.client import TagProducer
from producers.contract.messages import (
    RegisterExecution,
    TagBatch,
    add,
    register_execution,
    set_task_state,
)
from producers.errors import ChangesRefused, ConfigurationError, RevisionExpired, Unavailable
from producers.subscriber import Subscriber
from producers.tag_reader import AsyncTagReader, TagReader
from tests.support.servers import Servers
from tests.support.tenant import applied
from worker.db.repository import Repository

PENDING = ("review_status", "pending")


@pytest.fixture
def reader(servers: Servers, token: str) -> Iterator[TagReader]:
    with TagReader(endpoint_url=servers.stack.endpoint_url, token=token) as reader:
        yield reader


@pytest.fixture
def execution(repository: Repository, organization: UUID) -> UUID:
    """One of a flow, with 250 tasks that wait, and one that does not."""
    execution = uuid4()
    messages: list[Any] = [RegisterExecution(flow_execution_id=execution, flow_id="flow")]
    for start in range(0, 250, 50):
        numbers = range(start, start + 50)
        tags = [add(execution, f"{n:03}", *PENDING, {"n": n}) for n in numbers]
        messages.append(TagBatch(tags=tags))
    messages.append(TagBatch(tags=[add(execution, "other:1", "a:b\\", "c:d")]))
    messages.append(set_task_state(execution, "007", "awaiting_input"))
    applied(repository, organization, *messages)
    return execution


def test_a_work_list_is_read_to_its_end(reader: TagReader, execution: UUID) -> None:
    """Over three pages, in order, each task with its types."""
    found = list(reader.work_list([PENDING]))
    assert [task.task_name for task in found] == [f"{n:03}" for n in range(250)]
    task = found[7]
    assert (task.flow_id, task.flow_execution_id, task.state) == (
        "flow",
        execution,
        "awaiting_input",
    )
    assert task.waiting_since == task.tags[0].created_at
    assert (task.tags[0].tag_metadata, task.tags_next, task.state_changed_by) == (
        {"n": 7},
        None,
        "ada",
    )
    assert found[8].state is None


def test_selectors_are_pairs_that_the_sdk_escapes(reader: TagReader, execution: UUID) -> None:
    """None stands for any tag of a type; filters are one word or several."""

    def names(*arguments: Any, **filters: Any) -> list[str]:
        return [task.task_name for task in reader.work_list(*arguments, **filters)]

    assert names([("a:b\\", "c:d")]) == ["other:1"]
    assert names([PENDING, ("a:b\\", None)]) == []
    assert len(names([PENDING], [("a:b\\", None)])) == 250
    assert names(flow_execution_id=execution, without=[PENDING]) == ["other:1"]
    assert names([PENDING], state="awaiting_input", flow_id="flow") == ["007"]
    assert names([PENDING], state=["awaiting_input", "failed"]) == ["007"]
    assert names([PENDING], task_name="009", flow_execution_id=str(execution)) == ["009"]
    assert names([PENDING], flow_id="none") == []


def test_tags_are_read_to_their_end(reader: TagReader, execution: UUID) -> None:
    """All, or those that match."""
    found = list(reader.list_tags(execution))
    assert [tag.task_name for tag in found] == [*(f"{n:03}" for n in range(250)), "other:1"]
    assert [tag.tag for tag in reader.list_tags(execution, tag_type="a:b\\")] == ["c:d"]
    assert [tag.tag for tag in reader.list_tags(execution, tag=["c:d", "x"])] == ["c:d"]
    assert [tag.tag for tag in reader.list_tags(str(execution), task_name="007")] == ["pending"]


def test_asyncio_reads_the_same(
    servers: Servers, token: str, reader: TagReader, execution: UUID
) -> None:
    """Both lists, with the same arguments."""

    async def main() -> None:
        options: Any = {"endpoint_url": servers.stack.endpoint_url, "token": lambda: token}
        async with AsyncTagReader(**options) as asynchronous:
            tasks = [task async for task in asynchronous.work_list([PENDING])]
            assert tasks == list(reader.work_list([PENDING]))
            tags = [tag async for tag in asynchronous.list_tags(execution, tag_type="a:b\\")]
            assert tags == list(reader.list_tags(execution, tag_type="a:b\\"))
            with pytest.raises(ChangesRefused, match="unknown"):
                await anext(aiter(asynchronous.list_tags(uuid4())))

    asyncio.run(main())


def test_errors_say_whether_to_try_again(
    servers: Servers, reader: TagReader, execution: UUID
) -> None:
    """Refused for good, unavailable, or a setting that is missing."""
    refused: list[tuple[Callable[[], Iterator[object]], str]] = [
        (lambda: reader.work_list([("review_status", None)]), "the first must be type:tag"),
        (lambda: reader.work_list(), "flow_execution_id"),
        (lambda: reader.work_list(flow_execution_id=uuid4()), "unknown"),
        (lambda: reader.list_tags("x"), "must be a UUID"),
        (lambda: reader.list_tags(execution, tag=""), "must not be empty"),
    ]
    for texts in ("review_status:pending", ["review_status:pending"], ("review_status", "pending")):
        with pytest.raises(TypeError, match="pairs of type and tag"):
            reader.work_list(texts)  # type: ignore[arg-type]
    for ask, words in refused:
        with pytest.raises(ChangesRefused, match=words):
            next(ask())
    with TagReader(endpoint_url="http://127.0.0.1:1", token="t") as away:
        with pytest.raises(Unavailable):
            next(away.work_list([PENDING]))
    with TagReader(endpoint_url=servers.stack.endpoint_url, token="wrong") as stranger:
        with pytest.raises(ChangesRefused):
            next(stranger.work_list([PENDING]))
    with pytest.raises(ConfigurationError):
        TagReader(endpoint_url=servers.stack.endpoint_url)


def test_answers_of_later_versions_are_read() -> None:
    """Unknown fields are skipped, and unknown states are texts; what is no page is an error."""
    task: dict[str, Any] = {
        **dict.fromkeys(("flow_id", "state_changed_at", "state_changed_by", "waiting_since")),
        "flow_execution_id": str(uuid4()),
        "task_name": "t",
        "state": "paused",
        "new": 1,
        "tags": [],
        "tags_next": None,
    }
    answer: Any = {"task_executions": [task], "cursor": "0", "next_page": None, "new": {}}

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=json.dumps(answer))

    with TagReader(endpoint_url="http://localhost", token="t") as reader:
        reader._client = httpx.Client(
            base_url="http://localhost", transport=httpx.MockTransport(respond)
        )
        (found,) = reader.work_list([PENDING])
        assert str(found.state) == "paused"
        answer = [task]
        with pytest.raises(Unavailable, match="is not a task tags endpoint"):
            next(reader.work_list([PENDING]))


def test_a_task_whose_execution_is_gone_has_left(servers: Servers, token: str) -> None:
    """After a restore, an event may name an execution that is unknown again."""

    async def main() -> object:
        async with AsyncTagReader(endpoint_url=servers.stack.endpoint_url, token=token) as reader:
            query = {"with": ["review_status:pending"]}
            return await work_list._task(reader._client, query, (uuid4(), "task"))

    assert asyncio.run(main()) == []


def test_a_work_list_is_followed(
    servers: Servers, token: str, reader: TagReader, producer: TagProducer
) -> None:
    """Tasks that come, change and leave, by events; of other executions and types nothing."""
    one, other = uuid4(), uuid4()
    for each in (one, other):
        producer.apply(register_execution(each))
    producer.batch().set(one, "first", *PENDING).set(one, "second", *PENDING).apply()
    upper = str(one).upper()  # any spelling of the id
    found = reader.work_list([PENDING], [("hold", None)], flow_execution_id=upper, follow=True)
    assert [next(found).task_name for _ in range(2)] == ["first", "second"]
    producer.batch().set(other, "first", *PENDING).apply()
    producer.batch().set(one, "third", *PENDING).apply()
    came = next(found)
    assert (came.task_name, came.waiting_since is None) == ("third", False)
    producer.apply(set_task_state(one, "first", "awaiting_input"))
    assert next(found).state == "awaiting_input"
    producer.batch().add(one, "second", "hold", "until monday").apply()
    left = next(found)
    assert (left.task_name, left.waiting_since, left.tags) == ("second", None, [])
    producer.batch().set(one, "first", "review_status", "approved").apply()
    left = next(found)
    assert (left.task_name, left.waiting_since) == ("first", None)
    producer.batch().remove(one, "second", "hold", "until monday").apply()
    assert next(found).task_name == "second"

    async def main() -> list[str]:
        url = servers.stack.endpoint_url
        async with AsyncTagReader(endpoint_url=url, token=token) as again:
            names = []
            async for task in again.work_list([PENDING], follow=True):
                names.append(task.task_name)
                if len(names) == 3:
                    break
            return names

    assert asyncio.run(main()) == ["second", "first", "third"]


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (200, Unavailable, "127.0.0.1 is not a task tags endpoint"),
        (429, Unavailable, "the endpoint answered 429"),
        (503, Unavailable, "the endpoint answered 503"),
        (404, ChangesRefused, "the endpoint answered 404"),
        (410, RevisionExpired, "the endpoint answered 410"),
    ],
)
def test_what_another_server_or_a_proxy_answers_is_a_clear_error(
    status: int, error: type[Exception], said: str, organization: UUID
) -> None:
    """A page in HTML, for whatever is asked; nobody waits for it to become something else."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>\n\nid: 1\n\n</html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "token": "t"}
        execution = uuid4()
        with (
            TagReader(**place) as reader,
            Subscriber(redis_url="redis://x", organization_id=organization, **place) as subscriber,
        ):
            asks: list[Callable[[], object]] = [
                lambda: next(reader.list_tags(execution)),
                lambda: next(reader.work_list([PENDING])),
                lambda: next(reader.work_list([PENDING], follow=True)),
                lambda: next(subscriber.changes(execution, after=0)),
                lambda: next(subscriber.organization_changes()),
                lambda: subscriber.wait_for(execution, "task", "type"),
            ]
            for ask in asks:
                with pytest.raises(error, match=said):
                    ask()
        server.shutdown()
