"""Reading the work list: which tasks, in which order, page by page, while others change them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from jsonschema import Draft202012Validator

from producers.contract.cursors import Cursor, microseconds
from producers.contract.messages import (
    Message,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    TagOperation,
    add,
    register_execution,
    remove,
)
from producers.contract.selectors import Selector
from tests.support.api_errors import error_of
from tests.support.servers import Servers
from tests.support.tenant import applied
from worker.api.page_tokens import page_token
from worker.api.work_list import WorkQuery
from worker.db.repository import Repository

Apply = Callable[..., Any]
PENDING = "review_status:pending"


@pytest.fixture
def apply(repository: Repository, organization: UUID) -> Apply:
    """Apply messages in one transaction, as a worker would."""
    return lambda *messages: applied(repository, organization, *messages)


def tagging(*operations: TagOperation) -> TagBatch:
    return TagBatch(tags=list(operations))


def registered(apply: Apply, *, flow_id: str | None = None, names: Any = None) -> UUID:
    execution = uuid4()
    apply(RegisterExecution(flow_execution_id=execution, task_names=names, flow_id=flow_id))
    return execution


def state(execution: UUID, task_name: str, word: Any) -> Message:
    return SetTaskState(flow_execution_id=execution, task_name=task_name, state=word)


def page_of(http: httpx.Client, with_: Any = PENDING, **query: Any) -> dict[str, Any]:
    parameters = {"with": with_, **query} if with_ else query
    response = http.get("/task-executions", params=parameters)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    assert set(page) == {"task_executions", "cursor", "next_page"}
    return page


def pages(http: httpx.Client, with_: Any = PENDING, **query: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the tasks of each page, to the end."""
    page = page_of(http, with_, **query)
    yield page["task_executions"]
    while page["next_page"] is not None:
        page = page_of(http, with_, page=page["next_page"], **query)
        yield page["task_executions"]


def listed(http: httpx.Client, with_: Any = PENDING, **query: Any) -> list[dict[str, Any]]:
    return [task for page in pages(http, with_, **query) for task in page]


def names(tasks: list[dict[str, Any]]) -> list[str]:
    return [task["task_name"] for task in tasks]


def refused(response: httpx.Response, field: str) -> str:
    """Check that a parameter is refused by its name; return why."""
    assert response.status_code == 400, response.text
    (detail,) = error_of(response)["details"]
    assert (error_of(response)["code"], detail["field"]) == ("bad_request", field)
    message: str = detail["message"]
    return message


# --- Order ---------------------------------------------------------------------------------------


def test_the_task_that_waits_longest_comes_first(http: httpx.Client, apply: Apply) -> None:
    """Across executions, by the tag's time and then its id, whatever the names are."""
    first, second = registered(apply), registered(apply, flow_id="flow")
    apply(tagging(add(second, "z", "review_status", "pending")))
    # One transaction, so one time of creation: the order is that of the operations.
    apply(
        tagging(
            *(add(first, name, "review_status", "pending", {"by": "x"}) for name in ("c", "a", "b"))
        ),
        tagging(add(second, "a", "review_status", "pending")),
    )
    apply(tagging(add(first, "y", "review_status", "approved")), state(second, "z", "running"))
    for limit in (1, 2, 3, 100):
        found = listed(http, limit=limit)
        order = [(task["flow_execution_id"], task["task_name"]) for task in found]
        wanted = [(second, "z"), (first, "c"), (first, "a"), (first, "b"), (second, "a")]
        assert order == [(str(execution), name) for execution, name in wanted]
    (tag,) = found[0].pop("tags")
    assert found[0] == {
        "flow_id": "flow",
        "flow_execution_id": str(second),
        "task_name": "z",
        "state": "running",
        "state_changed_at": found[0]["state_changed_at"],
        "state_changed_by": "ada",
        "waiting_since": tag["created_at"],
        "tags_next": None,
    }
    assert len({task["waiting_since"] for task in found[1:]}) == 1
    tags = http.get("/task-tags", params={"flow_execution_id": str(second)}).json()
    assert tag == tags[0]


