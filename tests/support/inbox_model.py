"""A small model of the inbox protocol (docs/concepts/inbox-protocol.md), and all of its states.

A state says what is in Redis and PostgreSQL and where each drain is. Its steps are those of
producers/inbox/, in any order that can happen: three messages, two drains at work, and a number of
faults. tests/unit/test_inbox_model.py searches them all, and tests/integration/test_inbox_paths.py
takes random ways through them on a real server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from typing import Final, NamedTuple

MESSAGES: Final = 3
HAND: Final = 2
"""How many messages a drain has in its hands, at most; a group is any number of the first ones."""
WINDOW: Final = 2
"""How many groups are committed before the first of them is acknowledged, at most."""
WORKERS: Final = 2

# --- States --------------------------------------------------------------------------------------


class Faults(NamedTuple):
    """What may still go wrong on the way from a state."""

    crash: int = 0
    expire: int = 0
    lose: int = 0
    deliver_again: int = 0
    again: int = 0
    forget: int = 0
    junk: int = 0
    old: int = 0
    slow: int = 0
    """How often a run goes back to the queue although a group is under way, because PostgreSQL is
    slow at another inbox of its turn. No fault of this inbox, but it may lead to two runs."""


NO_FAULTS: Final = Faults()
ONE_OF_EACH: Final = Faults(*[1] * len(Faults._fields))
ALL_FAULTS: Final = ONE_OF_EACH._replace(expire=2, forget=0, junk=0, old=0, slow=0)
"""What happens to processes and messages."""
KEY_FAULTS: Final = Faults(crash=1, expire=1, forget=1, junk=1, old=1)
"""What happens to keys: the set of those that wait is lost, a lease is set that nobody frees."""
TURN_FAULTS: Final = Faults(crash=1, expire=1, again=1, slow=2)
"""What else happens to an inbox that shares a turn with others.

Of two inboxes no step touches the keys, messages or transactions of both, and each may fail or wait
at any step. So whatever the others do is in the states of one: its run fails and begins again, or
it goes back to the queue with a group under way.
"""


class Run(NamedTuple):
    """A drain at work: its id, and the messages in its hands, which are never none.

    It has `read` them, or `committed` them in groups; if a step failed, it has to `acquire` them
    again.
    """

    id: int
    read: tuple[int, ...]
    committed: tuple[tuple[int, ...], ...] = ()
    gone: tuple[int, ...] = ()
    """With a bug: what was removed before its commit."""

    @property
    def held(self) -> tuple[int, ...]:
        return (*chain.from_iterable(self.committed), *self.read)


class State(NamedTuple):
    """A state. Messages are numbers in the order of append.

    The lease is None if there is none, and "junk" if it is one that nobody frees.
    """

    left: Faults
    appended: int = 0
    inbox: tuple[int, ...] = ()
    effects: tuple[int, ...] = ()
    published: frozenset[int] = frozenset()
    lease: tuple[str, int] | None = None
    waiting: bool = False
    """Whether the organization is in the set of those in whose inboxes messages wait."""
    queue: tuple[int, ...] = ()
    """Drain messages, by the lease that they were sent with; workers take them in any order."""
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Bugs:
    """What may be planted in the model."""

    release_blindly: bool = False
    ack_before_commit: bool = False
    write_before_commit: bool = False
    """The next group is committed although the one before it was not."""
    release_in_flight: bool = False
    """The lease is freed when nothing follows, although a group is still on its way."""
    forget_batch_ids: bool = False
    demand_the_lease_id: bool = False
    acquire_from_the_running: bool = False
    remember_late: bool = False
    keep_junk: bool = False


NO_BUGS: Final = Bugs()
_STALE: Final = -1
NEW: Final = 1_000_000
"""The id of a lease or run that a step makes."""


def normal(state: State, bugs: Bugs = NO_BUGS) -> State:
    """Return the one state that stands for all that differ in names only.

    An id matters only if it is the lease's or that of a drain at work. Only one of the bugs looks
    at the id in a drain message.
    """
    lease_id = state.lease[1] if state.lease and state.lease[0] != "junk" else None
    runs = sorted(state.runs, key=lambda run: (run.id != lease_id, run[1:], run.id))
    ids = ([] if lease_id is None else [lease_id]) + [run.id for run in runs]
    names = {id: name for name, id in enumerate(dict.fromkeys(ids))}
    queue = state.queue if bugs.demand_the_lease_id else [_STALE] * len(state.queue)
    return state._replace(
        lease=state.lease and (state.lease[0], names.get(state.lease[1], _STALE)),
        queue=tuple(sorted(names.get(id, _STALE) for id in queue)),
        runs=tuple(run._replace(id=names[run.id]) for run in runs),
    )


def without(items: tuple[int, ...], item: int) -> tuple[int, ...]:
    place = items.index(item)
    return items[:place] + items[place + 1 :]


# --- Steps of producers and tasks ----------------------------------------------------------------


class Step(NamedTuple):
    """A step: its name, what it leads to, and the id of the drain message or run that takes it."""

    name: str
    state: State
    actor: int = 0


Steps = Iterator[Step]


def is_free(state: State) -> bool:
    return state.lease is None or state.lease[0] == "junk"


def append(state: State, bugs: Bugs) -> Steps:
    """A producer's: it adds the message, looks at the lease and sends the drain in one step."""
    if state.appended < MESSAGES:
        waiting = (state.waiting or not state.inbox) and not bugs.remember_late
        yield Step("append", _appended(state, bugs)._replace(waiting=waiting))
        if state.left.old:  # a producer of an older version does not know the set
            left = state.left._replace(old=state.left.old - 1)
            yield Step("append by an older one", _appended(state, bugs)._replace(left=left))


