"""Writing over HTTP: the answer is the worker's decision, once for each idempotency key.

Most tests use the stack that all share. Tests that depend on timing use another endpoint, on a
Redis database without a worker: the test drains by hand, and inboxes hold three messages.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import SecretStr

from producers.contract.encoding import MAX_DETAILS
from producers.contract.errors import ErrorInfo
from producers.contract.messages import MAX_MESSAGE_BYTES, register_execution
from producers.contract.results import ResultRecord
from producers.redis_client import open_redis
from tests.support.api_errors import error_of
from tests.support.etag import revision_of
from tests.support.memory import max_resident
from tests.support.processes import endpoint_of
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, Tenant, applied
from tests.support.waiting import eventually
from worker.api.errors import ApiError
from worker.api.writes import _answer
from worker.auth import EXECUTIONS_WRITE, READ, WRITE, Authorizer, sign_token
from worker.db.repository import Repository
from worker.local.stack import ENDPOINT, command, free_port
from worker.local.supervisor import ProcessSpec, Supervisor
from worker.settings import Settings

REDIS_USER = "gateway-tests"
INBOX_LIMIT = 3
MARK = "must not be said again"
GOOD = {
    "operation": "add",
    "flow_execution_id": str(uuid4()),
    "task_name": MARK,
    "tag_type": MARK,
    "tag": MARK,
}


@pytest.fixture
def execution(repository: Repository, organization: UUID) -> str:
    execution = uuid4()
    applied(repository, organization, register_execution(execution))
    return str(execution)


def adding(execution: UUID | str, tag: str, **fields: Any) -> dict[str, Any]:
    names = {"flow_execution_id": str(execution), "task_name": "task", "tag_type": "type"}
    return {"operation": "add", **names, "tag": tag, **fields}


def removing(execution: UUID | str, tag: str, **fields: Any) -> dict[str, Any]:
    return adding(execution, tag, operation="remove", **fields)


def patch(http: httpx.Client, *operations: Any, **headers: str) -> httpx.Response:
    """Send one batch; `Idempotency_Key` and the like become headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.patch("/task-tags", json={"tags": operations}, headers=named)


def statuses(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [each["status"] for each in response.json()["tags"]]


def stored(http: httpx.Client, response: httpx.Response) -> ResultRecord:
    """Return the record to which an answer leads, as soon as it is there."""
    location = response.headers["location"]
    eventually(lambda: http.get(location).status_code == 200)
    record = ResultRecord.decode(http.get(location).content)
    assert location == f"/task-tags/batches/{record.batch_id}"
    return record


def tags_of(http: httpx.Client, execution: UUID | str) -> list[str]:
    response = http.get("/task-tags", params={"flow_execution_id": str(execution)})
    assert response.status_code == 200, response.text
    return [tag["tag"] for tag in response.json()]


def revision(http: httpx.Client, execution: UUID | str) -> str:
    response = http.get("/task-tags", params={"flow_execution_id": str(execution)})
    return f"{revision_of(response)}"


def refused(response: httpx.Response, status: int, code: str) -> list[tuple[Any, Any]]:
    """Check that an answer is this error; return index and field of each detail."""
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["code"] == code
    assert response.headers["x-request-id"] == response.json()["request_id"]
    for detail in error["details"]:
        assert set(detail) == {"index", "field", "message"}
        assert detail["message"]
    return [(detail["index"], detail["field"]) for detail in error["details"]]


def as_another(servers: Servers, token: str) -> httpx.Client:
    return client_of(servers.stack.endpoint_url, {"Authorization": f"Bearer {token}"})


def client_of(url: str, headers: dict[str, str]) -> httpx.Client:
    """Return a client without certificates: to load them takes longer than most tests."""
    return httpx.Client(base_url=url, headers=headers, timeout=30, verify=False)


# --- A batch of operations -----------------------------------------------------------------------


def test_every_operation_gets_its_status_in_their_order(http: httpx.Client, execution: str) -> None:
    """Each operation sees what those before it did; metadata is part of a tag."""
    response = patch(
        http,
        removing(execution, "a"),
        adding(execution, "a"),
        adding(execution, "a"),
        adding(execution, "a", tag_metadata={"by": "ada"}),
        removing(execution, "a", tag_metadata=None),
        adding(execution, "b"),
    )
    assert statuses(response) == [
        "not_found",
        "added",
        "already_exists",
        "added",
        "removed",
        "added",
    ]
    assert response.headers["content-type"] == "application/json"
    assert tags_of(http, execution) == ["a", "b"]


def test_the_location_leads_to_the_stored_record(http: httpx.Client, execution: str) -> None:
    """The record has the same statuses as the answer."""
    response = patch(http, adding(execution, "a"), removing(execution, "b"))
    record = stored(http, response)
    assert record.statuses == statuses(response) == ["added", "not_found"]


def test_an_error_of_a_later_worker_is_no_fault_of_the_endpoint() -> None:
    """Workers are upgraded before endpoints: a code that is not known is passed on."""
    error = ErrorInfo(code=cast(Any, "quota_exceeded"), message="too many", details=[])
    record = ResultRecord(batch_id=uuid4(), organization_id=uuid4(), error=error)
    with pytest.raises(ApiError) as raised:
        _answer("tag_batch", record.batch_id, record, is_kept=False)
    assert (raised.value.status, raised.value.code) == (422, "quota_exceeded")


def test_operations_on_several_executions_are_one_batch(http: httpx.Client, execution: str) -> None:
    """One change event for each execution, both of the batch that Location names."""
    other = str(uuid4())
    http.put(f"/flow-executions/{other}", json={})
    record = stored(http, patch(http, adding(execution, "a"), adding(other, "b")))
    for each in (execution, other):
        (event,) = http.get("/task-tags/changes", params={"flow_execution_id": each}).json()
        assert (event["revision"], event["batch_id"]) == (1, str(record.batch_id))
        assert event["changed_by"] == "ada"


def test_nothing_takes_effect_if_one_operation_names_what_is_unknown(
    http: httpx.Client, execution: str
) -> None:
    """404 with the index and the field of each that does; also a task that is not registered."""
    named = str(uuid4())
    http.put(f"/flow-executions/{named}", json={"task_names": ["known"]})
    response = patch(
        http,
        adding(execution, "good"),
        adding(uuid4(), "of an unknown execution"),
        adding(named, "good", task_name="known"),
        removing(named, "of an unknown task"),
    )
    assert refused(response, 404, "not_found") == [(1, "flow_execution_id"), (3, "task_name")]
    assert tags_of(http, execution) == tags_of(http, named) == []
    assert revision(http, execution) == "0"


def test_another_organizations_execution_can_not_be_changed(
    servers: Servers, http: httpx.Client, execution: str
) -> None:
    """The answer is that of an unknown one, except for the request id; also for states."""
    patch(http, adding(execution, "mine"))
    state = {"task_name": "task", "state": "failed"}
    with as_another(servers, servers.token(uuid4())) as stranger:
        for foreign, unknown in (
            [patch(stranger, removing(each, "mine")) for each in (execution, uuid4())],
            [
                stranger.put("/task-executions", json={"flow_execution_id": str(each), **state})
                for each in (execution, uuid4())
            ],
        ):
            refused(foreign, 404, "not_found")
            request_ids = [each.json()["request_id"] for each in (foreign, unknown)]
            assert foreign.text.replace(*request_ids) == unknown.text
        created = stranger.put(f"/flow-executions/{execution}", json={"task_names": ["theirs"]})
        assert created.status_code == 201
        assert tags_of(stranger, execution) == []
    assert tags_of(http, execution) == ["mine"]
    assert revision(http, execution) == "1"


def test_many_at_once_get_their_own_answers(http: httpx.Client, execution: str) -> None:
    """Fifty requests of one organization side by side, each with statuses that no other has."""
    patch(http, adding(execution, "old"))

    def send(number: int) -> httpx.Response:
        bits = [number >> place & 1 for place in range(6)]
        known_or_not = [(removing, adding)[bit](execution, ("none", "old")[bit]) for bit in bits]
        return patch(http, adding(execution, f"{number}"), *known_or_not)

    with ThreadPoolExecutor(50) as pool:
        responses = list(pool.map(send, range(50)))
    for number, response in enumerate(responses):
        words = [("not_found", "already_exists")[number >> place & 1] for place in range(6)]
        assert statuses(response) == ["added", *words]
        assert stored(http, response).statuses == ["added", *words]
    assert len({response.headers["location"] for response in responses}) == 50
    assert sorted(tags_of(http, execution)) == sorted(["old", *map(str, range(50))])


def test_many_organizations_at_once_get_their_own_answers(servers: Servers) -> None:
    """Also while subscriptions come and go: a request gets results of its organization only."""

    def send(number: int) -> list[str]:
        execution = str(uuid4())
        with as_another(servers, servers.token(uuid4())) as client:
            client.put(f"/flow-executions/{execution}", json={})
            for tag in range(number % 5):
                patch(client, adding(execution, f"{tag}"))
            return statuses(patch(client, *(adding(execution, f"{tag}") for tag in range(5))))

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(send, range(20)))
    for number, answer in enumerate(answers):
        assert answer.count("already_exists") == number % 5