def test_a_task_with_variants_of_a_tag_is_listed_once_at_the_oldest(
    http: httpx.Client, apply: Apply
) -> None:
    """They differ in their metadata alone. If the oldest goes, the next one counts."""
    execution = registered(apply)

    def pending(name: str, metadata: Any) -> TagOperation:
        return add(execution, name, "review_status", "pending", metadata)

    apply(tagging(pending("varied", 1), pending("varied", 2)))
    apply(tagging(pending("plain", None)))
    apply(tagging(pending("varied", 0)))
    for limit in (1, 2):
        assert names(listed(http, limit=limit)) == ["varied", "plain"]
    apply(tagging(remove(execution, "varied", "review_status", "pending", 1)))
    assert names(listed(http)) == ["varied", "plain"]
    apply(tagging(remove(execution, "varied", "review_status", "pending", 2)))
    found = listed(http)
    assert names(found) == ["plain", "varied"]
    assert found[1]["waiting_since"] == found[1]["tags"][0]["created_at"]
    assert names(listed(http, flow_execution_id=str(execution))) == ["plain", "varied"]


def test_the_cursor_is_the_head_of_the_feed(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply
) -> None:
    """On every page the one of now, and 0 as long as nothing has changed."""
    assert page_of(http)["cursor"] == "0"
    execution = registered(apply)
    assert page_of(http, None, flow_execution_id=str(execution))["cursor"] == "0"
    page = None
    for number in range(1, 4):
        apply(tagging(*(add(execution, f"{number} {n}", "review_status", "pending") for n in "ab")))
        with servers.owner() as connection:
            found = connection.execute(
                "select position, changed_at from organizations where organization_id = %s",
                [organization],
            ).fetchone()
        assert found is not None
        assert found[0] == number
        query = {"limit": 1} if page is None else {"limit": 1, "page": page["next_page"]}
        page = page_of(http, **query)
        assert page["cursor"] == str(Cursor(number, microseconds(found[1])))
        assert page_of(http, None, flow_execution_id=str(execution))["cursor"] == page["cursor"]


# --- Pages ---------------------------------------------------------------------------------------


def test_while_tags_come_and_go_no_task_is_missed_or_given_twice(
    http: httpx.Client, apply: Apply
) -> None:
    """Between all pages, tasks before and behind the place lose the tag or get it."""
    executions = [registered(apply) for _ in range(3)]
    waiting = [(executions[n % 3], f"{n:03}") for n in range(100)]
    for start in range(0, 100, 10):
        apply(
            tagging(
                *(add(*task, "review_status", "pending") for task in waiting[start : start + 10])
            )
        )
    chance = random.Random(1)
    left, seen = set(waiting), []
    for number, page in enumerate(pages(http, limit=7)):
        seen += [(UUID(task["flow_execution_id"]), task["task_name"]) for task in page]
        if number < 10:
            gone = chance.sample(sorted(left), 2) + ([seen[-1]] if seen[-1] in left else [])
            left -= set(gone)
            apply(tagging(*(remove(*task, "review_status", "pending") for task in gone)))
            apply(
                tagging(
                    add(executions[0], f"new {number}", "review_status", "pending"),
                    add(*seen[0], "review_status", "pending", {"variant": number}),
                )
            )
    assert [task for task in seen if task in left] == [task for task in waiting if task in left]
    added = [name for _, name in seen if name.startswith("new")]
    assert added == [f"new {number}" for number in range(10)]


def test_registered_names_are_read_page_by_page(http: httpx.Client, apply: Apply) -> None:
    """In their order, each once, also if more are registered in between; null ends the list."""
    names_of = [f"{(n * 7) % 20:02}" for n in range(20)]
    execution = registered(apply, names=names_of[:15])
    found: list[str] = []
    for number, page in enumerate(pages(http, None, flow_execution_id=str(execution), limit=4)):
        found += names(page)
        if number == 1:
            apply(RegisterExecution(flow_execution_id=execution, task_names=names_of))
    assert found == names_of
    # Once every name is allowed, others that have a tag or a state follow, by name.
    tagged = ["z", "a", "04", "late"]
    apply(register_execution(execution), state(execution, "b", "queued"))
    apply(tagging(*(add(execution, name, "review_status", "pending") for name in tagged)))
    apply(RegisterExecution(flow_execution_id=execution, task_names=["late", "00"]))
    expected = [*names_of, "late", "a", "b", "z"]
    for limit in (1, 7, 1000):
        found = []
        for page in pages(http, None, flow_execution_id=str(execution), limit=limit):
            found += names(page)
        assert found == expected
    for name in ("04", "01", "a", "b", "late"):
        query = {"flow_execution_id": str(execution), "task_name": name}
        assert names(page_of(http, None, **query)["task_executions"]) == [name]
    query["task_name"] = "unknown"
    assert page_of(http, None, **query)["task_executions"] == []


