"""All states of a model of the inbox protocol: the promises hold for every order of events.

Each property is also shown to be able to fail: with a bug planted in the model, the search finds a
way to break it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.inbox_model import (
    ALL_FAULTS,
    KEY_FAULTS,
    MESSAGES,
    NO_BUGS,
    NO_FAULTS,
    TURN_FAULTS,
    Bugs,
    Faults,
    Graph,
    State,
    everything,
    forgotten,
    gone_too_early,
    normal,
    not_in_the_set,
    out_of_order,
    search,
    steps,
    stuck,
    two_at_work,
)

EVERYTHING = pytest.mark.parametrize(
    "faults", [ALL_FAULTS, KEY_FAULTS, TURN_FAULTS], ids=["processes", "keys", "a shared turn"]
)


def test_the_search_sees_what_it_is_meant_to_see() -> None:
    """57,051 states with faults of processes, 38,397 of keys, 32,147 of a shared turn."""
    faulty, harmed, shared = map(everything, (ALL_FAULTS, KEY_FAULTS, TURN_FAULTS))
    counts = [len(graph.states) for graph in (faulty, harmed, shared, everything(NO_FAULTS))]
    assert counts == [57_051, 38_397, 32_147, 34]
    common = {
        *("append", "commit", "rescue", "crash", "expire"),
        *("acquire", "acquire: refused", "acquire: nothing there"),
        *("ack_and_publish", "ack_and_publish: nothing left", "ack_and_publish: lease lost"),
        *("requeue", "requeue: lease lost"),
    }
    again = {"acquire again", "acquire again: refused"}
    assert names(shared) == common | again | {"requeue: a group is under way"}
    assert names(faulty) == common | again | {"lose", "deliver_again"}
    assert names(harmed) == common | {"rebuild", "forget", "junk", "append by an older one"}
    assert faulty.way_to(two_at_work)
    assert faulty.way_to(lambda state: len(state.effects) == MESSAGES and not state.lease)


def names(graph: Graph) -> set[str]:
    return {name for edges in graph.edges for name, _ in edges}


@EVERYTHING
def test_messages_take_effect_once_each_and_in_order(faults: Faults) -> None:
    """However drains fail and overlap: no message is applied twice or out of order."""
    assert not everything(faults).way_to(out_of_order)


@EVERYTHING
def test_no_message_leaves_the_inbox_before_it_is_applied_and_published(faults: Faults) -> None:
    """So what a dead drain had in its hands is still there for the next one."""
    assert not everything(faults).way_to(gone_too_early)


def test_without_faults_no_wake_up_is_lost_and_no_rescue_is_needed() -> None:
    """While messages wait, somebody has the lease, and exactly one drain is on the way."""
    graph = everything(NO_FAULTS)
    assert not graph.way_to(forgotten)
    for state in graph.states:
        assert len(state.queue) + len(state.runs) == (1 if state.lease else 0)
        assert state.lease or not state.inbox
        assert state.waiting == bool(state.inbox)
    assert not {"rescue", "rebuild"} & names(graph)


@pytest.mark.parametrize(
    "faults",
    [NO_FAULTS, ALL_FAULTS, KEY_FAULTS, TURN_FAULTS],
    ids=["none", "processes", "keys", "a shared turn"],
)
def test_nothing_is_stuck_for_ever(faults: Faults) -> None:
    """From every state, on every way: once faults cease, the inbox empties, the lease is free."""
    graph = everything(faults)
    assert not stuck(graph)
    for state, edges in zip(graph.states, graph.edges, strict=True):
        if forgotten(state):
            assert ("rescue" if state.waiting else "rebuild") in {name for name, _ in edges}


def test_an_organization_whose_messages_wait_is_in_the_set() -> None:
    """Unless the set was lost or the producer doesn't know it: a rescue reads no other keys."""
    assert not everything(ALL_FAULTS).way_to(not_in_the_set)


def test_two_drains_work_at_once_only_if_a_lease_ran_out_under_one() -> None:
    """A lost, doubled or late drain message and a crash alone never lead to that."""
    graph = everything(ALL_FAULTS._replace(expire=0))
    assert len(graph.states) > 1_000
    assert not graph.way_to(two_at_work)


def refused_while_nobody_runs(graph: Graph) -> list[State]:
    return [
        state
        for state, edges in zip(graph.states, graph.edges, strict=True)
        if "acquire: refused" in {name for name, _ in edges}
        and not (state.lease and state.lease[0] == "running")
    ]


