"""All states of a small model of the inbox protocol (docs/concepts/inbox-protocol.md).

A state says what is in Redis and PostgreSQL and where each drain is. Its steps are those of
producers/inbox/protocol.py, in any order that can happen: three messages, two drains at work, and a
number of faults. So the promises hold for every order of events, not only for those that a test on
servers meets. Each property is also shown to be able to fail: with a bug planted in the model, the
search finds a way to break it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Final, NamedTuple

import pytest

MESSAGES: Final = 3
GROUP: Final = 2
WORKERS: Final = 2

# --- States --------------------------------------------------------------------------------------


class Faults(NamedTuple):
    """What may still go wrong on the way from a state."""

    crash: int = 0
    expire: int = 0
    lose: int = 0
    deliver_again: int = 0
    again: int = 0


NO_FAULTS: Final = Faults()
ONE_OF_EACH: Final = Faults(crash=1, expire=1, lose=1, deliver_again=1, again=1)
ALL_FAULTS: Final = Faults(crash=1, expire=2, lose=1, deliver_again=1, again=1)


class Run(NamedTuple):
    """A drain at work: its id, where it is, and the messages in its hands, which are never none.

    It has `read` them, or `committed` them; if a step failed, it has to `acquire` them again.
    """

    id: int
    at: str
    held: tuple[int, ...]


class State(NamedTuple):
    """A state. Messages are numbers in the order of append. The lease is None if it is free."""

    left: Faults
    appended: int = 0
    inbox: tuple[int, ...] = ()
    effects: tuple[int, ...] = ()
    published: frozenset[int] = frozenset()
    lease: tuple[str, int] | None = None
    senders: tuple[int, ...] = ()
    """Who got the lease, by its id, and has not sent the drain message yet."""
    queue: tuple[int, ...] = ()
    """Drain messages, by the lease that they were sent with; workers take them in any order."""
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Bugs:
    """What may be planted in the model."""

    release_blindly: bool = False
    ack_before_commit: bool = False
    forget_batch_ids: bool = False
    demand_the_lease_id: bool = False
    acquire_from_the_running: bool = False


NO_BUGS: Final = Bugs()
_STALE: Final = -1
_NEW: Final = 1_000


def normal(state: State, bugs: Bugs = NO_BUGS) -> State:
    """Return the one state that stands for all that differ in names only.

    An id matters only if it is the lease's or that of a drain at work. Only one of the bugs looks
    at the id in a drain message.
    """
    lease_id = state.lease[1] if state.lease else None
    runs = sorted(state.runs, key=lambda run: (run.id != lease_id, run.at, run.held, run.id))
    ids = ([] if lease_id is None else [lease_id]) + [run.id for run in runs]
    names = {id: name for name, id in enumerate(dict.fromkeys(ids))}
    queue = state.queue if bugs.demand_the_lease_id else [_STALE] * len(state.queue)
    return state._replace(
        lease=state.lease and (state.lease[0], names[state.lease[1]]),
        senders=tuple(sorted(names.get(id, _STALE) for id in state.senders)),
        queue=tuple(sorted(names.get(id, _STALE) for id in queue)),
        runs=tuple(run._replace(id=names[run.id]) for run in runs),
    )


def without(items: tuple[int, ...], item: int) -> tuple[int, ...]:
    place = items.index(item)
    return items[:place] + items[place + 1 :]


# --- Steps of producers and tasks ----------------------------------------------------------------

Steps = Iterator[tuple[str, State]]


def append(state: State) -> Steps:
    """A producer's: one step adds the message and looks at the lease."""
    if state.appended < MESSAGES:
        inbox = (*state.inbox, state.appended)
        after = state._replace(appended=state.appended + 1, inbox=inbox)
        yield "append", after if state.lease else queued(after)


def claim_idle(state: State) -> Steps:
    """What `wake` does: it takes the lease of an inbox that waits with nobody on the way."""
    if state.inbox and not state.lease:
        yield "claim_idle", queued(state)


def queued(state: State) -> State:
    return state._replace(lease=("queued", _NEW), senders=(*state.senders, _NEW))