def test_a_page_looks_at_10000_tags_at_most(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply
) -> None:
    """It is short where few fit, and still has a next one; only null is the end."""
    execution = registered(apply)
    fill(servers, organization, execution, 20_500)
    for number, more in ((3, {}), (5, {"flow_execution_id": str(execution)})):
        for name, place in (("9999", 0), ("10000", 0), ("10001", 1), ("10500", 1)):
            query = {"with_": [PENDING, f"number:{name}"], "limit": 1, **more}
            found = [names(page) for page in pages(http, **query)]
            assert found == [[name] if each == place else [] for each in range(number)]
    for name in ("20500", "1"):
        query = {"flow_execution_id": str(execution), "task_name": name}
        assert [names(page) for page in pages(http, **query)] == [[name]]
        assert [names(page) for page in pages(http, None, **query)] == [[name]]
    query = {"flow_execution_id": str(execution), "without": "number:10500", "limit": 1000}
    sizes = [len(page) for page in pages(http, None, **query)]
    assert (sum(sizes), sizes[:20]) == (20_499, [1000] * 20)
    query["without"] = "review_status:pending"
    assert list(pages(http, None, **query)) == [[], [], []]


def fill(servers: Servers, organization: UUID, execution: UUID, number: int) -> None:
    """Store so many tasks, each with the tag that is waited for, and its own an hour later."""
    with servers.owner() as connection:
        for hour, tag_type, tag in (
            (0, "'review_status'", "'pending'"),
            (1, "'number'", "n::text"),
        ):
            connection.execute(
                f"""
                insert into task_tags
                       (organization_id, id, flow_execution_id, task_name, tag_type, tag,
                        tag_metadata, metadata_digest, status, created_at, created_by)
                select %s, gen_random_uuid(), %s, n::text, {tag_type}, {tag}, null, '',
                       'active', now() + interval '{hour} h' + interval '1 ms' * n, 'ada'
                  from generate_series(1, %s) as n
                """.encode(),
                [organization, execution, number],
            )
        connection.execute("analyze task_tags")


def test_a_page_ends_after_a_mebibyte(http: httpx.Client, apply: Apply) -> None:
    """Yet it has one task, and the next page begins with the task that had no room."""
    execution = registered(apply)
    large = "x" * 8_000
    for task in range(4):
        operations = [add(execution, f"{task}", "large", f"{n}", large) for n in range(60)]
        apply(tagging(add(execution, f"{task}", "review_status", "pending"), *operations))
    for query in ({}, {"with_": None, "flow_execution_id": str(execution)}):
        found = [names(page) for page in pages(http, **query)]
        assert found == [["0", "1", "2"], ["3"]]
        assert [names(page) for page in pages(http, limit=1, **query)] == [
            ["0"],
            ["1"],
            ["2"],
            ["3"],
        ]
        answer = http.get("/task-executions", params={"with": PENDING})
        assert 2**20 < len(answer.content) < 1.6 * 2**20


# --- Filters -------------------------------------------------------------------------------------

TYPES = ("a", "b", "c:d", "ü\\")
TAGS = ("1", "2", ":", "ö\\:")
STATES = ("queued", "running", None)
FLOWS = ("flow", "Flow", None)


