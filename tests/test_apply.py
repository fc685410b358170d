"""A drain on real PostgreSQL and Valkey: what it answers, what it survives, and in which order (section 3)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis.exceptions import ConnectionError

from producers.client import registration
from producers.inbox import Inbox
from producers.messages import (
    ChangeEvent,
    Message,
    ResultRecord,
    TagBatch,
    add,
    inbox_key,
    lease_key,
    rejected_key,
    remove,
)
from tests.conftest import Servers, eventually
from worker.apply import Drain
from worker.authorize import REGISTER, WRITE, Authorizer
from worker.store import Store

EXECUTION = uuid4()


@dataclass
class Bench:
    """An organization's inbox, and a drain of it that the test starts by hand."""

    servers: Servers
    redis: Any
    store: Store
    authorizer: Authorizer
    organization: UUID
    token: str
    handed_over: list[str] = field(default_factory=list)
    heard: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.redis, self.organization)

    def send(self, *messages: Message | bytes, token: str | None = None) -> None:
        raw = [each if isinstance(each, bytes) else each.encode() for each in messages]
        self.inbox.append(raw, self.token if token is None else token, "lease")

    def drain(self, **changes: Any) -> int:
        arguments: dict[str, Any] = {
            "inbox": self.inbox,
            "organization_id": self.organization,
            "run_id": "run",
            "store": self.store,
            "authorizer": self.authorizer,
            "hand_over": lambda: self.handed_over.append("run"),
            "group_size": 100,
            "budget_seconds": 60.0,
            "stopping": lambda: False,
        }
        return Drain(**(arguments | changes)).run()

    def records(self) -> list[ResultRecord]:
        return [
            ResultRecord.model_validate_json(payload)
            for channel, payload in self.heard
            if ":results:" in channel
        ]

    def events(self) -> list[ChangeEvent]:
        return [
            ChangeEvent.model_validate_json(payload)
            for channel, payload in self.heard
            if ":changes:" in channel
        ]

    def outcomes(self) -> list[Any]:
        """Statuses, or the code of the error, of each record that was heard."""
        return [outcome(record) for record in self.records()]

    def tags(self) -> list[str]:
        with self.servers.owner() as connection:
            rows = connection.execute(
                "select tag from task_tags where organization_id = %s and status = 'active' "
                "order by created_at, id",
                [self.organization],
            ).fetchall()
        return [tag for (tag,) in rows]


def outcome(record: ResultRecord) -> Any:
    if record.error is not None:
        return record.error.code
    if record.flow_execution is not None:
        return record.flow_execution.status
    return [result.status for result in record.tags or []]


@pytest.fixture
def bench(
    servers: Servers,
    quiet_redis: Any,
    store: Store,
    authorizer: Authorizer,
    organization: UUID,
    token: str,
) -> Iterator[Bench]:
    """A bench with one registered execution, which hears everything that is published."""
    bench = Bench(servers, quiet_redis, store, authorizer, organization, token)
    bench.send(registration(EXECUTION))
    bench.drain()
    with listening(bench):
        yield bench


@contextmanager
def listening(bench: Bench) -> Iterator[None]:
    """Collect what is published; at the end of a drain, all of it has been heard."""
    original = bench.drain
    with bench.redis.pubsub() as pubsub:
        pubsub.psubscribe(f"task-tags:{{{bench.organization}}}:*")
        eventually(lambda: pubsub.get_message(timeout=1))

        def drain(**changes: Any) -> int:
            try:
                return original(**changes)
            finally:
                bench.redis.publish(f"task-tags:{{{bench.organization}}}:end", b"")
                while (each := eventually(lambda: pubsub.get_message(timeout=1)))["data"]:
                    bench.heard.append((each["channel"].decode(), each["data"]))

        bench.drain = drain  # type: ignore[method-assign]
        yield


def tagging(tag: str, **fields: Any) -> TagBatch:
    return TagBatch(tags=[add(EXECUTION, "task", "type", tag)], **fields)


