"""The inbox protocol (docs/concepts/inbox-protocol.md) on a real server: nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis.exceptions import OutOfMemoryError, ResponseError

from producers.contract.channels import dead_letters_key, failing_key, inbox_key, lease_key
from producers.contract.encoding import MAX_READABLE_BYTES
from producers.inbox.drain_message import QUEUE
from producers.inbox.protocol import (
    DeadLetter,
    Inbox,
    StreamEntry,
    chunks,
)
from producers.inbox.rescue import rescue, rescue_some
from producers.redis_client import open_redis
from tests.support.servers import Servers
from tests.support.waiting import eventually

TOKEN = "a token"


@pytest.fixture
def inbox(quiet_redis: Any, organization: UUID) -> Inbox:
    return Inbox(quiet_redis, organization)


def append(inbox: Inbox, *messages: bytes, lease_id: str = "lease") -> bool:
    """Append; return whether that sent a drain, which is taken from the queue."""
    sent = inbox.redis.llen(QUEUE)
    inbox.append(messages, TOKEN, lease_id)
    return inbox.redis.llen(QUEUE) > sent


def acquire(inbox: Inbox, run_id: str, max_messages: int = 10, **bounds: int) -> list[StreamEntry]:
    return inbox.acquire(run_id, max_messages=max_messages, **bounds).entries


def ack_and_publish(
    inbox: Inbox,
    run_id: str,
    entries: list[StreamEntry],
    publications: Sequence[tuple[str, bytes]] = (),
    dead_letters: Sequence[DeadLetter] = (),
    max_messages: int = 10,
) -> list[StreamEntry]:
    sent = inbox.ack_and_publish(
        run_id, entries, publications, dead_letters, max_messages=max_messages
    )
    return sent.following() or []


def messages(entries: list[StreamEntry]) -> list[bytes | None]:
    return [entry.message for entry in entries]


def test_the_first_to_append_is_the_one_who_sends_a_drain(inbox: Inbox) -> None:
    """One drain for each busy inbox: while it is on the way, appenders need not send another."""
    assert append(inbox, b"1", lease_id="first")
    assert not append(inbox, b"2", lease_id="second")
    assert messages(acquire(inbox, "first")) == [b"1", b"2"]
    assert not append(inbox, b"3", lease_id="third")
    entries = acquire(inbox, "first")
    assert messages(entries) == [b"1", b"2", b"3"]
    assert {entry.token for entry in entries} == {TOKEN.encode()}


def test_an_append_behind_others_sends_a_drain_if_there_is_none(
    inbox: Inbox, quiet_redis: Any, organization: UUID
) -> None:
    """The drain of those that wait was lost: no rescue is needed where messages keep coming."""
    assert append(inbox, b"1")
    quiet_redis.delete(lease_key(organization))
    assert append(inbox, b"2")
    assert not append(inbox, b"3")


def test_what_is_read_stays_until_it_is_removed(inbox: Inbox) -> None:
    """A drain that dies after reading has lost nothing, and a run goes on where it has come to."""
    append(inbox, b"1", b"2", b"3")
    first = acquire(inbox, "run", max_messages=2)
    assert messages(first) == [b"1", b"2"]
    assert messages(acquire(inbox, "run", max_messages=2)) == [b"1", b"2"]
    assert messages(ack_and_publish(inbox, "run", first, max_messages=2)) == [b"3"]
    assert messages(acquire(inbox, "run", max_messages=2)) == [b"3"]


def test_an_append_while_the_last_message_is_removed_is_not_missed(inbox: Inbox) -> None:
    """append finds the lease taken, so the drain must find the message in its last step."""
    append(inbox, b"1")
    entries = acquire(inbox, "run")
    assert not append(inbox, b"2", lease_id="other")  # while the drain is at work
    entries = ack_and_publish(inbox, "run", entries)
    assert messages(entries) == [b"2"]  # so the drain goes on
    assert ack_and_publish(inbox, "run", entries) == []
    assert append(inbox, b"3", lease_id="next")  # and after its end, the next append sends a drain


def test_two_producers_and_a_drain_never_leave_a_message_with_nobody_on_the_way(
    quiet_redis: Any, organization: UUID
) -> None:
    """At any time nothing waits, or a drain is on the way: no message is forgotten."""
    inbox = Inbox(quiet_redis, organization)
    seen: list[bytes] = []
    done = threading.Event()

    def produce(name: int) -> None:
        for number in range(300):
            lease_id = f"{name}-{number}"
            inbox.append([b"%d-%d" % (name, number)], TOKEN, lease_id)

    def drain() -> None:
        is_last = False
        while quiet_redis.rpop(QUEUE) or not is_last:
            is_last = done.is_set()  # what was appended before has its message in the queue
            entries = acquire(inbox, "run", max_messages=7)
            while entries:
                seen.extend(entry.message or b"" for entry in entries)
                entries = ack_and_publish(inbox, "run", entries, max_messages=7)

    producers = [threading.Thread(target=produce, args=(name,)) for name in range(2)]
    drainer = threading.Thread(target=drain)
    for thread in (*producers, drainer):
        thread.start()
    for thread in producers:
        thread.join()
    done.set()
    drainer.join(30)
    assert not drainer.is_alive()
    assert quiet_redis.xlen(inbox_key(organization)) == 0
    assert quiet_redis.get(lease_key(organization)) is None
    for name in range(2):
        mine = [each for each in seen if each.startswith(b"%d-" % name)]
        assert mine == [b"%d-%d" % (name, number) for number in range(300)]


def test_a_second_drain_ends_at_once_while_one_runs(inbox: Inbox) -> None:
    """A drain message that is delivered twice, or comes late, changes nothing."""
    append(inbox, b"1")
    assert acquire(inbox, "this run")
    assert not acquire(inbox, "another run")
    assert messages(acquire(inbox, "this run")) == [b"1"]


def test_a_drain_that_finds_nothing_leaves_no_lease(
    inbox: Inbox, quiet_redis: Any, organization: UUID
) -> None:
    """A drain message that comes late frees what it took, also a lease that was queued with it."""
    append(inbox, b"1")
    ack_and_publish(inbox, "run", acquire(inbox, "run"))
    assert acquire(inbox, "late") == []
    assert not quiet_redis.exists(lease_key(organization))


def test_a_step_that_is_repeated_says_what_it_said(inbox: Inbox, quiet_redis: Any) -> None:
    """A client repeats a call whose answer was lost: it must recognize its own first call."""
    assert append(inbox, b"1", lease_id="mine")
    assert not append(inbox, b"1", lease_id="mine")  # the drain was sent in the same step
    assert acquire(inbox, "run")
    assert acquire(inbox, "run")
    inbox.requeue("run")
    inbox.requeue("run")
    assert quiet_redis.llen(QUEUE) == 2
    entries = acquire(inbox, "next run", max_messages=1)
    following = ack_and_publish(inbox, "next run", entries, max_messages=1)
    assert following
    assert ack_and_publish(inbox, "next run", entries, max_messages=1) == following
    assert ack_and_publish(inbox, "next run", following) == []
    assert ack_and_publish(inbox, "next run", following) == []


def test_an_inbox_is_drained_also_while_redis_has_no_memory_left(
    inbox: Inbox, quiet_redis: Any
) -> None:
    """Appending is refused then, but what frees memory goes on."""
    append(inbox, b"1")
    quiet_redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            append(inbox, b"2")
        (entry,) = acquire(inbox, "run")
        inbox.requeue("run")
        assert acquire(inbox, "run") == [entry]
        assert inbox.count_failure(entry, "DataError") == (1, 0)
        rejection = DeadLetter(b"1", "no id", datetime(2026, 1, 2, tzinfo=timezone.utc))
        inbox.add_dead_letter(entry, rejection)
        published = [("channel", b"x")]
        last = inbox.ack_and_publish("run", [entry], published, [rejection], max_messages=1)
        assert last.following() == []
    finally:
        quiet_redis.config_set("maxmemory", 0)


def test_a_lease_that_was_superseded_in_the_queue_does_not_stop_the_drain(inbox: Inbox) -> None:
    """However long the queue, the first drain message to arrive drains: else none ever would."""
    append(inbox, b"1", lease_id="superseded in the queue")
    assert messages(acquire(inbox, "an earlier one")) == [b"1"]
    assert not acquire(inbox, "superseded in the queue")


def test_a_lease_that_runs_out_is_free_and_its_old_holder_must_stop(
    quiet_redis: Any, organization: UUID
) -> None:
    """Another drain is sent after a worker has died or stopped; the stopped one then ends."""
    short = Inbox(quiet_redis, organization, lease_ms=30)
    append(short, b"1", b"2", lease_id="stopped")
    quiet_redis.rpop(QUEUE)  # as a worker takes it
    entries = acquire(short, "stopped", max_messages=1)
    eventually(lambda: quiet_redis.get(lease_key(organization)) is None)
    inbox = Inbox(quiet_redis, organization)
    rescue(quiet_redis, 10_000)
    assert quiet_redis.get(lease_key(organization)).startswith(b"queued ")
    assert acquire(inbox, "woken", max_messages=1) == entries
    assert not short.acquire("stopped", max_messages=1).entries
    short.requeue("stopped")
    assert quiet_redis.get(lease_key(organization)) == b"running woken"
    assert (
        ack_and_publish(short, "stopped", entries) == []
    )  # over, and the other's lease is untouched
    assert messages(acquire(inbox, "woken")) == [b"2"]


@pytest.mark.parametrize("held", [None, "queued run", "running another", "running run"])
def test_a_run_renews_no_lease_but_its_own(
    inbox: Inbox, quiet_redis: Any, organization: UUID, held: str | None
) -> None:
    """Neither a free one, nor one that waits in the queue, nor another run's."""
    key = lease_key(organization)
    if held is not None:
        quiet_redis.set(key, held, px=500)
    inbox.renew("run")
    assert quiet_redis.get(key) == (None if held is None else held.encode())
    assert (quiet_redis.pttl(key) > 500) == (held == "running run")