class Model:
    """Random tasks, and which of them are wanted, in the plainest way."""

    def __init__(self, apply: Apply, chance: random.Random) -> None:
        self.tasks: dict[tuple[UUID, str], Any] = {}
        self.first: dict[tuple[Any, str, str], int] = {}
        executions = [(registered(apply, flow_id=flow), flow) for flow in FLOWS]
        for execution, flow in executions:
            for name in "xyz":
                word = chance.choice(STATES)
                self.tasks[execution, name] = (flow, word, set())
                if word:
                    apply(state(execution, name, word))
        for number in range(60):
            task = chance.choice(list(self.tasks))
            pair = (chance.choice(TYPES), chance.choice(TAGS))
            apply(tagging(add(*task, *pair, number % 2)))
            self.tasks[task][2].add(pair)
            self.first.setdefault((task, *pair), number)

    def wanted(
        self, with_: list[Selector], without: list[Selector], query: dict[str, Any]
    ) -> list[tuple[UUID, str]]:
        def has(task: Any, selector: Selector) -> bool:
            pairs = self.tasks[task][2]
            return any(a == selector.tag_type and selector.tag in (None, b) for a, b in pairs)

        found = [
            task
            for task, (flow, word, _) in self.tasks.items()
            if all(has(task, each) for each in with_)
            and not any(has(task, each) for each in without)
            and word in query.get("state", STATES)
            and query.get("flow_id", flow) == flow
            and query.get("task_name", task[1]) == task[1]
            and query.get("flow_execution_id", str(task[0])) == str(task[0])
        ]
        if not with_:  # by name; tasks with neither tag nor state are not known
            return sorted(task for task in found if any(self.tasks[task][1:]))
        tag = (with_[0].tag_type, with_[0].tag or "")
        return sorted(found, key=lambda task: self.first[(task, *tag)])


def test_selectors_and_filters_together_find_what_a_model_finds(
    http: httpx.Client, apply: Apply
) -> None:
    """Random tasks and queries, with colons, backslashes and umlauts in types and tags."""
    chance = random.Random(7)
    model = Model(apply, chance)
    sizes, narrowed = [], Counter[str]()
    for number in range(200):
        selectors = [
            Selector(chance.choice(TYPES), chance.choice((*TAGS, None)))
            for _ in range(chance.choice((0, 0, 1, 2)))
        ]
        with_ = [Selector(chance.choice(TYPES), chance.choice(TAGS))] if number % 4 else []
        with_ += [each for each in selectors if chance.random() < 0.4]
        if with_ and with_[0].tag is None:
            with_ = []
        without = [each for each in selectors if each not in with_]
        query: dict[str, Any] = {}
        if chance.random() < 0.3:
            query["state"] = chance.sample(["queued", "running", "failed"], 2)
        if chance.random() < 0.2:
            query["flow_id"] = chance.choice(["flow", "Flow", "none"])
        if chance.random() < 0.2:
            query["task_name"] = chance.choice("xyz")
        if not with_ or chance.random() < 0.3:
            query["flow_execution_id"] = str(chance.choice(list(model.tasks))[0])
        asked = {"without": [str(each) for each in without], **query}
        found = listed(http, [str(each) for each in with_], limit=2, **asked)
        keys = [(UUID(task["flow_execution_id"]), task["task_name"]) for task in found]
        assert keys == model.wanted(with_, without, query), (with_, without, query)
        sizes.append(len(found))
        for field in query:
            others = {name: value for name, value in query.items() if name != field}
            narrowed[field] += bool(keys) and model.wanted(with_, without, others) != keys
    assert sum(size > 0 for size in sizes) > 50
    assert max(sizes) > 4
    assert min(narrowed[field] for field in ("state", "flow_id", "task_name")) > 2, narrowed


def test_a_selector_is_written_with_a_backslash_before_a_colon_in_the_type(
    http: httpx.Client, apply: Apply
) -> None:
    """The tag is taken as it is, with all its colons and backslashes."""
    execution = registered(apply)
    apply(tagging(add(execution, "task", "a:b\\", "c:d\\:\\\\"), add(execution, "task", "é", "ß")))
    for selector, wanted in (
        ("a\\:b\\\\:c:d\\:\\\\", True),
        ("é:ß", True),
        ("a:b\\\\:c:d\\:\\\\", False),
        ("a\\:b\\\\:c\\:d\\:\\\\", False),
        ("e\u0301:ß", False),
        ("É:ß", False),
    ):
        assert bool(listed(http, selector)) == wanted, selector
        without = page_of(http, None, flow_execution_id=str(execution), without=selector)
        assert bool(without["task_executions"]) == (not wanted)
    assert names(listed(http, ["é:ß", "a\\:b\\\\"])) == ["task"]


