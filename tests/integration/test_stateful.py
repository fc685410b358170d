"""Rules, storage and inbox together, on real servers, under any sequence of messages and faults.

Hypothesis sends messages and lets drains run, die and overtake one another, in any order. The
reference model (tests/support/reference_model.py) gets each message once, when it is sent. In the
end, answers, tags, revisions and change events must be the model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from producers.contract.channels import changes_channel, dead_letters_key, inbox_key, lease_key
from producers.contract.messages import (
    ANY_METADATA,
    Message,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    TagOperation,
    add,
    remove,
    set_tag,
    unless,
    when,
)
from producers.contract.results import Change, ChangeEvent, ResultRecord
from producers.inbox.protocol import Acknowledged, Acquired, Inbox, StreamEntry
from tests.support.reference_model import ReferenceModel
from tests.support.servers import Servers
from worker.auth import Authorizer
from worker.db.repository import Repository, Transaction
from worker.drain.path import Drain

ONE, TWO, UNKNOWN = UUID(int=11), UUID(int=12), UUID(int=13)
REJECTED = "rejected"
LEASE_MS = 60_000  # a lease runs out when the test says so, however slow the machine is


class Killed(BaseException):
    """Stands for the death of a process: nothing in the product may catch it."""


def killed() -> None:
    raise Killed


def nothing() -> None:
    pass


@dataclass
class Failpoints:
    """What happens to a drain after each read, before a commit and before a removal."""

    after_read: Callable[[], None] = nothing
    before_commit: Callable[[], None] = nothing
    before_remove: Callable[[], None] = nothing


@dataclass
class Published:
    """What was published and rejected, in this order."""

    messages: list[tuple[str, bytes]] = field(default_factory=list)
    dead_letters: list[bytes] = field(default_factory=list)


class WatchedInbox(Inbox):
    """An inbox that keeps what it published, and lets things happen in between."""

    def __init__(
        self, redis: Any, organization: UUID, failpoints: Failpoints, published: Published
    ) -> None:
        super().__init__(redis, organization, lease_ms=LEASE_MS)
        self.failpoints, self.published = failpoints, published

    def acquire(self, run_id: str, **bounds: Any) -> Acquired:
        acquired = super().acquire(run_id, **bounds)
        if acquired.entries:
            self.failpoints.after_read()
        return acquired

    def ack_and_publish(
        self, run_id: str, entries: Any, publications: Any, dead_letters: Any = (), **bounds: Any
    ) -> Acknowledged:
        self.failpoints.before_remove()
        sent = super().ack_and_publish(run_id, entries, publications, dead_letters, **bounds)
        following = sent.following()  # now, so that what was published is known
        self.published.messages.extend(publications)
        self.published.dead_letters.extend(each.message for each in dead_letters)
        return Answered(following, self.failpoints)


class Answered(Acknowledged):
    """The answer that is there already."""

    def __init__(self, found: list[StreamEntry] | None, failpoints: Failpoints) -> None:
        self.found, self.failpoints = found, failpoints

    def following(self) -> list[StreamEntry] | None:
        if self.found:
            self.failpoints.after_read()
        return self.found

    def drop(self) -> None:
        pass


class WatchedRepository(Repository):
    """A store that lets things happen before it commits."""

    failpoints = Failpoints()

    def begin(self, organization_id: UUID) -> Transaction:
        transaction = super().begin(organization_id)
        commit = transaction.commit

        def watched() -> None:
            self.failpoints.before_commit()
            commit()

        transaction.commit = watched  # type: ignore[method-assign]
        return transaction


names = st.sampled_from(["t1", "t2"])
metadata = st.sampled_from([None, None, 1, {"k": [1.0, "v"]}])


def operations_on(*executions: UUID) -> st.SearchStrategy[list[TagOperation]]:
    """Few names, so that operations meet."""
    key = (st.sampled_from(executions), names, st.just("type"), st.sampled_from("xy"))
    adds = st.builds(add, *key, metadata)
    removes = st.builds(remove, *key, metadata | st.just(ANY_METADATA))
    sets = st.builds(set_tag, *key, metadata)
    return st.lists(adds | removes | sets, min_size=1, max_size=5)


conditions = st.builds(
    lambda build, *named: build(*named),
    st.sampled_from([when, unless]),
    st.sampled_from([ONE, TWO]),
    st.just("t1"),
    st.just("type"),
    st.none() | st.sampled_from("xy"),
)


operations = operations_on(ONE) | operations_on(ONE, TWO) | operations_on(ONE, TWO, UNKNOWN)
some_batches = st.lists(
    st.builds(TagBatch, tags=operations, conditions=st.just([]) | st.lists(conditions, max_size=2)),
    min_size=1,
    max_size=4,
)
group_sizes = st.integers(1, 4)
task_names = st.sampled_from([["t2"], ["t1"], ["t1", "t2"], [], None])
NOT_A_BATCH = {"schema_version": 1, "kind": "tag_batch", "tags": []}


class Machine(RuleBasedStateMachine):
    """One organization: what was sent, what should become of it, and the drains that make it so."""

    sent = Bundle("sent")

    def __init__(self, servers: Servers, redis: Any, repository: WatchedRepository) -> None:
        super().__init__()
        self.organization = uuid4()
        self.servers, self.redis, self.repository = servers, redis, repository
        self.authorizer = Authorizer(servers.settings)
        self.token = servers.token(self.organization)
        self.model = ReferenceModel()
        self.expected: list[Any] = []
        """The outcome of each message, in the order of the inbox: the model's, or an error."""
        self.garbage: list[bytes] = []
        self.published = Published()
        self.runs = 0

    # --- Messages

    def append(self, raw: bytes, expected: Any, token: str | None = None) -> None:
        inbox = Inbox(self.redis, self.organization, lease_ms=LEASE_MS)
        inbox.append([raw], token or self.token, "lease")
        self.expected.append(expected)

    def send(self, message: Message) -> Message:
        """Send a message, to the model as well; its results channel is its place in the inbox."""
        here = message.model_copy(update={"reply_to": self.here})
        self.append(here.encode(), self.model.send(here))
        return message

    @property
    def here(self) -> str:
        return f"place-{len(self.expected)}"

    @initialize(target=sent, batches=some_batches)
    def begin(self, batches: list[TagBatch]) -> Any:
        one = RegisterExecution(flow_execution_id=ONE)
        two = RegisterExecution(flow_execution_id=TWO, task_names=["t1"])
        return multiple(self.send(one), self.send(two), *map(self.send, batches))

    @rule(target=sent, execution=st.sampled_from([TWO, UNKNOWN]), names=task_names)
    def register(self, execution: UUID, names: list[str] | None) -> Message:
        return self.send(RegisterExecution(flow_execution_id=execution, task_names=names))

    @rule(
        target=sent,
        execution=st.sampled_from([ONE, TWO, UNKNOWN]),
        name=names,
        state=st.sampled_from(["queued", "running"]),
        clear=st.none() | st.just(["type"]),
    )
    def record_state(self, execution: UUID, name: str, state: Any, clear: Any) -> Message:
        fields = {"flow_execution_id": execution, "task_name": name, "state": state}
        return self.send(SetTaskState(**fields, clear=clear))

    @rule(target=sent, batches=some_batches)
    def tag(self, batches: list[TagBatch]) -> Any:
        return multiple(*map(self.send, batches))

    @rule(message=sent)
    def send_again(self, message: Message) -> None:
        self.send(message)

    @rule(message=sent, tags=operations)
    def send_another_body(self, message: Message, tags: list[TagOperation]) -> None:
        self.send(TagBatch(batch_id=message.batch_id, tags=tags))

    @rule(raw=st.sampled_from([b"hello", b"", b"{}", b"\xff\xfe", b"[" * 100_000]))
    def send_garbage(self, raw: bytes) -> None:
        self.append(raw, REJECTED)
        self.garbage.append(raw)

    @rule(message=sent)
    def send_a_broken_batch(self, message: Message) -> None:
        fields = {**NOT_A_BATCH, "batch_id": str(message.batch_id), "reply_to": self.here}
        self.append(json.dumps(fields).encode(), "bad_request")

    @rule(message=sent)
    def send_without_right(self, message: Message) -> None:
        here = message.model_copy(update={"reply_to": self.here})
        self.append(here.encode(), "unauthorized", token="garbage")

    # --- Drains

    def run_drain(
        self, group_size: int, failpoints: Failpoints | None = None, rounds: int | None = None
    ) -> int:
        """Run one drain under a new id, to its end or for some rounds."""
        self.runs += 1
        self.repository.failpoints = failpoints = failpoints or Failpoints()
        turns = iter([False] * rounds + [True]) if rounds is not None else None
        return Drain(
            inbox=WatchedInbox(self.redis, self.organization, failpoints, self.published),
            organization_id=self.organization,
            run_id=f"run-{self.runs}",
            repository=self.repository,
            authorizer=self.authorizer,
            rescue=nothing,
            group_size=group_size,
            budget_seconds=60.0,
            stopping=lambda: next(turns, True) if turns else False,
        ).run()

    @rule(group_size=group_sizes)
    def drain(self, group_size: int) -> None:
        """A drain that gets the lease, free or queued, empties the inbox; others do nothing."""
        runs_already, waiting = self.lease.startswith(b"running"), self.waiting
        answered = self.run_drain(group_size)
        if runs_already:
            assert (answered, self.waiting) == (0, waiting)
        else:
            assert (answered, self.waiting, self.lease) == (waiting, 0, b"")

    @rule(group_size=group_sizes, rounds=st.integers(0, 2))
    def drain_and_hand_over(self, group_size: int, rounds: int) -> None:
        self.run_drain(group_size, rounds=rounds)

    @rule(
        target=sent,
        batches=some_batches,
        group_size=group_sizes,
        failpoint=st.sampled_from(["before_remove", "before_commit", "after_read"]),
        groups=st.integers(0, 2),
        lease_ends=st.booleans(),
    )
    def drain_and_die(
        self,
        batches: list[TagBatch],
        group_size: int,
        failpoint: str,
        groups: int,
        lease_ends: bool,
    ) -> Any:
        """A drain dies at its first group or a later one; the lease expires soon after, or not."""
        sent = self.tag(batches)
        with suppress(Killed):
            self.run_drain(group_size, Failpoints(**{failpoint: after(groups, killed)}))
        if lease_ends:
            self.expire()
        return sent

    @rule(
        target=sent,
        batches=some_batches,
        group_size=group_sizes,
        failpoint=st.sampled_from(["before_remove", "after_read"]),
        groups=st.integers(0, 2),
        rounds=st.none() | st.integers(0, 2),
    )
    def drain_and_be_overtaken(
        self,
        batches: list[TagBatch],
        group_size: int,
        failpoint: str,
        groups: int,
        rounds: int | None,
    ) -> Any:
        """The lease runs out under a slow drain, and another does its work, or a part of it."""
        sent = self.tag(batches)

        def overtake() -> None:
            self.expire()
            self.run_drain(2, rounds=rounds)

        self.run_drain(group_size, Failpoints(**{failpoint: after(groups, overtake)}))
        return sent

    @rule(group_size=group_sizes)
    def drain_while_another_is_running(self, group_size: int) -> None:
        """A drain message that is delivered twice: the second drain ends at once."""

        def second() -> None:
            waiting = self.waiting
            assert self.run_drain(2) == 0
            assert self.waiting == waiting

        self.run_drain(group_size, Failpoints(after_read=after(0, second)))

    @rule(tags=operations, group_size=group_sizes)
    def drain_while_a_message_comes(self, tags: list[TagOperation], group_size: int) -> None:
        """It comes just after a read, also after the empty one: the drain finds it all the same."""
        runs_already = self.lease.startswith(b"running")
        for_each_read = iter(TagBatch(tags=tags) for _ in range(self.waiting + 1))

        def come() -> None:
            with suppress(StopIteration):
                self.send(next(for_each_read))

        self.run_drain(group_size, Failpoints(after_read=come))
        assert runs_already or self.waiting == 0

    @rule()
    def expire(self) -> None:
        self.redis.delete(lease_key(self.organization))

    # --- What must be so

    @property
    def waiting(self) -> int:
        return int(self.redis.xlen(inbox_key(self.organization)))

    @property
    def lease(self) -> bytes:
        return bytes(self.redis.get(lease_key(self.organization)) or b"")

    @invariant()
    def what_left_the_inbox_was_answered_in_order(self) -> None:
        """Answers come in the order of the inbox, and nothing leaves it without one."""
        gone = len(self.expected) - self.waiting
        answered = [place for place in range(gone) if self.expected[place] != REJECTED]
        assert list(self.answers()) == answered

    def answers(self) -> dict[int, bytes]:
        """Return the answer to each message by its place; copies of an answer must be equal."""
        answers: dict[int, bytes] = {}
        for channel, payload in self.published.messages:
            if ":results:place-" in channel:
                place = int(channel.rpartition("-")[2])
                assert answers.setdefault(place, payload) == payload
        return answers

    def teardown(self) -> None:
        self.expire()
        self.run_drain(100)
        assert self.waiting == 0
        assert self.lease == b""
        self.what_left_the_inbox_was_answered_in_order()
        for place, answer in self.answers().items():
            assert said(answer) == self.expected[place]
        kept = self.redis.xrange(dead_letters_key(self.organization))
        assert set(self.garbage) == set(self.published.dead_letters)
        assert [fields[b"message"] for _, fields in kept] == self.published.dead_letters
        self.check_stored_results()
        self.check_executions()
        self.check_tags(self.replay())
        rows = self.select("flow_execution_id, task_name, state from task_executions")
        assert {(execution, name): state for execution, name, state in rows} == self.model.states

    def check_stored_results(self) -> None:
        """Each well-formed, authorized batch has its first answer stored, and no other has one."""
        rows = self.select("batch_id, result_record::text from tag_batches")
        stored = {batch_id: said(record.encode()) for batch_id, record in rows}
        assert stored == {id: answer for id, (_, answer) in self.model.answers.items()}

    def check_executions(self) -> None:
        rows = self.select("flow_execution_id, task_names, revision from flow_executions")
        assert {id: None if names is None else set(names) for id, names, _ in rows} == (
            self.model.names
        )
        assert {id: revision for id, _, revision in rows if revision} == self.model.revisions

    def replay(self) -> set[UUID]:
        """Return the tags that all stored events leave; the events were published in this order."""
        rows = self.select(
            "flow_execution_id, revision, event::text from tag_changes order by revision"
        )
        left: set[UUID] = set()
        for execution, count in self.model.revisions.items():
            stored = [(revision, text) for id, revision, text in rows if id == execution]
            assert [revision for revision, _ in stored] == list(range(1, count + 1))
            channel = changes_channel(self.organization, execution)
            published = [text.decode() for name, text in self.published.messages if name == channel]
            assert list(dict.fromkeys(published)) == [text for _, text in stored]
            for revision, text in stored:
                event = ChangeEvent.decode(text)
                assert event.revision == revision
                for change in event.changes:
                    if isinstance(change, Change):
                        (left.add if change.change == "added" else left.remove)(change.tag.id)
        assert len(rows) == sum(self.model.revisions.values())
        feed = self.select("position, flow_execution_id from tag_changes order by position")
        assert feed == list(enumerate(self.model.positions, 1))
        return left

    def check_tags(self, replayed: set[UUID]) -> None:
        """Active tags are the model's and those of the events, and each was added once."""
        rows = self.select(
            "status, id, flow_execution_id::text, task_name, tag_type, tag, tag_metadata "
            "from task_tags"
        )
        active = [row[1:] for row in rows if row[0] == "active"]
        assert {id for id, *_ in active} == replayed
        parts = ("flow_execution_id", "task_name", "tag_type", "tag", "tag_metadata")
        expected = [[row[part] for part in parts] for row in self.model.rows]
        found = [list(tag) for _, *tag in active]
        assert sorted(map(canonical_bytes, found)) == sorted(map(canonical_bytes, expected))
        assert len(rows) == self.model.added

    def select(self, what: str) -> list[tuple[Any, ...]]:
        """Read as the owner of all organizations' rows would: not through the product."""
        table, _, rest = what.partition(" order by ")
        query = f"select {table} where organization_id = %s" + (rest and f" order by {rest}")
        with self.servers.owner() as connection:
            return connection.execute(query.encode(), [self.organization]).fetchall()


def after(times: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return what does nothing for some times, then does this, then nothing again."""
    acts = iter([*[nothing] * times, act])
    return lambda: next(acts, nothing)()


def said(record: bytes) -> Any:
    """Return a result record in the words of the reference model."""
    result = ResultRecord.decode(record)
    if result.error is not None:
        return result.error.code
    return result.statuses


def canonical_bytes(row: list[Any]) -> str:
    return json.dumps(row, sort_keys=True)


@pytest.mark.timeout(600)  # a failure is made as short as can be, which takes its time
def test_whatever_happens_the_outcome_is_the_reference_models(
    servers: Servers, quiet_redis: Any
) -> None:
    """Exactly once and in order, with every kind of message, and drains that die and overlap."""
    with closing(WatchedRepository(servers.worker_url)) as repository:

        class Here(Machine):
            def __init__(self) -> None:
                super().__init__(servers, quiet_redis, repository)

        run_state_machine_as_test(
            Here, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
        )