def send(state: State) -> Steps:
    """The process that took the lease sends the drain message, some time later."""
    for id in set(state.senders):
        queue = (*state.queue, id)
        yield "send", state._replace(senders=without(state.senders, id), queue=queue)


def acquire(state: State, bugs: Bugs) -> Steps:
    """A worker gets a drain message and goes on with the inbox, unless another drain is running."""
    for id in set(state.queue):
        rest = state._replace(queue=without(state.queue, id))
        run_id = id if bugs.demand_the_lease_id else _NEW
        if not may_acquire(state, id, bugs):
            yield "acquire: refused", rest
        elif len(state.runs) < WORKERS:
            yield from begun(*go_on(rest, run_id))


def begun(after: State, run: Run | None) -> Steps:
    if run is None:
        yield "acquire: nothing there", after
    else:
        yield "acquire", after._replace(runs=(*after.runs, run))


def go_on(state: State, run_id: int) -> tuple[State, Run | None]:
    """Read the head of the inbox, or free the lease and end the run (`_read_head`)."""
    if not state.inbox:
        return state._replace(lease=None), None
    return state._replace(lease=("running", run_id)), Run(run_id, "read", state.inbox[:GROUP])


def may_acquire(state: State, id: int, bugs: Bugs) -> bool:
    if bugs.demand_the_lease_id:
        return state.lease == ("queued", id)
    if bugs.acquire_from_the_running:
        return True
    return state.lease is None or state.lease[0] == "queued"


# --- Steps of a drain ----------------------------------------------------------------------------

Turns = Iterator[tuple[str, State, Run | None]]
"""The step's name, what it leaves behind, and where the run is now; None if it is over."""


def drain(state: State, bugs: Bugs) -> Steps:
    """Yield what any drain at work may do next (`Drain.run` in worker/drain/path.py)."""
    for place, run in enumerate(state.runs):
        others = state.runs[:place] + state.runs[place + 1 :]
        for name, after, now in turn(state, run, bugs):
            yield name, after._replace(runs=others if now is None else (*others, now))


def turn(state: State, run: Run, bugs: Bugs) -> Turns:
    if run.at == "looked":
        yield "release blindly", state._replace(lease=None), None
    elif bugs.ack_before_commit:
        yield from ack_then_commit(state, run)
    elif run.at == "read":
        yield "commit", commit(state, run, bugs), run._replace(at="committed")
        yield from requeue(state, run)
        yield from acquire_again(state, run)
    else:
        yield from ack_and_publish(state, run, bugs)
        yield from acquire_again(state, run)


def is_mine_or_free(state: State, run: Run) -> bool:
    return state.lease in (None, ("running", run.id))


def acquire_again(state: State, run: Run) -> Turns:
    """A step failed because a connection broke: the same run reads the head of the inbox again."""
    if not state.left.again:
        return
    after = state._replace(left=state.left._replace(again=state.left.again - 1))
    if state.lease and state.lease[0] == "running" and state.lease[1] != run.id:
        yield "acquire again: refused", after, None
    else:
        yield ("acquire again", *go_on(after, run.id))


def commit(state: State, run: Run, bugs: Bugs = NO_BUGS) -> State:
    """Apply a group in one step, as its lock makes it; what is stored has no effect again."""
    new = [each for each in run.held if bugs.forget_batch_ids or each not in state.effects]
    return state._replace(effects=(*state.effects, *new))


def publish(state: State, run: Run) -> State:
    return state._replace(published=state.published | set(run.held))


def ack_and_publish(state: State, run: Run, bugs: Bugs) -> Turns:
    """Publish and remove in one step, then continue if the lease is still its own, or free."""
    after = taken_out(publish(state, run), run)
    if not is_mine_or_free(after, run):
        yield "ack_and_publish: lease lost", after, None
    elif bugs.release_blindly and not after.inbox:
        yield "ack_and_publish", after, run._replace(at="looked")
    else:
        following, now = go_on(after, run.id)
        yield "ack_and_publish" if now else "ack_and_publish: nothing left", following, now


def taken_out(state: State, run: Run) -> State:
    return state._replace(inbox=tuple(each for each in state.inbox if each not in run.held))