def _appended(state: State, bugs: Bugs) -> State:
    inbox = (*state.inbox, state.appended)
    after = state._replace(appended=state.appended + 1, inbox=inbox)
    free = state.lease is None if bugs.keep_junk else is_free(state)
    return queued(after, NEW) if free else after


def rescue(state: State, bugs: Bugs) -> Steps:
    """A drain or `wake` looks for lost drains, of those in the set; and hourly, of all."""
    name = "rescue" if state.waiting else "rebuild"
    if not state.inbox:
        after = state._replace(waiting=False)
    elif state.lease is None if bugs.keep_junk else is_free(state):
        after = queued(state._replace(waiting=True), NEW)
    else:
        after = state._replace(waiting=True)
    if after != state:
        yield Step(name, after)


def queued(state: State, id: int) -> State:
    return state._replace(lease=("queued", id), queue=(*state.queue, id))


def acquire(state: State, bugs: Bugs) -> Steps:
    """A worker gets a drain message and goes on with the inbox, unless another drain is running."""
    for id in sorted(set(state.queue)):
        rest = state._replace(queue=without(state.queue, id))
        run_id = id if bugs.demand_the_lease_id else NEW
        if not may_acquire(state, id, bugs):
            yield Step("acquire: refused", rest, id)
        elif len(state.runs) < WORKERS:
            after, run = go_on(rest, run_id)
            if run is None:
                yield Step("acquire: nothing there", after, id)
            else:
                yield Step("acquire", after._replace(runs=(*after.runs, run)), id)


def go_on(state: State, run_id: int) -> tuple[State, Run | None]:
    """Read the head of the inbox, or free the lease and end the run (`_read_head`)."""
    if not state.inbox:
        return state._replace(lease=None, waiting=False), None
    after = state._replace(lease=("running", run_id), waiting=True)
    return after, Run(run_id, state.inbox[:HAND])


def may_acquire(state: State, id: int, bugs: Bugs) -> bool:
    if bugs.demand_the_lease_id:
        return state.lease == ("queued", id)
    if bugs.acquire_from_the_running:
        return True
    return state.lease is None or state.lease[0] in ("queued", "junk")


# --- Steps of a drain ----------------------------------------------------------------------------

Turns = Iterator[tuple[str, State, Run | None]]
"""The step's name, what it leaves behind, and where the run is now; None if it is over."""