def test_a_drain_whose_lease_ran_out_unnoticed_goes_on(
    quiet_redis: Any, organization: UUID
) -> None:
    """If nobody else took the lease, a slow drain still has it, also after Redis lost a second."""
    inbox = Inbox(quiet_redis, organization)
    append(inbox, b"1", b"2")
    entries = acquire(inbox, "run", max_messages=1)
    quiet_redis.delete(lease_key(organization))
    assert messages(ack_and_publish(inbox, "run", entries)) == [b"2"]
    assert not append(inbox, b"3", lease_id="other")


def test_handing_over_keeps_the_lease_in_the_queue(inbox: Inbox, quiet_redis: Any) -> None:
    """Between two turns nobody else sends a drain, and the next turn may begin."""
    append(inbox, b"1")
    acquire(inbox, "run")
    inbox.requeue("run")
    assert not append(inbox, b"2", lease_id="other")
    assert acquire(inbox, "next run")


def test_only_inboxes_that_wait_with_nobody_on_the_way_are_claimed(quiet_redis: Any) -> None:
    """A drain is sent only where one is missing."""
    waiting, queued, empty = uuid4(), uuid4(), uuid4()
    for organization in (waiting, queued, empty):
        append(Inbox(quiet_redis, organization), b"1")
    quiet_redis.delete(lease_key(waiting))
    idle = Inbox(quiet_redis, empty)
    ack_and_publish(idle, "run", acquire(idle, "run"))
    wrong = uuid4()
    quiet_redis.set(inbox_key(wrong), "a key of another type, which is mended")
    quiet_redis.xadd("task-tags:{not a uuid}:inbox", {"message": "x"})
    assert rescue_some(quiet_redis, [waiting, queued, empty, wrong], 10_000) == [waiting]


