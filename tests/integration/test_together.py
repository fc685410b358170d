"""Several inboxes in one turn of a worker: each is as if it were alone, and waits for no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis import Redis
from redis.exceptions import RedisError

from producers.contract.channels import inbox_key, lease_key
from producers.contract.messages import TagBatch, add, register_execution
from producers.inbox.drain_message import QUEUE, drain_message, task_message
from producers.inbox.protocol import LEASE_MS, Inbox
from producers.inbox.rescue import claim_rescue, rescue
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, large_batch, slow
from tests.support.waiting import eventually
from worker.auth import Authorizer
from worker.broker import WAKE_TASK, drains_among, next_drain
from worker.db.repository import Repository
from worker.drain.path import Drain
from worker.drain.together import MAX_OTHERS, SharedTurn, drain_all

SLOW_SECONDS = 6.0


@dataclass
class Organizations:
    """Organizations with batches in their inboxes, on a Redis without workers."""

    servers: Servers
    redis: Redis
    authorizer: Authorizer
    ids: list[UUID] = field(default_factory=list)
    sent: dict[UUID, int] = field(default_factory=dict)
    lease_ms: int = LEASE_MS

    def send(self, organization: UUID, count: int = 1, tag: str = "tag") -> None:
        """Enqueue batches; the first ones add a tag to the tasks 0, 1, 2, …"""
        tasks = range(self.sent.get(organization, 0), self.sent.get(organization, 0) + count)
        batches = [TagBatch(tags=[add(EXECUTION, f"{n}", "type", tag)]) for n in tasks]
        messages = [batch.encode() for batch in batches]
        if organization not in self.sent:
            messages.insert(0, register_execution(EXECUTION).encode())
            self.ids.append(organization)
        self.sent[organization] = self.sent.get(organization, 0) + count
        token = self.servers.token(organization)
        accepted = Inbox(self.redis, organization).append(messages, token, str(uuid4()))
        assert accepted == len(messages)

    def new(self, number: int, **options: Any) -> list[UUID]:
        organizations = [uuid4() for _ in range(number)]
        for each in organizations:
            self.send(each, **options)
        return organizations

    def applied(self, organization: UUID) -> list[str]:
        """Return the tasks of the tags, in the order in which they were added."""
        with self.servers.owner() as owner:
            rows = owner.execute(
                "select task_name from task_tags where organization_id = %s "
                "order by created_at, id",
                [organization],
            )
            return [name for (name,) in rows]

    def is_done(self, organization: UUID) -> bool:
        return not self.redis.exists(lease_key(organization)) and not self.redis.xlen(
            inbox_key(organization)
        )

    def drain(self, repository: Repository, organization: UUID, **changes: Any) -> Drain:
        arguments: dict[str, Any] = {
            "inbox": Inbox(self.redis, organization, lease_ms=self.lease_ms),
            "organization_id": organization,
            "run_id": str(uuid4()),
            "repository": repository,
            "authorizer": self.authorizer,
            "rescue": lambda: None,
            "group_size": 100,
            "budget_seconds": 0.25,
            "stopping": lambda: False,
        }
        return Drain(**(arguments | changes))

    def take_turn(self, repository: Repository, **changes: Any) -> bool:
        """Do what a worker does with the next drain message; return whether there was one."""
        organization = next_drain(self.redis, time.monotonic() + 0.05, lambda: False)
        if organization is None:
            with suppress(RedisError):  # as the Celery task `wake` does
                if claim_rescue(self.redis):
                    rescue(self.redis, LEASE_MS)
            return False
        drain_all(
            self.drain(repository, organization, **changes),
            lambda messages: [
                self.drain(repository, each, **changes)
                for each in drains_among(self.redis, messages)
            ],
        )
        return True

    @contextmanager
    def worker(self) -> Iterator[None]:
        """Run a worker until the block ends."""
        ending = threading.Event()

        def work() -> None:
            with closing(Repository(self.servers.worker_url)) as repository:
                while not ending.is_set():
                    self.take_turn(repository)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()


@pytest.fixture
def organizations(servers: Servers, quiet_redis: Redis, authorizer: Authorizer) -> Organizations:
    return Organizations(servers, quiet_redis, authorizer)


def test_a_long_queue_is_worked_off_many_inboxes_at_a_time(
    organizations: Organizations, repository: Repository
) -> None:
    """Each inbox in its order, whatever it has, and every lease is free in the end."""
    few = organizations.new(70, count=3)
    many = organizations.new(2, count=450)
    turns = 0
    while organizations.take_turn(repository):
        turns += 1
    assert turns < 60
    for each in few + many:
        assert organizations.applied(each) == [f"{n}" for n in range(organizations.sent[each])]
        assert organizations.is_done(each)


def test_a_short_queue_is_left_to_other_workers(
    organizations: Organizations, repository: Repository
) -> None:
    """One turn takes one of 16 messages that wait besides its own, and 15 at most."""
    organizations.new(16)
    for expected in (15, 14):
        organizations.take_turn(repository)
        assert organizations.redis.llen(QUEUE) == expected
    organizations.new(400)
    before = organizations.redis.llen(QUEUE)
    organizations.take_turn(repository, budget_seconds=30.0)  # else some may be handed back
    assert organizations.redis.llen(QUEUE) == before - 1 - MAX_OTHERS


def test_a_turn_that_ends_hands_back_what_it_took(
    organizations: Organizations, repository: Repository
) -> None:
    """Its time is up, or its process ends: each inbox with messages has its drain in the queue."""
    ids = organizations.new(300, count=2)
    for changes in ({"budget_seconds": 0.0}, {"stopping": lambda: True}):
        organizations.take_turn(repository, **changes)
        done = [each for each in ids if organizations.is_done(each)]
        left = [each for each in ids if each not in done]
        assert 1 <= len(done) <= 4
        assert organizations.redis.llen(QUEUE) == len(left)
        for each in left:
            lease: Any = organizations.redis.get(lease_key(each))
            assert lease.startswith(b"queued ")
    while organizations.take_turn(repository):
        pass
    assert all(organizations.applied(each) == ["0", "1"] for each in ids)


@contextmanager
def locked(servers: Servers, organization: UUID) -> Iterator[None]:
    """Hold the row of an organization."""
    with servers.owner() as owner, owner.transaction():
        owner.execute(
            "select from organizations where organization_id = %s for update", [organization]
        )
        yield


@contextmanager
def trigger(servers: Servers, name: str, body: str) -> Iterator[None]:
    """Do something before a tag of this name is stored."""
    with servers.owner() as owner:
        owner.execute(
            f"create function {name}() returns trigger language plpgsql "
            f"as $$ begin {body}; return new; end $$".encode()
        )
        owner.execute(
            f"create trigger {name} before insert on task_tags for each row "
            f"when (new.tag = '{name}') execute function {name}()".encode()
        )
        try:
            yield
        finally:
            owner.execute(f"drop function {name} cascade".encode())


def test_nobody_waits_for_one_that_is_locked_failing_or_slow(
    organizations: Organizations, repository: Repository
) -> None:
    """Of 300 inboxes, some in the same turn as these: all are answered long before the slow one."""
    servers = organizations.servers
    first = organizations.new(5)
    (held,) = organizations.new(1)
    (failing,) = organizations.new(1, tag="failing")
    (slow,) = organizations.new(1, tag="slow")
    rest = organizations.new(292)
    for each in (held, failing, slow):
        Repository.add(repository, each)  # else its row is added first
    with ExitStack() as stack:
        stack.enter_context(trigger(servers, "failing", "raise exception 'it fails'"))
        stack.enter_context(trigger(servers, "slow", f"perform pg_sleep({SLOW_SECONDS})"))
        stack.enter_context(locked(servers, held))
        began = time.monotonic()
        for _ in range(2):
            stack.enter_context(organizations.worker())
        eventually(lambda: all(organizations.is_done(each) for each in first + rest), 60)
        assert time.monotonic() - began < SLOW_SECONDS
        assert not any(organizations.applied(each) for each in (held, failing, slow))
        eventually(lambda: organizations.applied(slow) == ["0"], 60)
    with organizations.worker():
        eventually(lambda: all(map(organizations.is_done, organizations.ids)), 60)
    for each in organizations.ids:
        assert organizations.applied(each) == ["0"]


def test_thirteen_of_a_turn_wait_for_none_of_the_other_three(
    organizations: Organizations, repository: Repository
) -> None:
    """One of these is locked, one fails, and PostgreSQL is slow at one; usually it takes 0.3 s."""
    (held,) = organizations.new(1)
    (failing,) = organizations.new(1, tag="failing")
    (slow_one,) = organizations.new(1, tag="slow")
    rest = organizations.new(MAX_OTHERS + 1 - 3)
    for each in organizations.ids:
        Repository.add(repository, each)
    with ExitStack() as stack:
        stack.enter_context(trigger(organizations.servers, "failing", "raise exception 'it fails'"))
        stack.enter_context(
            trigger(organizations.servers, "slow", f"perform pg_sleep({SLOW_SECONDS})")
        )
        stack.enter_context(locked(organizations.servers, held))
        ids = [*rest[:6], slow_one, held, failing, *rest[6:]]
        first, *others = (organizations.drain(repository, each) for each in ids)
        first.acquire()
        turn = threading.Thread(target=SharedTurn(first, others).run)
        began = time.monotonic()
        turn.start()
        with organizations.worker():
            eventually(lambda: all(map(organizations.is_done, rest)), SLOW_SECONDS)
            assert time.monotonic() - began < SLOW_SECONDS / 2
            turn.join()


@pytest.mark.parametrize(
    "work",
    [
        "perform pg_sleep(6)",
        "for i in 1..60 loop perform pg_sleep(0.1); raise notice 'working'; end loop",
    ],
    ids=["silent", "talking"],
)
def test_the_others_of_a_turn_do_not_wait_while_postgresql_works_for_one(
    organizations: Organizations, repository: Repository, work: str
) -> None:
    """Also if it sends something meanwhile; and no other worker takes the slow one's lease."""
    (slow,) = organizations.new(1, tag="slow")
    others = organizations.new(60)
    for each in organizations.ids:
        Repository.add(repository, each)
    organizations.lease_ms = 1500
    redis: Any = organizations.redis
    with trigger(organizations.servers, "slow", work):
        turn = threading.Thread(target=organizations.take_turn, args=(repository,))
        turn.start()
        eventually(lambda: (redis.get(lease_key(slow)) or b"").startswith(b"running"))
        with organizations.worker():
            eventually(lambda: all(map(organizations.is_done, others)), 30)
            assert not organizations.applied(slow)
        inbox = Inbox(organizations.redis, slow)
        while turn.is_alive():
            assert not inbox.acquire("another", max_messages=1).entries
            time.sleep(0.05)
    assert organizations.applied(slow) == ["0"]