def drain(state: State, bugs: Bugs) -> Steps:
    """Yield what any drain at work may do next (`Drain.run` in worker/drain/path.py)."""
    for place, run in enumerate(state.runs):
        others = state.runs[:place] + state.runs[place + 1 :]
        for name, after, now in turn(state, run, bugs):
            runs = others if now is None else (*others, now)
            yield Step(name, after._replace(runs=runs), run.id)


def turn(state: State, run: Run, bugs: Bugs) -> Turns:
    if run == Run(run.id, ()):
        yield "release blindly", state._replace(lease=None), None
    elif bugs.ack_before_commit:
        yield from ack_then_commit(state, run)
    else:
        if run.read and len(run.committed) < WINDOW:
            yield from commit_some(state, run, bugs)
        if run.committed:
            yield from ack_and_publish(state, run, bugs)
        else:
            yield from requeue(state, run)
        yield from requeue_under_way(state, run)
        yield from acquire_again(state, run)


def is_mine_or_free(state: State, run: Run) -> bool:
    return is_free(state) or state.lease == ("running", run.id)


def acquire_again(state: State, run: Run) -> Turns:
    """A step failed because a connection broke: the same run reads the head of the inbox again."""
    if not state.left.again:
        return
    after = state._replace(left=state.left._replace(again=state.left.again - 1))
    if state.lease and state.lease[0] == "running" and state.lease[1] != run.id:
        yield "acquire again: refused", after, None
    else:
        yield ("acquire again", *go_on(after, run.id))


def commit_some(state: State, run: Run, bugs: Bugs) -> Turns:
    """The next group takes effect: any number of messages, as its look-ups and answers allow."""
    for size in range(1, len(run.read) + 1):
        group, rest = run.read[:size], run.read[size:]
        after = run._replace(read=rest, committed=(*run.committed, group))
        yield "commit", commit(state, group, bugs), after
        if bugs.write_before_commit and rest:  # as if the commit before it had failed unnoticed
            yield "commit", commit(state, rest, bugs), after._replace(read=())


def commit(state: State, group: tuple[int, ...], bugs: Bugs = NO_BUGS) -> State:
    """Apply a group in one step, as its lock makes it; what is stored has no effect again."""
    new = [each for each in group if bugs.forget_batch_ids or each not in state.effects]
    return state._replace(effects=(*state.effects, *new))


def ack_and_publish(state: State, run: Run, bugs: Bugs) -> Turns:
    """Publish and remove in one step, then continue if the lease is still its own, or free.

    A drain that has lost the lease ends what is on its way, and begins nothing.
    """
    group, *rest = run.committed
    left = run._replace(committed=tuple(rest))
    after = taken_out(published(state, group), group)._replace(waiting=True)
    if not is_mine_or_free(after, run):
        left = left._replace(read=())
        yield "ack_and_publish: lease lost", after, left if rest else None
    elif bugs.release_blindly and not after.inbox:
        yield "ack_and_publish", after, Run(run.id, ())
    elif bugs.release_in_flight and left.held and after.inbox[-1:] == left.held[-1:]:
        yield "ack_and_publish", after._replace(lease=None), left
    elif left.held:
        space = HAND - len(left.held)
        following = [each for each in after.inbox if each > left.held[-1]][:space]
        left = left._replace(read=(*left.read, *following))
        yield "ack_and_publish", after._replace(lease=("running", run.id)), left
    else:
        following_state, now = go_on(after, run.id)
        name = "ack_and_publish" if now else "ack_and_publish: nothing left"
        yield name, following_state, now


def published(state: State, group: tuple[int, ...]) -> State:
    return state._replace(published=state.published | set(group))


def taken_out(state: State, group: tuple[int, ...]) -> State:
    return state._replace(inbox=tuple(each for each in state.inbox if each not in group))


def ack_then_commit(state: State, run: Run) -> Turns:
    """The bug: what a drain that dies in between had in its hands is gone."""
    if run.read:
        after = run._replace(read=(), gone=run.read)
        yield "ack_and_publish", taken_out(state, run.read), after
    else:
        after_commit = published(commit(state, run.gone), run.gone)
        yield "commit", *go_on(after_commit, run.id)


