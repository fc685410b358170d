"""A drain on real PostgreSQL and Valkey: what it answers, what it survives, and in which order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from redis.exceptions import ConnectionError

from producers.contract.channels import dead_letters_key, inbox_key, lease_key, position_key
from producers.contract.messages import TagBatch, add, register_execution, remove
from producers.inbox.protocol import Acknowledged, Acquired, Inbox
from tests.support.malformed import stream_entries
from tests.support.tenant import EXECUTION, Tenant, broken_for, killed, tagging
from worker.auth import EXECUTIONS_WRITE, WRITE
from worker.db.connection import SCHEMA
from worker.db.repository import Repository, Transaction
from worker.drain.path import MAX_GROUP_MESSAGE_BYTES
from worker.snapshot import ChangeSet


def test_a_group_is_answered_in_order_and_leaves_nothing_behind(tenant: Tenant) -> None:
    """Results, in the inbox's order, each on its channel, after the events of its batch."""
    batches = [tagging("a", reply_to="runner-7"), tagging("a"), tagging("b")]
    tenant.send(*batches)
    assert tenant.drain() == 3
    assert tenant.outcomes() == [["added"], ["already_exists"], ["added"]]
    assert [record.batch_id for record in tenant.records()] == [each.batch_id for each in batches]
    prefix = f"task-tags:{{{tenant.organization}}}"
    assert [channel for channel, _ in tenant.published] == [
        f"{prefix}:positions",
        f"{prefix}:changes:{EXECUTION}",
        f"{prefix}:results:runner-7",
        f"{prefix}:results:{batches[1].batch_id}",
        f"{prefix}:changes:{EXECUTION}",
        f"{prefix}:results:{batches[2].batch_id}",
    ]
    assert tenant.redis.xlen(inbox_key(tenant.organization)) == 0
    assert not tenant.redis.exists(lease_key(tenant.organization))
    assert tenant.tags() == ["a", "b"]
    announced = json.loads(tenant.published[0][1])
    assert announced == {"cursor": tenant.events()[-1].cursor, "flow_executions": [str(EXECUTION)]}
    assert tenant.redis.get(position_key(tenant.organization)).decode() == announced["cursor"]


def test_a_drain_takes_an_inbox_in_groups(tenant: Tenant) -> None:
    """However many wait, all are applied, at most so many in a transaction."""
    tenant.send(*[tagging(f"{number}") for number in range(25)])
    assert tenant.drain(group_size=10) == 25
    assert tenant.tags() == [f"{number}" for number in range(25)]
    assert [event.revision for event in tenant.events()] == list(range(1, 26))