@contextmanager
def hidden_records(servers: Servers) -> Iterator[None]:
    """Take from the endpoint the right to read stored results while the block runs."""
    with servers.owner() as connection:
        connection.execute("revoke select on tag_batches from task_tags_endpoint")
        try:
            yield
        finally:
            connection.execute("grant select on tag_batches to task_tags_endpoint")


def test_an_answer_is_received_and_need_not_be_looked_up(
    servers: Servers, http: httpx.Client, execution: str
) -> None:
    """Each request has subscribed in time, for stored results cannot be read here."""

    def send_some(number: int) -> list[int]:
        sent = [adding(execution, f"{number} {tag}") for tag in range(15)]
        return [patch(http, each, Prefer="wait=3").status_code for each in sent]

    with hidden_records(servers):
        assert send_some(0) == [200] * 15
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(send_some, range(1, 4))) == [[200] * 15] * 3


# --- Idempotency-Key -----------------------------------------------------------------------------


def test_the_same_key_takes_effect_once(http: httpx.Client, execution: str) -> None:
    """The second answer is the first one, although the tag was removed; no key, a new batch."""
    first = patch(http, adding(execution, "a"), Idempotency_Key="k")
    patch(http, removing(execution, "a"))
    second = patch(http, adding(execution, "a"), Idempotency_Key="k")
    assert statuses(first) == statuses(second) == ["added"]
    assert first.headers["location"] == second.headers["location"]
    assert tags_of(http, execution) == []
    assert statuses(patch(http, adding(execution, "a"))) == ["added"]


def test_the_same_key_from_many_threads_takes_effect_once(
    http: httpx.Client, execution: str
) -> None:
    """All of them get the one answer."""
    with ThreadPoolExecutor(12) as pool:
        sent = [
            pool.submit(patch, http, adding(execution, "a"), Idempotency_Key="k") for _ in range(12)
        ]
        responses = [each.result() for each in sent]
    assert {response.text for response in responses} == {'{"tags":[{"status":"added"}]}'}
    assert len({response.headers["location"] for response in responses}) == 1
    assert (tags_of(http, execution), revision(http, execution)) == (["a"], "1")


def test_the_same_body_in_other_words_is_the_same_batch(http: httpx.Client, execution: str) -> None:
    """Neither the order of keys counts, nor white space, nor 1.0 for 1."""
    first = {**adding(execution, "a"), "tag_metadata": {"a": 1, "b": "é"}}
    again = {"tag_metadata": {"b": "\u00e9", "a": 1.0}, **adding(execution, "a")}
    assert statuses(patch(http, first, Idempotency_Key="k")) == ["added"]
    body = json.dumps({"tags": [again]}, indent=4)
    response = http.patch("/task-tags", content=body, headers={"Idempotency-Key": "k"})
    assert statuses(response) == ["added"]


def test_another_body_under_the_same_key_is_a_conflict(http: httpx.Client, execution: str) -> None:
    """409, and nothing of it takes effect; a request of another kind is another body as well."""
    key = {"Idempotency-Key": "k"}
    patch(http, adding(execution, "a"), **key)
    assert refused(patch(http, adding(execution, "b"), **key), 409, "conflict") == []
    state = {"flow_execution_id": execution, "task_name": "task", "state": "failed"}
    refused(http.put("/task-executions", json=state, headers=key), 409, "conflict")
    refused(http.put(f"/flow-executions/{uuid4()}", json={}, headers=key), 409, "conflict")
    assert (tags_of(http, execution), revision(http, execution)) == (["a"], "1")


