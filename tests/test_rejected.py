"""Dead letters on real servers: what is kept of a message that was rejected, and what an operator does with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import registration
from producers.errors import InboxFull
from producers.inbox import Inbox
from producers.messages import MAX_MESSAGE_BYTES, inbox_key, lease_key, parse_message, rejected_key
from tests.conftest import Servers
from tests.test_apply import EXECUTION, Bench, broken_for, listening, tagging
from tests.test_cli import run
from worker.authorize import READ, Authorizer
from worker.rejected import (
    NotRetried,
    NotThere,
    Operator,
    Rejected,
    find,
    rejected_messages,
    server_time,
)
from worker.store import Store


@pytest.fixture
def bench(
    servers: Servers,
    quiet_redis: Any,
    store: Store,
    authorizer: Authorizer,
    organization: UUID,
    token: str,
) -> Iterator[Bench]:
    bench = Bench(servers, quiet_redis, store, authorizer, organization, token)
    bench.send(registration(EXECUTION))
    bench.drain()
    with listening(bench):
        yield bench


def rejected(bench: Bench) -> list[Rejected]:
    return list(rejected_messages(bench.redis, bench.organization))


def operator(bench: Bench, token: str | None = None, **changes: Any) -> Operator:
    token = token or bench.servers.token(bench.organization, sub="operator")
    arguments: dict[str, Any] = {
        "redis": bench.redis,
        "store": bench.store,
        "authorizer": bench.authorizer,
        "token": token,
        "send": lambda messages: bench.inbox.append(messages, token, "lease").count,
    }
    return Operator(**(arguments | changes))


def fail_at(bench: Bench, tag: str = "poison") -> Any:
    """Let the worker fail at a batch with this tag; the cause is gone afterwards."""
    poison = tagging(tag)
    bench.send(poison)
    with broken_for(bench, tag):
        bench.drain()
    return poison


def admin(bench: Bench, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run `task-tags-admin rejected` as an operator, on the database that no worker looks at."""
    secret = bench.servers.settings.jwt_secret
    assert secret is not None
    settings = {
        "TASK_TAGS_REDIS_URL": bench.servers.stack.redis_url.replace("db=0", "db=1"),
        "TASK_TAGS_DATABASE_URL": bench.servers.worker_url,
        "TASK_TAGS_JWT_SECRET": secret.get_secret_value(),
        "TASK_TAGS_TOKEN": bench.servers.token(bench.organization, sub="operator"),
    }
    return run(None, "rejected", *words, module="worker.cli", **(settings | values))


def created_by(bench: Bench) -> list[str]:
    with bench.servers.owner() as connection:
        rows = connection.execute(
            "select created_by from task_tags where organization_id = %s", [bench.organization]
        )
        return [actor for (actor,) in rows]


# --- What is kept --------------------------------------------------------------------------------


def test_a_batch_that_fails_is_kept_with_all_that_an_operator_asks_for(bench: Bench) -> None:
    """What it was, why, when, how often it was tried (in its group, then alone), and under which id."""
    poison, now = tagging("poison"), datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=timezone.utc)
    bench.send(tagging("neighbour"), poison)
    with broken_for(bench, "poison"):
        bench.drain(now=lambda: now)
    (kept,) = rejected(bench)
    assert kept == Rejected(
        bench.organization,
        kept.id,
        poison.encode(),
        "internal_error: CheckViolation",
        "2026-01-02T03:04:05.678+00:00",
        2,
        str(poison.batch_id),
    )
    fail_at(bench, "alone")
    assert [each.attempts for each in rejected(bench)] == [2, 1]


@pytest.mark.parametrize(
    ("size", "kept_size"),
    [
        (MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES),
        (MAX_MESSAGE_BYTES + 1, MAX_MESSAGE_BYTES),
    ],
)
def test_a_message_is_kept_whole_unless_it_is_larger_than_messages_may_be(
    bench: Bench, size: int, kept_size: int
) -> None:
    """Of a larger one, its first mebibyte."""
    bench.redis.xadd(inbox_key(bench.organization), {"message": b"x" * size, "token": "t"})
    bench.drain()
    (kept,) = rejected(bench)
    assert kept.message == b"x" * kept_size
    assert (kept.attempts, kept.batch_id) == (1, None)


