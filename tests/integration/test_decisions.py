"""Conditions, `set` and `clear`, from the SDK and HTTP to the tables: rules 18 to 20."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from producers.client import TagProducer
from producers.contract.encoding import parse_line
from producers.contract.messages import (
    Condition,
    Message,
    TagBatch,
    TagOperation,
    add,
    claim,
    decide,
    register_execution,
    remove,
    set_tag,
    set_task_state,
    unless,
    when,
)
from producers.errors import BatchRefused, Forbidden, PreconditionFailed
from tests.support.api_errors import error_of
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, Tenant
from worker.auth import EXECUTIONS_WRITE, READ, WRITE


@pytest.fixture
def execution(producer: TagProducer) -> UUID:
    execution = uuid4()
    producer.apply(register_execution(execution))
    return execution


def tag(execution: UUID, tag_type: str, name: str, **more: Any) -> dict[str, Any]:
    named = {"flow_execution_id": str(execution), "task_name": "review", "tag_type": tag_type}
    return {**named, "tag": name, **more}


def test_many_who_claim_a_task_have_one_winner_known_to_all(
    servers: Servers, producer: TagProducer, execution: UUID
) -> None:
    """Over several connections at once; the losers get the winner's name."""
    start = threading.Barrier(12)

    def try_to(number: int) -> str:
        start.wait()
        try:
            producer.apply(claim(execution, "review", f"reviewer {number}"))
        except PreconditionFailed as failed:
            error = failed.record.error
            assert error is not None
            found = error.details[0].found or []
            return found[0].tag
        return f"won {number}"

    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(try_to, range(12)))
    (winner,) = [each for each in said if each.startswith("won")]
    assert set(said) == {winner, winner.replace("won", "reviewer")}


def test_the_builder_makes_the_same_batch(producer: TagProducer, execution: UUID) -> None:
    """`when`, `unless` and `set` of a batch, in one call."""
    named = execution, "review", "status"
    record = producer.batch().unless(*named).set(*named, "pending").apply()
    assert record.statuses == ["added"]
    record = producer.batch().when(*named, "pending").set(*named, "approved", {"by": 1}).apply()
    assert record.statuses == ["replaced"]
    with pytest.raises(PreconditionFailed, match="condition 0: no such tag is active; there is"):
        producer.apply(decide(execution, "review", "status", "rejected"))


def test_a_condition_over_http_is_412_and_says_what_is_there(
    servers: Servers, http: httpx.Client, organization: UUID, producer: TagProducer, execution: UUID
) -> None:
    """To a token that may read; the others only learn which condition fails."""
    producer.apply(TagBatch(tags=[add(execution, "review", "status", "approved")]))
    condition = {**tag(execution, "status", "pending"), "exists": True}
    body = {"tags": [tag(execution, "status", "x", operation="set")], "conditions": [condition]}
    answer = http.patch("/task-tags", json=body, headers={"Idempotency-Key": "one"})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (412, "precondition_failed")
    (detail,) = error["details"]
    assert (detail["field"], detail["index"]) == ("conditions", 0)
    (found,) = detail["found"]
    assert (found["tag_type"], found["tag"], found["created_by"]) == ("status", "approved", "ada")
    assert found["created_at"].endswith("Z")
    stored = http.get(answer.headers["Location"]).json()
    assert stored["error"]["details"] == error["details"]
    writer = {"Authorization": f"Bearer {servers.token(organization, WRITE)}"}
    (detail,) = error_of(http.patch("/task-tags", json=body, headers=writer))["details"]
    assert "found" not in detail
    again = http.patch("/task-tags", json=body, headers={"Idempotency-Key": "one"})
    assert error_of(again)["details"] == error["details"]
    condition |= {"tag": "approved"}
    assert http.patch("/task-tags", json=body).json() == {"tags": [{"status": "replaced"}]}