def test_a_key_is_its_actors_own(servers: Servers, organization: UUID, execution: str) -> None:
    """The same key of another actor, or of the actor in another organization, is another batch."""
    elsewhere = uuid4()
    locations = set()
    for owner, actor, key in (
        (organization, "ada", "k"),
        (organization, "eve", "k"),
        (organization, "a", "b c"),
        (organization, "a b", "c"),
        (elsewhere, "ada", "k"),
    ):
        with as_another(servers, servers.token(owner, sub=actor)) as client:
            client.put(f"/flow-executions/{execution}", json={})
            response = patch(client, adding(execution, f"{actor}{key}"), Idempotency_Key=key)
            assert statuses(response) == ["added"] or key == "c"
            locations.add(response.headers["location"])
    assert len(locations) == 5


def test_a_refusal_is_the_answer_to_its_key(http: httpx.Client) -> None:
    """`not_found` stays the answer to its key, as the record says; a new key is decided again."""
    later = str(uuid4())
    for _ in range(2):
        response = patch(http, adding(later, "a"), Idempotency_Key="k")
        assert refused(response, 404, "not_found") == [(0, "flow_execution_id")]
        http.put(f"/flow-executions/{later}", json={})
    assert statuses(patch(http, adding(later, "a"), Idempotency_Key="other")) == ["added"]


def test_an_error_that_is_stored_asks_for_another_key(http: httpx.Client, execution: str) -> None:
    """Each of the three that a repetition with the key gets again; without a key none does."""
    variants = [adding(execution, "v", tag_metadata=number) for number in range(250)]
    for start in range(0, 250, 100):
        patch(http, *variants[start : start + 100]).raise_for_status()
    missing = {**adding(execution, "none"), "exists": True}
    del missing["operation"]
    bodies = {
        "not_found": body(adding(uuid4(), "a")),
        "precondition_failed": body(adding(execution, "a"), conditions=[missing]),
        "too_large": body(adding(execution, "v", tag_metadata="x")),
    }
    for code, content in bodies.items():
        for headers in ({"Idempotency-Key": code}, {"Idempotency-Key": code}, {}):
            error = error_of(http.patch("/task-tags", content=content, headers=headers))
            assert error["code"] == code
            assert error["message"].endswith("use another key for a retry") == bool(headers)


def test_a_malformed_key_is_refused(http: httpx.Client, execution: str) -> None:
    """400 that names the header, and nothing takes effect."""
    for key in (b"", b"x" * 201, b"a\tb", b"\xc3\xa9", b"x" * 5000):
        headers = [(b"Idempotency-Key", key)]
        response = http.patch("/task-tags", content=body(adding(execution, "a")), headers=headers)
        assert refused(response, 400, "bad_request") == [(None, "Idempotency-Key")], key
    assert tags_of(http, execution) == []


def test_any_printable_key_will_do(http: httpx.Client, execution: str) -> None:
    """Up to 200 characters, each of which counts."""
    keys = ("x", "x" * 200, "x" * 199 + "y", 'a key, "quoted": {}~!', "01a20284-3291-7fc2", "0")
    for number, key in enumerate(keys * 2):
        operation = adding(execution, f"{number % len(keys)}")
        assert statuses(patch(http, operation, Idempotency_Key=key)) == ["added"], key


# --- Bodies --------------------------------------------------------------------------------------


def body(*operations: Any, **fields: Any) -> bytes:
    return json.dumps({"tags": operations, **fields}).encode()


def wrong(**fields: Any) -> bytes:
    """Return a body whose second operation has these fields."""
    return body(GOOD, {**GOOD, **fields})


def without(name: str) -> bytes:
    return body(GOOD, {key: value for key, value in GOOD.items() if key != name})


def nested(levels: int) -> Any:
    value: Any = MARK
    for _ in range(levels):
        value = [value]
    return value


WHOLE: list[tuple[Any, Any]] = [(None, None)]
BODIES: dict[str, tuple[bytes, list[tuple[Any, Any]]]] = {
    "nothing": (b"", WHOLE),
    "no JSON": (f"{MARK}".encode(), WHOLE),
    "JSON that is cut off": (body(GOOD)[:-1], WHOLE),
    "something behind the JSON": (body(GOOD) + b"{}", WHOLE),
    "not UTF-8": (b'{"tags": "\xff"}', WHOLE),
    "UTF-16": (body(GOOD).decode().encode("utf-16"), WHOLE),
    "100,000 levels": (b"[" * 100_000, WHOLE),
    "a list": (f'["{MARK}"]'.encode(), WHOLE),
    "a string": (f'"{MARK}"'.encode(), WHOLE),
    "null": (b"null", WHOLE),
    "a doubled key": (b'{"tags": [], "tags": []}', WHOLE),
    "a doubled key in an operation": (body(GOOD).replace(b'"tag":', b'"tag": "", "tag":'), WHOLE),
    "a doubled key in metadata": (
        wrong(tag_metadata={"key": MARK}).replace(b'{"key"', b'{"key": 1, "key"'),
        WHOLE,
    ),
    "an empty object": (b"{}", [(None, "tags")]),
    "tags that are null": (b'{"tags": null}', [(None, "tags")]),
    "tags that are an object": (b'{"tags": {}}', [(None, "tags")]),
    "no operations": (body(), [(None, "tags")]),
    "101 operations": (body(*[GOOD] * 101), [(None, "tags")]),
    "an operation that is a string": (body(GOOD, MARK), [(1, None)]),
    "an operation that is null": (body(GOOD, None), [(1, None)]),
    **{
        f"an unknown field {name}": (body(GOOD, **{name: value}), [(None, name)])
        for name, value in {
            "unknown": MARK,
            "batch_id": str(uuid4()),
            "reply_to": "somebody",
            "kind": "tag_batch",
            "schema_version": 1,
            "flow_execution_id": str(uuid4()),
        }.items()
    },
    "an unknown field that is no plain name": (body(GOOD, **{MARK: 1}), WHOLE),
    "an unknown field with a surrogate": (body(GOOD, **{"\ud800": 1}), WHOLE),
    "an unknown field of an operation": (wrong(unknown=MARK), [(1, "unknown")]),
    "an unknown odd field of an operation": (wrong(**{MARK: MARK}), [(1, None)]),
    "a field of an operation with a surrogate": (wrong(**{"\ud800": MARK}), [(1, None)]),
    **{f"no {name}": (without(name), [(1, name)]) for name in GOOD},
    **{
        f"{name} of type {type(value).__name__}": (wrong(**{name: value}), [(1, name)])
        for name in GOOD
        for value in (None, 5, [MARK], {MARK: MARK}, True, 10**30)
    },
    **{
        f"{name} that is {what}": (wrong(**{name: value}), [(1, name)])
        for name, longest in (("task_name", 200), ("tag_type", 100), ("tag", 200))
        for what, value in {
            "empty": "",
            "too long": (MARK * 20)[: longest + 1],
            "a lone surrogate": f"{MARK}\udc00",
            "U+0000": f"{MARK}\x00",
            "NaN": float("nan"),
        }.items()
    },
    "an unknown operation": (wrong(operation=MARK), [(1, "operation")]),
    "an execution that is no UUID": (wrong(flow_execution_id=MARK), [(1, "flow_execution_id")]),
    **{
        f"metadata with {what}": (wrong(tag_metadata=value), [(1, "tag_metadata")])
        for what, value in {
            "NaN": {"a": [float("nan")]},
            "an infinity": -float("inf"),
            "an integer beyond 64 bits": {"a": 2**63},
            "a small integer beyond 64 bits": [-(2**63) - 1],
            "an integer of 4,000 digits": int("9" * 4000),
            "33 levels": nested(33),
            "900 levels": nested(900),
            "over 8 KiB": (MARK * 400)[: 8 * 1024 - 1],
            "a lone surrogate": [f"{MARK}\ud800"],
            "a lone surrogate in a key": {f"{MARK}\ud800": 1},
            "U+0000": {"a": f"{MARK}\x00"},
            "U+0000 in a key": {f"{MARK}\x00": 1},
        }.items()
    },
    "a number beyond a double": (
        wrong(tag_metadata=7).replace(b": 7}", b": 1e999}"),
        [(1, "tag_metadata")],
    ),
    "several faults": (
        body({**GOOD, "tag": ""}, GOOD, {**GOOD, "operation": "?", "tag_type": 1}, more=1),
        [(0, "tag"), (2, "operation"), (2, "tag_type"), (None, "more")],
    ),
}