def test_a_group_is_answered_in_order_and_leaves_nothing_behind(bench: Bench) -> None:
    """Results, in the inbox's order, each on its channel, after the events of its batch."""
    batches = [tagging("a", reply_to="runner-7"), tagging("a"), tagging("b")]
    bench.send(*batches)
    assert bench.drain() == 3
    assert bench.outcomes() == [["added"], ["already_exists"], ["added"]]
    assert [record.batch_id for record in bench.records()] == [each.batch_id for each in batches]
    prefix = f"task-tags:{{{bench.organization}}}"
    assert [channel for channel, _ in bench.heard] == [
        f"{prefix}:changes:{EXECUTION}",
        f"{prefix}:results:runner-7",
        f"{prefix}:results:{batches[1].batch_id}",
        f"{prefix}:changes:{EXECUTION}",
        f"{prefix}:results:{batches[2].batch_id}",
    ]
    assert bench.redis.xlen(inbox_key(bench.organization)) == 0
    assert not bench.redis.exists(lease_key(bench.organization))
    assert bench.tags() == ["a", "b"]


def test_a_drain_takes_an_inbox_in_groups(bench: Bench) -> None:
    """However many wait, all are applied, at most so many in a transaction."""
    bench.send(*[tagging(f"{number}") for number in range(25)])
    assert bench.drain(group_size=10) == 25
    assert bench.tags() == [f"{number}" for number in range(25)]
    assert [event.revision for event in bench.events()] == list(range(1, 26))


def test_a_drain_hands_over_when_its_time_is_used_up(bench: Bench) -> None:
    """It goes to the end of the queue under the same lease, and the next turn goes on where it stopped."""
    bench.send(tagging("a"), tagging("b"))
    assert bench.drain(budget_seconds=0.0, group_size=1) == 0
    assert bench.handed_over == ["run"]
    assert bench.redis.get(lease_key(bench.organization)) == b"queued run"
    assert bench.drain() == 2


def test_a_drain_hands_over_when_the_process_is_to_end(bench: Bench) -> None:
    """A warm shutdown stops between two transactions, and another worker goes on at once."""
    bench.send(tagging("a"), tagging("b"))
    stops = iter([False, True])
    assert bench.drain(group_size=1, stopping=lambda: next(stops)) == 1
    assert bench.handed_over == ["run"]


REFUSED: list[tuple[str, Callable[[Bench], tuple[bytes, str]], str]] = [
    ("bad json", lambda b: (b"hello", b.token), "rejected"),
    ("no batch id", lambda b: (b"{}", b.token), "rejected"),
    ("bad batch", lambda b: (raw(tags=[]), b.token), "bad_request"),
    ("101 operations", lambda b: (raw(tags=[raw_operation()] * 101), b.token), "bad_request"),
    ("2 MiB", lambda b: (raw(tags=["x" * 2 * 1024 * 1024]), b.token), "bad_request"),
    ("no token", lambda b: (raw(), ""), "unauthorized"),
    ("garbage token", lambda b: (raw(), "garbage"), "unauthorized"),
    ("bad and no token", lambda b: (raw(tags=[]), ""), "unauthorized"),
    ("no scope", lambda b: (raw(), b.servers.token(b.organization, REGISTER)), "forbidden"),
    (
        "other scope",
        lambda b: (raw_registration(), b.servers.token(b.organization, WRITE)),
        "forbidden",
    ),
    ("other org", lambda b: (raw(), b.servers.token(uuid4())), "forbidden"),
    ("unknown execution", lambda b: (raw(execution=uuid4()), b.token), "not_found"),
]


def raw_operation(execution: UUID = EXECUTION) -> dict[str, Any]:
    return add(execution, "task", "type", "poison").model_dump(mode="json")


def raw(execution: UUID = EXECUTION, **fields: Any) -> bytes:
    base = {"schema_version": 1, "kind": "tag_batch", "batch_id": str(uuid4()), "reply_to": None}
    return json.dumps({**base, "tags": [raw_operation(execution)], **fields}).encode()


def raw_registration() -> bytes:
    return registration(uuid4()).encode()


