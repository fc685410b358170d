"""Reading over HTTP: tasks with states and tags, filters, pages of tags and of changes."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from jsonschema import Draft202012Validator

from producers.contract.cursors import Cursor
from producers.contract.messages import (
    Message,
    SetTaskState,
    TagBatch,
    TagOperation,
    add,
    register_execution,
    remove,
)
from tests.support.api_errors import error_of
from tests.support.etag import revision_of
from tests.support.servers import Servers
from tests.support.tenant import applied
from worker.api.page_tokens import page_token
from worker.api.params import TagsQuery
from worker.auth import EXECUTIONS_WRITE, WRITE
from worker.db.repository import Repository

NAMES = ("z", "A", "Z", "a", "é", "\ufffd", "\U0001f600", "a b", "10", "9", "", "a\u0301")
"""Task names whose order by code point differs from that of a language, and from UTF-16's."""

Apply = Callable[..., Any]


@pytest.fixture
def apply(repository: Repository, organization: UUID) -> Apply:
    """Apply messages in one transaction, as a worker would."""
    return lambda *messages: applied(repository, organization, *messages)


@pytest.fixture
def execution(apply: Apply) -> UUID:
    execution = uuid4()
    apply(register_execution(execution))
    return execution


def tagging(*operations: TagOperation) -> TagBatch:
    return TagBatch(tags=list(operations))


def state(execution: UUID, task_name: str, word: Any) -> Message:
    return SetTaskState(flow_execution_id=execution, task_name=task_name, state=word)


def read(http: httpx.Client, path: str, execution: UUID | str, **query: Any) -> httpx.Response:
    return http.get(path, params={"flow_execution_id": str(execution), **query})


def tags(http: httpx.Client, execution: UUID, **query: Any) -> list[dict[str, Any]]:
    """Return the bare array of tags."""
    response = read(http, "/task-tags", execution, **query)
    assert response.status_code == 200, response.text
    found = response.json()
    assert isinstance(found, list)
    return found