def test_a_wrong_body_is_refused(http: httpx.Client) -> None:
    """400 with the index and the field of every fault, in words that quote nothing."""
    for name, (content, faults) in BODIES.items():
        response = http.patch("/task-tags", content=content)
        found = refused(response, 400, "bad_request")
        assert sorted(found, key=str) == sorted(faults, key=str), name
        assert MARK not in response.text, name


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"tags": [{}] * 100}),
        json.dumps({"tags": [{f"unknown{n}": 1 for n in range(30)}] * 100}),
    ],
)
def test_very_many_faults_are_counted_not_listed(http: httpx.Client, content: str) -> None:
    """A small body does not make a large answer."""
    response = http.patch("/task-tags", content=content)
    details = refused(response, 400, "bad_request")
    assert len(details) == MAX_DETAILS + 1
    assert "more faults" in response.json()["error"]["details"][-1]["message"]


def test_what_is_just_within_the_limits_is_taken(http: httpx.Client, execution: str) -> None:
    """Longest names, deepest and largest metadata, extreme numbers, 100 operations, 1 MiB."""
    metadata = [nested(32), "x" * (8 * 1024 - 2), 2**63 - 1, -(2**63), 1e308, None, "\U0001f600"]
    operations = [
        adding(execution, f"{number}" + "é" * 196, task_name="t" * 200, tag_type="😀" * 100)
        | ({"tag_metadata": metadata[number]} if number < len(metadata) else {})
        for number in range(100)
    ]
    content = body(*operations)
    response = http.patch("/task-tags", content=content + b" " * (MAX_MESSAGE_BYTES - len(content)))
    assert statuses(response) == ["added"] * 100
    assert len(tags_of(http, execution)) == 100


def test_a_body_over_a_mebibyte_is_413(http: httpx.Client, execution: str) -> None:
    """With a declared length or in chunks; the connection can be used again."""
    content = body(adding(execution, "a"))
    padding = b" " * (MAX_MESSAGE_BYTES + 1 - len(content))
    chunks = [content, *(padding[at : at + 65536] for at in range(0, len(padding), 65536))]
    for large in (content + padding, iter(chunks)):
        assert refused(http.patch("/task-tags", content=large), 413, "body_too_large") == []
        assert tags_of(http, execution) == []
    assert statuses(http.patch("/task-tags", content=iter([content]))) == ["added"]


def test_many_large_bodies_at_once_need_little_memory(
    servers: Servers, http: httpx.Client, execution: str
) -> None:
    """They are parsed one after the other, and nobody else waits for all of them."""
    large = b'{"tags": [' + b"{}," * 349_000 + b"{}]}"
    before = max_resident(endpoint_of(servers))
    with ThreadPoolExecutor(30) as threads:
        send = partial(http.patch, "/task-tags", content=large, timeout=120)
        futures = [threads.submit(send) for _ in range(30)]
        assert statuses(patch(http, adding(execution, "a"))) == ["added"]
        assert not all(future.done() for future in futures)
        assert {future.result().status_code for future in futures} == {400}
    assert max_resident(endpoint_of(servers)) - before < 300  # without a limit, 800


def body_of_size(execution: str, size: int) -> bytes:
    """Return a body of so many bytes, or up to five less, that has not a byte to spare."""
    operations = [
        adding(execution, f"{number}", task_name="\x01" * 200, tag_metadata="x" * 8190)
        for number in range(100)
    ]
    spare = (size - len(compact(operations))) // 6
    for operation in operations:
        more = min(spare, 195)
        operation["tag"] += "\x01" * more  # 6 bytes each
        spare -= more
    return compact(operations)


def compact(operations: list[Any]) -> bytes:
    return json.dumps({"tags": operations}, separators=(",", ":")).encode()


def test_a_body_whose_message_is_over_a_mebibyte_is_refused(
    http: httpx.Client, execution: str
) -> None:
    """What is added to a body on its way counts as well: 400, and nothing takes effect."""
    content = body_of_size(execution, MAX_MESSAGE_BYTES)
    assert MAX_MESSAGE_BYTES - 6 < len(content) <= MAX_MESSAGE_BYTES
    response = http.patch("/task-tags", content=content)
    assert refused(response, 400, "bad_request") == WHOLE
    assert tags_of(http, execution) == []
    content = body_of_size(execution, MAX_MESSAGE_BYTES - 300)
    assert statuses(http.patch("/task-tags", content=content)) == ["added"] * 100


