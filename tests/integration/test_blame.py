"""Whose fault is a failed transaction: nothing is refused for a server's fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from producers.contract.channels import dead_letters_key, failing_key, inbox_key
from producers.contract.messages import set_task_state
from tests.support.tenant import EXECUTION, Tenant, broken_for, tagging
from tests.support.waiting import eventually
from worker.db import statements
from worker.db.pg_pipeline import Pipeline
from worker.drain.blame import attempts_to_blame, witness
from worker.rules import decide_in_parts

CODES = (
    *("XX000", "XX001", "26000", "42P05", "55000", "23505", "54000", "72000", "3F000", "25P02"),
    *("P0001", "22P02", "42P01", "42501", "0A000", "53200", "57014", "40001", "25006"),
)


@contextmanager
def broken_server(
    tenant: Tenant,
    code: str,
    table: str = "task_tags",
    event: str = "insert",
    condition: str = "true",
) -> Iterator[None]:
    """Let every insert of this organization into a table fail with an SQLSTATE, or some do."""
    name = f"broken_{tenant.organization.hex}"
    with tenant.servers.owner() as connection:
        connection.execute(
            f"""
            create function {name}() returns trigger language plpgsql as $$ begin
                if new.organization_id = '{tenant.organization}' and ({condition}) then
                    raise exception 'broken' using errcode = '{code}';
                end if;
                return new;
            end $$
            """.encode()
        )
        trigger = f"create trigger {name} before {event} on {table} for each row"
        connection.execute(f"{trigger} execute function {name}()".encode())
        try:
            yield
        finally:
            connection.execute(f"drop function {name} cascade".encode())


@contextmanager
def drained(tenant: Tenant, **changes: Any) -> Iterator[None]:
    """Drain in the background, turn after turn as workers do, and to the end after the block."""
    ending = threading.Event()

    def drain() -> None:
        while not ending.is_set() or tenant.redis.xlen(tenant.inbox._inbox):
            Tenant.drain(tenant, budget_seconds=0.25, **changes)
            time.sleep(0.01)

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(60)
        tenant.drain()  # what was published has arrived


@pytest.mark.parametrize("code", CODES)
def test_no_batch_is_refused_for_what_fails_at_the_server(
    tenant: Tenant, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A witness fails as well, with any error code, so the batches wait."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    with drained(tenant):
        with broken_server(tenant, code):
            tenant.send(*[tagging(f"{number}") for number in range(20)])
            time.sleep(1.0)  # the fault lasts for so long
        eventually(lambda: len(tenant.tags()) == 20)
    assert tenant.outcomes() == [["added"]] * 20
    assert tenant.tags() == [f"{number}" for number in range(20)]
    assert not tenant.redis.exists(dead_letters_key(tenant.organization))


def test_a_commit_that_fails_is_waited_out(tenant: Tenant) -> None:
    """A deferred constraint fails there; no witness commits, so no message is to blame."""
    name = f"deferred_{tenant.organization.hex}"
    with tenant.servers.owner() as connection:
        connection.execute(
            f"""
            create function {name}() returns trigger language plpgsql as $$ begin
                if new.tag = '{name}' then raise exception 'at the commit'; end if;
                return null;
            end $$;
            create constraint trigger {name} after insert on task_tags
            deferrable initially deferred for each row execute function {name}()
            """.encode()
        )
        tenant.send(tagging(name), tagging("behind"))
        with drained(tenant):
            time.sleep(1.0)
            assert tenant.tags() == []
            connection.execute(f"drop function {name} cascade".encode())
    assert tenant.outcomes() == [["added"], ["added"]]


def test_a_message_that_fails_in_the_database_is_refused_after_a_while(tenant: Tenant) -> None:
    """Five failures in ten seconds, counted across turns; those behind it then take effect."""
    began = time.monotonic()
    with broken_for(tenant, "poison"):
        tenant.send(tagging("before"), tagging("poison"), tagging("behind"))
        with drained(tenant):
            eventually(lambda: "before" in tenant.tags())
            eventually(lambda: tenant.redis.hget(failing_key(tenant.organization), "attempts"))
            eventually(lambda: "behind" in tenant.tags(), seconds=40)
    assert time.monotonic() - began >= 9
    assert tenant.outcomes() == [["added"], "internal_error", ["added"]]
    assert tenant.redis.xlen(dead_letters_key(tenant.organization)) == 1
    assert not tenant.redis.exists(failing_key(tenant.organization))


@pytest.mark.parametrize("code", ["P0001", "XX000", "22012", "54000", "57014", "25P04"])
def test_an_error_of_a_statement_is_a_messages_if_the_witness_succeeds(
    tenant: Tenant, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a time-out, after a longer time: it would block the organization for ever."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    monkeypatch.setattr("worker.drain.blame._TIMEOUT_SECONDS", 0.0)
    with broken_server(tenant, code, condition="new.tag = 'poison'"):
        tenant.send(tagging("before"), tagging("poison"), tagging("behind"))
        with drained(tenant):
            eventually(lambda: "behind" in tenant.tags(), seconds=40)
    assert tenant.outcomes() == [["added"], "internal_error", ["added"]]


def test_time_outs_and_other_failures_are_counted_apart(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failure of another kind, behind many time-outs, is the first of its kind."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    monkeypatch.setattr("worker.drain.blame.MIN_ATTEMPTS", 8)
    key = failing_key(tenant.organization)
    with drained(tenant):
        with broken_server(tenant, "57014", condition="new.tag = 'slow'"):
            tenant.send(tagging("slow"))
            eventually(lambda: int(tenant.redis.hget(key, "attempts_slow") or 0) > 8)
        with broken_server(tenant, "XX000", condition="new.tag = 'slow'"):
            eventually(lambda: tenant.redis.hget(key, "attempts"))
    assert tenant.outcomes() == [["added"]]


def test_a_connection_that_the_workers_limit_closed_is_counted_as_a_time_out(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other lost connection says nothing of a message."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    tenant.send(tagging("a"))
    (entry,) = tenant.inbox.acquire("run", max_messages=1).entries
    lost, repository = psycopg.OperationalError("lost"), tenant.repository

    def attempts() -> int:
        return attempts_to_blame(lost, entry, tenant.inbox, repository, tenant.organization)

    repository.failed_statement = statements.SAVE_ADDED
    assert attempts() == 0
    assert not tenant.redis.exists(failing_key(tenant.organization))
    repository.was_too_long = True
    for number in range(1, 7):
        assert attempts() == 0  # for ten minutes
        assert int(tenant.redis.hget(failing_key(tenant.organization), "attempts_slow")) == number
    tenant.redis.hincrby(failing_key(tenant.organization), "first_slow", -600)
    assert attempts() == 7


@pytest.mark.parametrize(
    "code", ["08006", "25006", "40001", "53100", "53200", "55P03", "57P01", "58030"]
)
def test_what_a_server_lacks_is_no_messages_fault(
    tenant: Tenant, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is nearly full, a small witness may succeed where a message can't."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    with drained(tenant):
        with broken_server(tenant, code, condition="new.tag = 'large'"):
            tenant.send(tagging("large"), tagging("behind"))
            time.sleep(2.0)
            assert not tenant.redis.exists(failing_key(tenant.organization))
        eventually(lambda: tenant.tags() == ["large", "behind"])
    assert tenant.outcomes() == [["added"]] * 2


def test_a_row_that_another_session_has_locked_is_waited_for(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long: a witness has rows of its own, and succeeds."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    with drained(tenant), tenant.servers.owner() as connection:
        with connection.transaction():
            connection.execute(
                "select from flow_executions where flow_execution_id = %s for update", [EXECUTION]
            )
            tenant.send(tagging("a"))
            time.sleep(2.0)
            assert not tenant.redis.exists(failing_key(tenant.organization))
        eventually(lambda: tenant.tags() == ["a"])
    assert tenant.outcomes() == [["added"]]


def test_the_witness_runs_every_statement_of_a_drain(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that it left out could fail for a server's sake, and a message be blamed."""
    sent, send = set[str](), Pipeline.send

    def record(self: Pipeline, statement: str, values: Any) -> Any:
        sent.add(statement)
        return send(self, statement, values)

    monkeypatch.setattr(Pipeline, "send", record)
    assert witness(tenant.repository, tenant.organization)
    wanted = {name for name in vars(statements) if name.startswith(("LOAD_", "SAVE_"))}
    assert {name for name in wanted if getattr(statements, name) not in sent} == set()