def ack_then_commit(state: State, run: Run) -> Turns:
    """The bug: what a drain that dies in between had in its hands is gone."""
    if run.at == "read":
        yield "ack_and_publish", taken_out(state, run), run._replace(at="acknowledged")
    else:
        after, now = go_on(publish(commit(state, run), run), run.id)
        yield "commit", after, now


def requeue(state: State, run: Run) -> Turns:
    """Before it applies a group, a drain may go to the end of the queue and keep the lease."""
    if is_mine_or_free(state, run):
        senders = (*state.senders, run.id)
        yield "requeue", state._replace(lease=("queued", run.id), senders=senders), None
    else:
        yield "requeue: lease lost", state, None


# --- Faults --------------------------------------------------------------------------------------


def crash(state: State) -> Steps:
    """A drain dies anywhere."""
    if state.left.crash:
        left = state.left._replace(crash=state.left.crash - 1)
        for place in range(len(state.runs)):
            others = state.runs[:place] + state.runs[place + 1 :]
            yield "crash", state._replace(left=left, runs=others)


def expire(state: State) -> Steps:
    """The lease expires: a fault if its holder is still on the way, else bound to happen."""
    if state.lease and not in_use(state):
        yield "expire", state._replace(lease=None)
    elif state.lease and state.left.expire:
        left = state.left._replace(expire=state.left.expire - 1)
        yield "expire", state._replace(left=left, lease=None)


def in_use(state: State) -> bool:
    if state.lease and state.lease[0] == "running":
        return any(run.id == state.lease[1] for run in state.runs)
    return bool(state.senders or state.queue)


def lose(state: State) -> Steps:
    """A drain message is lost; or it can't be sent, and the lease is given back."""
    if state.left.lose:
        after = state._replace(left=state.left._replace(lose=state.left.lose - 1))
        for id in set(state.queue):
            yield "lose", after._replace(queue=without(state.queue, id))
        for id in set(state.senders):
            yield "release", release(after, id)


def release(state: State, id: int) -> State:
    lease = None if state.lease == ("queued", id) else state.lease
    return state._replace(senders=without(state.senders, id), lease=lease)


def deliver_again(state: State) -> Steps:
    """A drain message comes twice."""
    if state.left.deliver_again:
        left = state.left._replace(deliver_again=state.left.deliver_again - 1)
        for id in set(state.queue):
            yield "deliver_again", state._replace(left=left, queue=(*state.queue, id))


# --- The search ----------------------------------------------------------------------------------


def steps(state: State, bugs: Bugs) -> Steps:
    yield from append(state)
    yield from claim_idle(state)
    yield from send(state)
    yield from acquire(state, bugs)
    yield from drain(state, bugs)
    yield from crash(state)
    yield from expire(state)
    yield from lose(state)
    yield from deliver_again(state)


@dataclass(eq=False)
class Core:
    """All states that differ in the faults that are left alone; their steps are worked out once."""

    state: State
    """The one that has one fault of each kind left."""
    bugs: Bugs

    @cached_property
    def moves(self) -> list[tuple[str, Faults, Core]]:
        """The steps: each with its name, the faults that it takes, and where it leads."""
        return [
            (name, difference(ONE_OF_EACH, after.left), core(normal(after, self.bugs), self.bugs))
            for name, after in steps(self.state, self.bugs)
        ]


def core(state: State, bugs: Bugs) -> Core:
    return _core(state._replace(left=ONE_OF_EACH), bugs)


_core: Final = cache(Core)


def difference(faults: Faults, others: Faults) -> Faults:
    return Faults(*map(int.__sub__, faults, others))


@cache
def spend(left: Faults, spent: Faults) -> Faults | None:
    """Return the faults that are left then, or None if there are not enough."""
    rest = difference(left, spent)
    return rest if min(rest) >= 0 else None


@dataclass
class Graph:
    """The states in the order in which they were found, how each was found, and its edges."""

    states: list[State]
    found: list[tuple[int, str]]
    edges: list[list[tuple[str, int]]] = field(default_factory=list)

    def way_to(self, bad: Callable[[State], bool]) -> list[str]:
        """Return the steps of a shortest way to a bad state; empty if there is none."""
        place = next((place for place, state in enumerate(self.states) if bad(state)), 0)
        way: list[str] = []
        while place:
            place, name = self.found[place]
            way.append(name)
        return way[::-1]


