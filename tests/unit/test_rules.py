"""The rules of a batch (docs/concepts/contract.md#rules): as tables, and against a model."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producers.contract.messages import (
    ANY_METADATA,
    Condition,
    Message,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    TagOperation,
    add,
    claim,
    register_execution,
    release,
    remove,
    set_tag,
    unless,
    when,
)
from producers.contract.messages import decide as decide_as
from producers.contract.results import Change, ChangeEvent, ResultRecord, StateChange, Task
from producers.contract.values import Uuid7
from tests.support.reference_model import ReferenceModel, json_equal
from worker.bounds import MAX_VARIANTS
from worker.rules import decide
from worker.snapshot import AuthorizedMessage, Decision, Snapshot, types_of

ORGANIZATION = UUID(int=1)
ONE, TWO, UNKNOWN = UUID(int=11), UUID(int=12), UUID(int=13)
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
NEW_ID = Uuid7()


def settle(state: Snapshot, *messages: Message, actor: str = "ada", **options: Any) -> Decision:
    requests = [AuthorizedMessage.of(message, actor, **options) for message in messages]
    for request in requests:
        for _, _, key, _ in types_of(request.message):
            state.types.setdefault(key, {each: None for each in state.tags if each[:3] == key})
    return decide(ORGANIZATION, requests, state, now=NOW, new_id=NEW_ID)


def registered(*executions: UUID, names: list[str] | None = None) -> Snapshot:
    state = Snapshot()
    settle(state, *(register_execution(execution, names) for execution in executions))
    return state


def batch(*operations: TagOperation, batch_id: UUID | None = None) -> TagBatch:
    if batch_id is None:
        return TagBatch(tags=list(operations))
    return TagBatch(tags=list(operations), batch_id=batch_id)


def record(decision: Decision, place: int = -1) -> ResultRecord:
    return ResultRecord.decode(decision.outcomes[place].record)


def statuses(decision: Decision, place: int = -1) -> list[str]:
    return list(record(decision, place).statuses)


def events(decision: Decision, place: int = -1) -> list[ChangeEvent]:
    return [ChangeEvent.decode(e) for _, e in decision.outcomes[place].events]


def plus(tag: str, *metadata: Any) -> TagOperation:
    return add(ONE, "task", "type", tag, *metadata)


def state_of(task_name: str, state: Any) -> SetTaskState:
    return SetTaskState(flow_execution_id=ONE, task_name=task_name, state=state)


def minus(tag: str, *metadata: Any) -> TagOperation:
    return remove(ONE, "task", "type", tag, *metadata)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([plus("x"), plus("x")], ["added", "already_exists"]),
        ([plus("x"), minus("x")], ["added", "removed"]),
        ([plus("x"), minus("x"), plus("x")], ["added", "removed", "added"]),
        ([minus("x")], ["not_found"]),
        ([plus("x"), minus("x"), minus("x")], ["added", "removed", "not_found"]),
        ([plus("x"), plus("x", {"k": 1})], ["added", "added"]),
        ([plus("x"), plus("x", None)], ["added", "already_exists"]),
        ([plus("x", {"a": 1, "b": 2}), plus("x", {"b": 2, "a": 1})], ["added", "already_exists"]),
        ([plus("x", 1), plus("x", 1.0)], ["added", "already_exists"]),
        ([plus("x", 0), plus("x", -0.0)], ["added", "already_exists"]),
        ([plus("x", [1.0, {"k": 2.0}]), plus("x", [1, {"k": 2}])], ["added", "already_exists"]),
        ([plus("x", 0.1), plus("x", 0.10000000000000001)], ["added", "already_exists"]),
        ([plus("x", 1), plus("x", True)], ["added", "added"]),
        ([plus("x", "1"), plus("x", 1)], ["added", "added"]),
        ([plus("x", [1, 2]), plus("x", [2, 1])], ["added", "added"]),
        ([plus("x", {}), plus("x", []), plus("x", "")], ["added", "added", "added"]),
        ([plus("x", 1), plus("x"), minus("x")], ["added", "added", "removed"]),
        ([plus("x", 1), minus("x", None)], ["added", "not_found"]),
        ([plus("x"), minus("x", 1)], ["added", "not_found"]),
        ([plus("x"), minus("x", None)], ["added", "removed"]),
        ([plus("x", 1), minus("x", 1.0)], ["added", "removed"]),
        ([plus("x", 1), plus("x", 2), minus("x", 1), minus("x")], ["added"] * 2 + ["removed"] * 2),
        ([plus("\u00e9"), plus("e\u0301")], ["added", "added"]),
        ([plus("x"), plus("X"), plus(" x")], ["added"] * 3),
    ],
)
def test_each_operation_sees_what_the_ones_before_it_did(
    operations: list[TagOperation], expected: list[str]
) -> None:
    """Rules 1, 2 and 3: the statuses of a batch, in the order of its operations."""
    assert statuses(settle(registered(ONE), batch(*operations))) == expected


@pytest.mark.parametrize(
    "other",
    [
        add(TWO, "task", "type", "x"),
        add(ONE, "other", "type", "x"),
        add(ONE, "task", "other", "x"),
        add(ONE, "task", "type", "other"),
    ],
)
def test_every_part_of_a_name_tells_tags_apart(other: TagOperation) -> None:
    """Rule 2: execution, task, type and tag are all part of the identity."""
    assert statuses(settle(registered(ONE, TWO), batch(plus("x"), other))) == ["added", "added"]


def test_adding_again_makes_a_new_row() -> None:
    """Rule 4: a removed tag keeps its row; the same tag added again has another id."""
    state = registered(ONE)
    first = settle(state, batch(plus("x")))
    second = settle(state, batch(minus("x"), plus("x")), actor="grace")
    (added,) = first.change_set.added.values()
    (removed,) = second.change_set.removed.values()
    (again,) = second.change_set.added.values()
    assert removed.id == added[0].id != again[0].id
    assert (removed.status, removed.modified_by, removed.updated_at) == ("deleted", "grace", NOW)
    assert (again[0].status, again[0].created_by) == ("active", "grace")


def test_a_tag_that_comes_and_goes_in_one_transaction_leaves_a_deleted_row() -> None:
    """Rule 4 also holds when the row is not stored yet."""
    decision = settle(registered(ONE), batch(plus("x"), minus("x")))
    assert [new.tag.status for new in decision.change_set.added.values()] == ["deleted"]
    assert not decision.change_set.removed


def test_one_unknown_execution_fails_the_whole_batch() -> None:
    """Rule 5: nothing of it takes effect, and each operation at fault is named."""
    state = registered(ONE)
    decision = settle(
        state,
        batch(plus("x"), add(UNKNOWN, "t", "t", "x"), plus("y"), minus("x")),
        batch(plus("x")),
    )
    error = record(decision, 0).error
    assert error is not None
    assert error.code == "not_found"
    assert [(d.index, d.field) for d in error.details] == [(1, "flow_execution_id")]
    assert not decision.outcomes[0].events
    assert statuses(decision, 1) == ["added"]


def test_a_batch_may_span_executions_and_counts_each_ones_revision() -> None:
    """Rule 5 and the change events: one event for each execution that really changed."""
    state = registered(ONE, TWO)
    settle(state, batch(plus("x")))
    decision = settle(
        state, batch(plus("x"), add(TWO, "a", "b", "c"), plus("y"), add(TWO, "a", "b", "d"))
    )
    assert [(e.flow_execution_id, e.revision, len(e.changes)) for e in events(decision)] == [
        (TWO, 1, 2),
        (ONE, 2, 1),
    ]
    later = settle(state, batch(plus("z"), add(TWO, "a", "b", "e")))
    assert [(e.flow_execution_id, e.revision) for e in events(later)] == [(ONE, 3), (TWO, 2)]


def test_a_batch_that_changes_nothing_has_no_event_and_no_revision() -> None:
    """Revisions count real changes only."""
    state = registered(ONE)
    settle(state, batch(plus("x")))
    decision = settle(state, batch(plus("x"), minus("nothing")))
    assert not events(decision)
    assert not decision.change_set.revisions
    assert len(decision.change_set.batches) == 1  # but its result is stored


def test_removing_by_name_reports_every_tag_that_went() -> None:
    """Rule 3: one operation, one status, as many changes as there were tags."""
    state = registered(ONE)
    settle(state, batch(plus("x"), plus("x", 1), plus("x", 2)))
    decision = settle(state, batch(minus("x")))
    assert statuses(decision) == ["removed"]
    (event,) = events(decision)
    assert [change.change for change in event.changes] == ["removed"] * 3
    assert [c.tag.tag_metadata for c in event.changes if isinstance(c, Change)] == [None, 1, 2]


@pytest.mark.parametrize(
    ("first", "then", "allowed"),
    [
        (["a"], ["b"], {"a", "b"}),
        (["a"], ["a"], {"a"}),
        (["a"], None, {"a", "b", "anything"}),
        (None, ["a"], {"a", "b", "anything"}),
        ([], ["a"], {"a"}),
    ],
)
def test_task_names_only_ever_grow(
    first: list[str] | None, then: list[str] | None, allowed: set[str]
) -> None:
    """A second registration adds names; every name, once allowed, stays allowed."""
    state = registered(ONE, names=first)
    again = settle(state, register_execution(ONE, then))
    assert record(again).flow_execution is not None
    assert record(again).flow_execution.status == "already_exists"  # type: ignore[union-attr]
    for name in ("a", "b", "anything"):
        outcome = record(settle(state, batch(add(ONE, name, "t", "x"))))
        assert (outcome.error is None) == (name in allowed)


def test_an_execution_has_10000_registered_names_at_most() -> None:
    """What would exceed it has no effect; a repetition of known names does not."""
    names = [f"{number}" for number in range(10_000)]
    state = registered(ONE, names=names[:9_999])
    for more in (["x", "y"], names):
        outcome = record(settle(state, register_execution(ONE, more)))
        assert (outcome.error is None) == (more is names)
        if outcome.error:
            assert outcome.error.code == "too_large"
            assert [each.field for each in outcome.error.details] == ["task_names"]
    assert list(state.executions[ONE.int].task_names) == names
    assert record(settle(state, register_execution(ONE, None))).error is None


def test_an_execution_without_task_names_has_no_tasks() -> None:
    """An empty list allows no name; only null allows every name."""
    error = record(settle(registered(ONE, names=[]), batch(plus("x")))).error
    assert error is not None
    assert [(each.index, each.field) for each in error.details] == [(0, "task_name")]


def test_a_batch_that_is_too_large_takes_all_of_its_operations_back() -> None:
    """Also those on tags that were stored, or added by another batch of the same group."""
    state = registered(ONE)
    settle(state, batch(plus("stored"), plus("both", 1), plus("both", 2)))
    many = [plus("x", number) for number in range(MAX_VARIANTS)]
    for place in range(0, MAX_VARIANTS, 50):
        settle(state, batch(*many[place : place + 50]))
    revision = state.executions[ONE.int].revision
    decision = settle(
        state,
        batch(plus("group")),
        batch(
            *(minus("stored"), plus("stored"), minus("stored"), minus("both"), plus("both", 2)),
            *(minus("group"), plus("group"), plus("new"), minus("new"), plus("x", "one more")),
        ),
        batch(plus("stored"), plus("both", 1), plus("both", 2), plus("group"), minus("new")),
    )
    error = record(decision, 1).error
    assert error is not None
    assert (error.code, [each.index for each in error.details]) == ("too_large", [9])
    assert not events(decision, 1)
    assert statuses(decision, 2) == ["already_exists"] * 4 + ["not_found"]
    assert state.executions[ONE.int].revision == revision + 1
    assert [new.tag.tag for new in decision.change_set.added.values()] == ["group"]
    assert {new.tag.status for new in decision.change_set.added.values()} == {"active"}
    assert not decision.change_set.removed


def test_the_same_batch_again_gets_the_stored_answer_and_changes_nothing() -> None:
    """Exactly once, also if the copy is in the same group, or the state has changed since."""
    state = registered(ONE)
    same = batch(plus("x"))
    first = settle(state, same, batch(minus("x")), same)
    assert first.outcomes[2] == first.outcomes[0]
    later = settle(state, same, actor="someone else")
    assert later.outcomes[0] == first.outcomes[0]
    assert not later.change_set.batches
    assert not later.change_set.added


def test_the_same_id_for_something_else_is_a_conflict() -> None:
    """The id stays with what it was first used for; the conflict itself is not stored."""
    state = registered(ONE)
    first = batch(plus("x"))
    decision = settle(state, first, batch(plus("y"), batch_id=first.batch_id))
    error = record(decision).error
    assert error is not None
    assert error.code == "conflict"
    assert len(decision.change_set.batches) == 1
    assert statuses(settle(state, first)) == ["added"]


def test_a_not_found_is_stored_too() -> None:
    """What was decided from the tables is not decided again later, when they are others."""
    state = Snapshot()
    early = batch(plus("x"))
    before = settle(state, early)
    settle(state, register_execution(ONE))
    assert settle(state, early).outcomes == before.outcomes


def test_a_state_is_recorded_once_and_any_state_may_follow() -> None:
    """Only the last state counts; each change of it is an event, and a repetition is none."""
    state = registered(ONE, names=["task"])
    asked = ["queued", "queued", "running", "failed", "running", "completed"]
    found = [settle(state, state_of("task", each), actor="runner") for each in asked]
    assert [statuses(each) for each in found] == [
        ["recorded"],
        ["unchanged"],
        *[["recorded"]] * 4,
    ]
    assert [len(events(each)) for each in found] == [1, 0, 1, 1, 1, 1]
    (event,) = events(found[-1])
    assert event.revision == 5
    task = Task(ONE, "task", "completed", state_changed_at=NOW, state_changed_by="runner")
    assert event.changes == [StateChange("state", task)]
    assert found[-1].change_set.tasks == {(ONE, "task"): task}


def test_a_state_of_what_is_unknown_is_not_found() -> None:
    """As for tags: an execution must be registered, and a task be one of its names."""
    state = registered(ONE, names=["task"])
    elsewhere = SetTaskState(flow_execution_id=UNKNOWN, task_name="task", state="queued")
    for message, field_name in ((state_of("other", "queued"), "task_name"), (elsewhere, None)):
        error = record(settle(state, message)).error
        assert error is not None
        assert error.code == "not_found"
        assert error.details[0].field == (field_name or "flow_execution_id")


# --- Conditions, set, clear ----------------------------------------------------------------------


def only(tag: str, *metadata: Any) -> TagOperation:
    return set_tag(ONE, "task", "type", tag, *metadata)


def guarded(*operations: TagOperation, conditions: list[Condition]) -> TagBatch:
    return TagBatch(tags=list(operations), conditions=conditions)


@pytest.mark.parametrize(
    ("before", "operation", "expected", "changes"),
    [
        ([], only("x"), "added", ["added x"]),
        ([plus("x")], only("x"), "already_exists", []),
        ([plus("y")], only("x"), "replaced", ["removed y", "added x"]),
        ([plus("y"), plus("x")], only("x"), "replaced", ["removed y"]),
        ([plus("x", 1)], only("x"), "replaced", ["removed x", "added x"]),
        ([plus("x", 1), plus("x", 2)], only("x", 2.0), "replaced", ["removed x"]),
        ([add(ONE, "task", "other", "y")], only("x"), "added", ["added x"]),
        ([add(ONE, "other", "type", "y")], only("x"), "added", ["added x"]),
    ],
)
def test_set_leaves_one_tag_of_its_type(
    before: list[TagOperation], operation: TagOperation, expected: str, changes: list[str]
) -> None:
    """Rule 19: what it removes stands in the change event, before what it adds."""
    state = registered(ONE)
    if before:
        settle(state, batch(*before))
    decision = settle(state, batch(operation))
    assert statuses(decision) == [expected]
    found = [change for event in events(decision) for change in event.changes]
    assert [f"{each.change} {each.tag.tag}" for each in found if isinstance(each, Change)] == (
        changes
    )


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (when(ONE, "task", "type"), True),
        (when(ONE, "task", "type", "x"), True),
        (when(ONE, "task", "type", "x", {"k": 1.0}), True),
        (when(ONE, "task", "type", "x", None), False),
        (when(ONE, "task", "type", "y"), False),
        (when(ONE, "other", "type"), False),
        (when(TWO, "task", "type"), False),
        (unless(ONE, "task", "type"), False),
        (unless(ONE, "task", "type", "x"), False),
        (unless(ONE, "task", "type", "x", None), True),
        (unless(ONE, "task", "other"), True),
    ],
)
def test_a_batch_takes_effect_only_if_its_conditions_hold(condition: Any, holds: bool) -> None:
    """Rule 18; each is looked at before the first operation."""
    state = registered(ONE, TWO)
    settle(state, batch(plus("x", {"k": 1})))
    decision = settle(state, guarded(minus("x"), plus("new"), conditions=[condition]))
    error = record(decision).error
    assert (error is None) is holds
    assert bool(decision.change_set.changes) is holds
    if error is not None:
        assert (error.code, error.details[0].field, error.details[0].index) == (
            "precondition_failed",
            "conditions",
            0,
        )
        assert error.details[0].found is None


def test_all_conditions_that_fail_are_named_with_what_is_there_for_who_may_read() -> None:
    """At most five tags, the oldest first; the same batch again gets the same answer."""
    state = registered(ONE)
    settle(state, batch(*[plus(f"t{number}") for number in range(7)]))
    asked = guarded(
        plus("new"),
        conditions=[
            when(ONE, "task", "type", "gone"),
            when(ONE, "task", "type", "t1"),
            unless(ONE, "task", "type", "t6"),
        ],
    )
    decision = settle(state, asked, may_read=True)
    error = record(decision).error
    assert error is not None
    found = {each.index: [tag.tag for tag in each.found or []] for each in error.details}
    assert found == {0: ["t0", "t1", "t2", "t3", "t4"], 2: ["t6"]}
    assert error.details[0].found is not None
    assert error.details[0].found[0].created_by == "ada"
    settle(state, batch(plus("gone")))
    assert settle(state, asked).outcomes[0] == decision.outcomes[0]


def test_a_condition_on_what_is_unknown_is_not_found() -> None:
    """As an operation on it; the detail says which condition it is."""
    state = registered(ONE, names=["task"])
    asked = [when(UNKNOWN, "task", "type"), unless(ONE, "other", "type")]
    error = record(settle(state, guarded(plus("x"), conditions=asked))).error
    assert error is not None
    assert error.code == "not_found"
    assert [(each.index, each.field, each.message) for each in error.details] == [
        (0, "conditions", "flow_execution_id is unknown"),
        (1, "conditions", "task_name is not registered"),
    ]


def test_a_claim_has_one_winner_and_a_decision_counts_once() -> None:
    """In one group as in several: the second one sees what the first one did."""
    state = registered(ONE)
    first, second = claim(ONE, "task", "ada"), claim(ONE, "task", "grace")
    decision = settle(state, first, second, may_read=True)
    assert statuses(decision, 0) == ["added"]
    error = record(decision, 1).error
    assert error is not None
    assert error.details[0].found is not None
    assert error.details[0].found[0].tag == "ada"
    assert record(settle(state, release(ONE, "task", "grace"))).error is not None
    assert statuses(settle(state, release(ONE, "task", "ada"))) == ["removed"]
    settle(state, batch(add(ONE, "task", "review", "pending")))
    yes, no = (decide_as(ONE, "task", "review", tag) for tag in ("approved", "rejected"))
    decision = settle(state, yes, no)
    assert statuses(decision, 0) == ["replaced"]
    assert record(decision, 1).error is not None
    step = UUID(int=7)
    again = claim(ONE, "task", "ada", batch_id=step)
    assert (again.batch_id, again.digest() == first.digest()) == (step, True)
    assert release(ONE, "task", "ada", batch_id=step).batch_id == step
    assert decide_as(ONE, "task", "review", "approved", batch_id=step).batch_id == step


def test_a_new_state_clears_approvals_in_one_event() -> None:
    """Rule 20: the state first, then what was removed; only the types that are named."""
    state = registered(ONE)
    settle(state, batch(plus("x"), plus("y", 1), add(ONE, "task", "other", "z")))
    asked = SetTaskState(
        flow_execution_id=ONE, task_name="task", state="running", clear=["type", "none"]
    )
    decision = settle(state, asked, actor="runner")
    found = record(decision).task_execution
    assert found is not None
    assert (found.status, found.cleared) == ("recorded", 2)
    (event,) = events(decision)
    assert [each.change for each in event.changes] == ["state", "removed", "removed"]
    again = asked.model_copy(update={"batch_id": UUID(int=5)})
    found = record(settle(state, again)).task_execution
    assert found is not None
    assert (found.status, found.cleared) == ("unchanged", 0)
    settle(state, batch(plus("x")))
    found = record(settle(state, again.model_copy(update={"batch_id": UUID(int=6)}))).task_execution
    assert found is not None
    assert (found.status, found.cleared) == ("recorded", 1)
    plain = record(settle(state, state_of("task", "queued")))
    assert b"cleared" not in plain.encode()


def test_a_type_with_too_many_tags_is_refused_by_each_of_the_three() -> None:
    """At 1,000 it is not; nothing is changed, and the detail says by what."""
    state = registered(ONE)
    for start in range(0, 1000, 100):
        settle(state, batch(*[plus(str(start + number)) for number in range(100)]))
    settle(state, guarded(plus("1000"), conditions=[when(ONE, "task", "type", "999")]))
    clearing = SetTaskState(flow_execution_id=ONE, task_name="task", state="failed", clear=["type"])
    for asked, place in (
        (guarded(plus("y"), conditions=[when(ONE, "task", "type")]), (0, "conditions")),
        (batch(plus("y"), only("x")), (1, None)),
        (clearing, (None, "clear")),
    ):
        decision = settle(state, asked)
        error = record(decision).error
        assert error is not None
        assert error.code == "too_large"
        assert (error.details[0].index, error.details[0].field) == place
        assert not decision.change_set.changes
        assert not decision.change_set.tasks
    settle(state, batch(minus("1000")))
    again = clearing.model_copy(update={"batch_id": UUID(int=7)})
    assert record(settle(state, again)).error is None


# --- Against a reference model -------------------------------------------------------------------


metadata = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([0.0, 1.0, -0.0, 0.5, "", "1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=3,
)
executions = st.sampled_from([ONE, TWO])
names = st.sampled_from(["t1", "t2"])
adds = st.builds(add, executions, names, st.just("type"), st.sampled_from("xy"), metadata)
removes = st.builds(
    remove,
    executions,
    names,
    st.just("type"),
    st.sampled_from("xy"),
    metadata | st.just(ANY_METADATA),
)
sets = st.builds(set_tag, executions, names, st.just("type"), st.sampled_from("xy"), metadata)
named_tag = (executions, names, st.just("type"), st.sampled_from("xy"), metadata)
conditions = st.one_of(
    st.builds(when, *named_tag[:3]),
    st.builds(unless, *named_tag[:3]),
    st.builds(when, *named_tag[:4], metadata | st.just(ANY_METADATA)),
    st.builds(unless, *named_tag[:4], metadata | st.just(ANY_METADATA)),
)
batch_ids = st.integers(1, 12).map(lambda number: UUID(int=1000 + number))
batches = st.builds(
    lambda batch_id, tags, conditions: TagBatch(
        batch_id=batch_id, tags=tags, conditions=conditions
    ),
    batch_ids,
    st.lists(adds | removes | sets, min_size=1, max_size=6),
    st.just([]) | st.lists(conditions, max_size=2),
)
registrations = st.builds(
    lambda batch_id, execution, names: RegisterExecution(
        batch_id=batch_id, flow_execution_id=execution, task_names=names
    ),
    batch_ids,
    executions,
    st.none() | st.lists(names, max_size=2),
)
states = st.builds(
    lambda batch_id, execution, name, state, clear: SetTaskState(
        batch_id=batch_id, flow_execution_id=execution, task_name=name, state=state, clear=clear
    ),
    batch_ids,
    executions,
    names,
    st.sampled_from(["queued", "running"]),
    st.none() | st.just(["other"]) | st.just(["type", "type"]),
)
groups = st.lists(
    st.lists(st.one_of(batches, batches, registrations, states), min_size=1, max_size=4),
    max_size=6,
)


def failures(got: ResultRecord) -> list[tuple[int | None, list[tuple[str, str]]]]:
    """Return each condition that failed, with the types and tags that are there instead."""
    assert got.error is not None
    details = got.error.details
    return [(each.index, [(it.tag_type, it.tag) for it in each.found or ()]) for each in details]


@settings(max_examples=300, deadline=None)
@given(groups)
def test_any_sequence_of_messages_agrees_with_the_reference_model(
    groups: list[list[Message]],
) -> None:
    """However messages are grouped, results, revisions, events and active tags are the model's."""
    state, model = Snapshot(), ReferenceModel()
    seen: dict[UUID, list[ChangeEvent]] = {}
    known: set[bytes] = set()
    for group in groups:
        decision = settle(state, *group, may_read=True)
        for place, message in enumerate(group):
            answer = model.send(message)
            got = record(decision, place)
            if got.error is not None:
                assert got.error.code == answer
            else:
                assert got.statuses == answer
            if answer == "precondition_failed":
                assert failures(got) == model.failed[str(message.batch_id)]
            elif got.task_execution is not None:
                cleared = model.cleared[str(message.batch_id)]
                assert (got.task_execution.cleared or 0) == cleared
            for execution, event in decision.outcomes[place].events:
                if event not in known:
                    known.add(event)
                    seen.setdefault(execution, []).append(ChangeEvent.decode(event))
    assert {e.id: e.revision for e in state.executions.values() if e.revision} == model.revisions
    for execution, stored in seen.items():
        assert [e.revision for e in stored] == list(range(1, model.revisions[execution] + 1))
    active = [tag for tags in state.tags.values() for tag in tags.values()]
    replayed: set[UUID] = set()
    recorded: dict[tuple[UUID, str], str] = {}
    for stored_event in (each for stored in seen.values() for each in stored):
        for change in stored_event.changes:
            if isinstance(change, StateChange):
                recorded[change.task.flow_execution_id, change.task.task_name] = change.task.state
            elif isinstance(change, Change):
                (replayed.add if change.change == "added" else replayed.remove)(change.tag.id)
    assert recorded == model.states
    assert {key: task.state for key, task in state.tasks.items()} == model.states
    assert replayed == {tag.id for tag in active}
    assert len(active) == len(model.rows)
    for tag in active:
        row = {"flow_execution_id": str(tag.flow_execution_id), "task_name": tag.task_name}
        row |= {"tag_type": tag.tag_type, "tag": tag.tag}
        metadata = json.loads(bytes(tag.tag_metadata or b"null"))
        assert any(json_equal(r["tag_metadata"], metadata) for r in model.matching(row))