def requeue(state: State, run: Run) -> Turns:
    """Before it applies a group, a drain may go to the end of the queue and keep the lease."""
    if is_mine_or_free(state, run):
        waiting = state.waiting or bool(state.inbox)
        yield "requeue", queued(state._replace(waiting=waiting), run.id), None
    else:
        yield "requeue: lease lost", state, None


def requeue_under_way(state: State, run: Run) -> Turns:
    """An inbox leaves a shared turn (`SharedTurn`); what is under way of it is finished."""
    if state.left.slow and is_mine_or_free(state, run):
        left = state.left._replace(slow=state.left.slow - 1)
        waiting = state.waiting or bool(state.inbox)
        after = queued(state._replace(left=left, waiting=waiting), run.id)
        yield "requeue: a group is under way", after, run


# --- Faults --------------------------------------------------------------------------------------


def crash(state: State) -> Steps:
    """A drain dies anywhere."""
    if state.left.crash:
        left = state.left._replace(crash=state.left.crash - 1)
        for place, run in enumerate(state.runs):
            others = state.runs[:place] + state.runs[place + 1 :]
            yield Step("crash", state._replace(left=left, runs=others), run.id)


def expire(state: State) -> Steps:
    """The lease expires: a fault if its holder is still on the way, else bound to happen."""
    if state.lease is None or state.lease[0] == "junk":
        return
    if not in_use(state):
        yield Step("expire", state._replace(lease=None))
    elif state.left.expire:
        left = state.left._replace(expire=state.left.expire - 1)
        yield Step("expire", state._replace(left=left, lease=None))


def in_use(state: State) -> bool:
    if state.lease and state.lease[0] == "running":
        return any(run.id == state.lease[1] for run in state.runs)
    return bool(state.queue)


def lose(state: State) -> Steps:
    """A drain message is lost."""
    if state.left.lose:
        left = state.left._replace(lose=state.left.lose - 1)
        for id in sorted(set(state.queue)):
            yield Step("lose", state._replace(left=left, queue=without(state.queue, id)), id)


def deliver_again(state: State) -> Steps:
    """A drain message comes twice."""
    if state.left.deliver_again:
        left = state.left._replace(deliver_again=state.left.deliver_again - 1)
        for id in sorted(set(state.queue)):
            yield Step("deliver_again", state._replace(left=left, queue=(*state.queue, id)), id)


def harm_keys(state: State) -> Steps:
    """The set of those that wait is lost, or somebody sets a lease without a time to live."""
    if state.left.forget and state.waiting:
        left = state.left._replace(forget=state.left.forget - 1)
        yield Step("forget", state._replace(left=left, waiting=False))
    if state.left.junk:
        left = state.left._replace(junk=state.left.junk - 1)
        yield Step("junk", state._replace(left=left, lease=("junk", _STALE)))


# --- The search ----------------------------------------------------------------------------------


def steps(state: State, bugs: Bugs) -> Steps:
    yield from append(state, bugs)
    yield from rescue(state, bugs)
    yield from acquire(state, bugs)
    yield from drain(state, bugs)
    yield from crash(state)
    yield from expire(state)
    yield from lose(state)
    yield from deliver_again(state)
    yield from harm_keys(state)


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
            (step.name, _spent(step), core(normal(step.state, self.bugs), self.bugs))
            for step in steps(self.state, self.bugs)
        ]


def _spent(step: Step) -> Faults:
    return difference(ONE_OF_EACH, step.state.left)


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
    """Messages wait, and nobody is on the way: only a rescue would ever find them."""
    return bool(state.inbox) and is_free(state) and not (state.queue or state.runs)


def not_in_the_set(state: State) -> bool:
    """Messages wait, and a rescue would not look for them."""
    return bool(state.inbox) and not state.waiting


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
    return not state.inbox and is_free(state) and not state.waiting and state.appended == MESSAGES