def test_a_write_takes_no_parameters(http: httpx.Client, execution: str) -> None:
    """One is named, not overlooked."""
    content = body(adding(execution, "a"))
    response = http.patch("/task-tags", params={"task_name": MARK}, content=content)
    assert refused(response, 400, "bad_request") == [(None, "task_name")]
    assert MARK not in response.text
    assert tags_of(http, execution) == []


# --- Tokens --------------------------------------------------------------------------------------


def writes(client: httpx.Client, execution: str) -> dict[str, httpx.Response]:
    """Send one write of each kind; return the answers by the scope that is needed and the path."""
    state = {"flow_execution_id": execution, "task_name": "task", "state": "failed"}
    return {
        f"{WRITE} tags": client.patch("/task-tags", content=body(adding(execution, "a"))),
        f"{EXECUTIONS_WRITE} executions": client.put(
            f"/flow-executions/{execution}", json={"task_names": None}
        ),
        f"{EXECUTIONS_WRITE} states": client.put("/task-executions", json=state),
    }


def token_of_an_hour_ago(servers: Servers, organization: UUID) -> str:
    return sign_token(
        servers.settings,
        organization_id=organization,
        actor="ada",
        scopes=(READ, WRITE, EXECUTIONS_WRITE),
        lifetime=timedelta(hours=-1),
    )


def test_a_missing_wrong_or_expired_token_is_401(
    servers: Servers, http: httpx.Client, organization: UUID, execution: str
) -> None:
    """For any body, and nothing takes effect."""
    for header in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic dTpw"},
        {"Authorization": f"Bearer {MARK.replace(' ', '-')}"},
        {"Authorization": f"Bearer {token_of_an_hour_ago(servers, organization)}"},
    ):
        with client_of(servers.stack.endpoint_url, header) as client:
            answers = [*writes(client, execution).values(), client.patch("/task-tags", content="?")]
            for response in answers:
                assert refused(response, 401, "unauthorized") == []
                assert response.headers["www-authenticate"] == "Bearer"
                assert MARK.replace(" ", "-") not in response.text
    assert revision(http, execution) == "0"


def test_a_token_in_the_url_is_none(servers: Servers, token: str) -> None:
    """It would be in logs: 401, as without one."""
    url = f"{servers.stack.endpoint_url}/task-tags"
    response = httpx.patch(url, params={"token": token}, content=body(GOOD))
    assert refused(response, 401, "unauthorized") == []


@pytest.mark.parametrize("scope", [READ, WRITE, EXECUTIONS_WRITE])
def test_a_token_can_do_what_its_scope_allows(
    servers: Servers, http: httpx.Client, organization: UUID, execution: str, scope: str
) -> None:
    """And no more: 403 that names the scope which it lacks."""
    with as_another(servers, servers.token(organization, scope)) as client:
        for needed, response in writes(client, execution).items():
            if needed.startswith(scope):
                assert response.status_code == 200, needed
            else:
                assert refused(response, 403, "forbidden") == []
                assert needed.split()[0] in response.json()["error"]["message"]
    assert tags_of(http, execution) == (["a"] if scope == WRITE else [])


# --- Executions ----------------------------------------------------------------------------------


def put(http: httpx.Client, execution: str, content: Any) -> tuple[int, Any]:
    response = http.put(f"/flow-executions/{execution}", json=content)
    assert stored(http, response).statuses == [response.json()["status"]]
    return response.status_code, response.json()


def test_an_execution_is_registered_once_and_its_names_grow(http: httpx.Client) -> None:
    """201, then 200; the names of all requests may be tagged, and null is every name, for ever."""
    execution = str(uuid4())
    exists = (200, {"status": "already_exists"})
    assert put(http, execution, {"task_names": ["a"]}) == (201, {"status": "registered"})
    assert put(http, execution, {"task_names": ["a"]}) == exists
    assert put(http, execution, {"task_names": []}) == exists
    wanted = [adding(execution, "x", task_name=name) for name in ("a", "b", "c")]
    response = patch(http, *wanted)
    assert refused(response, 404, "not_found") == [(1, "task_name"), (2, "task_name")]
    assert put(http, execution, {"task_names": ["b"]}) == exists
    assert statuses(patch(http, *wanted[:2])) == ["added"] * 2
    assert put(http, execution, {"task_names": None}) == exists
    assert put(http, execution, {"task_names": ["a"]}) == exists
    assert statuses(patch(http, wanted[2])) == ["added"]


def test_an_execution_without_names_takes_every_task(http: httpx.Client) -> None:
    """The field may be null, or left out."""
    for content in ({}, {"task_names": None}):
        execution = str(uuid4())
        assert put(http, execution, content) == (201, {"status": "registered"})
        assert statuses(patch(http, adding(execution, "a", task_name="any"))) == ["added"]


def test_no_names_is_not_every_name(http: httpx.Client) -> None:
    """An empty list lets no task be tagged, until there are names."""
    execution = str(uuid4())
    put(http, execution, {"task_names": []})
    response = patch(http, adding(execution, "a"))
    assert refused(response, 404, "not_found") == [(0, "task_name")]


def test_a_wrong_registration_is_refused(http: httpx.Client) -> None:
    """400 with the place of each name that is wrong; nothing is registered."""
    mark, execution = MARK.encode(), uuid4()
    for content, faults in (
        (b"[]", WHOLE),
        (b"{", WHOLE),
        (b'{"task_names": [], "task_names": null}', WHOLE),
        (b'{"unknown": 1}', [(None, "unknown")]),
        (b'{"flow_execution_id": "%b"}' % mark, [(None, "flow_execution_id")]),
        (b'{"batch_id": 1, "kind": 2}', [(None, "batch_id")]),  # unknown fields are one fault
        (b'{"task_names": "%b"}' % mark, [(None, "task_names")]),
        (b'{"task_names": {}}', [(None, "task_names")]),
        (b'{"task_names": ["a", 1, "", null]}', [(n, "task_names") for n in (1, 2, 3)]),
        (b'{"task_names": ["a\\u0000"]}', [(0, "task_names")]),
        (b'{"task_names": ["\\ud800"]}', [(0, "task_names")]),
        (b'{"task_names": ["%b", "%b"]}' % (b"x" * 200, mark * 20), [(1, "task_names")]),
    ):
        response = http.put(f"/flow-executions/{execution}", content=content)
        assert sorted(refused(response, 400, "bad_request"), key=str) == faults, content
        assert MARK not in response.text
    query = {"flow_execution_id": str(execution)}
    assert http.get("/task-tags", params=query).status_code == 404