def test_a_group_of_large_messages_has_fewer(tenant: Tenant) -> None:
    """It ends with the message at which it reaches its size, so that a worker stays small."""
    size = MAX_GROUP_MESSAGE_BYTES // 5
    batches = [
        TagBatch(
            tags=[
                add(EXECUTION, "task", "type", f"{number}-{k}", {"text": "x" * 8_000})
                for k in range(size // 8_000 + 1)
            ]
        )
        for number in range(7)
    ]
    tenant.send(*batches)
    assert tenant.drain(budget_seconds=0.0) == 5
    assert tenant.drain() == 2


def test_a_drain_hands_over_when_its_time_is_used_up(tenant: Tenant) -> None:
    """It goes to the end of the queue under the same lease; its next turn continues there."""
    tenant.send(tagging("a"), tagging("b"))
    assert tenant.drain(budget_seconds=0.0, group_size=1) == 1  # each turn applies one group
    assert tenant.is_requeued()
    assert tenant.drain() == 1


def test_a_drain_hands_over_when_the_process_is_to_end(tenant: Tenant) -> None:
    """A warm shutdown stops between two transactions, and another worker goes on at once."""
    tenant.send(tagging("a"), tagging("b"))
    assert tenant.drain(group_size=1, stopping=lambda: True) == 1
    assert tenant.is_requeued()


REFUSED: list[tuple[str, Callable[[Tenant], tuple[bytes, str]], str]] = [
    ("bad json", lambda b: (b"hello", b.token), "rejected"),
    ("no batch id", lambda b: (b"{}", b.token), "rejected"),
    ("bad batch", lambda b: (raw(tags=[]), b.token), "bad_request"),
    ("101 operations", lambda b: (raw(tags=[raw_operation()] * 101), b.token), "bad_request"),
    ("2 MiB", lambda b: (raw(tags=["x" * 2 * 1024 * 1024]), b.token), "bad_request"),
    ("no token", lambda b: (raw(), ""), "unauthorized"),
    ("garbage token", lambda b: (raw(), "garbage"), "unauthorized"),
    ("bad and no token", lambda b: (raw(tags=[]), ""), "unauthorized"),
    ("no scope", lambda b: (raw(), b.servers.token(b.organization, EXECUTIONS_WRITE)), "forbidden"),
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
    return register_execution(uuid4()).encode()


@pytest.mark.parametrize(("what", "make", "expected"), REFUSED, ids=[each[0] for each in REFUSED])
def test_a_refused_message_changes_nothing_and_holds_nobody_up(
    tenant: Tenant, what: str, make: Callable[[Tenant], tuple[bytes, str]], expected: str
) -> None:
    """It gets its error, or is kept if it names no channel; the messages around it take effect."""
    message, token = make(tenant)
    tenant.send(tagging("before"))
    tenant.send(message, token=token)
    tenant.send(tagging("after"))
    assert tenant.drain() == 3
    rejected = tenant.redis.xrange(dead_letters_key(tenant.organization))
    if expected == "rejected":
        assert tenant.outcomes() == [["added"], ["added"]]
        ((_, kept),) = rejected
        assert kept[b"message"] == message
        assert b"token" not in kept
    else:
        assert tenant.outcomes() == [["added"], expected, ["added"]]
        assert not rejected
    assert tenant.tags() == ["before", "after"]


def test_entries_that_are_no_messages_at_all_are_kept_out_of_the_way(tenant: Tenant) -> None:
    """Entries that somebody adds by hand are refused or kept; messages between them are applied."""
    entries = stream_entries()
    for name, fields in entries.items():
        tenant.redis.xadd(inbox_key(tenant.organization), fields)
        tenant.send(tagging(name))
    assert tenant.drain() == 2 * len(entries)
    assert tenant.tags() == list(entries)
    kept = [fields for _, fields in tenant.redis.xrange(dead_letters_key(tenant.organization))]
    refused = [record.error for record in tenant.records() if record.error is not None]
    assert len(kept) + len(refused) == len(entries)
    assert {error.code for error in refused} == {"unauthorized"}
    assert all(len(fields[b"message"]) <= 1024 * 1024 for fields in kept)


def test_a_group_of_the_largest_size_is_applied(tenant: Tenant) -> None:
    """A hundred batches of a hundred operations: more in one transaction than a socket buffers."""
    batches = [
        TagBatch(
            tags=[add(EXECUTION, "task", f"type {i}", f"{number}", "x" * 500) for i in range(100)]
        )
        for number in range(100)
    ]
    tenant.send(*batches)
    assert tenant.drain() == 100
    assert tenant.outcomes() == [["added"] * 100] * 100
    tenant.send(*batches)
    assert tenant.drain() == 100
    assert tenant.outcomes()[100:] == [["added"] * 100] * 100


def test_a_batch_that_comes_again_is_answered_again_and_changes_nothing(tenant: Tenant) -> None:
    """Fifty copies in one inbox: one effect, fifty equal answers, the event published each time."""
    batch = tagging("a")
    tenant.send(*[batch] * 50)
    tenant.drain(group_size=20)
    assert len(set(map(repr, tenant.records()))) == 1
    assert len(tenant.records()) == 50
    assert {event.revision for event in tenant.events()} == {1}
    assert len({payload for channel, payload in tenant.published if ":changes:" in channel}) == 1
    assert tenant.tags() == ["a"]


def test_the_same_id_with_another_body_is_a_conflict(tenant: Tenant) -> None:
    """In the same group and in a later one."""
    batch = tagging("a")
    other = tagging("b", batch_id=batch.batch_id)
    tenant.send(batch, other)
    tenant.drain()
    tenant.send(other, batch)
    tenant.drain()
    assert tenant.outcomes() == [["added"], "conflict", "conflict", ["added"]]
    assert tenant.tags() == ["a"]


def test_another_organizations_execution_is_answered_like_an_unknown_one(tenant: Tenant) -> None:
    """Nobody can learn which ids exist elsewhere."""
    foreign = Tenant(
        tenant.servers,
        tenant.redis,
        tenant.repository,
        tenant.authorizer,
        (other := uuid4()),
        tenant.servers.token(other),
    )
    secret = uuid4()
    foreign.send(register_execution(secret))
    foreign.drain()
    for execution in (secret, uuid4()):
        tenant.send(TagBatch(tags=[add(execution, "task", "type", "x")], reply_to="r"))
    tenant.drain()
    answers = [record.error for record in tenant.records()]
    assert answers[0] == answers[1]
    assert answers[0] is not None
    assert answers[0].code == "not_found"


def test_a_crash_between_commit_and_publication_only_repeats_the_publication(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages are still in the inbox; the next drain publishes their stored results."""
    tenant.send(tagging("a"), TagBatch(tags=[remove(EXECUTION, "task", "type", "a")]), tagging("a"))
    monkeypatch.setattr(Inbox, "ack_and_publish", killed)
    with pytest.raises(RuntimeError, match="killed"):
        tenant.drain()
    monkeypatch.undo()
    assert not tenant.published
    assert tenant.tags() == ["a"]
    tenant.redis.delete(lease_key(tenant.organization))
    tenant.drain()
    assert tenant.outcomes() == [["added"], ["removed"], ["added"]]
    assert [event.revision for event in tenant.events()] == [1, 2, 3]
    assert tenant.tags() == ["a"]


def test_a_lost_database_connection_is_waited_out_in_place(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is run again, with its messages in their order; nobody gets an error."""
    cut_once = threading.Event()
    original = Transaction.commit

    def cut(self: Transaction) -> None:
        if not cut_once.is_set():
            cut_once.set()
            pid = self._pipeline.connection.info.backend_pid
            with tenant.servers.owner() as connection:
                connection.execute("select pg_terminate_backend(%s)", [pid])
        original(self)

    monkeypatch.setattr(Transaction, "commit", cut)
    tenant.send(tagging("a"), tagging("b"))
    assert tenant.drain() == 2
    assert cut_once.is_set()
    assert tenant.outcomes() == [["added"], ["added"]]
    assert tenant.tags() == ["a", "b"]


def test_a_connection_that_breaks_while_it_is_made_is_waited_out_in_place(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first queries on a connection fail: not a fault of a batch."""
    asked: list[str] = []
    original: Any = psycopg.Cursor.execute

    def cut_at_first(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        if not asked:
            with tenant.servers.owner() as connection:
                pid = self.connection.info.backend_pid
                asked.append(query)
                connection.execute("select pg_terminate_backend(%s)", [pid])
        return original(self, query, *arguments, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", cut_at_first)
    repository = Repository(tenant.servers.worker_url)
    tenant.send(tagging("a"))
    assert tenant.drain(repository=repository) == 1
    repository.close()
    assert asked == [SCHEMA]
    assert tenant.outcomes() == [["added"]]


def test_a_lost_redis_connection_is_waited_out_in_place(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the commit: then only the publication is repeated."""
    failures = iter([True, False])
    original = Inbox.ack_and_publish

    def fail_once(self: Inbox, *arguments: Any, **bounds: Any) -> Acknowledged:
        if next(failures, False):
            raise ConnectionError("cut")
        return original(self, *arguments, **bounds)

    monkeypatch.setattr(Inbox, "ack_and_publish", fail_once)
    tenant.send(tagging("a"), tagging("a"))
    assert tenant.drain() == 2
    assert tenant.outcomes() == [["added"], ["already_exists"]]


def test_one_batch_that_fails_for_good_does_not_take_its_group_along(tenant: Tenant) -> None:
    """Each message is then applied alone; the one at fault is answered and kept, for good."""
    poison = tagging("poison")
    tenant.send(tagging("before"), poison, tagging("after"))
    with broken_for(tenant, "poison"):
        assert tenant.drain() == 3
    assert tenant.outcomes() == [["added"], "internal_error", ["added"]]
    assert tenant.tags() == ["before", "after"]
    ((_, kept),) = tenant.redis.xrange(dead_letters_key(tenant.organization))
    assert kept[b"message"] == poison.encode()
    assert kept[b"reason"].startswith(b"internal_error")
    tenant.send(poison)
    tenant.drain()
    assert tenant.outcomes()[-1] == "internal_error"
    assert tenant.tags() == ["before", "after"]


def test_an_error_that_does_not_come_again_is_not_blamed_on_a_batch(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However lasting it looks, and also if nothing else was applied with it."""
    original, errors = Transaction.save, iter([psycopg.errors.InternalError_("once")])

    def fail_once(self: Transaction, writes: ChangeSet) -> None:
        if error := next(errors, None):
            raise error
        original(self, writes)

    monkeypatch.setattr(Transaction, "save", fail_once)
    tenant.send(tagging("a"))
    assert tenant.drain() == 1
    assert tenant.outcomes() == [["added"]]
    assert not tenant.redis.exists(dead_letters_key(tenant.organization))


def test_two_drains_at_once_apply_each_batch_once(tenant: Tenant) -> None:
    """Even without the lease, the lock and the stored batch ids keep the promise."""
    tenant.send(*[tagging(f"{number}") for number in range(60)])
    stores = [Repository(tenant.servers.worker_url) for _ in range(2)]

    class NoLease(Inbox):
        """An inbox whose lease everybody seems to have."""

        def acquire(self, run_id: str, **bounds: Any) -> Acquired:
            tenant.redis.delete(lease_key(tenant.organization))
            return super().acquire(run_id, **bounds)

        def ack_and_publish(self, run_id: str, *arguments: Any, **bounds: Any) -> Acknowledged:
            tenant.redis.delete(lease_key(tenant.organization))
            return super().ack_and_publish(run_id, *arguments, **bounds)

    threads = [
        threading.Thread(
            target=Tenant.drain,
            args=(tenant,),
            kwargs={
                "inbox": NoLease(tenant.redis, tenant.organization),
                "repository": repository,
                "group_size": 7,
            },
        )
        for repository in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tenant.drain()
    assert tenant.tags() == [f"{number}" for number in range(60)]
    revisions = [event.revision for event in tenant.events()]
    assert set(revisions) == set(range(1, 61))
    assert all(each == ["added"] for each in tenant.outcomes())
    for repository in stores:
        repository.close()


def test_tokens_are_nowhere_but_in_the_inbox(
    tenant: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither stored, logged, published nor kept with a rejected message."""
    tenant.send(tagging("a"), b"hello", raw(tags=[]))
    tenant.drain()
    signature = tenant.token.rpartition(".")[2]
    with tenant.servers.owner() as connection:
        stored = connection.execute(
            "select coalesce(string_agg(b::text, ''), '') || "
            "(select string_agg(c::text, '') from tag_changes c) || "
            "(select string_agg(t::text, '') from task_tags t) from tag_batches b"
        ).fetchone()
    kept = repr(tenant.redis.xrange(dead_letters_key(tenant.organization)))
    for place in (repr(stored), repr(tenant.published), caplog.text, kept):
        assert signature not in place
