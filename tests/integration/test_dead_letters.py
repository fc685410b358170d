"""Dead letters on real servers: what is kept of a message, and what an operator can do with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from producers.contract.channels import dead_letters_key, inbox_key, lease_key, position_key
from producers.contract.messages import MAX_MESSAGE_BYTES
from producers.errors import InboxFull
from producers.inbox.protocol import Inbox
from tests.support.commands import run
from tests.support.tenant import Tenant, applied, broken_for, killed, tagging
from worker.auth import READ
from worker.db import rows
from worker.drain.application import Application
from worker.drain.dead_letters import (
    DeadLetterEntry,
    DeadLetterNotFound,
    DeadLetterRetrier,
    RetryRefused,
    dead_letters,
    find,
    server_time,
)
from worker.wire import read_message


def rejected(tenant: Tenant) -> list[DeadLetterEntry]:
    return list(dead_letters(tenant.redis, tenant.organization))


def operator(tenant: Tenant, token: str | None = None, **changes: Any) -> DeadLetterRetrier:
    token = token or tenant.servers.token(tenant.organization, sub="operator")
    arguments: dict[str, Any] = {
        "redis": tenant.redis,
        "repository": tenant.repository,
        "authorizer": tenant.authorizer,
        "token": token,
        "send": lambda messages: tenant.inbox.append(messages, token, "lease"),
    }
    return DeadLetterRetrier(**(arguments | changes))


def fail_at(tenant: Tenant, tag: str = "poison") -> Any:
    """Let the worker fail at a batch with this tag; the cause is gone afterwards."""
    poison = tagging(tag)
    tenant.send(poison)
    with broken_for(tenant, tag):
        tenant.drain()
    return poison


def admin(tenant: Tenant, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run `task-tags-admin rejected` as an operator, on the database that no worker looks at."""
    secret = tenant.servers.settings.jwt_secret
    assert secret is not None
    settings = {
        "TASK_TAGS_REDIS_URL": tenant.servers.stack.redis_url.replace("db=0", "db=1"),
        "TASK_TAGS_DATABASE_URL": tenant.servers.worker_url,
        "TASK_TAGS_JWT_SECRET": secret.get_secret_value(),
        "TASK_TAGS_TOKEN": tenant.servers.token(tenant.organization, sub="operator"),
    }
    return run(None, "rejected", *words, module="worker.cli", **(settings | values))


def created_by(tenant: Tenant) -> list[str]:
    with tenant.servers.owner() as connection:
        rows = connection.execute(
            "select created_by from task_tags where organization_id = %s", [tenant.organization]
        )
        return [actor for (actor,) in rows]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is to blame after 5 failures, without the 10 seconds."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)


# --- What is kept --------------------------------------------------------------------------------


def test_a_batch_that_fails_is_kept_with_all_that_an_operator_asks_for(tenant: Tenant) -> None:
    """What it was, why, when, how often it failed alone, and under which id."""
    poison, now = tagging("poison"), datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=timezone.utc)
    tenant.send(tagging("neighbour"), poison)
    with broken_for(tenant, "poison"):
        tenant.drain(now=lambda: now)
    (kept,) = rejected(tenant)
    assert kept == DeadLetterEntry(
        tenant.organization,
        kept.id,
        poison.encode(),
        "internal_error: CheckViolation",
        "2026-01-02T03:04:05.678+00:00",
        5,
        str(poison.batch_id),
    )
    fail_at(tenant, "alone")
    assert [each.attempts for each in rejected(tenant)] == [5, 5]


@pytest.mark.parametrize(
    ("size", "kept_size"),
    [
        (MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES),
        (MAX_MESSAGE_BYTES + 1, MAX_MESSAGE_BYTES),
    ],
)
def test_a_message_is_kept_whole_unless_it_is_larger_than_messages_may_be(
    tenant: Tenant, size: int, kept_size: int
) -> None:
    """Of a larger one, its first mebibyte."""
    tenant.redis.xadd(inbox_key(tenant.organization), {"message": b"x" * size, "token": "t"})
    tenant.drain()
    (kept,) = rejected(tenant)
    assert kept.message == b"x" * kept_size
    assert (kept.attempts, kept.batch_id) == (1, None)