def test_an_execution_that_is_no_uuid_is_refused(http: httpx.Client) -> None:
    """400 that names it, not 404."""
    for wrong_id in ("x", "%00", "0" * 33, "{}", "01970000-0000-7000-8000"):
        response = http.put(f"/flow-executions/{wrong_id}", json={})
        assert refused(response, 400, "bad_request") == [(None, "flow_execution_id")], wrong_id


def test_a_registration_with_a_key_takes_effect_once(http: httpx.Client) -> None:
    """The answer is 201 both times: it is the answer to the one request."""
    execution, key = uuid4(), {"Idempotency-Key": "k"}
    for _ in range(2):
        response = http.put(f"/flow-executions/{execution}", json={}, headers=key)
        assert (response.status_code, response.json()) == (201, {"status": "registered"})


# --- States of tasks -----------------------------------------------------------------------------


def put_state(http: httpx.Client, execution: str, state: Any, name: str = "task") -> httpx.Response:
    content = {"flow_execution_id": execution, "task_name": name, "state": state}
    return http.put("/task-executions", json=content)


def test_a_state_is_recorded_and_told(http: httpx.Client, execution: str, token: str) -> None:
    """A change of state is a change event with who and when; the same state again is none."""
    recorded: list[httpx.Response] = []
    for state in ("queued", "running", "failed", "queued", "completed"):
        recorded.append(put_state(http, execution, state))
        assert (recorded[-1].status_code, recorded[-1].json()) == (200, {"status": "recorded"})
        assert put_state(http, execution, state).json() == {"status": "unchanged"}
    query = {"flow_execution_id": execution}
    events = http.get("/task-tags/changes", params=query).json()
    assert [event["revision"] for event in events] == [1, 2, 3, 4, 5]
    last = events[-1]
    assert last["changes"] == [
        {
            "change": "state",
            "task": {
                "flow_execution_id": execution,
                "task_name": "task",
                "state": "completed",
                "state_changed_at": last["changed_at"],
                "state_changed_by": "ada",
            },
        }
    ]
    assert last["batch_id"] == str(stored(http, recorded[-1]).batch_id)
    (task,) = http.get("/task-executions", params=query).json()["task_executions"]
    assert {**last["changes"][0]["task"], "tags": []}.items() <= task.items()


def test_a_wrong_state_is_refused(http: httpx.Client, execution: str) -> None:
    """400 with every field that is wrong."""
    for state in (MARK, "Failed", "", None, 1, ["failed"], True):
        response = put_state(http, execution, state)
        assert refused(response, 400, "bad_request") == [(None, "state")], state
        assert MARK not in response.text
    fields = [(None, name) for name in ("flow_execution_id", "state", "task_name")]
    for content, faults in (
        (b"", WHOLE),
        (b"[]", WHOLE),
        (b"{}", fields),
        (b'{"flow_execution_id": 1, "task_name": "", "state": [], "a": 1}', [(None, "a"), *fields]),
    ):
        response = http.put("/task-executions", content=content)
        assert sorted(refused(response, 400, "bad_request"), key=str) == faults, content
    assert revision(http, execution) == "0"


def test_a_state_of_what_is_unknown_is_404(http: httpx.Client) -> None:
    """An unknown execution, or a task that is not registered; no index, for there is one task."""
    response = put_state(http, str(uuid4()), "failed")
    assert refused(response, 404, "not_found") == [(None, "flow_execution_id")]
    execution = str(uuid4())
    put(http, execution, {"task_names": ["task"]})
    response = put_state(http, execution, "failed", "unregistered")
    assert refused(response, 404, "not_found") == [(None, "task_name")]
    assert put_state(http, execution, "failed").json() == {"status": "recorded"}


# --- The document --------------------------------------------------------------------------------


def test_what_is_answered_and_what_is_taken_is_in_the_document(
    servers: Servers, http: httpx.Client, execution: str
) -> None:
    """Status, body and headers of real answers, and real bodies, fit the OpenAPI document."""
    document = http.get("/openapi.json").json()
    tags, executions = "/task-tags", "/flow-executions/{flow_execution_id}"
    states = "/task-executions"
    methods = {tags: "patch", executions: "put", states: "put"}
    answers: list[tuple[str, httpx.Response]] = []
    mine = http.headers["authorization"]
    for authorization, prefer in (
        ("", ""),
        (f"Bearer {servers.token(uuid4(), READ)}", ""),
        (mine, ""),
        (mine, "wait=0"),
    ):
        http.headers.update({"authorization": authorization, "prefer": prefer})
        answers += zip(methods, writes(http, execution).values(), strict=True)
    http.headers["prefer"] = ""
    key = {"Idempotency-Key": "k"}
    answers += [
        (executions, http.put(f"/flow-executions/{uuid4()}", json={}, headers=key)),
        (executions, http.put(f"/flow-executions/{uuid4()}", json={}, headers=key)),
        (executions, http.put("/flow-executions/x", json={})),
        (tags, http.patch("/task-tags", content=b"{}")),
        (tags, http.patch("/task-tags", content=b" " * (MAX_MESSAGE_BYTES + 1))),
        (tags, http.patch("/task-tags", content=iter([b" " * (MAX_MESSAGE_BYTES + 1)]))),
        (tags, patch(http, adding(uuid4(), "a"))),
        (tags, patch(http, adding(execution, "b"), **key)),
        (states, put_state(http, str(uuid4()), "failed")),
        (states, put_state(http, execution, "?")),
    ]
    for path, response in answers:
        described = document["paths"][path][methods[path]]["responses"]
        described = described[str(response.status_code)]
        schema = described["content"]["application/json"]["schema"]
        schema = {**schema, "components": document["components"]}
        Draft202012Validator(schema).validate(response.json())
        assert all(name in response.headers for name in described["headers"]), response.text
    seen = {response.status_code for _, response in answers}
    assert seen == {200, 201, 202, 400, 401, 403, 404, 409, 413}
    taken = document["paths"]["/task-tags"]["patch"]["requestBody"]["content"]["application/json"]
    bodies = Draft202012Validator({**taken["schema"], "components": document["components"]})
    assert bodies.is_valid({"tags": [adding(execution, "a"), removing(execution, "a")]})
    for content in (b"{}", body(), body(GOOD, more=1), body({**GOOD, "more": 1})):
        assert not bodies.is_valid(json.loads(content))


# --- Waiting -------------------------------------------------------------------------------------