def test_the_first_drain_message_to_arrive_drains() -> None:
    """A drain message is refused only while another drain is running, however late it comes."""
    assert not refused_while_nobody_runs(everything(ALL_FAULTS))


# --- The search finds bugs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bugs", "faults", "bad", "last"),
    [
        (Bugs(release_blindly=True), NO_FAULTS, forgotten, ["append", "release blindly"]),
        (Bugs(remember_late=True), NO_FAULTS, not_in_the_set, ["append"]),
        (Bugs(ack_before_commit=True), NO_FAULTS, gone_too_early, ["acquire", "ack_and_publish"]),
        (Bugs(ack_before_commit=True), ALL_FAULTS, out_of_order, ["ack_and_publish", "commit"]),
        (Bugs(write_before_commit=True), NO_FAULTS, out_of_order, ["acquire", "commit"]),
        (
            Bugs(release_in_flight=True),
            NO_FAULTS,
            two_at_work,
            ["commit", "ack_and_publish", "append", "acquire"],
        ),
        (Bugs(forget_batch_ids=True), Faults(crash=1), out_of_order, ["acquire", "commit"]),
        (Bugs(forget_batch_ids=True), Faults(expire=1), out_of_order, ["acquire", "commit"]),
        (
            Bugs(forget_batch_ids=True),
            Faults(again=1),
            out_of_order,
            ["commit", "acquire again", "commit"],
        ),
        (
            Bugs(forget_batch_ids=True),
            Faults(slow=1),
            out_of_order,
            ["requeue: a group is under way", "acquire", "commit"],
        ),
        (
            Bugs(acquire_from_the_running=True),
            Faults(deliver_again=1),
            two_at_work,
            ["acquire", "acquire"],
        ),
    ],
    ids=[
        "a lease that is freed without a look at the inbox",
        "an append that leaves the set to the drain",
        "acknowledge before commit: too early",
        "acknowledge before commit: a message overtakes the one that a dead drain had",
        "a group that is written although the one before it was not committed",
        "a lease that is freed while a group is on its way",
        "batch ids not looked at, after a crash",
        "batch ids not looked at, with two drains",
        "batch ids not looked at, after a lost answer",
        "batch ids not looked at, with a group under way in a shared turn",
        "acquire from a drain that is running",
    ],
)
def test_a_planted_bug_is_found(
    bugs: Bugs, faults: Faults, bad: Callable[[State], bool], last: list[str]
) -> None:
    """Each part of the protocol is necessary: without it, the search finds a way to do harm."""
    assert not everything(faults).way_to(bad)
    assert search(faults, bugs, until=bad).way_to(bad)[-len(last) :] == last


def test_without_a_rescue_a_lost_drain_message_would_leave_messages_waiting() -> None:
    """The check that nothing is stuck can fail: only a rescue repairs what faults leave."""
    graph = search(Faults(lose=1))
    for place, edges in enumerate(graph.edges):
        graph.edges[place] = [edge for edge in edges if edge[0] != "rescue"]
    assert graph.way_to(forgotten)
    assert any(forgotten(state) for state in stuck(graph))


def test_a_lease_without_a_time_to_live_that_counted_would_hold_an_inbox_for_ever() -> None:
    """So scripts take it for free."""
    graph = search(Faults(junk=1), Bugs(keep_junk=True))
    assert any(state.inbox and state.lease and state.lease[0] == "junk" for state in stuck(graph))
    assert not stuck(search(Faults(junk=1)))


def go(state: State, bugs: Bugs, *names: str) -> State:
    """Follow steps by their names."""
    for name in names:
        step = next(step for step in steps(state, bugs) if step.name == name)
        state = normal(step.state, bugs)
    return state


def test_an_acquire_that_demanded_its_lease_id_would_never_drain() -> None:
    """With a queue longer than the lease, each message is superseded before its turn, for ever."""
    bugs, superseded = Bugs(demand_the_lease_id=True), ("expire", "rescue")
    waiting = go(State(Faults(expire=2)), bugs, "append")
    once_round = go(waiting, bugs, *superseded, "acquire: refused")
    assert once_round == waiting._replace(left=Faults(expire=1))
    assert once_round.inbox == (0,)
    assert refused_while_nobody_runs(search(Faults(expire=1), bugs))
    drained = go(State(Faults(expire=2)), NO_BUGS, "append", *superseded, "acquire")
    assert not go(drained, NO_BUGS, "commit", "ack_and_publish: nothing left").inbox