@pytest.mark.parametrize(("what", "make", "expected"), REFUSED, ids=[each[0] for each in REFUSED])
def test_a_refused_message_changes_nothing_and_holds_nobody_up(
    bench: Bench, what: str, make: Callable[[Bench], tuple[bytes, str]], expected: str
) -> None:
    """It is answered with its error, or kept if there is nobody to answer; its neighbours take effect."""
    message, token = make(bench)
    bench.send(tagging("before"))
    bench.send(message, token=token)
    bench.send(tagging("after"))
    assert bench.drain() == 3
    rejected = bench.redis.xrange(rejected_key(bench.organization))
    if expected == "rejected":
        assert bench.outcomes() == [["added"], ["added"]]
        ((_, kept),) = rejected
        assert kept[b"message"] == message
        assert b"token" not in kept
    else:
        assert bench.outcomes() == [["added"], expected, ["added"]]
        assert not rejected
    assert bench.tags() == ["before", "after"]


def test_entries_that_are_no_messages_at_all_are_kept_out_of_the_way(bench: Bench) -> None:
    """Whatever somebody adds to the stream by hand, those behind it are applied."""
    key = inbox_key(bench.organization)
    for fields in ({"x": "y"}, {"message": ""}, {"message": b"\xff\xfe", "token": b"\xff"}):
        bench.redis.xadd(key, fields)
    bench.redis.xadd(key, {"message": b"x" * (20 * 1024 * 1024), "token": "t"})
    bench.send(tagging("good"))
    assert bench.drain() == 5
    assert bench.outcomes() == [["added"]]
    kept = bench.redis.xrange(rejected_key(bench.organization))
    assert len(kept) == 4
    assert all(len(fields[b"message"]) <= 1024 * 1024 for _, fields in kept)


def test_a_batch_that_comes_again_is_answered_again_and_changes_nothing(bench: Bench) -> None:
    """Fifty copies in one inbox: one effect, fifty equal answers, and the event is published again."""
    batch = tagging("a")
    bench.send(*[batch] * 50)
    bench.drain(group_size=20)
    assert len(set(map(repr, bench.records()))) == 1
    assert len(bench.records()) == 50
    assert {event.revision for event in bench.events()} == {1}
    assert len({payload for channel, payload in bench.heard if ":changes:" in channel}) == 1
    assert bench.tags() == ["a"]


def test_the_same_id_with_another_body_is_a_conflict(bench: Bench) -> None:
    """In the same group and in a later one."""
    batch = tagging("a")
    other = tagging("b", batch_id=batch.batch_id)
    bench.send(batch, other)
    bench.drain()
    bench.send(other, batch)
    bench.drain()
    assert bench.outcomes() == [["added"], "conflict", "conflict", ["added"]]
    assert bench.tags() == ["a"]


def test_another_organizations_execution_is_answered_like_an_unknown_one(bench: Bench) -> None:
    """Nobody can learn which ids exist elsewhere."""
    foreign = Bench(
        bench.servers,
        bench.redis,
        bench.store,
        bench.authorizer,
        (other := uuid4()),
        bench.servers.token(other),
    )
    secret = uuid4()
    foreign.send(registration(secret))
    foreign.drain()
    for execution in (secret, uuid4()):
        bench.send(TagBatch(tags=[add(execution, "task", "type", "x")], reply_to="r"))
    bench.drain()
    answers = [record.error for record in bench.records()]
    assert answers[0] == answers[1]
    assert answers[0] is not None
    assert answers[0].code == "not_found"