def test_a_task_has_its_oldest_100_tags_and_the_url_of_the_others(
    http: httpx.Client, apply: Apply
) -> None:
    """Which is a page of `GET /task-tags`, also for a name that a URL must escape."""
    execution = registered(apply)
    name = "größe & ?=#/+%"
    operations = [add(execution, name, f"{n % 3}", f"{n:03}") for n in range(250)]
    apply(tagging(add(execution, name, "review_status", "pending"), *operations[:99]))
    apply(tagging(add(execution, "b", "review_status", "pending")))
    assert [task["tags_next"] for task in listed(http)] == [None, None]
    apply(tagging(*operations[99:199]), tagging(*operations[199:]))
    task, other = listed(http)
    assert other["tags_next"] is None
    assert len(task["tags"]) == 100
    rest = http.get(task["tags_next"]).json()
    last = httpx.URL(task["tags_next"]).copy_set_param("page", rest["next_page"])
    pieces = [task["tags"], rest["tags"], http.get(last).json()["tags"]]
    assert [len(piece) for piece in pieces] == [100, 100, 51]
    tags = [tag["tag"] for piece in pieces for tag in piece]
    assert tags == ["pending", *(f"{n:03}" for n in range(250))]


# --- What is refused -----------------------------------------------------------------------------


def test_wrong_parameters_are_named(http: httpx.Client, apply: Apply) -> None:
    """Unknown, missing, doubled and malformed ones, each with a reason that says what is right."""
    execution = str(registered(apply))

    def get(**query: Any) -> httpx.Response:
        return http.get("/task-executions", params=query)

    assert refused(get(), "flow_execution_id") == "is required without with"
    assert refused(get(without=PENDING), "flow_execution_id") == "is required without with"
    assert "type:tag" in refused(get(**{"with": "review_status"}), "with")
    assert "type:tag" in refused(get(**{"with": ["review_status", PENDING]}), "with")
    for wrong in (
        "",
        ":",
        ":x",
        "a:",
        "a\\",
        "a\\b:c",
        "\\",
        "a\x00:b",
        "a" * 101,
        "a:" + "b" * 201,
    ):
        assert "backslash" in refused(get(**{"with": wrong}), "with")
        assert "backslash" in refused(get(**{"with": [PENDING, wrong]}), "with")
        refused(get(without=wrong, flow_execution_id=execution), "without")
    assert get(**{"with": "a" * 100 + ":" + "b" * 200}).status_code == 200
    assert get(**{"with": [PENDING] * 5, "without": ["x"] * 5}).status_code == 200
    for with_, without in ((11, 0), (6, 5), (1, 10)):
        query = {"with": [PENDING] * with_, "without": ["x"] * without}
        assert "too many values" in refused(get(**query), "with")
    for field, values in {
        "flow_execution_id": ("x", ""),
        "task_name": ("", "a\x00"),
        "state": ("", "Queued", ["queued", "x"]),
        "flow_id": ("", "x" * 201),
        "limit": ("0", "1001", "x", "-1", ""),
        "page": ("", "x"),
        "tag": ("x",),
        "with_": ("a:b",),
        "cursor": ("x",),
    }.items():
        for value in values:
            refused(get(**{"with": PENDING, field: value}), field)
    for field in ("flow_execution_id", "task_name", "flow_id", "limit", "page"):
        doubled = refused(get(**{"with": PENDING, field: [execution, execution]}), field)
        assert doubled == "is given more than once"