def test_a_caller_need_not_wait(http: httpx.Client, execution: str) -> None:
    """202 with the batch's id, and the record is soon at Location."""
    for prefer in (
        *("respond-async", "wait=0", "Respond-Async, return=minimal"),
        *('Wait = "0"', "wait=0; unit=s", "return=minimal, respond-async; x"),
    ):
        response = patch(http, adding(execution, prefer), Prefer=prefer)
        assert response.status_code == 202
        batch_id = response.json()["batch_id"]
        assert response.json() == {"batch_id": batch_id}
        record = stored(http, response)
        assert (str(record.batch_id), record.statuses) == (batch_id, ["added"])
        assert prefer in tags_of(http, execution)


def test_also_a_refusal_is_soon_at_its_location(http: httpx.Client) -> None:
    """Who did not wait finds the error there."""
    response = patch(http, adding(uuid4(), "a"), Prefer="respond-async")
    record = stored(http, response)
    assert record.error is not None
    assert record.error.code == "not_found"
    execution = uuid4()
    response = http.put(f"/flow-executions/{execution}", json={}, headers={"Prefer": "wait=0"})
    assert response.status_code == 202
    assert stored(http, response).statuses == ["registered"]


def test_who_did_not_wait_may_ask_again_with_the_key(http: httpx.Client, execution: str) -> None:
    """And gets the one result."""
    headers = {"Idempotency-Key": "k"}
    patch(http, adding(execution, "a"), Prefer="respond-async", **headers)
    assert statuses(patch(http, adding(execution, "a"), **headers)) == ["added"]


@dataclass(frozen=True)
class QuietEndpoint:
    """An endpoint with small inboxes and its own user, on the Redis database without a worker."""

    url: str
    supervisor: Supervisor

    @property
    def process(self) -> subprocess.Popen[bytes]:
        ((_, process),) = self.supervisor.running
        return process

    @property
    def log(self) -> str:
        return self.supervisor.log("quiet endpoint").read_text()

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", verify=False).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def quiet_endpoint(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QuietEndpoint]:
    port = free_port(0)
    redis_url = servers.stack.redis_url.replace("?db=0", "?db=1")
    assert servers.settings.jwt_secret is not None
    with Supervisor(tmp_path_factory.mktemp("quiet")) as supervisor:
        endpoint = QuietEndpoint(f"http://127.0.0.1:{port}", supervisor)
        child = ProcessSpec(
            name="quiet endpoint",
            argv=[*command(ENDPOINT), "--host", "127.0.0.1", "--port", str(port)],
            ready=endpoint.answers,
            environment={
                "TASK_TAGS_REDIS_URL": redis_url.replace("unix://", f"unix://{REDIS_USER}:x@"),
                "TASK_TAGS_DATABASE_URL": servers.endpoint_url,
                "TASK_TAGS_JWT_SECRET": servers.settings.jwt_secret.get_secret_value(),
                "TASK_TAGS_INBOX_LIMIT": str(INBOX_LIMIT),
            },
        )
        with open_redis(redis_url) as redis:
            grant_all(redis)
            supervisor.start(child)
            yield endpoint
            redis.acl_deluser(REDIS_USER)


@pytest.fixture
def quiet(quiet_endpoint: QuietEndpoint, tenant: Tenant) -> Iterator[httpx.Client]:
    """A client of that endpoint, in whose organization nothing is applied until the test drains."""
    grant_all(tenant.redis)
    quiet_endpoint.supervisor.restart_ended(lambda _: None)
    eventually(quiet_endpoint.answers)
    with client_of(quiet_endpoint.url, {"Authorization": f"Bearer {tenant.token}"}) as client:
        yield client


def grant_all(redis: Any) -> None:
    """Give the quiet endpoint's user every right again."""
    redis.execute_command("ACL", "SETUSER", REDIS_USER, "on", ">x", "~*", "&*", "+@all")


@contextmanager
def sending(quiet: httpx.Client, *sent: tuple[Any, dict[str, str]]) -> Iterator[list[Any]]:
    """Send batches of one operation side by side; yield the futures of their answers."""
    with ThreadPoolExecutor(len(sent)) as pool:
        yield [pool.submit(patch, quiet, operation, **headers) for operation, headers in sent]


def waiting(tenant: Tenant) -> int:
    length: int = tenant.redis.xlen(f"task-tags:{{{tenant.organization}}}:inbox")
    return length


def test_who_waits_gets_202_when_the_time_is_up(quiet: httpx.Client, tenant: Tenant) -> None:
    """After the seconds of `Prefer: wait`; the batch is applied later, see its Location."""
    for prefer in ("wait=1", "respond-async, wait=1"):
        begin = time.monotonic()
        response = patch(quiet, adding(EXECUTION, prefer), Prefer=prefer)
        assert response.status_code == 202
        assert 1 <= time.monotonic() - begin < 9
    location = response.headers["location"]
    assert location == f"/task-tags/batches/{response.json()['batch_id']}"
    assert refused(quiet.get(location), 404, "not_found") == []
    tenant.drain()
    assert stored(quiet, response).statuses == ["added"]


def test_a_full_inbox_is_429(quiet: httpx.Client, tenant: Tenant) -> None:
    """With Retry-After, and nothing is accepted; the key can be used again. Others are not full."""
    for number in range(INBOX_LIMIT):
        response = patch(quiet, adding(EXECUTION, f"{number}"), Prefer="respond-async")
        assert response.status_code == 202
    for prefer in ("wait=5", "respond-async"):
        response = patch(quiet, adding(EXECUTION, "late"), Prefer=prefer, Idempotency_Key="k")
        assert refused(response, 429, "inbox_full") == []
        assert int(response.headers["retry-after"]) >= 1
        assert "location" not in response.headers
    other = {"Authorization": f"Bearer {tenant.servers.token(uuid4())}", "Prefer": "wait=0"}
    assert patch(quiet, adding(EXECUTION, "other"), **other).status_code == 202
    assert waiting(tenant) == INBOX_LIMIT
    tenant.drain()
    assert tenant.tags() == ["0", "1", "2"]
    with sending(quiet, (adding(EXECUTION, "late"), {"Idempotency_Key": "k"})) as (future,):
        eventually(lambda: waiting(tenant))
        tenant.drain()
        assert statuses(future.result()) == ["added"]