def test_an_inbox_does_not_wait_until_the_look_ups_of_the_next_one_are_sent(
    organizations: Organizations, repository: Repository
) -> None:
    """They are sent behind its commit, do not fit into a socket, and PostgreSQL is slow at them."""
    fast, slow_one = organizations.new(2)
    redis, servers = organizations.redis, organizations.servers
    while organizations.take_turn(repository):
        pass
    token = servers.token(slow_one)
    Inbox(redis, slow_one).append([large_batch(0).encode()], token, str(uuid4()))
    organizations.send(fast)
    first, other = (organizations.drain(repository, each) for each in (fast, slow_one))
    first.acquire()
    turn = threading.Thread(target=SharedTurn(first, [other]).run)
    with slow(servers, slow_one, "perform pg_sleep(5)", "look-up"):
        turn.start()
        try:
            eventually(lambda: organizations.is_done(fast), 3)  # usually in 0.05 s
        finally:
            turn.join()


def test_an_inbox_that_left_the_turn_is_left_to_others(
    organizations: Organizations, repository: Repository
) -> None:
    """Also if its lease expired before what was under way of it was answered."""
    slow_one, other = organizations.new(2)
    while organizations.take_turn(repository):
        pass
    for each in (slow_one, other):
        organizations.send(each, count=4)
    organizations.lease_ms = 2000
    first, second = (
        organizations.drain(repository, each, group_size=1) for each in (slow_one, other)
    )
    first.acquire()
    with slow(organizations.servers, slow_one, "perform pg_sleep(3)", "write"):
        SharedTurn(first, [second]).run()
        lease: Any = organizations.redis.get(lease_key(other))
    assert lease.startswith(b"queued ")
    assert organizations.applied(other) == ["0", "1"]
    with organizations.worker():
        eventually(lambda: all(map(organizations.is_done, organizations.ids)), 30)
    assert organizations.applied(other) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    "cut",
    [
        lambda redis, repository: redis.connection_pool.disconnect(),
        lambda redis, repository: repository._pipeline.connection.close(),
    ],
    ids=["Redis", "PostgreSQL"],
)
def test_a_lost_connection_loses_no_inbox(
    organizations: Organizations,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[[Any, Any], None],
) -> None:
    """Whatever was under way is done again, once."""
    ids = organizations.new(160, count=2)
    original, calls = Inbox.ack_and_publish, iter(range(1_000_000))

    def cut_sometimes(self: Inbox, *arguments: Any, **options: Any) -> Any:
        sent = original(self, *arguments, **options)
        if next(calls) % 40 == 7:
            cut(self.redis, repository)
        return sent

    monkeypatch.setattr(Inbox, "ack_and_publish", cut_sometimes)
    with organizations.worker():  # takes over what is handed back
        while organizations.take_turn(repository):
            pass
        monkeypatch.undo()
        eventually(lambda: all(map(organizations.is_done, ids)), 60)
    assert all(organizations.applied(each) == ["0", "1"] for each in ids)


def test_what_is_for_celery_is_put_back(organizations: Organizations) -> None:
    """To the front of the queue; what is malformed is dropped, and a repetition is one drain."""
    one, other = uuid4(), uuid4()
    wake = task_message(WAKE_TASK, str(uuid4()), [])
    drains = [drain_message(each, str(uuid4())) for each in (one, other, one)]
    assert drains_among(organizations.redis, [drains[0], b"junk", wake, *drains[1:]]) == [
        one,
        other,
    ]
    assert organizations.redis.lrange(QUEUE, 0, -1) == [wake]