def test_a_page_is_of_one_query_and_organization(
    servers: Servers, http: httpx.Client, organization: UUID, apply: Apply
) -> None:
    """A limit does not belong to the query. A forged place is refused as well."""
    execution = str(registered(apply, names=[f"{n}" for n in range(9)]))
    apply(tagging(*(add(execution, f"{n}", "review_status", "pending") for n in range(9))))
    query: dict[str, Any] = {"with_": PENDING, "state": ["queued"], "without": "x"}
    apply(*(state(UUID(execution), f"{n}", "queued") for n in range(9)))
    token = page_of(http, limit=2, **query)["next_page"]
    assert names(page_of(http, limit=3, page=token, **query)["task_executions"]) == ["2", "3", "4"]
    changes: tuple[dict[str, Any], ...] = (
        {"with_": "review_status:approved"},
        {"with_": [PENDING, PENDING]},
        {"without": "y"},
        {"without": []},
        {"state": ["queued", "running"]},
        {"state": []},
        {"flow_id": "x"},
        {"task_name": "2"},
        {"flow_execution_id": execution},
    )
    for change in changes:
        other = {**query, **change, "page": token}
        response = http.get("/task-executions", params={"with": other.pop("with_"), **other})
        assert "same query" in refused(response, "page"), change
    with httpx.Client(
        base_url=http.base_url, headers={"Authorization": f"Bearer {servers.token(uuid4())}"}
    ) as stranger:
        params = {"with": PENDING, "state": ["queued"], "without": "x", "page": token}
        refused(stranger.get("/task-executions", params=params), "page")
    named = WorkQuery.model_validate({"flow_execution_id": execution})
    for place in ("x", "1", "-1 x", "1 ", "1 a\x00", "99999999999999999999 x"):
        forged = page_token(place, organization, "/task-executions", named)
        params = {"flow_execution_id": execution, "page": forged}
        refused(http.get("/task-executions", params=params), "page")


def test_a_token_is_made_without_a_warning(organization: UUID) -> None:
    """Else the endpoint would log, and remember, the text of each selector; here it is an error."""
    query = WorkQuery.model_validate({"with": [PENDING], "without": ["x"]})
    assert page_token("place", organization, "/task-executions", query)


def test_an_unknown_execution_is_404_and_a_foreign_one_too(
    servers: Servers, http: httpx.Client, apply: Apply
) -> None:
    """Alike, with and without selectors; a work list has nothing of other organizations."""
    execution = registered(apply)
    apply(tagging(add(execution, "task", "review_status", "pending")))
    headers = {"Authorization": f"Bearer {servers.token(uuid4())}"}
    for query in ({}, {"with": PENDING}, {"with": PENDING, "task_name": "task"}):
        parameters = {**query, "flow_execution_id": str(execution)}
        assert names(http.get("/task-executions", params=parameters).json()["task_executions"])
        foreign = http.get("/task-executions", params=parameters, headers=headers)
        parameters["flow_execution_id"] = str(uuid4())
        unknown = http.get("/task-executions", params=parameters)
        assert foreign.status_code == unknown.status_code == 404
        assert error_of(foreign) == error_of(unknown)
    answer = http.get("/task-executions", params={"with": PENDING}, headers=headers).json()
    assert answer == {"task_executions": [], "cursor": "0", "next_page": None}


def test_the_document_describes_the_work_list(servers: Servers, http: httpx.Client) -> None:
    """Every parameter with its description; an answer as it is given."""
    document = httpx.get(f"{servers.stack.endpoint_url}/openapi.json").json()
    described = document["paths"]["/task-executions"]["get"]
    parameters = {each["name"]: each for each in described["parameters"]}
    assert set(parameters) == {
        *("with", "without", "flow_execution_id", "task_name", "state", "flow_id", "limit", "page")
    }
    for each in parameters.values():
        assert each["in"] == "query"
        assert not each["required"]
        assert each["description"]
    schema = described["responses"]["200"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**schema, "components": document["components"]})
    validator.validate(page_of(http))


def test_times_are_as_everywhere(http: httpx.Client, apply: Apply) -> None:
    """In UTC with microseconds."""
    execution = registered(apply)
    apply(tagging(add(execution, "task", "review_status", "pending")))
    (task,) = listed(http)
    assert datetime.fromisoformat(task["waiting_since"]).utcoffset() is not None
    assert len(task["waiting_since"]) == len("2026-01-01T12:00:00.000000Z")