def search(
    faults: Faults, bugs: Bugs = NO_BUGS, until: Callable[[State], bool] = lambda _: False
) -> Graph:
    """Find every state, breadth first; stop at the first for which `until` is true."""
    graph = Graph([State(faults)], [(0, "")])
    nodes = [(faults, core(State(faults), bugs))]
    places = {nodes[0]: 0}
    for place, (left, here) in enumerate(nodes):  # which grows meanwhile
        edges: list[tuple[str, int]] = []
        graph.edges.append(edges)
        for name, spent, following in here.moves:
            if (rest := spend(left, spent)) is None:
                continue
            there = places.setdefault((rest, following), len(nodes))
            if there == len(nodes):
                nodes.append((rest, following))
                graph.states.append(State(rest, *following.state[1:]))
                graph.found.append((place, name))
            edges.append((name, there))
        if until(graph.states[place]):
            break
    return graph


@cache
def everything(faults: Faults) -> Graph:
    return search(faults)


# --- What must not be ----------------------------------------------------------------------------


def out_of_order(state: State) -> bool:
    """A message took effect twice, or before one that was appended earlier."""
    return state.effects != tuple(range(len(state.effects)))


def gone_too_early(state: State) -> bool:
    """A message is not in the inbox, and has not taken effect or not been published."""
    gone = set(range(state.appended)) - set(state.inbox)
    return not gone <= state.published & set(state.effects)


def forgotten(state: State) -> bool:
    """Messages wait, and nobody is on the way: only `claim_idle` would ever find them."""
    return bool(state.inbox) and not (state.lease or state.senders or state.queue or state.runs)


def two_at_work(state: State) -> bool:
    return len(state.runs) > 1


def stuck(graph: Graph) -> list[State]:
    """Return the states from which not every way ends with an empty inbox and a free lease.

    Only ways without more faults count, and without `requeue`, which a drain could repeat for
    ever. A state is done if it leads nowhere, or only to states that are done; the rest lead in
    circles.
    """
    ahead = [
        {there for name, there in edges if is_bound(graph, place, name, there)}
        for place, edges in enumerate(graph.edges)
    ]
    behind: list[list[int]] = [[] for _ in ahead]
    for place, theres in enumerate(ahead):
        for there in theres:
            behind[there].append(place)
    missing = Counter({place: len(theres) for place, theres in enumerate(ahead)})
    ended = [place for place, count in missing.items() if not count and at_rest(graph, place)]
    for place in ended:  # which grows meanwhile
        for before in behind[place]:
            missing[before] -= 1
            if not missing[before]:
                ended.append(before)
    return [graph.states[place] for place in sorted(set(range(len(ahead))) - set(ended))]


def is_bound(graph: Graph, place: int, name: str, there: int) -> bool:
    """Whether a step is no fault and no requeue."""
    return name != "requeue" and graph.states[place].left == graph.states[there].left


def at_rest(graph: Graph, place: int) -> bool:
    state = graph.states[place]
    return not (state.inbox or state.lease) and state.appended == MESSAGES


# --- The promises --------------------------------------------------------------------------------


def test_the_search_sees_what_it_is_meant_to_see() -> None:
    """66,866 states with faults, 34 without, among them every step and two drains at once."""
    graph = everything(ALL_FAULTS)
    assert (len(graph.states), len(everything(NO_FAULTS).states)) == (66_866, 34)
    names = {name for edges in graph.edges for name, _ in edges}
    assert names == {
        *("append", "claim_idle", "send", "commit"),
        *("acquire", "acquire: refused", "acquire: nothing there"),
        *("ack_and_publish", "ack_and_publish: nothing left", "ack_and_publish: lease lost"),
        *("acquire again", "acquire again: refused"),
        *("requeue", "requeue: lease lost", "release"),
        *("crash", "expire", "lose", "deliver_again"),
    }
    assert graph.way_to(two_at_work)
    assert graph.way_to(lambda state: len(state.effects) == MESSAGES and not state.lease)