def test_the_bound_holds_and_what_is_accepted_is_the_beginning(
    quiet_redis: Any, organization: UUID
) -> None:
    """Over the bound nothing is stored; of several messages the first ones are, in one piece."""
    inbox = Inbox(quiet_redis, organization, limit=5)
    assert inbox.append([b"1", b"2", b"3"], TOKEN, "lease") == 3
    assert inbox.append([b"4", b"5", b"6"], TOKEN, "lease") == 2
    assert inbox.append([b"7"], TOKEN, "lease") == 0
    assert messages(acquire(inbox, "run")) == [b"1", b"2", b"3", b"4", b"5"]


def test_the_bound_holds_with_fifty_producers(quiet_redis: Any, organization: UUID) -> None:
    """The check and the append are one step."""
    inbox = Inbox(quiet_redis, organization, limit=500)
    accepted: list[int] = []

    def produce() -> None:
        for _ in range(20):
            accepted.append(inbox.append([b"x"], TOKEN, "lease"))

    threads = [threading.Thread(target=produce) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(accepted) == 500 == quiet_redis.xlen(inbox_key(organization))


def test_an_inbox_has_a_limited_size(quiet_redis: Any, organization: UUID) -> None:
    """So that one organization can't fill the memory of Redis, which all share."""
    inbox = Inbox(quiet_redis, organization)
    large = b"x" * 1_000_000
    accepted = sum(inbox.append([large], "token", str(uuid4())) for _ in range(300))
    assert 200 <= accepted <= 270
    assert inbox.append([b"{}"], "token", str(uuid4())) == 0
    entries = inbox.acquire("run", max_messages=200, max_bytes=10**9).entries
    inbox.ack_and_publish("run", entries, [], max_messages=0).following()
    assert inbox.append([b"{}"], "token", str(uuid4())) == 1
    quiet_redis.flushdb()


def test_what_may_not_be_published_stays(
    inbox: Inbox, quiet_redis: Any, servers: Servers, organization: UUID
) -> None:
    """While a right to a channel is missing, no result is lost, and no dead letter kept twice."""
    append(inbox, b"1", b"2")
    quiet_redis.acl_setuser("deaf", reset=True, enabled=True, nopass=True, keys=["*"])
    quiet_redis.acl_setuser("deaf", enabled=True, categories=["+@all"])
    url = servers.stack.redis_url.replace("unix://", "unix://deaf:x@").replace("db=0", "db=1")
    try:
        with open_redis(url) as deaf:
            mine = Inbox(deaf, organization)
            entries = acquire(mine, "run")
            rejection = DeadLetter(b"2", "no id", datetime(2026, 1, 2, tzinfo=timezone.utc))
            for _ in range(2):
                with pytest.raises(ResponseError, match="channel"):
                    ack_and_publish(mine, "run", entries, [("channel", b"x")], [rejection])
            assert acquire(mine, "run") == entries
            quiet_redis.acl_setuser("deaf", enabled=True, channels=["*"])
            assert ack_and_publish(mine, "run", entries, [("channel", b"x")], [rejection]) == []
        assert quiet_redis.xlen(dead_letters_key(organization)) == 1
    finally:
        quiet_redis.acl_deluser("deaf")


def test_dead_letters_that_have_reached_their_last_id_are_moved_aside(
    inbox: Inbox, quiet_redis: Any, organization: UUID
) -> None:
    """Else the organization's batches would never be answered."""
    key = dead_letters_key(organization)
    quiet_redis.xadd(key, {"message": "old"}, id=f"{2**64 - 1}-{2**64 - 2}")  # one more fits
    append(inbox, b"1", b"2")
    entries = acquire(inbox, "run")
    now = datetime(2026, 1, 2, tzinfo=timezone.utc)
    rejections = [DeadLetter(each, "no id", now) for each in (b"1", b"2")]
    assert ack_and_publish(inbox, "run", entries, [], rejections) == []
    assert [fields[b"message"] for _, fields in quiet_redis.xrange(key)] == [b"1", b"2"]
    (aside,) = quiet_redis.keys(f"{key}:aside:*")
    assert quiet_redis.xlen(aside) == 1


def test_a_value_that_is_larger_than_any_message_is_cut(inbox: Inbox, quiet_redis: Any) -> None:
    """A producer could fill the memory of a worker, while others wait."""
    append(inbox, b"x" * (MAX_READABLE_BYTES + 1000))
    (entry,) = acquire(inbox, "run")
    assert entry.message is not None
    assert len(entry.message) == MAX_READABLE_BYTES + 1


def test_a_read_is_bounded_in_bytes_but_never_empty(inbox: Inbox) -> None:
    """A hundred messages of 1 MiB come in parts; one that is larger than the bound comes alone."""
    append(inbox, b"x" * 600, b"y" * 600, b"z" * 600)
    assert len(acquire(inbox, "run", max_bytes=1300)) == 2
    assert len(acquire(inbox, "run", max_bytes=10)) == 1


def test_removing_publishes_in_the_same_step(
    inbox: Inbox, quiet_redis: Any, organization: UUID
) -> None:
    """A result is published if and only if its message is removed; dead letters have no token."""
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    append(inbox, b"1", b"2")
    entries = acquire(inbox, "run")
    with quiet_redis.pubsub() as pubsub:
        pubsub.subscribe("channel")
        eventually(lambda: pubsub.get_message(timeout=1))
        publications = [("channel", b"a"), ("channel", b"b")]
        rejection = DeadLetter(b"2", "no id", now)
        last = inbox.ack_and_publish("run", entries, publications, [rejection], max_messages=2)
        assert last.following() == []
        received = [eventually(lambda: pubsub.get_message(timeout=1))["data"] for _ in range(2)]
    assert received == [b"a", b"b"]
    assert quiet_redis.xlen(inbox_key(organization)) == 0
    ((_, kept),) = quiet_redis.xrange(dead_letters_key(organization))
    assert kept == {
        b"message": b"2",
        b"reason": b"no id",
        b"rejected_at": b"2026-01-02T03:04:05.000+00:00",
        b"attempts": b"1",
    }


def test_failures_are_counted_for_each_message(inbox: Inbox, organization: UUID) -> None:
    """A message is not blamed for what failed at the one before it."""
    append(inbox, b"1", b"2")
    first, second = acquire(inbox, "run")
    assert [inbox.count_failure(first, "error")[0] for _ in range(3)] == [1, 2, 3]
    assert inbox.count_failure(second, "error") == (1, 0)
    assert inbox.count_failure(second, "error")[0] == 2
    assert inbox.count_failure(second, "time-out", "_slow")[0] == 1
    assert inbox.count_failure(second, "error")[0] == 3
    ack_and_publish(inbox, "run", [first])
    assert inbox.count_failure(second, "error")[0] == 1  # the count ends with what is acknowledged


def test_a_failure_that_was_counted_by_a_clock_ahead_counts_from_now(
    inbox: Inbox, quiet_redis: Any, organization: UUID
) -> None:
    """Else the message would hold its organization up until the clock is there again."""
    append(inbox, b"1")
    (entry,) = acquire(inbox, "run")
    inbox.count_failure(entry, "error")
    key = failing_key(organization)
    quiet_redis.hincrby(key, "first", 3600)
    assert inbox.count_failure(entry, "error") == (2, 0)
    quiet_redis.hincrby(key, "first", -20)
    attempts, seconds = inbox.count_failure(entry, "error")
    assert (attempts, 20 <= seconds < 60) == (3, True)


def test_ids_never_come_again(inbox: Inbox, quiet_redis: Any) -> None:
    """A drain that is late removes only what it has read, never what was appended since."""
    ids: set[bytes] = set()
    for _ in range(50):
        append(inbox, b"x")
        entries = acquire(inbox, "run")
        ack_and_publish(inbox, "run", entries)
        ids.update(entry.id for entry in entries)
    assert len(ids) == 50


def test_an_entry_tells_when_it_was_accepted(inbox: Inbox, quiet_redis: Any) -> None:
    """The stream id is the server's time: the moment at which a token must have been valid."""
    append(inbox, b"x")
    (entry,) = acquire(inbox, "run")
    seconds, _ = quiet_redis.time()
    assert abs(entry.accepted_at - seconds) < 5


def test_messages_are_sent_in_pieces_and_keep_their_order() -> None:
    """Each script call is short, and the pieces add up to what was given."""
    given = [b"%d" % number for number in range(1000)] + [b"x" * 700_000, b"y" * 700_000]
    pieces = list(chunks(given))
    assert [message for piece in pieces for message in piece] == given
    assert all(len(piece) <= 200 and sum(map(len, piece)) <= 1024 * 1024 for piece in pieces)


def test_the_time_of_acceptance_is_a_field_of_the_entry(inbox: Inbox, quiet_redis: Any) -> None:
    """The id is for the order alone: it never runs back, also when Redis' clock does."""
    organization_key = inbox._inbox
    ahead = int((time.time() + 3600) * 1000)
    quiet_redis.xadd(organization_key, {"message": "ahead", "token": "t"}, id=f"{ahead}-0")
    inbox.append([b"now"], "token", "lease")
    first, second = acquire(inbox, "run")
    assert int(second.id.partition(b"-")[0]) >= ahead
    assert abs(first.accepted_at - time.time() - 3600) < 60
    assert abs(second.accepted_at - time.time()) < 60