def tasks(http: httpx.Client, execution: UUID, **query: Any) -> list[dict[str, Any]]:
    """Return the tasks of an execution that fit on one page."""
    response = read(http, "/task-executions", execution, limit=1000, **query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["next_page"] is None
    found: list[dict[str, Any]] = answer["task_executions"]
    return found


def named(found: list[dict[str, Any]], field: str = "tag") -> list[str]:
    return [each[field] for each in found]


def etag(http: httpx.Client, path: str, execution: UUID, **query: Any) -> str:
    """Return the ETag without the time in it."""
    header: str = read(http, path, execution, **query).headers["etag"]
    return re.sub("-[0-9a-z]+", "", header)


def refused(response: httpx.Response, field: str) -> None:
    """Check that a parameter is refused by its name."""
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["code"] == "bad_request"
    assert [(each["index"], each["field"]) for each in error["details"]] == [(None, field)]


# --- Tasks ---------------------------------------------------------------------------------------


def test_a_task_is_there_if_it_is_registered_tagged_or_has_a_state(
    http: httpx.Client, apply: Apply, organization: UUID
) -> None:
    """Each for itself and all together: one object for a task, with every field."""
    execution = uuid4()
    names = ["registered", "tagged", "with a state", "with both"]
    apply(register_execution(execution, names))
    apply(tagging(*(add(execution, name, "type", "tag", {"n": 1}) for name in names[1::2])))
    apply(state(execution, "with a state", "queued"), state(execution, "with both", "running"))
    apply(state(execution, "with a state", "failed"))
    found = {task["task_name"]: task for task in tasks(http, execution)}
    assert list(found) == names
    nothing = dict.fromkeys(("state", "state_changed_at", "state_changed_by"))
    nothing |= dict.fromkeys(("flow_id", "waiting_since", "tags_next"))
    assert found["registered"] == {
        "flow_execution_id": str(execution),
        "task_name": "registered",
        **nothing,
        "tags": [],
    }
    assert {**found["tagged"], "tags": []} == {**found["registered"], "task_name": "tagged"}
    events = read(http, "/task-tags/changes", execution).json()
    recorded = events[-1]["changes"][0]["task"]
    assert recorded.items() <= found["with a state"].items()
    assert (found["with both"]["state"], found["with a state"]["state"]) == ("running", "failed")
    assert found["with both"]["state_changed_by"] == "ada"
    assert found["with both"]["state_changed_at"] == events[-2]["changed_at"]
    assert [tag for task in found.values() for tag in task["tags"]] == tags(http, execution)
    assert found["with both"]["tags"][0]["organization_id"] == str(organization)


def test_without_registered_names_only_what_is_known_is_there(
    http: httpx.Client, apply: Apply, execution: UUID
) -> None:
    """An execution that takes every task name has those with a tag or a state; at first none."""
    assert tasks(http, execution) == []
    apply(tagging(add(execution, "tagged", "type", "tag")), state(execution, "stated", "queued"))
    found = tasks(http, execution)
    assert named(found, "task_name") == ["stated", "tagged"]
    assert [(task["state"], len(task["tags"])) for task in found] == [("queued", 0), (None, 1)]


def test_a_task_goes_with_its_last_tag_unless_it_is_registered_or_has_a_state(
    http: httpx.Client, apply: Apply, execution: UUID
) -> None:
    """A removed tag is of no task; what keeps a task is its name or its state."""
    apply(state(execution, "stated", "completed"))
    for name in ("stated", "unregistered"):
        apply(tagging(add(execution, name, "type", "1"), add(execution, name, "type", "2")))
        apply(tagging(remove(execution, name, "type", "1")))
    assert named(tasks(http, execution), "task_name") == ["stated", "unregistered"]
    apply(tagging(*(remove(execution, name, "type", "2") for name in ("stated", "unregistered"))))
    (left,) = tasks(http, execution)
    assert (left["task_name"], left["state"], left["tags"]) == ("stated", "completed", [])
    registered = uuid4()
    apply(register_execution(registered, ["task"]), tagging(add(registered, "task", "type", "1")))
    apply(tagging(remove(registered, "task", "type", "1")))
    assert named(tasks(http, registered), "task_name") == ["task"]


def test_registered_tasks_are_in_their_order_and_others_in_that_of_code_points(
    http: httpx.Client, apply: Apply
) -> None:
    """In the order in which names were first given; names that are not registered, sorted."""
    execution = uuid4()
    names = [name for name in NAMES if name]
    apply(register_execution(execution, names[:4]), register_execution(execution, names[::-1]))
    apply(tagging(*(add(execution, name, "type", "tag") for name in names[2:8])))
    apply(*(state(execution, name, "queued") for name in names[6:]))
    assert named(tasks(http, execution), "task_name") == [*names[:4], *names[:3:-1]]
    execution = uuid4()
    apply(register_execution(execution))
    apply(tagging(*(add(execution, name, "type", "tag") for name in names[:8])))
    apply(*(state(execution, name, "queued") for name in names[6:]))
    assert named(tasks(http, execution), "task_name") == sorted(names)


def test_the_tags_of_a_task_are_in_the_order_in_which_they_are_read(
    http: httpx.Client, apply: Apply, execution: UUID
) -> None:
    """By time of creation, as in `GET /task-tags`: the oldest 100, and then the URL of the rest."""
    names = ["c", "a", "b"]
    for batch in range(6):
        operations = [add(execution, names[n % 3], f"{n % 7}", f"{batch} {n}") for n in range(100)]
        apply(tagging(*operations))
    apply(*(tagging(add(execution, "few", "type", f"{n}")) for n in range(100)))
    bare = tags(http, execution)
    assert len(bare) == 700
    for task in tasks(http, execution):
        own = [tag for tag in bare if tag["task_name"] == task["task_name"]]
        found, following = task["tags"], task["tags_next"]
        assert len(found) == 100
        assert (following is None) == (task["task_name"] == "few")
        while following:
            rest = http.get(following)
            assert rest.status_code == 200, rest.text
            found += rest.json()["tags"]
            token = rest.json()["next_page"]
            url = httpx.URL(following)
            following = str(url.copy_set_param("page", token)) if token else None
        assert found == own


def test_one_task_is_read(http: httpx.Client, apply: Apply) -> None:
    """By its exact name; an unknown one is not there, and that is no error."""
    execution = uuid4()
    apply(register_execution(execution, ["a", "b", "é", "never tagged"]))
    apply(tagging(add(execution, "a", "type", "x"), add(execution, "b", "type", "y")))
    apply(state(execution, "é", "queued"))
    everything = {task["task_name"]: task for task in tasks(http, execution)}
    for name, task in everything.items():
        assert tasks(http, execution, task_name=name) == [task]
    for unknown in ("A", "a ", "%", "e\u0301", "'"):
        assert tasks(http, execution, task_name=unknown) == []


def test_tasks_of_unknown_and_foreign_executions_are_404(
    servers: Servers, http: httpx.Client, apply: Apply, execution: UUID
) -> None:
    """Alike, but for the request id; with a filter of tasks as well."""
    apply(state(execution, "task", "queued"))
    assert tasks(http, execution)
    headers = {"Authorization": f"Bearer {servers.token(uuid4())}"}
    for path, name, value in (
        ("/task-executions", "task_name", "task"),
        ("/task-tags", "tag_type", "type"),
        ("/task-tags", "limit", "1"),
    ):
        for query in ({}, {name: value}):
            parameters = {"flow_execution_id": str(execution), **query}
            foreign = http.get(path, params=parameters, headers=headers)
            unknown = read(http, path, uuid4(), **query)
            assert foreign.status_code == unknown.status_code == 404
            assert error_of(foreign) == error_of(unknown)
            assert error_of(foreign)["code"] == "not_found"


def test_reading_tasks_needs_a_token_with_the_scope(
    servers: Servers, organization: UUID, execution: UUID
) -> None:
    """401 without one, 403 if it may only write."""
    url = f"{servers.stack.endpoint_url}/task-executions?flow_execution_id={execution}"
    assert httpx.get(url).status_code == 401
    token = servers.token(organization, WRITE, EXECUTIONS_WRITE)
    response = httpx.get(url, headers={"Authorization": f"Bearer {token}"})
    assert (response.status_code, error_of(response)["code"]) == (403, "forbidden")


def test_wrong_parameters_of_tasks_are_named(http: httpx.Client, execution: UUID) -> None:
    """Also those that other paths know."""
    for field, value in {
        "task_name": "",
        "limit": "0",
        "page": "x",
        "cursor": "x",
        "tag_type": "x",
        "after": "1",
    }.items():
        refused(read(http, "/task-executions", execution, **{field: value}), field)
    refused(read(http, "/task-executions", "x"), "flow_execution_id")
    refused(http.get("/task-executions"), "flow_execution_id")


# --- Filters -------------------------------------------------------------------------------------


@pytest.fixture
def mixed(apply: Apply, execution: UUID) -> UUID:
    """Tags of two tasks, three types and four names, one of them removed."""
    for name in ("one", "two"):
        apply(
            tagging(
                add(execution, name, "status", "reviewed", {"by": "ada"}),
                add(execution, name, "status", "reviewed"),
                add(execution, name, "status", "approved"),
                add(execution, name, "quality", "reviewed"),
                add(execution, name, "é", "a, b&c"),
                add(execution, name, "status", "gone"),
            )
        )
        apply(tagging(remove(execution, name, "status", "gone")))
    return execution


FILTERS: list[dict[str, Any]] = [
    {"tag_type": "status"},
    {"tag_type": ["quality", "é"]},
    {"tag_type": ["status", "status", "none"]},
    {"tag": "reviewed"},
    {"tag": ["approved", "a, b&c"]},
    {"tag_type": ["status", "quality"], "tag": ["reviewed"]},
    {"tag_type": "é", "tag": "reviewed"},
    {"tag": "gone"},
    {"tag_type": "Status"},
    {"tag_type": "%"},
    {"task_name": "two", "tag": "reviewed"},
    {"task_name": "two", "tag_type": ["quality", "é"]},
    {"task_name": "three", "tag": "reviewed"},
    {"tag_type": [f"{number}" for number in range(99)] + ["status"]},
]


def fits(tag: dict[str, Any], query: dict[str, Any]) -> bool:
    """Say whether a tag is wanted, in the plainest way."""
    return all(
        tag[name] in (value if isinstance(value, list) else [value])
        for name, value in query.items()
    )


def test_only_the_tags_that_fit_are_read(http: httpx.Client, mixed: UUID) -> None:
    """One value, several, one that does not fit, with a task name; the order stays the same."""
    everything = tags(http, mixed)
    assert len(everything) == 10
    lengths = []
    for query in FILTERS:
        wanted = [tag for tag in everything if fits(tag, query)]
        assert tags(http, mixed, **query) == wanted, query
        assert etag(http, "/task-tags", mixed, **query) == '"4"'
        lengths.append(len(wanted))
    assert lengths == [6, 4, 6, 6, 4, 6, 0, 0, 0, 0, 3, 2, 0, 6]


def test_a_reader_who_knows_the_revision_gets_304_with_filters_too(
    http: httpx.Client, apply: Apply, mixed: UUID
) -> None:
    """Also of a page; after a change it is read again, even if what fits is the same."""
    queries: list[dict[str, Any]] = [{"tag": "approved"}, {"tag": "none"}, {"limit": 2}]
    known = read(http, "/task-tags", mixed).headers["etag"]
    page = read(http, "/task-tags", mixed, limit=2).json()
    queries += [{"limit": 2, "page": page["next_page"]}, {"page": page["next_page"]}]
    for query in queries:
        parameters = {"flow_execution_id": str(mixed), **query}
        for header, status in (
            *((known, 304), (f"W/{known}", 304), (f'"3-abc", {known}', 304), ("*", 304)),
            *(('"3-abc"', 200), ('"4-abc"', 200), ('"4"', 200)),
        ):
            response = http.get("/task-tags", params=parameters, headers={"If-None-Match": header})
            assert response.status_code == status, (query, header)
            assert response.headers["etag"] == known
            assert (response.content == b"") == (status == 304)
    apply(tagging(add(mixed, "three", "status", "new")))
    for query in queries:
        parameters = {"flow_execution_id": str(mixed), **query}
        response = http.get("/task-tags", params=parameters, headers={"If-None-Match": known})
        assert (response.status_code, revision_of(response)) == (200, 5)


@pytest.mark.parametrize("path", ["/task-tags", "/task-tags/changes"])
def test_a_wrong_filter_is_named(http: httpx.Client, execution: UUID, path: str) -> None:
    """By its own name, also if it is one of several; and without what was given."""
    for name, longest in (("tag_type", 100), ("tag", 200)):
        for value in ("", ["good", ""], "a\x00b", "unwanted" * 30, ["good"] * 101):
            response = read(http, path, execution, **{name: value})
            refused(response, name)
            assert "unwanted" not in response.text
        assert read(http, path, execution, **{name: "x" * longest}).status_code == 200
    refused(read(http, path, execution, task_name=["a", "b"]), "task_name")
    refused(read(http, path, execution, tags="a"), "tags")


# --- Pages of tags -------------------------------------------------------------------------------


def pages(http: httpx.Client, execution: UUID, **query: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the pages of tags, until there is no next page; none comes twice."""
    following: dict[str, str] = {}
    while True:
        response = read(http, "/task-tags", execution, **query, **following)
        assert response.status_code == 200, response.text
        page = response.json()
        assert set(page) == {"tags", "next_page"}
        yield page["tags"]
        if page["next_page"] is None:
            return
        assert page["next_page"] not in following.values()
        following = {"page": page["next_page"]}


@pytest.fixture
def many(apply: Apply, execution: UUID) -> UUID:
    """25 tags of five batches in four transactions; so many have the same time of creation."""

    def some(*numbers: int) -> TagBatch:
        return tagging(
            *(add(execution, f"{n % 2}", f"{n % 3}", f"{n:02}", {"n": n}) for n in numbers)
        )

    apply(some(*range(11)), some(11, 12))
    apply(some(13))
    apply(some(*range(14, 24)))
    apply(some(24))
    return execution


def test_pages_have_every_tag_once_in_the_order_of_the_whole(
    http: httpx.Client, many: UUID
) -> None:
    """However long the pages are; a page that ends with the last tag has no next one."""
    everything = tags(http, many)
    assert named(everything) == [f"{n:02}" for n in range(25)]
    for limit in (1, 5, 7, 24, 25, 26, 1000):
        found = list(pages(http, many, limit=limit))
        assert [tag for page in found for tag in page] == everything
        assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
        assert 0 < len(found[-1]) <= limit
    first = read(http, "/task-tags", many, limit=20)
    assert revision_of(first) == 5
    rest = read(http, "/task-tags", many, page=first.json()["next_page"])
    assert rest.json() == {"tags": everything[20:], "next_page": None}


def test_pages_of_what_fits(http: httpx.Client, many: UUID) -> None:
    """With filters, a page is full of what fits."""
    everything = tags(http, many)
    for query in (
        {"tag_type": ["0", "2"]},
        {"task_name": "1"},
        {"task_name": "0", "tag_type": "1"},
        {"tag": [f"{n:02}" for n in range(3, 22)]},
    ):
        wanted = [tag for tag in everything if fits(tag, query)]
        found = list(pages(http, many, limit=3, **query))
        assert [tag for page in found for tag in page] == wanted
        assert [len(page) for page in found[:-1]] == [3] * (len(found) - 1)
    assert list(pages(http, many, limit=3, tag="none")) == [[]]


def test_what_changes_between_pages_neither_hides_nor_doubles_a_tag(
    http: httpx.Client, apply: Apply, many: UUID
) -> None:
    """Tags are added and removed between pages, also a page's last: all that stay come once."""
    everything = named(tags(http, many))
    seen: list[str] = []
    removed: list[str] = []
    for number, page in enumerate(pages(http, many, limit=7)):
        seen += named(page)
        if number < 3:
            removed.append(seen[-1])
            last = int(seen[-1])
            apply(
                tagging(
                    remove(many, f"{last % 2}", f"{last % 3}", seen[-1]),
                    add(many, "0", "0", f"new {number}"),
                    add(many, "0", "0", f"{number:02}", "the same name"),
                )
            )
    assert len(removed) == 3
    assert seen[:25] == everything
    assert sorted(seen[25:]) == ["00", "01", "02", "new 0", "new 1", "new 2"]


def test_an_execution_without_tags_has_one_empty_page(http: httpx.Client, execution: UUID) -> None:
    """With the same ETag as the bare array."""
    assert list(pages(http, execution, limit=7)) == [[]]
    assert etag(http, "/task-tags", execution, limit=7) == '"0"'


def token_of(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def text_of(token: str) -> str:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()


def test_a_wrong_page_is_named(http: httpx.Client, many: UUID) -> None:
    """Garbage, a token that was cut off or changed, or one of another text: always 400."""
    token = read(http, "/task-tags", many, limit=7).json()["next_page"]
    text = text_of(token)
    wrong = {
        *("", "x", "null", "0", "%00", "é" * 20, "x" * 12, "x" * 13, "x" * 5000, " " + token),
        *(token[:end] for end in range(1, len(token), 5)),
        *(token[:-1], token[1:], token + "A", token * 2, token + "=", token.swapcase()),
        token_of("select 1"),
        token_of(text[:-1]),
        token_of(text + "\n"),
        token_of(text.upper()),
        token_of(text.replace(" ", "T", 1)),
        token_of(text[::-1]),
        token_of(text[8:]),
        token_of("0" * 8 + text[8:]),
    }
    for each in wrong - {token}:
        refused(read(http, "/task-tags", many, page=each), "page")
        refused(read(http, "/task-tags", many, limit=7, page=each), "page")
    refused(read(http, "/task-tags", many, page=[token, token]), "page")


def test_a_page_of_no_moment_is_wrong_as_well(
    http: httpx.Client, organization: UUID, many: UUID
) -> None:
    """It has the form of a token, but no valid time: 400, and not 503 as without a database."""
    query = TagsQuery(flow_execution_id=many)
    place = text_of(read(http, "/task-tags", many, limit=7).json()["next_page"])[8:]
    for part, wrong in (
        (r"-\d\d-", "-13-"),
        (r"-\d\d-\d\d", "-02-30"),
        (r"\d\d:\d\d:", "25:00:"),
        (r":\d\d:", ":60:"),
        (r"^\d{4}", "0000"),
        (r"^\d{4}", "99999"),
    ):
        forged = re.sub(part, wrong, place, count=1)
        assert forged != place
        token = page_token(forged, organization, "/task-tags", query)
        refused(read(http, "/task-tags", many, page=token), "page")
    token = page_token(place, organization, "/task-tags", query)
    assert len(read(http, "/task-tags", many, page=token).json()["tags"]) == 18


def test_a_page_is_of_one_query(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply, many: UUID
) -> None:
    """Not of another execution, filter, path or organization; another limit is no other query."""
    other = uuid4()
    apply(register_execution(other), tagging(add(other, "task", "type", "other")))
    token = read(http, "/task-tags", many, limit=7, tag_type=["0", "1"]).json()["next_page"]
    page = read(http, "/task-tags", many, limit=3, tag_type=["0", "1"], page=token).json()
    assert len(page["tags"]) == 3
    for execution, query in (
        (other, {"tag_type": ["0", "1"]}),
        (many, {"tag_type": ["0", "2"]}),
        (many, {"tag_type": ["0"]}),
        (many, {"tag": ["0", "1"]}),
        (many, {"tag_type": ["0", "1"], "task_name": "1"}),
        (many, {}),
    ):
        refused(read(http, "/task-tags", execution, page=token, **query), "page")
    refused(read(http, "/task-executions", many, page=token), "page")
    headers = {"Authorization": f"Bearer {servers.token(uuid4())}"}
    query = {"flow_execution_id": str(many), "tag_type": ["0", "1"], "page": token}
    refused(http.get("/task-tags", params=query, headers=headers), "page")


def test_a_page_looks_at_10000_tags_at_most(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply, execution: UUID
) -> None:
    """Then it is short, and has a next one; the end is where there is none."""
    fill(servers, organization, execution, 20_500, 2)
    found = list(pages(http, execution, limit=3, tag="tag-10500"))
    assert [len(page) for page in found] == [0, 1, 0]
    found = list(pages(http, execution, limit=2, tag=[f"tag-{n}" for n in range(9_998, 10_002)]))
    assert [len(page) for page in found] == [2, 2, 0]
    assert len(tags(http, execution, tag="tag-10500")) == 1
    assert list(pages(http, execution, limit=3, task_name="none")) == [[]]


def test_a_wrong_limit_is_named(http: httpx.Client, many: UUID) -> None:
    """From 1 to 1000, in digits."""
    for limit in ("0", "1001", "x", "-1", "", "1.0", "+1", " 1", "1e2", "１", "9" * 30, ["1", "2"]):
        refused(read(http, "/task-tags", many, limit=limit), "limit")


def test_pages_are_in_the_document(servers: Servers, http: httpx.Client, many: UUID) -> None:
    """Real answers, held against the OpenAPI document; its parameters are those that are taken."""
    document = httpx.get(f"{servers.stack.endpoint_url}/openapi.json").json()
    for path, query in (
        ("/task-tags", {}),
        ("/task-tags", {"limit": 7}),
        ("/task-tags", {"limit": 1000}),
        ("/task-executions", {}),
        ("/task-tags/changes", {"tag_type": "1"}),
    ):
        described = document["paths"][path]["get"]
        schema = described["responses"]["200"]["content"]["application/json"]["schema"]
        answer = read(http, path, many, **query).json()
        assert answer
        Draft202012Validator({**schema, "components": document["components"]}).validate(answer)
        assert query.keys() <= {each["name"] for each in described["parameters"]}


# --- Filtered changes ----------------------------------------------------------------------------


@pytest.fixture
def changed(apply: Apply, execution: UUID) -> UUID:
    """Fourteen changes: tags of two tasks and several types, added and removed, and states."""
    metadata = {"b": 1e300, "a": "é", "c": [0.1, -(2**63)]}
    apply(
        tagging(add(execution, "one", "status", "reviewed", metadata)),
        state(execution, "one", "running"),
        tagging(add(execution, "two", "status", "reviewed"), add(execution, "one", "quality", "a")),
        state(execution, "two", "queued"),
        *(tagging(add(execution, "one", "rest", f"{number}")) for number in range(5)),
        tagging(remove(execution, "two", "status", "reviewed"), add(execution, "two", "rest", "0")),
        state(execution, "one", "completed"),
        tagging(*(remove(execution, "one", "rest", f"{number}") for number in range(5))),
        tagging(add(execution, "two", "quality", "é&=")),
        tagging(add(execution, "one", "rest", "last")),
    )
    return execution


CHANGE_FILTERS: list[dict[str, Any]] = [
    {"tag_type": "status"},
    {"tag_type": ["status", "quality"]},
    {"tag": ["reviewed", "é&="]},
    {"tag": "last"},
    {"tag": "none"},
    {"task_name": "one"},
    {"task_name": "two"},
    {"task_name": "two", "tag_type": ["rest", "quality"]},
    {"task_name": "one", "tag_type": "rest", "tag": ["1", "3"]},
    {},
]


def wanted_of(events: list[dict[str, Any]], query: dict[str, Any]) -> list[dict[str, Any]]:
    """Filter events in the plainest way; a state has no type and no tag."""
    reduced = []
    for event in events:
        changes = [
            change
            for change in event["changes"]
            if ("tag" in change and fits(change["tag"], query))
            or ("task" in change and query.keys() <= {"task_name"} and fits(change["task"], query))
        ]
        if changes:
            reduced.append({**event, "changes": changes})
    return reduced


def follow(http: httpx.Client, response: httpx.Response) -> Iterator[list[dict[str, Any]]]:
    """Yield pages of events, each by the Link of the one before, until there is no Link."""
    while True:
        assert response.status_code == 200, response.text
        yield response.json()
        if "link" not in response.headers:
            return
        following = response.links["next"]["url"]
        assert not str(response.url).endswith(following)
        response = http.get(following)


def test_only_the_changes_that_fit_are_read(http: httpx.Client, changed: UUID) -> None:
    """Events without a fitting change are left out; others have only the changes that fit."""
    everything = read(http, "/task-tags/changes", changed).json()
    assert [event["revision"] for event in everything] == list(range(1, 15))
    lengths = []
    for query in CHANGE_FILTERS:
        response = read(http, "/task-tags/changes", changed, **query)
        assert response.json() == wanted_of(everything, query), query
        assert "link" not in response.headers
        lengths.append(len(response.json()))
    assert lengths == [3, 4, 4, 1, 0, 11, 4, 2, 3, 14]


def test_states_are_changes_of_their_task(http: httpx.Client, changed: UUID) -> None:
    """A filter of the task keeps them; a filter of tags leaves them out."""

    def states(**query: Any) -> list[str]:
        events = read(http, "/task-tags/changes", changed, **query).json()
        changes = [change for event in events for change in event["changes"]]
        return [change["task"]["state"] for change in changes if change["change"] == "state"]

    assert states() == ["running", "queued", "completed"]
    assert states(task_name="one") == ["running", "completed"]
    assert states(task_name="two") == ["queued"]
    assert states(task_name="one", tag_type="status") == states(tag="reviewed") == []


def test_links_lead_through_all_changes_that_fit(http: httpx.Client, changed: UUID) -> None:
    """With the same filters and limit, over pages without a fitting change, up to the end."""
    everything = read(http, "/task-tags/changes", changed).json()
    for query in CHANGE_FILTERS:
        for limit, after in ((1, 0), (3, 0), (3, 5), (13, 0), (14, 0), (1000, 13), (5, 14)):
            first = read(http, "/task-tags/changes", changed, limit=limit, after=after, **query)
            found = list(follow(http, first))
            wanted = wanted_of(everything[after:], query)
            assert [event for page in found for event in page] == wanted
            assert len(found) == max(1, -(-(14 - after) // limit))


def test_a_link_keeps_what_was_asked(http: httpx.Client, changed: UUID) -> None:
    """It is relative to the endpoint, and has every parameter as often as it was given."""
    query = {"tag": ["é&=", "a b"], "task_name": "ü/?#", "limit": "2", "after": "3"}
    response = read(http, "/task-tags/changes", changed, **query)
    link = httpx.URL(response.links["next"]["url"])
    assert (link.host, link.path) == ("", "/task-tags/changes")
    assert response.links["next"]["rel"] == "next"
    asked = {"flow_execution_id": [str(changed)], **query, "after": ["5"]}
    given = {name: link.params.get_list(name) for name in link.params}
    given["after"] = [f"{Cursor.parse(given['after'][0]).number}"]
    assert given == {
        name: value if isinstance(value, list) else [value] for name, value in asked.items()
    }


def test_without_a_limit_a_link_goes_on_after_a_hundred(
    http: httpx.Client, apply: Apply, execution: UUID
) -> None:
    """What fits comes from the second page alone; the first one is empty, and not the end."""
    apply(*(tagging(add(execution, "task", "type", f"{number}")) for number in range(101)))
    response = read(http, "/task-tags/changes", execution, tag="100")
    assert response.json() == []
    found = list(follow(http, response))
    assert [[event["revision"] for event in page] for page in found] == [[], [101]]


# --- Large answers -------------------------------------------------------------------------------


def fill(servers: Servers, organization: UUID, execution: UUID, number: int, size: int) -> None:
    """Store active tags, with metadata of so many bytes."""
    with servers.owner() as connection:
        connection.execute(
            """
            insert into task_tags
                   (organization_id, id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
                    metadata_digest, status, created_at, created_by)
            select %s, gen_random_uuid(), %s, 'large', 'type', 'tag-' || n,
                   to_json(repeat('x', %s)), int4send(n), 'active',
                   now() + interval '1 ms' * n, 'ada'
              from generate_series(1, %s) as n
            """,
            [organization, execution, size - 2, number],
        )


def test_an_answer_over_8_mib_is_refused_and_read_in_pages(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply
) -> None:
    """Whole, of the task, or with a filter: never shortened. What is smaller is answered whole."""
    execution = uuid4()
    apply(register_execution(execution), TagBatch(tags=[add(execution, "small", "type", "x")]))
    fill(servers, organization, execution, 1000, 8 * 1024)
    about = {"flow_execution_id": str(execution)}
    for path, more in (
        ("/task-tags", {}),
        ("/task-tags", {"task_name": "large"}),
        ("/task-tags", {"tag_type": "type"}),
    ):
        refused = http.get(path, params={**about, **more})
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "too_large"
        assert "limit" in error_of(refused)["message"]
    assert [len(page) for page in pages(http, execution, limit=300)] == [300, 300, 300, 101]
    assert http.get("/task-tags", params={**about, "task_name": "small"}).status_code == 200


def test_large_answers_below_that_are_whole(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply
) -> None:
    """More tags than are read at once, in the same order, and 304 as for all others."""
    execution = uuid4()
    apply(register_execution(execution), TagBatch(tags=[add(execution, "small", "type", "x")]))
    fill(servers, organization, execution, 10_000, 100)
    response = http.get("/task-tags", params={"flow_execution_id": str(execution)})
    assert response.status_code == 200
    tags = [tag["tag"] for tag in response.json() if tag["task_name"] == "large"]
    assert tags == [f"tag-{number}" for number in range(1, 10_001)]
    known = {"If-None-Match": response.headers["etag"]}
    again = http.get("/task-tags", params={"flow_execution_id": str(execution)}, headers=known)
    assert again.status_code == 304
