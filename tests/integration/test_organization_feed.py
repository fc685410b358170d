"""The feed of an organization: positions without a gap, filters, and places that a restore ends."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from redis import Redis
from websockets.sync.client import ClientConnection

from producers.contract.channels import position_key, positions_channel
from producers.contract.cursors import Cursor
from producers.contract.messages import TagBatch, add, register_execution, set_task_state
from producers.pubsub import PubSubMultiplexer
from producers.redis_client import open_async_redis
from tests.support.change_source import SECONDS, ChangeSource, nothing_more, refused
from tests.support.servers import Servers
from tests.support.tenant import applied
from tests.support.waiting import eventually
from worker.api import change_hub, feeds
from worker.api.errors import ApiError
from worker.api.params import AllFeedQuery
from worker.api.queries import Reader
from worker.auth import Principal
from worker.db.repository import Repository


@pytest.fixture
def source(
    servers: Servers, repository: Repository, redis: Redis, organization: UUID
) -> ChangeSource:
    return ChangeSource(servers, repository, redis, organization)


def frames(watching: ClientConnection) -> Iterator[dict[str, Any]]:
    while True:
        yield json.loads(watching.recv(SECONDS))


def positions(watching: ClientConnection, count: int) -> list[int]:
    """Return the positions of the next events; frames that are none are passed over."""
    found: list[int] = []
    for frame in frames(watching):
        if "position" in frame:
            found.append(frame["position"])
            if len(found) == count:
                break
    return found


def read(source: ChangeSource, **query: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {source.token}"}
    return httpx.get(source.url(None, **query), headers=headers)


def restore(source: ChangeSource, position: int, executions: dict[UUID, int]) -> None:
    """Set the database back to the state after some event, as a restore of a backup does."""
    with source.servers.owner() as owner:
        of = {"o": source.organization, "p": position}
        owner.execute(
            "delete from tag_changes where organization_id = %(o)s and position > %(p)s", of
        )
        owner.execute(
            "update organizations set position = %(p)s, changed_at = (select changed_at "
            "from tag_changes where organization_id = %(o)s and position = %(p)s) "
            "where organization_id = %(o)s",
            of,
        )
        for execution, revision in executions.items():
            owner.execute(
                "update flow_executions e set revision = %(r)s, changed_at = coalesce((select "
                "changed_at from tag_changes c where c.organization_id = e.organization_id and "
                "c.flow_execution_id = e.flow_execution_id and c.revision = %(r)s), created_at) "
                "where organization_id = %(o)s and flow_execution_id = %(e)s",
                {**of, "e": execution, "r": revision},
            )
            owner.execute(
                "delete from task_tags where organization_id = %(o)s and created_at > (select "
                "changed_at from organizations where organization_id = %(o)s)",
                of,
            )


# --- What is read and watched --------------------------------------------------------------------


def test_positions_count_the_events_of_all_executions(source: ChangeSource) -> None:
    """1, 2, 3 … in the order in which they took effect; revisions count in each execution."""
    one, two = source.execution(), source.execution()
    with source.watch(None) as watching:
        assert json.loads(watching.recv(SECONDS)) == {"cursor": "0", "caught_up": True}
        for execution in (one, two, two, one):
            source.change(execution)
        events = [json.loads(watching.recv(SECONDS)) for _ in range(4)]
        nothing_more(watching)
    assert [event["position"] for event in events] == [1, 2, 3, 4]
    assert [event["revision"] for event in events] == [1, 1, 2, 2]
    assert [UUID(event["flow_execution_id"]) for event in events] == [one, two, two, one]
    answer = read(source).json()
    assert answer == {"changes": events, "cursor": events[-1]["cursor"]}
    with source.watch(None, after=events[1]["cursor"]) as later:
        assert positions(later, 2) == [3, 4]
        last = json.loads(later.recv(SECONDS))
        assert last == {"cursor": events[-1]["cursor"], "caught_up": True}


def test_a_batch_over_executions_takes_a_position_for_each(source: ChangeSource) -> None:
    """In the order of its operations; a batch that is refused takes none."""
    executions = [source.execution() for _ in range(3)]
    tags = [add(each, "task", "type", "x") for each in reversed(executions)]
    applied(source.repository, source.organization, TagBatch(tags=tags))
    unknown = TagBatch(tags=[tags[0], add(uuid4(), "task", "type", "x")])
    applied(source.repository, source.organization, unknown)
    applied(
        source.repository, source.organization, set_task_state(executions[0], "task", "skipped")
    )
    events = read(source).json()["changes"]
    assert [event["position"] for event in events] == [1, 2, 3, 4]
    found = [UUID(event["flow_execution_id"]) for event in events]
    assert found == [*reversed(executions), executions[0]]


def test_pages_follow_cursors_and_links(source: ChangeSource) -> None:
    """With filters, a page may be empty, and its cursor passes over what does not match."""
    flows = {name: uuid4() for name in ("import", "export")}
    for flow_id, execution in flows.items():
        registration = register_execution(execution, flow_id=flow_id)
        applied(source.repository, source.organization, registration)
    for number in range(20):
        execution = flows["import" if number % 3 else "export"]
        source.change(execution, publish=False, tag_type="ab"[number % 2])
    everything = read(source).json()["changes"]
    assert {event["flow_id"] for event in everything} == set(flows)
    cases: list[dict[str, Any]] = [
        {},
        {"flow_id": "import"},
        {"flow_id": ["import", "export"], "tag_type": "b"},
        {"tag": ["3", "19"]},
        {"task_name": ["task", "other"], "flow_id": "export"},
        {"task_name": "other"},
    ]
    for query in cases:
        found, url = [], source.url(None, limit=7, **query)
        for _ in range(4):
            response = httpx.get(url, headers={"Authorization": f"Bearer {source.token}"})
            found += response.json()["changes"]
            if "next" not in response.links:
                break
            url = f"{source.servers.stack.endpoint_url}{response.links['next']['url']}"
        wanted = [each for each in everything if fits(each, query)]
        assert [each["position"] for each in found] == [each["position"] for each in wanted], query
        assert response.json()["cursor"] == everything[-1]["cursor"]


def fits(event: dict[str, Any], query: dict[str, Any]) -> bool:
    (change,) = event["changes"]
    of_event = {**change["tag"], "flow_id": event["flow_id"]}
    return all(
        of_event[name] in (values if isinstance(values, list) else [values])
        for name, values in query.items()
    )


def test_a_watcher_whose_filter_matches_nothing_is_told_how_far_it_is(
    source: ChangeSource,
) -> None:
    """Every 1,000 events that it passes over, and at the end."""
    execution = source.execution()
    batches = [TagBatch(tags=[add(execution, "task", "type", f"{n}")]) for n in range(1_100)]
    for first in range(0, len(batches), 100):
        applied(source.repository, source.organization, *batches[first : first + 100])
    with source.watch(None, tag_type="other") as watching:
        first_frame, second = (json.loads(watching.recv(SECONDS)) for _ in range(2))
        assert first_frame.keys() == {"cursor"}
        assert Cursor.parse(first_frame["cursor"]).number == 1_000
        assert second["caught_up"]
        assert Cursor.parse(second["cursor"]).number == 1_100
    with source.stream(None, tag_type="other", last=first_frame["cursor"]) as lines:
        found = [line for line in islice_until(lines, "data") if line]
    assert found[-3:-1] == [f"id: {second['cursor']}", "event: caught_up"]


def islice_until(lines: Iterator[str], start: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(start):
            return


def test_events_of_other_organizations_are_not_there(source: ChangeSource) -> None:
    """Nor do they take positions; a cursor of another organization leads nowhere."""
    execution = source.execution()
    source.change(execution)
    other = uuid4()
    applied(source.repository, other, register_execution(execution))
    applied(source.repository, other, TagBatch(tags=[add(execution, "task", "type", "x")]))
    (event,) = read(source).json()["changes"]
    source.token = source.servers.token(other)
    (foreign,) = read(source).json()["changes"]
    assert (event["position"], foreign["position"]) == (1, 1)
    assert event["organization_id"] != foreign["organization_id"]
    response = read(source, after=event["cursor"])
    assert (response.status_code, response.json()["error"]["cursor"]) == (410, foreign["cursor"])


@pytest.mark.parametrize(
    "query",
    [
        {"after": "1"},
        {"after": "x"},
        {"after": "-1"},
        {"after": "1-"},
        {"after": "1-A"},
        {"after": "00"},
        {"after": "01-abc"},
        {"after": "1-0abc"},
        {"after": "1-" + "z" * 13},
        {"after": ["0", "0"]},
        {"limit": 0},
        {"limit": 1001},
        {"flow_execution_id": str(uuid4())},
        {"flow_id": ""},
        {"tag": "a\x00"},
    ],
)
def test_wrong_parameters_are_named(source: ChangeSource, query: dict[str, Any]) -> None:
    """Over HTTP, and in a WebSocket."""
    response = read(source, **query)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_request")
    assert response.json()["error"]["details"][0]["field"] == next(iter(query))
    if "limit" not in query:
        with source.watch(None, **query) as watching:
            assert refused(watching) == (4400, "bad_request")


# --- Histories that end --------------------------------------------------------------------------


@pytest.mark.parametrize("written_since", [0, 2, 5])
def test_a_restore_deceives_no_reader(source: ChangeSource, written_since: int) -> None:
    """Open watchers of the organization and of an execution, cursors and ETags: all find out.

    Whether the restored history is shorter than what was read, as long, or longer.
    """
    execution = source.execution()
    for _ in range(3):
        source.change(execution)
    headers = {"Authorization": f"Bearer {source.token}"}
    tags = f"{source.servers.stack.endpoint_url}/task-tags?flow_execution_id={execution}"
    with source.watch(None) as of_all, source.watch(execution) as of_one:
        assert positions(of_all, 3) == positions(of_one, 3) == [1, 2, 3]
        for _ in range(2):
            source.change(execution)
        assert positions(of_all, 2) == positions(of_one, 2) == [4, 5]
        cursor = read(source).json()["cursor"]
        etag = httpx.get(tags, headers=headers).headers["etag"]
        restore(source, 3, {execution: 3})
        for _ in range(written_since):
            source.change(execution)
        if not written_since:  # a quiet restore: Redis still has the position of before
            source.redis.delete(position_key(source.organization))
        errors = [json.loads(each.recv(SECONDS))["error"] for each in (of_all, of_one)]
    head = read(source).json()["cursor"]
    assert Cursor.parse(head).number == 3 + written_since
    assert [error["code"] for error in errors] == ["gone", "gone"]
    gone = read(source, after=cursor)
    assert (gone.status_code, gone.json()["error"]["cursor"]) == (410, head)
    again = httpx.get(tags, headers={**headers, "If-None-Match": etag})
    assert again.status_code == 200
    assert read(source, after=head).json() == {"changes": [], "cursor": head}


def test_what_was_purged_is_gone(source: ChangeSource) -> None:
    """A prefix is: who is behind it gets the place to continue from, and the last event stays."""
    execution = source.execution()
    for _ in range(5):
        source.change(execution)
    events = read(source).json()["changes"]
    with source.servers.owner() as owner:
        owner.execute(
            "update tag_changes set changed_at = changed_at - interval '1 day' "
            "where organization_id = %s and position in (1, 2, 4)",
            [source.organization],
        )
    assert source.repository.purge_changes(source.organization, timedelta(hours=1)) == 2
    for after in ("0", events[0]["cursor"]):
        response = read(source, after=after)
        assert (response.status_code, response.json()["error"]["code"]) == (410, "gone")
        assert response.json()["error"]["cursor"] == events[-1]["cursor"]
        with source.watch(None, after=after) as watching:
            assert refused(watching) == (4410, "gone")
    later = read(source, after=events[2]["cursor"]).json()["changes"]
    assert [event["position"] for event in later] == [4, 5]
    eventually(lambda: source.repository.purge_changes(source.organization, timedelta(0)) == 2)
    assert read(source, after=events[-1]["cursor"]).json()["changes"] == []


# --- One hub, in this process --------------------------------------------------------------------


@asynccontextmanager
async def hub_of(source: ChangeSource) -> AsyncIterator[Any]:
    """Run what a process of the endpoint has for its watchers."""
    redis = open_async_redis(source.servers.stack.redis_url)
    reader = Reader(source.servers.endpoint_url, 2)
    pubsub = PubSubMultiplexer(redis)
    hub = change_hub.ChangeHub(pubsub, redis, reader)
    jobs = [asyncio.create_task(job) for job in (pubsub.run(), hub.run())]
    state = SimpleNamespace(change_hub=hub, reader=reader)
    try:
        yield SimpleNamespace(app=SimpleNamespace(state=state))
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await redis.aclose()
        reader.close()


def watcher(source: ChangeSource, connection: Any, **query: Any) -> feeds.ChangeCursor:
    principal = cast(Principal, SimpleNamespace(organization_id=source.organization))
    return feeds.ChangeCursor(connection, AllFeedQuery.model_validate(query), principal)


def test_a_quiet_watcher_is_told_in_time_how_far_it_is(
    source: ChangeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that it passed over long ago are told, although none came since."""
    monkeypatch.setattr(feeds, "PASSED_SECONDS", 0.2)
    execution = source.execution()

    async def main() -> None:
        async with hub_of(source) as connection:
            found = watcher(source, connection, tag_type=["other"]).frames()
            assert (await anext(found)).kind == "caught_up"
            waiting = asyncio.ensure_future(anext(found))
            await asyncio.to_thread(source.change, execution)
            frame = await asyncio.wait_for(waiting, SECONDS)
            assert (frame.kind, frame.cursor.number) == ("cursor", 1)
            await found.aclose()

    asyncio.run(main())