def test_messages_take_effect_once_each_and_in_order() -> None:
    """However drains fail and overlap: no message is applied twice or out of order."""
    assert not everything(ALL_FAULTS).way_to(out_of_order)


def test_no_message_leaves_the_inbox_before_it_is_applied_and_published() -> None:
    """So what a dead drain had in its hands is still there for the next one."""
    assert not everything(ALL_FAULTS).way_to(gone_too_early)


def test_without_faults_no_wake_up_is_lost_and_wake_is_never_needed() -> None:
    """While messages wait, somebody has the lease, and exactly one drain is on the way."""
    graph = everything(NO_FAULTS)
    assert not graph.way_to(forgotten)
    for state in graph.states:
        on_the_way = len(state.senders) + len(state.queue) + len(state.runs)
        assert on_the_way == (1 if state.lease else 0)
        assert state.lease or not state.inbox
    assert "claim_idle" not in {name for edges in graph.edges for name, _ in edges}


@pytest.mark.parametrize("faults", [NO_FAULTS, ALL_FAULTS], ids=["no faults", "all faults"])
def test_nothing_is_stuck_for_ever(faults: Faults) -> None:
    """From every state, on every way: once faults cease, the inbox empties, the lease is free."""
    graph = everything(faults)
    assert not stuck(graph)
    for state, edges in zip(graph.states, graph.edges, strict=True):
        if forgotten(state):
            assert "claim_idle" in {name for name, _ in edges}


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
        (Bugs(ack_before_commit=True), NO_FAULTS, gone_too_early, ["acquire", "ack_and_publish"]),
        (Bugs(ack_before_commit=True), ALL_FAULTS, out_of_order, ["ack_and_publish", "commit"]),
        (Bugs(forget_batch_ids=True), Faults(crash=1), out_of_order, ["acquire", "commit"]),
        (Bugs(forget_batch_ids=True), Faults(expire=1), out_of_order, ["acquire", "commit"]),
        (
            Bugs(forget_batch_ids=True),
            Faults(again=1),
            out_of_order,
            ["commit", "acquire again", "commit"],
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
        "acknowledge before commit: too early",
        "acknowledge before commit: a message overtakes the one that a dead drain had",
        "batch ids not looked at, after a crash",
        "batch ids not looked at, with two drains",
        "batch ids not looked at, after a lost answer",
        "acquire from a drain that is running",
    ],
)
def test_a_planted_bug_is_found(
    bugs: Bugs, faults: Faults, bad: Callable[[State], bool], last: list[str]
) -> None:
    """Each part of the protocol is necessary: without it, the search finds a way to do harm."""
    assert not everything(faults).way_to(bad)
    assert search(faults, bugs, until=bad).way_to(bad)[-len(last) :] == last


def test_without_wake_a_lost_drain_message_would_leave_messages_waiting() -> None:
    """The check that nothing is stuck can fail: only `claim_idle` repairs what faults leave."""
    graph = search(Faults(lose=1))
    for place, edges in enumerate(graph.edges):
        graph.edges[place] = [edge for edge in edges if edge[0] != "claim_idle"]
    assert graph.way_to(forgotten)
    assert any(forgotten(state) for state in stuck(graph))


def go(state: State, bugs: Bugs, *names: str) -> State:
    """Follow steps by their names."""
    for name in names:
        state = normal(next(after for step, after in steps(state, bugs) if step == name), bugs)
    return state


def test_an_acquire_that_demanded_its_lease_id_would_never_drain() -> None:
    """With a queue longer than the lease, each message is superseded before its turn, for ever."""
    bugs, superseded = Bugs(demand_the_lease_id=True), ("expire", "claim_idle", "send")
    waiting = go(State(Faults(expire=2)), bugs, "append", "send")
    once_round = go(waiting, bugs, *superseded, "acquire: refused")
    assert once_round == waiting._replace(left=Faults(expire=1))
    assert once_round.inbox == (0,)
    assert refused_while_nobody_runs(search(Faults(expire=1), bugs))
    drained = go(State(Faults(expire=2)), NO_BUGS, "append", "send", *superseded, "acquire")
    assert not go(drained, NO_BUGS, "commit", "ack_and_publish: nothing left").inbox
