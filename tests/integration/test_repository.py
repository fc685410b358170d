"""Storage on real PostgreSQL: organizations are isolated, roles are bounded, values survive."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

import worker.db.repository
from producers.contract.messages import (
    Message,
    SetTaskState,
    TagBatch,
    TaskState,
    add,
    register_execution,
    remove,
)
from producers.contract.results import ResultRecord
from producers.contract.values import Uuid7
from tests.support.servers import Servers
from tests.support.tenant import applied, requests_of
from tests.support.waiting import eventually
from worker.db.connection import UnsafeRole
from worker.db.migrate import migrate
from worker.db.repository import Repository
from worker.drain.application import apply_in_transaction
from worker.drain.blame import is_server_fault
from worker.rules import decide
from worker.snapshot import Execution, Snapshot

TABLES = (
    "flow_executions",
    "task_tags",
    "tag_batches",
    "tag_changes",
    "task_executions",
    "organizations",
)
WAITING: Final = "select from pg_locks where locktype = 'transactionid' and not granted"


def load(repository: Repository, organization: UUID, *messages: Message) -> Snapshot:
    with repository.transaction(organization) as transaction:
        return transaction.load(requests_of(*messages))


@contextmanager
def as_role(url: str, organization: UUID | str | None) -> Iterator[psycopg.Connection]:
    """A plain connection of a role, with the organization set as the product sets it."""
    with psycopg.connect(url) as connection:
        if organization is not None:
            connection.execute(
                "select set_config('app.organization_id', %s, true)", [str(organization)]
            )
        yield connection
        connection.rollback()


def count(connection: psycopg.Connection, table: str) -> int:
    query = sql.SQL("select count(*) from {}").format(sql.Identifier(table))
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def test_what_is_saved_is_what_is_loaded(repository: Repository, organization: UUID) -> None:
    """The next transaction finds the state after this one, with every form of metadata."""
    one, two = uuid4(), uuid4()
    values: list[Any] = [
        None,
        0,
        -1.5,
        1e19,
        1e300,
        5e-324,
        1e15,
        0.1,
        "é\u0301 '\"\\ \t 🎉",
        True,
        [],
        {},
        {"b": [1, {"a": None}], "a": ""},
    ]
    batch = TagBatch(
        tags=[add(one, "task", "type", "x", value) for value in values]
        + [add(two, "other", "type", '\\N {a,b} "q" \'', None), remove(one, "task", "type", "x", 0)]
    )
    decision = applied(
        repository,
        organization,
        register_execution(one),
        register_execution(two, ["other", "b"]),
        batch,
    )
    by_name = TagBatch(
        tags=[
            remove(one, "task", "type", "x"),
            remove(two, "other", "type", '\\N {a,b} "q" \''),
        ]
    )
    executions = register_execution(one), register_execution(two)
    state = load(repository, organization, batch, by_name, *executions)
    known = state.batches[batch.batch_id]
    assert known.record == decision.outcomes[2].record
    assert set(known.events) == set(decision.outcomes[2].events)
    assert state.executions == {
        one.int: Execution(one, {}, any_task_name=True, revision=1),
        two.int: Execution(two, {"other": None, "b": None}, any_task_name=False, revision=1),
    }
    loaded = {tag.id: (tag, digest) for tags in state.tags.values() for digest, tag in tags.items()}
    expected = {
        tag.id: (tag, digest)
        for tag, _, digest in decision.change_set.added.values()
        if tag.status == "active"
    }
    assert loaded.keys() == expected.keys()
    for id, (tag, digest) in expected.items():
        assert loaded[id][1] == digest
        assert loaded[id][0] == tag


def test_registering_again_keeps_the_revision(repository: Repository, organization: UUID) -> None:
    """Task names are added to the row of the execution, and nothing else of it changes.

    They are kept in their order, also when every name is allowed.
    """
    execution = uuid4()
    applied(repository, organization, register_execution(execution, ["a"]))
    applied(repository, organization, TagBatch(tags=[add(execution, "a", "t", "x")]))
    again = register_execution(execution, ["b"])
    applied(repository, organization, again)
    found = load(repository, organization, register_execution(execution)).executions
    names = {"a": None, "b": None}
    assert found == {execution.int: Execution(execution, names, any_task_name=False, revision=1)}
    for more in (None, ["c", "a"], None):
        applied(repository, organization, register_execution(execution, more))
    (known,) = load(repository, organization, register_execution(execution)).executions.values()
    assert (list(known.task_names), known.any_task_name) == (["a", "b", "c"], True)


def test_removed_tags_keep_their_rows(
    servers: Servers, repository: Repository, organization: UUID
) -> None:
    """Rule 4, as stored: status, updated_at and modified_by change; a new row has a new id."""
    execution = uuid4()
    applied(repository, organization, register_execution(execution))
    applied(repository, organization, TagBatch(tags=[add(execution, "a", "t", "x")]))
    applied(
        repository,
        organization,
        TagBatch(tags=[remove(execution, "a", "t", "x"), add(execution, "a", "t", "x")]),
    )
    with as_role(servers.worker_url, organization) as connection:
        rows = connection.execute(
            "select status, created_at < now(), updated_at is null, modified_by from task_tags "
            "order by created_at, id"
        ).fetchall()
    assert rows == [("deleted", True, False, "ada"), ("active", True, True, None)]
    removing = (TagBatch(tags=[remove(execution, "a", "t", "x")]) for _ in range(2))
    found = [applied(repository, organization, batch).outcomes[0].record for batch in removing]
    assert [ResultRecord.decode(each).statuses for each in found] == [["removed"], ["not_found"]]


def test_the_last_state_of_a_task_is_kept(repository: Repository, organization: UUID) -> None:
    """The next transaction finds the recorded state; each task of each execution has its own."""
    one, two = uuid4(), uuid4()
    states: list[TaskState] = ["queued", "running", "failed"]
    asked = [
        SetTaskState(flow_execution_id=execution, task_name=name, state=state)
        for state in states
        for execution, name in ((one, "a"), (one, "b"), (two, "a"))
    ]
    applied(repository, organization, register_execution(one), register_execution(two), *asked[:-1])
    found = load(repository, organization, *asked).tasks
    assert {key: task.state for key, task in found.items()} == {
        (one, "a"): "failed",
        (one, "b"): "failed",
        (two, "a"): "running",
    }
    assert {task.state_changed_by for task in found.values()} == {"ada"}
    again = applied(repository, organization, asked[-1], asked[-1])
    assert [len(outcome.events) for outcome in again.outcomes] == [
        1,
        1,
    ]  # the same, published again
    assert again.change_set.tasks == load(repository, organization, asked[-1]).tasks


def test_events_of_the_same_batch_again_come_in_the_order_in_which_they_were_made(
    repository: Repository, organization: UUID
) -> None:
    """Whether the batch is answered again in its own transaction or in a later one."""
    executions = sorted((uuid4() for _ in range(5)), reverse=True)
    batch = TagBatch(tags=[add(execution, "a", "t", "x") for execution in executions])
    registrations = map(register_execution, executions)
    *_, first, same = applied(repository, organization, *registrations, batch, batch).outcomes
    (later,) = applied(repository, organization, batch).outcomes
    assert [id for id, _ in first.events] == executions
    assert later == same == first


@pytest.mark.parametrize("unset", [None, ""])
@pytest.mark.parametrize("table", sorted(set(TABLES) - {"organizations"}))
def test_without_an_organization_there_are_no_rows(
    servers: Servers, repository: Repository, organization: UUID, table: str, unset: str | None
) -> None:
    """Forgetting to say whose rows shows none: unset, or left empty by an earlier transaction."""
    execution = uuid4()
    applied(
        repository,
        organization,
        register_execution(execution),
        TagBatch(tags=[add(execution, "a", "t", "x")]),
        SetTaskState(flow_execution_id=execution, task_name="a", state="queued"),
    )
    for url in (servers.worker_url, servers.endpoint_url):
        with as_role(url, organization) as connection:
            assert count(connection, table) > 0
        with as_role(url, unset) as connection:
            assert count(connection, table) == 0
        with as_role(url, uuid4()) as connection:
            assert count(connection, table) == 0


def test_no_row_can_be_written_for_another_organization(
    servers: Servers, repository: Repository, organization: UUID
) -> None:
    """The policy holds for writing as well as for reading."""
    with as_role(servers.worker_url, organization) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            connection.execute(
                "insert into flow_executions values (%s, %s, null, 0, now(), null, now())",
                [uuid4(), uuid4()],
            )


@pytest.mark.parametrize(
    "statement",
    [
        "insert into flow_executions "
        "values (gen_random_uuid(), gen_random_uuid(), null, 0, now(), null, now())",
        "update task_tags set tag = 'x'",
        "delete from tag_batches",
        "truncate task_tags",
        "create table mine (a int)",
        "alter table task_tags disable row level security",
    ],
)
def test_the_endpoint_can_only_read(servers: Servers, statement: str) -> None:
    """Its role has no right to anything else."""
    with as_role(servers.endpoint_url, uuid4()) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


@pytest.mark.parametrize(
    "statement",
    [
        "truncate tag_batches",
        "delete from task_tags",
        "update tag_changes set revision = 1",
        "update tag_batches set digest = ''",
        "alter table task_tags owner to task_tags_worker",
    ],
)
def test_the_worker_can_not_rewrite_history(servers: Servers, statement: str) -> None:
    """It can delete only what has a retention, and change neither results nor change events."""
    with as_role(servers.worker_url, uuid4()) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


def test_a_role_that_sees_through_the_policies_is_refused(servers: Servers) -> None:
    """The worker and the endpoint don't run as a superuser or as the tables' owner."""
    repository = Repository(servers.owner_url)
    with pytest.raises(UnsafeRole, match="task_tags_worker"):
        repository.check()
    repository.close()


def test_security_is_enabled_and_forced_and_every_key_begins_with_the_organization(
    servers: Servers,
) -> None:
    """The schema itself, read from the catalogue."""
    with servers.owner() as connection:
        flags = connection.execute(
            "select relname, relrowsecurity, relforcerowsecurity from pg_class "
            "where relkind = 'r' and relname = any(%s)",
            [list(TABLES)],
        ).fetchall()
        keys = connection.execute(
            "select c.relname, a.attname from pg_index i join pg_class c on c.oid = i.indexrelid "
            "join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0] "
            "where i.indrelid::regclass::text = any(%s)",
            [list(TABLES)],
        ).fetchall()
        roles = connection.execute(
            "select rolsuper or rolbypassrls or rolcreaterole or rolcreatedb from pg_roles "
            "where rolname like 'task_tags_%'"
        ).fetchall()
    assert sorted(flags) == sorted((table, True, True) for table in TABLES)
    assert len(keys) == 11
    assert {column for _, column in keys} == {"organization_id"}
    assert roles == [(False,), (False,)]


def test_two_drains_of_one_organization_take_turns(
    repository: Repository, servers: Servers
) -> None:
    """The lock makes the second wait until the first has committed; others are not held up."""
    organization, another = uuid4(), uuid4()
    other = Repository(servers.worker_url)
    for each in (organization, another):
        applied(repository, each, register_execution(uuid4()))
    with repository.transaction(organization) as transaction:
        assert transaction.now
        with other.transaction(another):
            pass
        with pytest.raises(Exception, match="lock timeout"), other.transaction(organization):
            pass
    with other.transaction(organization):
        pass
    other.close()


def test_the_time_of_a_transaction_is_that_at_which_it_has_the_lock(
    repository: Repository, servers: Servers, organization: UUID
) -> None:
    """So it never runs back within an organization, whichever transaction began first."""
    applied(repository, organization, register_execution(uuid4()))
    other = Repository(servers.worker_url)
    with other.transaction(organization):
        other._scope = repository._scope.replace("'100ms'", "'20s'")

    def now_behind() -> datetime:
        with other.transaction(organization) as transaction:
            return transaction.now

    with ThreadPoolExecutor() as threads, servers.owner() as connection:
        with repository.transaction(organization) as transaction:
            assert transaction.now
            behind = threads.submit(now_behind)
            eventually(lambda: connection.execute(WAITING).fetchall())
            found = connection.execute("select clock_timestamp()").fetchone()
        assert found is not None
        assert behind.result() > found[0]
    other.close()


def test_look_ups_see_what_the_lock_waited_for(
    repository: Repository, servers: Servers, organization: UUID
) -> None:
    """They are sent with the lock, before it is free, and find what was committed before that."""
    execution, other = uuid4(), Repository(servers.worker_url)
    applied(repository, organization, register_execution(execution))
    first, second = (TagBatch(tags=[add(execution, "task", "type", "x")]) for _ in range(2))
    other._scope = repository._scope  # it connects, and then waits for longer than a drain does
    with other.transaction(organization):
        other._scope = repository._scope.replace("'100ms'", "'20s'")
    with ThreadPoolExecutor() as threads:
        with repository.transaction(organization) as transaction:
            requests = requests_of(first)
            now, state = transaction.now, transaction.load(requests)
            transaction.save(
                decide(organization, requests, state, now=now, new_id=Uuid7()).change_set
            )
            behind = threads.submit(
                apply_in_transaction, other, organization, requests_of(second), Uuid7()
            )
            with servers.owner() as connection:
                eventually(lambda: connection.execute(WAITING).fetchall())
        (outcome,), _ = behind.result()
    assert ResultRecord.decode(outcome.record).statuses == ["already_exists"]
    other.close()


def test_purging_forgets_old_results_of_that_organization_alone(
    servers: Servers, repository: Repository, organization: UUID
) -> None:
    """The retention of results applies to tag_batches alone; change events have their own."""
    execution = uuid4()
    batch = TagBatch(tags=[add(execution, "a", "t", "x")])
    foreign = uuid4()
    for each in (organization, foreign):
        applied(repository, each, register_execution(execution), batch)
    assert repository.purge_results(organization, timedelta(hours=1)) == 0
    eventually(lambda: repository.purge_results(organization, timedelta(0)) == 2)
    assert not load(repository, organization, batch).batches
    assert load(repository, foreign, batch).batches
    with as_role(servers.worker_url, organization) as connection:
        assert (count(connection, "task_tags"), count(connection, "tag_changes")) == (1, 1)
    applied(repository, organization, TagBatch(tags=[remove(execution, "a", "t", "x")]))
    assert repository.purge_changes(organization, timedelta(hours=1)) == 0
    eventually(lambda: repository.purge_changes(organization, timedelta(0)) == 1)
    assert repository.purge_changes(organization, timedelta(0)) == 0  # the last one stays
    with as_role(servers.worker_url, foreign) as connection:
        assert count(connection, "tag_changes") == 1


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection and is silent: a retryable error, and no process that hangs."""
    monkeypatch.setitem(worker.db.connection.CONNECT_ARGUMENTS, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = Repository(f"postgresql://u:p@127.0.0.1:{server.getsockname()[1]}/x")
        with pytest.raises(psycopg.OperationalError) as caught:
            silent.check()
    assert is_server_fault(caught.value)


def test_a_wrong_password_is_waited_out(servers: Servers) -> None:
    """No batch is at fault, and it may be corrected; an unknown option is an error at once."""
    url = make_url(servers.worker_url)
    for wrong, passes in ((url.set(password="x"), True), (url.set(query={"sslmod": "x"}), False)):
        refused = Repository(wrong.render_as_string(hide_password=False))
        with pytest.raises(psycopg.Error) as caught:
            refused.check()
        assert is_server_fault(caught.value) == passes


@pytest.mark.parametrize(
    ("state", "passes"),
    [
        ("08006", True),
        ("40001", True),
        ("40P01", True),
        ("53100", True),
        ("55P03", True),
        ("57P01", True),
        ("25P03", True),
        ("25006", True),
        ("23505", False),
        ("22P02", False),
        ("42501", False),
        ("42P01", False),
        ("42601", False),
        ("0A000", False),
        ("54000", False),
        ("XX000", False),
    ],
)
def test_errors_of_servers_are_told_from_those_that_need_a_witness(
    state: str, passes: bool
) -> None:
    """Lost connections, deadlocks, a full disk or a restart say nothing of a message."""
    assert is_server_fault(psycopg.errors.lookup(state)("x")) == passes


def test_migrating_again_changes_nothing_and_sets_passwords(servers: Servers) -> None:
    """`task-tags-admin migrate` may run at every deployment."""
    migrate(servers.owner_url, {})
    with servers.owner() as connection:
        stored = connection.execute(
            "select rolpassword from pg_authid where rolname = 'task_tags_worker'"
        ).fetchone()
    assert stored is not None
    assert stored[0].startswith("SCRAM-SHA-256$")