def test_a_restore_that_nothing_announces_is_found(
    source: ChangeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last events are read from the table every now and then, whatever Redis says."""
    monkeypatch.setattr(change_hub, "LOOK_SECONDS", 0.0)
    execution = source.execution()

    async def main() -> None:
        async with hub_of(source) as connection:
            found = watcher(source, connection).frames()
            assert (await anext(found)).kind == "caught_up"
            for _ in range(3):
                await asyncio.to_thread(source.change, execution)
                assert (await anext(found)).kind == "change"
            await asyncio.to_thread(restore, source, 1, {execution: 1})
            with pytest.raises(ApiError) as gone:
                await asyncio.wait_for(anext(found), SECONDS)
            assert (gone.value.status, gone.value.cursor and gone.value.cursor.number) == (410, 1)

    asyncio.run(main())


def test_watchers_at_the_end_share_one_read(source: ChangeSource) -> None:
    """Whatever their number; a busy organization costs the watcher of a quiet execution nothing."""
    busy, quiet = source.execution(), source.execution()

    async def main() -> None:
        async with hub_of(source) as connection:
            reader, reads = connection.app.state.reader, []
            original = reader.changes

            async def changes(organization_id: UUID, execution: UUID | None, *rest: Any) -> Any:
                reads.append(execution)
                return await original(organization_id, execution, *rest)

            reader.changes = changes
            cursors = [watcher(source, connection).frames() for _ in range(50)]
            for each in cursors:
                assert (await anext(each)).kind == "caught_up"
            hub = connection.app.state.change_hub
            with hub.watch(source.organization, quiet) as feed:
                await asyncio.sleep(0.3)  # looks of new subscriptions are over
                news, before = feed.news, len(reads)
                for number in range(1, 6):
                    waiting = [asyncio.ensure_future(anext(each)) for each in cursors]
                    await asyncio.to_thread(source.change, busy)
                    for done in await asyncio.gather(*waiting):
                        assert done.cursor.number == number
                assert feed.news == news
            assert len(reads) - before <= 5 * 3

    asyncio.run(main())


def test_watchers_that_begin_anywhere_get_every_event_once(source: ChangeSource) -> None:
    """While events are made, kept ones and stored ones follow one another without a seam."""
    executions = [source.execution() for _ in range(5)]
    chance = random.Random(17)

    async def main() -> None:
        async with hub_of(source) as connection:

            async def watch(after: str) -> list[int]:
                found = []
                async for frame in watcher(source, connection, after=after).frames():
                    if frame.kind == "change":
                        found.append(json.loads(frame.event)["position"])
                        if found[-1] == 200:
                            break
                return found

            watching: list[tuple[int, asyncio.Task[list[int]]]] = []
            for _ in range(200):
                event = await asyncio.to_thread(
                    source.change, chance.choice(executions), chance.random() < 0.7
                )
                made = json.loads(event)
                if chance.random() < 0.3:
                    job = asyncio.create_task(watch(made["cursor"]))
                    watching.append((made["position"], job))
            for position, job in watching:
                found = await asyncio.wait_for(job, SECONDS)
                assert found == list(range(position + 1, 201)) or position == 200

    asyncio.run(main())


# --- Waiting over HTTP ---------------------------------------------------------------------------


def tags_url(source: ChangeSource, execution: UUID, **query: Any) -> str:
    return source.url(execution, **query).replace("/task-tags/changes?", "/task-tags?")


def test_a_read_waits_for_the_next_revision(source: ChangeSource) -> None:
    """Of its execution alone; without a change it is 304 at the end of its time."""
    execution, other = source.execution(), source.execution()
    headers = {"Authorization": f"Bearer {source.token}"}
    url = tags_url(source, execution, tag="1")
    known = httpx.get(url, headers=headers).headers["etag"]
    headers |= {"If-None-Match": known, "Prefer": "wait=30"}
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(httpx.get, url, headers=headers, timeout=40) for _ in range(5)]
        eventually(lambda: subscribed(source))
        source.count = 10
        source.change(other)
        eventually(lambda: source.redis.get(position_key(source.organization)))
        assert not any(each.done() for each in waiting)
        source.count = 0
        source.change(execution)
        for each in waiting:
            response = each.result()
            assert (response.status_code, len(response.json())) == (200, 1)
            assert response.headers["etag"] != known
    eventually(lambda: not subscribed(source))
    headers |= {"If-None-Match": response.headers["etag"], "Prefer": "wait=1"}
    began = time.monotonic()
    assert httpx.get(url, headers=headers).status_code == 304
    assert time.monotonic() - began >= 1
    headers |= {"If-None-Match": known, "Prefer": "wait=30"}
    assert httpx.get(url, headers=headers).status_code == 200


def test_waits_that_are_dropped_leave_nothing_behind(source: ChangeSource) -> None:
    """Their subscription ends with their connections."""
    execution = source.execution()
    url = httpx.URL(tags_url(source, execution))
    headers = {"Authorization": f"Bearer {source.token}"}
    known = httpx.get(url, headers=headers).headers["etag"]
    request = (
        f"GET {url.raw_path.decode()} HTTP/1.1\r\nHost: x\r\nPrefer: wait=60\r\n"
        f"Authorization: Bearer {source.token}\r\nIf-None-Match: {known}\r\n\r\n"
    ).encode()
    dropped = []
    for _ in range(200):
        connection = socket.create_connection((url.host, url.port))
        connection.sendall(request)
        dropped.append(connection)
    eventually(lambda: subscribed(source))
    for connection in dropped:
        connection.close()
    eventually(lambda: not subscribed(source))


def subscribed(source: ChangeSource) -> bool:
    ((_, count),) = source.redis.pubsub_numsub(positions_channel(source.organization))
    return bool(count)
