"""Loads a snapshot and saves a change set, each in the transaction of one organization.

The statements are in worker/db/statements.py. The endpoint reads by worker/api/queries.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar, cast
from uuid import UUID

import psycopg

from producers.contract.cursors import Cursor, microseconds
from producers.contract.results import Task
from worker.bounds import MAX_GROUP_BYTES, MAX_OF_TYPE
from worker.db import pg_arrays, rows, statements
from worker.db.connection import (
    CONNECT_ARGUMENTS,
    DISCARD_PLANS,
    ROLE_CHECK,
    SCHEMA,
    TABLES,
    assert_safe_role,
    scope_statement,
    session_statement,
    should_discard_plans,
)
from worker.db.pg_pipeline import Pipeline, Sent
from worker.db.time_limit import DEFAULT_SECONDS, TimeLimit
from worker.settings import connect_arguments
from worker.snapshot import (
    AuthorizedMessage,
    ChangeSet,
    Snapshot,
    StoredResult,
    TagKey,
)
from worker.wire import Tag

Result = TypeVar("Result")


class UnknownOrganization(Exception):
    """The organization has no row yet, and nothing was written: add the row and begin again."""


_MAX_WAIT_SECONDS: Final = 65.0
"""The role's limit of a transaction is 60 s, from PostgreSQL 17 on."""
_BEGIN: Final = "begin isolation level read committed read write not deferrable"
_COMMIT: Final = "commit"