def test_a_crash_after_the_failure_was_stored_does_not_lose_the_message(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next drain only publishes the stored result; the message was kept before, and once."""
    poison = tagging("poison")
    tenant.send(poison)
    monkeypatch.setattr(Inbox, "ack_and_publish", killed)
    with broken_for(tenant, "poison"), pytest.raises(RuntimeError, match="killed"):
        tenant.drain()
    monkeypatch.undo()
    tenant.redis.delete(lease_key(tenant.organization))
    tenant.drain()
    assert tenant.outcomes() == ["internal_error"]
    assert [each.message for each in rejected(tenant)] == [poison.encode()]


def test_what_another_drain_has_answered_is_no_failure(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was stopped blames a message that took effect in the meantime."""
    batch = tagging("good")

    def fail(*_: Any) -> Any:
        raise psycopg.errors.CheckViolation

    def blame(*_: Any) -> int:
        applied(tenant.repository, tenant.organization, batch)
        return 1

    monkeypatch.setattr(Application, "decide", fail)
    monkeypatch.setattr("worker.drain.path.attempts_to_blame", blame)
    tenant.send(batch)
    tenant.drain()
    assert tenant.outcomes() == [["added"]]
    (event,) = tenant.events()
    assert event.revision == 1
    assert tenant.redis.get(position_key(tenant.organization)) == str(event.cursor).encode()
    assert not rejected(tenant)


def test_a_failure_that_comes_again_is_answered_as_before(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its look-ups fail whenever they are tried: those behind it do not wait for ever."""
    poison, read = tagging("poison"), rows.tags

    def fail(found: Any, tags: Any) -> Any:
        if "poison" in str(found):
            raise ValueError("a fault of ours")
        return read(found, tags)

    tenant.send(poison)
    tenant.drain()
    monkeypatch.setattr("worker.db.rows.tags", fail)
    again = tagging("poison")
    tenant.send(again, tagging("after"))
    tenant.drain()
    tenant.send(again, poison, tagging("last"))
    tenant.drain()
    answers = [["added"], "internal_error", ["added"], "internal_error", ["added"], ["added"]]
    assert tenant.outcomes() == answers
    assert [each.message for each in rejected(tenant)] == [again.encode()]
    assert tenant.tags() == ["poison", "after", "last"]


def test_a_message_at_whose_reading_the_worker_fails_holds_nobody_up(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker itself fails to read it: the message is kept, and those behind it take effect."""
    poison = tagging("poison")
    tenant.send(poison, tagging("after"))

    def fail(raw: bytes) -> Any:
        if b"poison" in raw:
            raise RuntimeError("a fault of ours")
        return read_message(raw)

    monkeypatch.setattr("worker.drain.admission.read_message", fail)
    assert tenant.drain() == 2
    assert tenant.tags() == ["after"]
    assert [each.message for each in rejected(tenant)] == [poison.encode()]


# --- Retrying ------------------------------------------------------------------------------------


def test_a_retry_takes_effect_once_its_cause_is_gone(tenant: Tenant) -> None:
    """The operator is the actor; a sender who repeats the batch gets the new result."""
    poison = fail_at(tenant)
    (kept,) = rejected(tenant)
    assert operator(tenant).retry(kept, server_time(tenant.redis)) == poison.batch_id
    assert not rejected(tenant)
    tenant.drain()
    tenant.send(poison)
    tenant.drain()
    assert tenant.outcomes() == ["internal_error", ["added"], ["added"]]
    assert tenant.tags() == ["poison"]
    assert created_by(tenant) == ["operator"]


def test_a_retry_whose_cause_is_still_there_is_rejected_again(tenant: Tenant) -> None:
    """Nothing is lost, and it can be tried another time."""
    poison = fail_at(tenant)
    (kept,) = rejected(tenant)
    operator(tenant).retry(kept, server_time(tenant.redis))
    with broken_for(tenant, "poison"):
        tenant.drain()
    assert tenant.outcomes() == ["internal_error", "internal_error"]
    assert [each.message for each in rejected(tenant)] == [poison.encode()]


class Crash(Exception):
    """The operator's process dies."""


def die(*_: Any) -> Any:
    raise Crash


def send_and_die(tenant: Tenant) -> Callable[[Any], int]:
    def send(messages: Any) -> int:
        tenant.inbox.append(messages, tenant.token, "lease")
        raise Crash

    return send


@pytest.mark.parametrize("when", ["before it is enqueued", "before the entry is removed"])
def test_a_crash_amid_a_retry_neither_loses_the_message_nor_doubles_it(
    tenant: Tenant, when: str
) -> None:
    """It stays rejected until it is in the inbox, and another retry has no second effect."""
    fail_at(tenant)
    (kept,) = rejected(tenant)
    send = die if when == "before it is enqueued" else send_and_die(tenant)
    with pytest.raises(Crash):
        operator(tenant, send=send).retry(kept, server_time(tenant.redis))
    tenant.drain()
    assert rejected(tenant) == [kept]
    operator(tenant).retry(kept, server_time(tenant.redis))
    tenant.drain()
    assert tenant.outcomes()[-1] == ["added"]
    assert [event.revision for event in tenant.events()] in ([1], [1, 1])  # published again at most
    assert tenant.tags() == ["poison"]
    assert not rejected(tenant)


def test_a_batch_that_took_effect_is_not_applied_again(tenant: Tenant) -> None:
    """Only a failure is decided again: a retry of an older entry gets the stored result."""
    fail_at(tenant)
    (kept,) = rejected(tenant)
    for _ in range(2):
        operator(tenant).retry(kept, server_time(tenant.redis))
        tenant.drain()
    assert tenant.outcomes() == ["internal_error", ["added"], ["added"]]
    assert {event.revision for event in tenant.events()} == {1}


def test_only_a_failure_of_the_own_organization_is_forgotten(tenant: Tenant) -> None:
    """What took effect stays known; another organization's rows don't exist."""
    good = tagging("good")
    tenant.send(good)
    tenant.drain()
    poison = fail_at(tenant)
    assert not tenant.repository.forget_failure(tenant.organization, good.batch_id)
    assert not tenant.repository.forget_failure(uuid4(), poison.batch_id)
    assert tenant.repository.forget_failure(tenant.organization, poison.batch_id)
    assert not tenant.repository.forget_failure(tenant.organization, poison.batch_id)


def test_what_the_worker_would_refuse_stays_rejected(tenant: Tenant) -> None:
    """Under a token that does not allow it, a message would become an error and be gone."""
    poison = fail_at(tenant)
    (kept,) = rejected(tenant)
    organization = tenant.organization
    for token, said in (
        ("garbage", "unauthorized"),
        (tenant.servers.token(uuid4()), "forbidden"),
        (tenant.servers.token(organization, READ), "forbidden"),
    ):
        with pytest.raises(RetryRefused, match=said):
            operator(tenant, token).retry(kept, server_time(tenant.redis))
    assert rejected(tenant) == [kept]
    tenant.send(poison)
    tenant.drain()
    assert tenant.outcomes()[-1] == "internal_error"  # so its failure was not forgotten either


def test_a_message_for_which_there_is_no_room_stays_rejected(tenant: Tenant) -> None:
    """It goes only once it is in the inbox."""
    fail_at(tenant)
    (kept,) = rejected(tenant)
    with pytest.raises(InboxFull):
        operator(tenant, send=lambda _: 0).retry(kept, server_time(tenant.redis))
    assert rejected(tenant) == [kept]


@pytest.mark.parametrize("id", ["1-1", "1", "", "x", "-", "+", "1-99999999999999999999", "１-１"])
def test_an_id_that_is_not_there_says_so(tenant: Tenant, id: str) -> None:
    """A wrong id never names another message."""
    fail_at(tenant)
    with pytest.raises(DeadLetterNotFound):
        find(tenant.redis, tenant.organization, id)


# --- The commands --------------------------------------------------------------------------------


def test_nothing_of_another_organization_is_listed(tenant: Tenant) -> None:
    """With --org only that one's, without it everybody's; the list does not show message texts."""
    other = uuid4()
    tenant.send(b"hello")
    tenant.drain()
    Inbox(tenant.redis, other).append([b"secret"], "t", "lease")
    tenant.drain(inbox=Inbox(tenant.redis, other), organization_id=other)
    mine = admin(tenant, "list", "--org", str(tenant.organization), "--json")
    both = admin(tenant, "list", "--json")
    (line,) = mine.stdout.splitlines()
    (kept,) = rejected(tenant)
    assert json.loads(line) == kept.summary()
    listed = {json.loads(each)["organization_id"] for each in both.stdout.splitlines()}
    assert listed == {str(tenant.organization), str(other)}
    assert "secret" not in both.stdout
    plain = admin(tenant, "list", "--org", str(other))
    assert str(other) in plain.stdout
    assert "the message is not JSON" in plain.stdout
    assert str(tenant.organization) not in plain.stdout


def test_a_message_is_shown_and_the_terminal_does_not_obey_it(tenant: Tenant) -> None:
    """Whole, and escaped; as JSON for programs."""
    raw = b"\x1b]0;owned\x07[bold]\nfake \xff " + b"x" * 5000
    tenant.send(raw)
    tenant.drain()
    (kept,) = rejected(tenant)
    plain = admin(tenant, "show", "--org", str(tenant.organization), kept.id)
    assert r"\x1b]0;owned\x07[bold]\nfake \xff " + "x" * 5000 in plain.stdout
    assert "\x1b" not in plain.stdout
    as_json = admin(tenant, "show", "--org", str(tenant.organization), kept.id, "--json")
    assert json.loads(as_json.stdout) == {**kept.summary(), "message": kept.text}


def test_all_are_retried_but_those_that_nobody_can_answer(tenant: Tenant) -> None:
    """In their order; what can't be retried is said, stays, and makes the exit code 2."""
    first = fail_at(tenant)
    tenant.send(b"hello")
    tenant.drain()
    second = fail_at(tenant, "poison 2")
    done = admin(tenant, "retry", "--org", str(tenant.organization), "--all")
    assert done.returncode == 2
    assert done.stdout.splitlines()[0].endswith(f"enqueued again: {first.batch_id}")
    assert done.stdout.splitlines()[1].endswith(f"enqueued again: {second.batch_id}")
    assert "no readable batch id: the message is not JSON" in done.stderr
    assert [each.message for each in rejected(tenant)] == [b"hello"]
    tenant.drain()
    assert tenant.tags() == ["poison", "poison 2"]
    assert created_by(tenant) == ["operator", "operator"]


def test_what_is_dropped_is_gone_and_the_rest_stays(tenant: Tenant) -> None:
    """By id, then all of it; one that is not there is said."""
    tenant.send(*[b"%d" % number for number in range(25)])
    tenant.drain()
    kept, org = rejected(tenant), str(tenant.organization)
    done = admin(tenant, "drop", "--org", org, kept[0].id, "1-1", kept[2].id)
    assert (done.returncode, len(done.stdout.splitlines())) == (2, 2)
    assert "there is no dead letter 1-1" in done.stderr
    assert rejected(tenant) == [kept[1], *kept[3:]]
    assert admin(tenant, "drop", "--org", org, "--all").returncode == 0
    assert not rejected(tenant)
    assert tenant.redis.exists(dead_letters_key(tenant.organization))  # so no id ever comes again


@pytest.mark.parametrize(
    ("words", "values", "code", "said"),
    [
        (("retry", "1-1"), {}, 2, "there is no dead letter 1-1"),
        (("show", "1-1"), {}, 2, "there is no dead letter 1-1"),
        (("retry",), {}, 2, "--all"),
        (("drop", "1-1", "--all"), {}, 2, "--all"),
        (("retry", "--all"), {"TASK_TAGS_TOKEN": ""}, 2, "TASK_TAGS_TOKEN is not set"),
        (("retry", "--all"), {"TASK_TAGS_JWT_SECRET": ""}, 2, "TASK_TAGS_JWT_SECRET"),
        (("list",), {"TASK_TAGS_REDIS_URL": "unix:///nowhere"}, 3, "Redis can't be used"),
    ],
)
def test_an_operators_error_is_one_clear_line(
    tenant: Tenant, words: tuple[str, ...], values: dict[str, str], code: int, said: str
) -> None:
    """As for users."""
    done = admin(tenant, *words, "--org", str(tenant.organization), **values)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