def test_the_same_key_twice_while_it_waits_is_answered_twice(
    quiet: httpx.Client, tenant: Tenant
) -> None:
    """Both requests are in the inbox before either is applied."""
    one = adding(EXECUTION, "a"), {"Idempotency_Key": "k"}
    with sending(quiet, one, one) as futures:
        eventually(lambda: waiting(tenant) == 2)
        tenant.drain()
        assert [statuses(future.result()) for future in futures] == [["added"], ["added"]]
    assert [event.revision for event in tenant.events()] == [1]  # once for both
    assert tenant.tags() == ["a"]


def test_another_body_at_the_same_time_is_a_conflict(quiet: httpx.Client, tenant: Tenant) -> None:
    """One of two bodies under one key takes effect; the other request must not get its result."""
    key = {"Idempotency_Key": "k"}
    with sending(quiet, (adding(EXECUTION, "a"), key), (adding(EXECUTION, "b"), key)) as futures:
        eventually(lambda: waiting(tenant) == 2)
        tenant.drain()
        codes = {tag: each.result().status_code for tag, each in zip("ab", futures, strict=True)}
    (tag,) = tenant.tags()
    assert codes == {tag: 200, ({"a", "b"} - {tag}).pop(): 409}


def test_another_body_never_gets_the_first_ones_result(quiet: httpx.Client, tenant: Tenant) -> None:
    """Also while workers are slow: the result stored under the key is of another request."""
    key = {"Idempotency_Key": "k"}
    with sending(quiet, (adding(EXECUTION, "a"), key)) as (future,):
        eventually(lambda: waiting(tenant))
        tenant.drain()
        assert statuses(future.result()) == ["added"]
    response = patch(quiet, adding(EXECUTION, "b"), Prefer="wait=1", **key)
    assert response.status_code in (202, 409), response.text


def test_who_gives_up_takes_nothing_from_another_who_waits(
    quiet: httpx.Client, tenant: Tenant
) -> None:
    """Two wait under one key, one briefly; the other still gets a refusal, which is not stored."""
    key = "k"
    others = Authorizer(Settings.model_construct(jwt_secret=SecretStr("another secret" * 3)))
    patient = adding(EXECUTION, "a"), {"Idempotency_Key": key, "Prefer": "wait=3"}
    hasty = adding(EXECUTION, "a"), {"Idempotency_Key": key, "Prefer": "wait=1"}
    with sending(quiet, patient, hasty) as (long, short):
        assert short.result().status_code == 202
        tenant.drain(authorizer=others)
        refused(long.result(), 401, "unauthorized")


def test_a_result_that_is_not_received_is_looked_up(quiet: httpx.Client, tenant: Tenant) -> None:
    """The endpoint may not subscribe: publications are lost; the stored record is the answer."""
    tenant.redis.execute_command("ACL", "SETUSER", REDIS_USER, "resetchannels")
    with sending(quiet, (adding(EXECUTION, "a"), {})) as (future,):
        eventually(lambda: waiting(tenant))
        tenant.drain()
        assert [record.statuses for record in tenant.records()] == [["added"]]
        response = future.result()
    assert statuses(response) == ["added"]
    assert stored(quiet, response).statuses == ["added"]


def test_killed_subscriptions_lose_no_answer(quiet: httpx.Client, tenant: Tenant) -> None:
    """Also what is published before they are made again is not lost."""
    ended = threading.Event()
    kills: list[int] = []

    def kill() -> None:
        while not ended.wait(0.005):
            kills.append(tenant.redis.client_kill_filter(_type="pubsub", user=REDIS_USER))

    killing = threading.Thread(target=kill)
    killing.start()
    try:
        with sending(quiet, *[(adding(EXECUTION, f"{n}"), {}) for n in range(3)]) as futures:
            eventually(lambda: waiting(tenant) == 3 and sum(kills) > 0)
            tenant.drain()
            assert [statuses(future.result()) for future in futures] == [["added"]] * 3
    finally:
        ended.set()
        killing.join()


def test_what_redis_refuses_is_503(quiet: httpx.Client, tenant: Tenant) -> None:
    """With Retry-After; later the endpoint continues, and the same key can be used again."""
    tenant.redis.execute_command("ACL", "SETUSER", REDIS_USER, "-evalsha", "-eval")
    response = patch(quiet, adding(EXECUTION, "a"), Idempotency_Key="k")
    assert refused(response, 503, "unavailable") == []
    assert int(response.headers["retry-after"]) >= 1
    grant_all(tenant.redis)
    response = patch(quiet, adding(EXECUTION, "a"), Idempotency_Key="k", Prefer="wait=0")
    tenant.drain()
    assert stored(quiet, response).statuses == ["added"]


def test_a_redis_without_memory_is_503(quiet: httpx.Client, tenant: Tenant) -> None:
    """Nothing is accepted, and that is said."""
    tenant.redis.config_set("maxmemory", 1)
    try:
        response = patch(quiet, adding(EXECUTION, "a"))
    finally:
        tenant.redis.config_set("maxmemory", 0)
    assert refused(response, 503, "unavailable") == []
    assert waiting(tenant) == 0


def test_an_endpoint_that_is_told_to_end_answers_first(
    quiet_endpoint: QuietEndpoint, quiet: httpx.Client, tenant: Tenant
) -> None:
    """It takes no more, but who waits still gets the result; then it ends, without a complaint."""
    with sending(quiet, (adding(EXECUTION, "a"), {})) as (future,):
        eventually(lambda: waiting(tenant))
        quiet_endpoint.process.terminate()
        eventually(lambda: not quiet_endpoint.answers())
        tenant.drain()
        assert statuses(future.result()) == ["added"]
    quiet_endpoint.process.wait(10)
    assert "Traceback" not in quiet_endpoint.log


def test_an_execution_keeps_the_flow_of_its_first_registration(http: httpx.Client) -> None:
    """Without one, a later registration does not compare it; another one is a conflict."""
    path = f"/flow-executions/{uuid4()}"
    assert http.put(path, json={"flow_id": "import", "task_names": ["a"]}).status_code == 201
    assert http.put(path, json={"task_names": ["b"]}).json() == {"status": "already_exists"}
    assert http.put(path, json={"flow_id": "import"}).json() == {"status": "already_exists"}
    refused = http.put(path, json={"flow_id": "export"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert refused.json()["error"]["details"][0]["field"] == "flow_id"
    assert http.get(refused.headers["location"]).json()["error"]["code"] == "conflict"
    path = f"/flow-executions/{uuid4()}"
    assert http.put(path, json={}).status_code == 201
    assert http.put(path, json={"flow_id": "import"}).status_code == 409
    assert http.put(path, json={"flow_id": ""}).status_code == 400