class Repository:
    """The worker's database: one connection, opened at the first transaction."""

    def __init__(self, database_url: str, time_limit: TimeLimit | None = None) -> None:
        self._database_url = database_url
        self._time_limit = time_limit or TimeLimit(DEFAULT_SECONDS, lambda: False)
        self._pipeline: Pipeline | None = None
        self._scope = ""
        self._uses = 0
        self._under_way: deque[Transaction] = deque()
        self.on_slow: Callable[[], None] | None = None
        """While this is set, transactions do not wait for a lock; it is called each `SLOW_SECONDS`
        for which one of them waits for PostgreSQL."""
        self.on_wait: Callable[[], None] | None = None
        """It is called as often, if PostgreSQL has answered that the transaction has its lock."""
        self.failed_statement: str | None = None
        """The statement at which the last transaction failed; None: in its begin or commit."""
        self.was_too_long = False
        """The last transaction failed because it lasted longer than its time limit."""

    def clone(self) -> Repository:
        """Return a repository of the same database, with a new connection."""
        clone = Repository(self._database_url, self._time_limit)
        clone.on_wait = self.on_wait
        return clone

    def check(self) -> None:
        """Connect, and raise `UnsafeRole` if the role sees through row-level security."""
        with (
            psycopg.connect(autocommit=True, **self._arguments) as connection,
            self._time_limit.watch(connection),  # which a commit behind it would outlast
        ):
            found = connection.execute(ROLE_CHECK, TABLES).fetchall()
        assert_safe_role(found)

    def begin(self, organization_id: UUID) -> Transaction:
        """Begin a transaction in which this process alone may change the organization's tags.

        Its statements are sent in two parts: the lock with all look-ups, and all writes with the
        commit. The first part may be sent while the transaction before commits. Whatever fails
        between this and the end, also elsewhere, must be followed by `abandon`.
        """
        try:
            if not self._under_way:
                self.failed_statement, self.was_too_long = None, False
            pipeline = self._pipeline = self._pipeline or self._connect()
            if not self._under_way:
                self._time_limit.begin(pipeline.connection)
            transaction = Transaction(self, pipeline, organization_id)
            self._under_way.append(transaction)
            self._uses += 1
            lock = statements.LOCK if self.on_slow is None else statements.LOCK_NOW
            transaction.begin(self._scope, lock)
            if should_discard_plans(self._uses):
                pipeline.send(DISCARD_PLANS, {})
            return transaction
        except BaseException:
            self.abandon()
            raise

    def end(self) -> None:
        """Take note that the transaction that began first has ended; the next one has its time."""
        assert self._pipeline is not None
        if self._time_limit.end():
            raise psycopg.OperationalError("the transaction was cancelled")
        self._under_way.popleft()
        if self._under_way:
            self._time_limit.begin(self._pipeline.connection)

    def abandon(self) -> None:
        """Close the connection, if a transaction is under way; nothing of it is stored.

        After an error of the server's state, the next connection may lead to another server.
        """
        if not self._under_way:
            return
        locks = statements.LOCK, statements.LOCK_NOW
        frame = None, _BEGIN, self._scope, *locks, DISCARD_PLANS, _COMMIT
        failed = self._pipeline.unanswered if self._pipeline is not None else None
        self.failed_statement = None if failed in frame else failed
        self.was_too_long = self._time_limit.was_exceeded
        self.close()

    @contextmanager
    def transaction(self, organization_id: UUID) -> Iterator[Transaction]:
        """Run one transaction from its beginning to its end."""
        transaction = self.begin(organization_id)
        try:
            yield transaction
            transaction.commit()
            transaction.wait()
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, psycopg.Error):
                transaction.roll_back()
            self.abandon()
            raise

    def transact(self, organization_id: UUID, work: Callable[[Transaction], Result]) -> Result:
        """Do some work in one transaction; the first one of an organization adds its row before."""
        try:
            with self.transaction(organization_id) as transaction:
                return work(transaction)
        except UnknownOrganization:
            self.add(organization_id)
            with self.transaction(organization_id) as transaction:
                return work(transaction)

    def add(self, organization_id: UUID) -> None:
        """Add an organization's row, in a transaction without its lock."""
        self._execute(organization_id, statements.ADD_ORGANIZATION)

    def organizations(self, after: UUID) -> list[UUID]:
        """Return the organizations with the next ids after this one, up to 1,000 of them."""
        rows = self._execute(after, statements.LIST_ORGANIZATIONS)[0]
        return [organization_id for (organization_id,) in rows]

    def purge_results(self, organization_id: UUID, age: timedelta) -> int:
        """Delete up to 1,000 stored results that are older than `age`; return how many."""
        return self._purge(organization_id, statements.PURGE_RESULTS, age)

    def purge_changes(self, organization_id: UUID, age: timedelta) -> int:
        """Delete up to 1,000 stored change events that are older than `age`; return how many."""
        return self._purge(organization_id, statements.PURGE_CHANGES, age)

    def _purge(self, organization_id: UUID, statement: str, age: timedelta) -> int:
        return self._execute(organization_id, statement, age=pg_arrays.interval(age))[1]

    def _execute(
        self, organization_id: UUID, statement: str, **parameters: pg_arrays.Parameter
    ) -> tuple[list[tuple[Any, ...]], int]:
        """Run one statement in a transaction of the organization, without its lock.

        Returns its rows, and how many it returned or changed.
        """
        values = {"organization_id": pg_arrays.uuid(organization_id), **parameters}
        with self._connection() as pipeline:
            pipeline.send(_BEGIN, {})
            pipeline.send(self._scope, values)
            sent = pipeline.send(statement, values)
            pipeline.send(_COMMIT, {})
            pipeline.sync()
            assert sent.result is not None
            return pipeline.rows(sent), sent.result.command_tuples or 0

    def forget_failure(self, organization_id: UUID, batch_id: UUID) -> bool:
        """Delete the stored `internal_error` of a batch, so that it can be applied under its id.

        Nothing else is ever deleted here: what took effect must not take effect again. Returns
        whether there was such a failure.
        """
        return self.transact(organization_id, lambda it: it.forget_failure(batch_id))

    def close(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        self._under_way.clear()
        self._time_limit.end()
        if pipeline is not None:
            pipeline.connection.close()

    @property
    def _arguments(self) -> dict[str, Any]:
        return {**connect_arguments(self._database_url), **CONNECT_ARGUMENTS}

    @contextmanager
    def _connection(self) -> Iterator[Pipeline]:
        """Yield the connection, idle and with a time limit; replace a broken one."""
        try:
            pipeline = self._pipeline = self._pipeline or self._connect()
            with self._time_limit.watch(pipeline.connection):
                try:
                    yield pipeline
                except psycopg.Error:
                    raise
                except Exception:
                    pipeline.send("rollback", {})
                    pipeline.sync()
                    raise
        except BaseException as error:
            # After an error of the server's state, the next connection may lead to another server.
            if isinstance(error, psycopg.Error) or not isinstance(error, Exception):
                self.close()
            raise

    def _connect(self) -> Pipeline:
        connection = psycopg.connect(autocommit=True, **self._arguments)
        try:
            with self._time_limit.watch(connection):
                found = connection.execute(SCHEMA).fetchone()
                schema = found[0] if found else "public"
                connection.execute(session_statement(schema).encode())
        except BaseException:
            connection.close()
            raise
        self._scope, self._uses = scope_statement("%(organization_id)s", schema), 0
        return Pipeline(connection, self._note_slow)

    def _note_slow(self, seconds: float) -> None:
        """Take note that a transaction has waited for so long; the server may be gone."""
        if self.on_slow is not None:
            self.on_slow()
        is_locked = bool(self._under_way) and self._under_way[0].is_locked
        if self.on_wait is not None and is_locked and seconds < _MAX_WAIT_SECONDS:
            self.on_wait()


class Transaction:
    """What happens between the lock and the commit."""

    def __init__(self, repository: Repository, pipeline: Pipeline, organization_id: UUID) -> None:
        self._repository = repository
        self._pipeline = pipeline
        self._values: rows.Parameters = {"organization_id": pg_arrays.uuid(organization_id)}
        self._locked: Sent | None = None
        self._found: tuple[datetime, Cursor] | None = None
        self._end: Sent | None = None

    def begin(self, scope: str, lock: str) -> None:
        """Send the begin and the lock, whose answer comes before those to slow look-ups."""
        self._send(_BEGIN)
        self._send(scope)
        self._locked = self._send(lock)
        self._pipeline.ask()

    @property
    def is_locked(self) -> bool:
        """Whether PostgreSQL has answered that the lock is held."""
        locked = None if self._locked is None else self._locked.result
        return locked is not None and locked.ntuples > 0

    @property
    def now(self) -> datetime:
        """The database's time, one clock for all workers, read while the lock is held.

        Raises `UnknownOrganization` if there is no row to lock: read this before any write.
        """
        return self._row[0]

    @property
    def head(self) -> Cursor:
        """The organization's last change event."""
        return self._row[1]

    @property
    def _row(self) -> tuple[datetime, Cursor]:
        """What the lock returned: the time, and the organization's last change event."""
        if self._found is None:
            found = self._rows(self._locked)
            if not found:
                raise UnknownOrganization
            ((now, position, changed_at),) = found
            self._values["now"] = pg_arrays.timestamp(microseconds(now))
            at = None if changed_at is None else microseconds(changed_at)
            self._found = now, Cursor(position, at)
        return self._found

    def load(self, messages: Sequence[AuthorizedMessage]) -> Snapshot:
        """Return the state of all that the messages name."""
        return self.look_up(messages)()

    def look_up(self, messages: Sequence[AuthorizedMessage]) -> Callable[[], Snapshot]:
        """Ask for the state of all that the messages name; return a function that waits for it."""
        names = rows.named(messages)
        bounds: rows.Parameters = {
            "max_rows": pg_arrays.bigint(rows.MAX_LOADED_TAGS),
            "max_bytes": pg_arrays.bigint(rows.MAX_LOADED_BYTES),
            "max_of_type": pg_arrays.bigint(MAX_OF_TYPE + 1),
        }
        sent_batches = self._find_batches([each.message.batch_id for each in messages])
        executions = pg_arrays.uuids(list(names.executions))
        sent_executions = self._send(statements.LOAD_EXECUTIONS, flow_execution_ids=executions)
        sent_tags = sent_types = sent_tasks = None
        if names.tags:
            keys = rows.key_columns(list(names.tags))
            sent_tags = self._send(statements.LOAD_TAGS, **bounds, **keys)
        if names.types:
            types = rows.key_columns(list(names.types))
            sent_types = self._send(statements.LOAD_TYPES, **bounds, **types)
        if names.tasks:
            sent_tasks = self._send(statements.LOAD_TASKS, **rows.task_columns(list(names.tasks)))
        self._pipeline.ask()

        def read() -> Snapshot:
            head = self.head
            batches, seen = rows.batches(self._rows(sent_batches))
            tags: dict[TagKey, dict[bytes, Tag]] = {}
            executions_by_key, long = rows.executions(self._rows(sent_executions))
            _, last_tag = rows.tags(self._rows(sent_tags), tags)
            of_types, last_type = rows.types(self._rows(sent_types), tags, names)
            tasks = {row[:2]: Task(*row) for row in self._rows(sent_tasks)}
            complete = rows.complete(messages, names, seen, last_tag, last_type)
            if long:
                whole, enough = rows.all_names_needed(messages, long)
                complete = min(complete, enough)
                columns = rows.task_name_columns(names, long, whole)
                for id, name in self._rows(self._send(statements.LOAD_TASK_NAMES, **columns)):
                    executions_by_key[id.int].task_names[name] = None
            return Snapshot(
                batches=batches,
                executions=executions_by_key,
                tags=tags,
                types=of_types,
                tasks=tasks,
                head=head,
                complete=complete,
            )

        return read

    def save(self, change_set: ChangeSet) -> None:
        """Store what was decided. A statement that has nothing to do is left out."""
        _ = self.now  # the lock is held
        for statement, found, columns in (
            (statements.SAVE_REGISTRATIONS, change_set.registrations, rows.registration_columns),
            (statements.SAVE_REVISIONS, change_set.revisions, rows.revision_columns),
            (statements.SAVE_REMOVED, change_set.removed, rows.removed_columns),
            (statements.SAVE_ADDED, change_set.added, rows.added_columns),
            (statements.SAVE_TASKS, change_set.tasks, rows.state_columns),
            (statements.SAVE_CHANGES, change_set.changes, rows.change_columns),
            (statements.SAVE_BATCHES, change_set.batches, rows.batch_columns),
        ):
            if found:
                self._send(statement, **cast(Any, columns)(found))
        self._pipeline.push()
        if change_set.changes:
            position = change_set.changes[-1].position
            self._found = self.now, Cursor(position, microseconds(self.now))

    def batches(self, batch_ids: Sequence[UUID]) -> dict[UUID, StoredResult]:
        """Return what is stored of these batches, with the change events that they made."""
        return rows.batches(self._rows(self._find_batches(batch_ids)))[0]

    def commit(self) -> None:
        """Send the commit; `wait` says whether it succeeded."""
        self._send(_COMMIT)
        self._end = self._pipeline.end()

    def wait(self) -> None:
        """Wait until the commit has succeeded. Raises the error of what did not."""
        assert self._end is not None
        if self._end.result is None:
            self._pipeline.wait(self._end)
            self._repository.end()

    def roll_back(self) -> None:
        """End the transaction, which is the only one under way, without effect."""
        try:
            self._pipeline.send("rollback", {})
            self._pipeline.sync()
            self._repository.end()
        except psycopg.Error:
            self._repository.abandon()
            raise

    def check(self) -> None:
        """Wait until all that was sent has succeeded. Raises the error of what did not."""
        self._pipeline.sync()

    def forget_failure(self, batch_id: UUID) -> bool:
        _ = self.now  # the lock is held
        deleted = self._send(statements.FORGET_FAILURE, batch_id=pg_arrays.uuid(batch_id))
        return bool(self._rows(deleted))

    def _find_batches(self, batch_ids: Sequence[UUID]) -> Sent:
        ids = pg_arrays.uuids([id.int for id in batch_ids])
        max_bytes = pg_arrays.bigint(MAX_GROUP_BYTES)
        return self._send(statements.LOAD_BATCHES, batch_ids=ids, max_bytes=max_bytes)

    def _send(self, statement: str, **parameters: pg_arrays.Parameter) -> Sent:
        """Send a statement; its result is waited for when it is read."""
        return self._pipeline.send(statement, {**self._values, **parameters})

    def _rows(self, sent: Sent | None) -> list[tuple[Any, ...]]:
        return [] if sent is None else self._pipeline.rows(sent)