def test_a_crash_between_commit_and_publication_only_repeats_the_publication(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages are still in the inbox; the next drain finds them applied and publishes what is stored."""
    bench.send(tagging("a"), TagBatch(tags=[remove(EXECUTION, "task", "type", "a")]), tagging("a"))
    monkeypatch.setattr(Inbox, "remove", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        bench.drain()
    monkeypatch.undo()
    assert not bench.heard
    assert bench.tags() == ["a"]
    bench.redis.delete(lease_key(bench.organization))
    bench.drain()
    assert bench.outcomes() == [["added"], ["removed"], ["added"]]
    assert [event.revision for event in bench.events()] == [1, 2, 3]
    assert bench.tags() == ["a"]


def test_a_lost_database_connection_is_waited_out_in_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is run again, with its messages in their order; nobody gets an error."""
    killed = threading.Event()
    original = Store.transaction

    @contextmanager
    def cut(self: Store, organization: UUID) -> Iterator[Any]:
        with original(self, organization) as transaction:
            yield transaction
            if not killed.is_set():
                killed.set()
                pid = transaction.connection.exec_driver_sql("select pg_backend_pid()").scalar()
                with bench.servers.owner() as connection:
                    connection.execute("select pg_terminate_backend(%s)", [pid])

    monkeypatch.setattr(Store, "transaction", cut)
    bench.send(tagging("a"), tagging("b"))
    assert bench.drain() == 2
    assert killed.is_set()
    assert bench.outcomes() == [["added"], ["added"]]
    assert bench.tags() == ["a", "b"]


def test_a_lost_redis_connection_is_waited_out_in_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the commit: then only the publication is repeated."""
    failures = iter([True, False])
    original = Inbox.remove

    def fail_once(self: Inbox, *arguments: Any) -> None:
        if next(failures, False):
            raise ConnectionError("cut")
        original(self, *arguments)

    monkeypatch.setattr(Inbox, "remove", fail_once)
    bench.send(tagging("a"), tagging("a"))
    assert bench.drain() == 2
    assert bench.outcomes() == [["added"], ["already_exists"]]


def test_one_batch_that_fails_for_good_does_not_take_its_group_along(bench: Bench) -> None:
    """Each message is then applied by itself; the one at fault is answered, kept, and never applied later."""
    poison = tagging("poison")
    bench.send(tagging("before"), poison, tagging("after"))
    with broken_for(bench, "poison"):
        assert bench.drain() == 3
    assert bench.outcomes() == [["added"], "internal_error", ["added"]]
    assert bench.tags() == ["before", "after"]
    ((_, kept),) = bench.redis.xrange(rejected_key(bench.organization))
    assert kept[b"message"] == poison.encode()
    assert kept[b"reason"].startswith(b"internal_error")
    bench.send(poison)
    bench.drain()
    assert bench.outcomes()[-1] == "internal_error"
    assert bench.tags() == ["before", "after"]


@contextmanager
def broken_for(bench: Bench, tag: str) -> Iterator[None]:
    """Make the database refuse one tag, as a fault of ours would."""
    with bench.servers.owner() as connection:
        connection.execute(
            f"alter table task_tags add constraint broken check (tag <> '{tag}') not valid".encode()
        )
        try:
            yield
        finally:
            connection.execute("alter table task_tags drop constraint broken")


def test_two_drains_at_once_apply_each_batch_once(bench: Bench) -> None:
    """Were the lease to fail altogether, the lock and the batch ids would still hold the promise."""
    bench.send(*[tagging(f"{number}") for number in range(60)])
    stores = [Store(bench.servers.worker_url) for _ in range(2)]

    class NoLease(Inbox):
        """An inbox whose lease everybody seems to have."""

        def take(self, run_id: str) -> bool:
            return True

        def read(self, run_id: str, **bounds: Any) -> Any:
            bench.redis.delete(lease_key(bench.organization))
            return super().read(run_id, **bounds)

    threads = [
        threading.Thread(
            target=Bench.drain,
            args=(bench,),
            kwargs={
                "inbox": NoLease(bench.redis, bench.organization),
                "store": store,
                "group_size": 7,
            },
        )
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.drain()
    assert bench.tags() == [f"{number}" for number in range(60)]
    revisions = [event.revision for event in bench.events()]
    assert set(revisions) == set(range(1, 61))
    assert all(each == ["added"] for each in bench.outcomes())
    for store in stores:
        store.close()


def test_tokens_are_nowhere_but_in_the_inbox(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither stored, logged, published nor kept with a rejected message."""
    bench.send(tagging("a"), b"hello", raw(tags=[]))
    bench.drain()
    signature = bench.token.rpartition(".")[2]
    with bench.servers.owner() as connection:
        stored = connection.execute(
            "select coalesce(string_agg(b::text, ''), '') || "
            "(select string_agg(c::text, '') from tag_changes c) || "
            "(select string_agg(t::text, '') from task_tags t) from tag_batches b"
        ).fetchone()
    kept = repr(bench.redis.xrange(rejected_key(bench.organization)))
    for place in (repr(stored), repr(bench.heard), caplog.text, kept):
        assert signature not in place