def test_the_witness_changes_a_state_as_well(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that fails for every task is no fault of the messages that record a state."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    tenant.send(set_task_state(EXECUTION, "task", "queued"))
    tenant.drain()
    with drained(tenant):
        with broken_server(tenant, "XX000", "task_executions", "update"):
            tenant.send(set_task_state(EXECUTION, "task", "running"))
            time.sleep(2.0)
        eventually(lambda: not tenant.redis.xlen(inbox_key(tenant.organization)))
    assert not tenant.redis.exists(dead_letters_key(tenant.organization))


def test_a_dead_letter_is_kept_once_however_often_its_error_can_not_be_stored(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would push out all others; junk where failures are counted is begun anew."""
    monkeypatch.setattr("worker.drain.blame.MIN_SECONDS", 0.0)
    poison, redis = tagging("poison"), tenant.redis
    key = failing_key(tenant.organization)
    with drained(tenant):
        with broken_server(
            tenant, "P0001", "tag_batches", condition=f"new.batch_id = '{poison.batch_id}'"
        ):
            tenant.send(poison, tagging("behind"))
            eventually(lambda: redis.hget(key, "attempts"))
            redis.hset(key, mapping={"first": "junk", "attempts": "junk"})
            eventually(lambda: redis.hget(key, "first") != b"junk")
            eventually(lambda: int(redis.hget(key, "attempts") or 0) > 12, seconds=40)
            assert redis.xlen(dead_letters_key(tenant.organization)) == 1
        eventually(lambda: tenant.tags()[-1:] == ["behind"])


def test_a_message_at_which_our_code_fails_is_kept_once_as_well(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its error can't be stored, no failure is counted."""
    poison = tagging("poison")

    def fail(organization: Any, messages: Any, *others: Any, **named: Any) -> Any:
        if any(each.message.batch_id == poison.batch_id for each in messages):
            raise ValueError("a fault of ours")
        return decide_in_parts(organization, messages, *others, **named)

    monkeypatch.setattr("worker.drain.application.decide_in_parts", fail)
    letters = dead_letters_key(tenant.organization)
    with drained(tenant):
        condition = f"new.batch_id = '{poison.batch_id}'"
        with broken_server(tenant, "XX000", "tag_batches", condition=condition):
            tenant.send(poison, tagging("behind"))
            eventually(lambda: tenant.redis.xlen(letters))
            time.sleep(1.0)  # it is tried again for so long
        eventually(lambda: tenant.tags() == ["behind"])
    assert tenant.redis.xlen(letters) == 1
    assert tenant.outcomes() == ["internal_error", ["added"]]


def test_a_failing_drain_lets_others_have_a_turn(tenant: Tenant) -> None:
    """It goes to the end of the queue when its budget is used up."""
    with broken_server(tenant, "XX000"):
        tenant.send(tagging("a"))
        began = time.monotonic()
        assert Tenant.drain(tenant, budget_seconds=0.25) == 0
        assert time.monotonic() - began < 2.5
    assert tenant.is_requeued()


def test_a_witness_leaves_nothing_behind(tenant: Tenant) -> None:
    """It runs every statement, and is rolled back."""
    before = rows(tenant)
    assert witness(tenant.repository, tenant.organization)
    assert rows(tenant) == before


def rows(tenant: Tenant) -> list[Any]:
    tables = ("flow_executions", "task_tags", "tag_batches", "tag_changes", "task_executions")
    with tenant.servers.owner() as connection:
        return [
            connection.execute(
                f"select count(*) from {table} where organization_id = %s".encode(),
                [tenant.organization],
            ).fetchone()
            for table in tables
        ]


def test_a_locked_organization_is_requeued_at_once(tenant: Tenant) -> None:
    """Another worker has it: this one is free for other organizations."""
    tenant.send(tagging("a"))
    with tenant.servers.owner() as connection, connection.transaction():
        connection.execute(
            "select from organizations where organization_id = %s for update",
            [tenant.organization],
        )
        began = time.monotonic()
        assert Tenant.drain(tenant, budget_seconds=30) == 0
        assert time.monotonic() - began < 5
    assert tenant.is_requeued()
    tenant.drain()
    assert tenant.tags() == ["a"]