def test_a_crash_after_the_failure_was_stored_does_not_lose_the_message(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next drain only answers it, for its result is known; so it was kept before, and is kept once."""
    poison = tagging("poison")
    bench.send(poison)
    monkeypatch.setattr(Inbox, "remove", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with broken_for(bench, "poison"), pytest.raises(RuntimeError, match="killed"):
        bench.drain()
    monkeypatch.undo()
    bench.redis.delete(lease_key(bench.organization))
    bench.drain()
    assert bench.outcomes() == ["internal_error"]
    assert [each.message for each in rejected(bench)] == [poison.encode()]


def test_a_message_at_whose_reading_the_worker_fails_holds_nobody_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours in the reading itself: the message is kept, and those behind it take effect."""
    poison = tagging("poison")
    bench.send(poison, tagging("after"))

    def fail(raw: bytes) -> Any:
        if b"poison" in raw:
            raise RuntimeError("a fault of ours")
        return parse_message(raw)

    monkeypatch.setattr("worker.apply.parse_message", fail)
    assert bench.drain() == 2
    assert bench.tags() == ["after"]
    assert [each.message for each in rejected(bench)] == [poison.encode()]


# --- Retrying ------------------------------------------------------------------------------------


def test_a_retry_takes_effect_once_its_cause_is_gone(bench: Bench) -> None:
    """The operator is the actor; the sender, who asks again with the same batch, gets the new result."""
    poison = fail_at(bench)
    (kept,) = rejected(bench)
    assert operator(bench).retry(kept, server_time(bench.redis)) == poison.batch_id
    assert not rejected(bench)
    bench.drain()
    bench.send(poison)
    bench.drain()
    assert bench.outcomes() == ["internal_error", ["added"], ["added"]]
    assert bench.tags() == ["poison"]
    assert created_by(bench) == ["operator"]


def test_a_retry_whose_cause_is_still_there_is_rejected_again(bench: Bench) -> None:
    """Nothing is lost, and it can be tried another time."""
    poison = fail_at(bench)
    (kept,) = rejected(bench)
    operator(bench).retry(kept, server_time(bench.redis))
    with broken_for(bench, "poison"):
        bench.drain()
    assert bench.outcomes() == ["internal_error", "internal_error"]
    assert [each.message for each in rejected(bench)] == [poison.encode()]


class Crash(Exception):
    """The operator's process dies."""


def die(*_: Any) -> Any:
    raise Crash


def send_and_die(bench: Bench) -> Callable[[Any], int]:
    def send(messages: Any) -> int:
        bench.inbox.append(messages, bench.token, "lease")
        raise Crash

    return send


@pytest.mark.parametrize("when", ["before it is enqueued", "before the entry is removed"])
def test_a_crash_amid_a_retry_neither_loses_the_message_nor_doubles_it(
    bench: Bench, when: str
) -> None:
    """It stays rejected until it is in the inbox, and another retry has no second effect."""
    fail_at(bench)
    (kept,) = rejected(bench)
    send = die if when == "before it is enqueued" else send_and_die(bench)
    with pytest.raises(Crash):
        operator(bench, send=send).retry(kept, server_time(bench.redis))
    bench.drain()
    assert rejected(bench) == [kept]
    operator(bench).retry(kept, server_time(bench.redis))
    bench.drain()
    assert bench.outcomes()[-1] == ["added"]
    assert [event.revision for event in bench.events()] in ([1], [1, 1])  # published again at most
    assert bench.tags() == ["poison"]
    assert not rejected(bench)


def test_a_batch_that_took_effect_is_not_applied_again(bench: Bench) -> None:
    """Only a failure is forgotten: whoever retries an old entry is answered with what is stored."""
    fail_at(bench)
    (kept,) = rejected(bench)
    for _ in range(2):
        operator(bench).retry(kept, server_time(bench.redis))
        bench.drain()
    assert bench.outcomes() == ["internal_error", ["added"], ["added"]]
    assert {event.revision for event in bench.events()} == {1}


def test_only_a_failure_of_the_own_organization_is_forgotten(bench: Bench) -> None:
    """What took effect stays known; another organization's rows don't exist."""
    good = tagging("good")
    bench.send(good)
    bench.drain()
    poison = fail_at(bench)
    assert not bench.store.forget_failure(bench.organization, good.batch_id)
    assert not bench.store.forget_failure(uuid4(), poison.batch_id)
    assert bench.store.forget_failure(bench.organization, poison.batch_id)
    assert not bench.store.forget_failure(bench.organization, poison.batch_id)


def test_what_the_worker_would_refuse_stays_rejected(bench: Bench) -> None:
    """A token that does not sign for it would turn the message into an error, and it would be gone."""
    poison = fail_at(bench)
    (kept,) = rejected(bench)
    organization = bench.organization
    for token, said in (
        ("garbage", "unauthorized"),
        (bench.servers.token(uuid4()), "forbidden"),
        (bench.servers.token(organization, READ), "forbidden"),
    ):
        with pytest.raises(NotRetried, match=said):
            operator(bench, token).retry(kept, server_time(bench.redis))
    assert rejected(bench) == [kept]
    bench.send(poison)
    bench.drain()
    assert bench.outcomes()[-1] == "internal_error"  # so its failure was not forgotten either


def test_a_message_for_which_there_is_no_room_stays_rejected(bench: Bench) -> None:
    """It goes only once it is in the inbox."""
    fail_at(bench)
    (kept,) = rejected(bench)
    with pytest.raises(InboxFull):
        operator(bench, send=lambda _: 0).retry(kept, server_time(bench.redis))
    assert rejected(bench) == [kept]


@pytest.mark.parametrize("id", ["1-1", "1", "", "x", "-", "+", "1-99999999999999999999", "１-１"])
def test_an_id_that_is_not_there_says_so(bench: Bench, id: str) -> None:
    """Whatever was typed, it is never another message."""
    fail_at(bench)
    with pytest.raises(NotThere):
        find(bench.redis, bench.organization, id)


# --- The commands --------------------------------------------------------------------------------


def test_nothing_of_another_organization_is_listed(bench: Bench) -> None:
    """With --org that one's alone, without it everybody's; a message's own text is not in the list."""
    other = uuid4()
    bench.send(b"hello")
    bench.drain()
    Inbox(bench.redis, other).append([b"secret"], "t", "lease")
    bench.drain(inbox=Inbox(bench.redis, other), organization_id=other)
    mine = admin(bench, "list", "--org", str(bench.organization), "--json")
    both = admin(bench, "list", "--json")
    (line,) = mine.stdout.splitlines()
    (kept,) = rejected(bench)
    assert json.loads(line) == kept.summary()
    listed = {json.loads(each)["organization_id"] for each in both.stdout.splitlines()}
    assert listed == {str(bench.organization), str(other)}
    assert "secret" not in both.stdout
    plain = admin(bench, "list", "--org", str(other))
    assert str(other) in plain.stdout
    assert "the message must be JSON" in plain.stdout
    assert str(bench.organization) not in plain.stdout


def test_a_message_is_shown_and_the_terminal_does_not_obey_it(bench: Bench) -> None:
    """Whole, and escaped; as JSON for programs."""
    raw = b"\x1b]0;owned\x07[bold]\nfake \xff " + b"x" * 5000
    bench.send(raw)
    bench.drain()
    (kept,) = rejected(bench)
    plain = admin(bench, "show", "--org", str(bench.organization), kept.id)
    assert r"\x1b]0;owned\x07[bold]\nfake \xff " + "x" * 5000 in plain.stdout
    assert "\x1b" not in plain.stdout
    as_json = admin(bench, "show", "--org", str(bench.organization), kept.id, "--json")
    assert json.loads(as_json.stdout) == {**kept.summary(), "message": kept.text}


def test_all_are_retried_but_those_that_nobody_can_answer(bench: Bench) -> None:
    """In their order; what can't be retried is said, stays, and makes the exit code 2."""
    first = fail_at(bench)
    bench.send(b"hello")
    bench.drain()
    second = fail_at(bench, "poison 2")
    done = admin(bench, "retry", "--org", str(bench.organization), "--all")
    assert done.returncode == 2
    assert done.stdout.splitlines()[0].endswith(f"enqueued again: {first.batch_id}")
    assert done.stdout.splitlines()[1].endswith(f"enqueued again: {second.batch_id}")
    assert "no readable batch id: the message must be JSON" in done.stderr
    assert [each.message for each in rejected(bench)] == [b"hello"]
    bench.drain()
    assert bench.tags() == ["poison", "poison 2"]
    assert created_by(bench) == ["operator", "operator"]


def test_what_is_dropped_is_gone_and_the_rest_stays(bench: Bench) -> None:
    """By id, then all of it; one that is not there is said."""
    bench.send(*[b"%d" % number for number in range(25)])
    bench.drain()
    kept, org = rejected(bench), str(bench.organization)
    done = admin(bench, "drop", "--org", org, kept[0].id, "1-1", kept[2].id)
    assert (done.returncode, len(done.stdout.splitlines())) == (2, 2)
    assert "there is no rejected message 1-1" in done.stderr
    assert rejected(bench) == [kept[1], *kept[3:]]
    assert admin(bench, "drop", "--org", org, "--all").returncode == 0
    assert not rejected(bench)
    assert bench.redis.exists(rejected_key(bench.organization))  # so no id ever comes again


@pytest.mark.parametrize(
    ("words", "values", "code", "said"),
    [
        (("retry", "1-1"), {}, 2, "there is no rejected message 1-1"),
        (("show", "1-1"), {}, 2, "there is no rejected message 1-1"),
        (("retry",), {}, 2, "--all"),
        (("drop", "1-1", "--all"), {}, 2, "--all"),
        (("retry", "--all"), {"TASK_TAGS_TOKEN": ""}, 2, "TASK_TAGS_TOKEN is not set"),
        (("retry", "--all"), {"TASK_TAGS_JWT_SECRET": ""}, 2, "TASK_TAGS_JWT_SECRET"),
        (("list",), {"TASK_TAGS_REDIS_URL": "unix:///nowhere"}, 3, "Redis can't be used"),
    ],
)
def test_an_operators_error_is_one_clear_line(
    bench: Bench, words: tuple[str, ...], values: dict[str, str], code: int, said: str
) -> None:
    """As for users."""
    done = admin(bench, *words, "--org", str(bench.organization), **values)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