def test_a_state_over_http_clears_tags_with_both_scopes(
    servers: Servers, http: httpx.Client, organization: UUID, producer: TagProducer, execution: UUID
) -> None:
    """The answer says how many; a token without task-tags:write changes nothing."""
    producer.apply(TagBatch(tags=[add(execution, "review", "status", str(n)) for n in range(3)]))
    body = {"flow_execution_id": str(execution), "task_name": "review", "state": "running"}
    clearing = {**body, "clear": ["status"]}
    runner = {"Authorization": f"Bearer {servers.token(organization, EXECUTIONS_WRITE, READ)}"}
    refused = http.put("/task-executions", json=clearing, headers=runner)
    assert (refused.status_code, error_of(refused)["code"]) == (403, "forbidden")
    assert http.put("/task-executions", json=body, headers=runner).json() == {"status": "recorded"}
    cleared = http.put("/task-executions", json=clearing)
    assert cleared.json() == {"status": "recorded", "cleared": 3}
    assert http.get("/task-tags", params={"flow_execution_id": str(execution)}).json() == []
    with (
        TagProducer(
            redis_url=servers.stack.redis_url,
            organization_id=organization,
            token=servers.token(organization, EXECUTIONS_WRITE),
        ) as runners,
        pytest.raises(Forbidden, match=WRITE),
    ):
        runners.apply(set_task_state(execution, "review", "failed", clear=["status"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conditions": [{}]}, "condition 0: flow_execution_id is required"),
        ({"conditions": None}, "conditions: must be a list"),
        ({"conditions": [1]}, "condition 0: must be an object"),
        ({"conditions": [{"tag": 1}] * 101}, "conditions: must have at most 100 items"),
        ({"exists": 1}, "condition 0: exists must be true or false"),
        ({"tag_type": ""}, "condition 0: tag_type must have at least 1 character"),
        ({"tag": None, "tag_metadata": 1}, "condition 0: has tag_metadata without a tag"),
        ({"more": 1}, "condition 0: more is not a known field"),
        ({"tag_metadata": "x" * 9000}, "condition 0: tag_metadata must not be larger than 8192"),
    ],
)
def test_a_wrong_condition_is_a_clear_error(
    http: httpx.Client, change: dict[str, Any], said: str
) -> None:
    """With its place; in the SDK and over HTTP alike."""
    condition = {**tag(uuid4(), "status", "x"), "exists": True, **change}
    body = {"tags": [tag(uuid4(), "status", "x", operation="add")], "conditions": [condition]}
    if "conditions" in change:
        body |= change
    answer = http.patch("/task-tags", json=body)
    assert answer.status_code == 400
    details = error_of(answer)["details"]
    with pytest.raises(ValueError, match=said.replace("(", "\\(")) as caught:
        parse_line(httpx.Request("PATCH", "http://x", json=body).read(), uuid4())
    listed: Any = caught.value
    assert [(each.index, each.field, each.message) for each in listed.details] == [
        (each["index"], each["field"], each["message"]) for each in details
    ]


def guarded(operation: TagOperation, condition: Condition) -> TagBatch:
    return TagBatch(tags=[operation], conditions=[condition])


def fill(tenant: Tenant, task: str, count: int) -> None:
    for start in range(0, count, 100):
        numbers = range(start, min(start + 100, count))
        tenant.send(TagBatch(tags=[add(EXECUTION, task, "many", str(n)) for n in numbers]))
    tenant.drain()


def test_what_a_batch_is_answered_does_not_depend_on_its_group(tenant: Tenant) -> None:
    """A type beyond the bound is too large for all three, also where others remove some first."""
    fill(tenant, "full", 1000)
    asked: list[Message] = [
        TagBatch(
            tags=[add(EXECUTION, "full", "many", "x")],
            conditions=[when(EXECUTION, "full", "many", "7")],
        ),
        TagBatch(tags=[remove(EXECUTION, "full", "many", "0")]),
        TagBatch(
            tags=[add(EXECUTION, "full", "other", "x")],
            conditions=[unless(EXECUTION, "full", "many", "0")],
        ),
        TagBatch(tags=[add(EXECUTION, "full", "many", "y")]),
        TagBatch(tags=[set_tag(EXECUTION, "full", "many", "z")]),
        set_task_state(EXECUTION, "full", "failed", clear=["many"]),
        TagBatch(tags=[remove(EXECUTION, "full", "many", "y")]),
        TagBatch(tags=[set_tag(EXECUTION, "full", "many", "z", {"k": 1})]),
        set_task_state(EXECUTION, "full", "failed", clear=["many", "other"]),
    ]
    expected = [
        *(["added"], ["removed"], ["added"], ["added"], "too_large", "too_large", ["removed"]),
        *(["replaced"], ["recorded"]),
    ]
    before = len(tenant.outcomes())
    tenant.send(*asked)
    tenant.drain()
    assert tenant.outcomes()[before:] == expected
    assert tenant.tags() == []
    cleared = tenant.records()[-1].task_execution
    assert cleared is not None
    assert cleared.cleared == 2
    # One by one, on another task: the same answers.
    fill(tenant, "again", 1000)
    before = len(tenant.outcomes())
    for each in asked:
        again = each.encode().replace(b'"full"', b'"again"')
        tenant.send(again.replace(str(each.batch_id).encode(), str(uuid4()).encode()))
        tenant.drain(group_size=1)
    assert tenant.outcomes()[before:] == expected


def test_a_batch_that_depends_on_too_many_tags_is_too_large_alone(tenant: Tenant) -> None:
    """26 types with 1,000 tags each are more than one transaction loads; others go on."""
    for number in range(26):
        fill(tenant, f"task {number}", 1000)
    conditions = [when(EXECUTION, f"task {number}", "many") for number in range(26)]
    batch = TagBatch(tags=[add(EXECUTION, "new", "a", "b")], conditions=conditions)
    half = TagBatch(tags=[add(EXECUTION, "new", "a", "c")], conditions=conditions[:13])
    before = len(tenant.outcomes())
    tenant.send(half, batch, TagBatch(tags=[add(EXECUTION, "new", "a", "d")]))
    tenant.drain()
    assert tenant.outcomes()[before:] == [["added"], "too_large", ["added"]]


def test_another_organizations_execution_is_unknown_in_a_condition(
    servers: Servers, producer: TagProducer, execution: UUID
) -> None:
    """As in an operation: nothing says that it is there."""
    other, mine = uuid4(), uuid4()
    with TagProducer(
        redis_url=servers.stack.redis_url, organization_id=other, token=servers.token(other)
    ) as foreign:
        foreign.apply(register_execution(mine))
        batch = TagBatch(
            tags=[add(mine, "review", "a", "b")], conditions=[unless(execution, "review", "a")]
        )
        with pytest.raises(BatchRefused, match="not_found") as caught:
            foreign.apply(batch)
    error = caught.value.record.error
    assert error is not None
    assert [(each.index, each.field) for each in error.details] == [(0, "conditions")]
