"""Loads a snapshot and saves a change set, each in the transaction of one organization.

The statements are in worker/db/statements.py; what the endpoint reads is in worker/api/queries.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, LiteralString, TypeVar, cast
from uuid import UUID

import psycopg
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

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
from worker.db.time_limit import DEFAULT_SECONDS, TimeLimit
from worker.settings import driver_url
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


class Repository:
    """The worker's database: one connection, opened at the first transaction."""

    def __init__(self, database_url: str, time_limit: TimeLimit | None = None) -> None:
        self._engine: Engine = create_engine(
            driver_url(database_url),
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            connect_args=CONNECT_ARGUMENTS,
        )
        event.listen(self._engine, "connect", self._prepare)
        self._uses = 0
        self._scope = b""
        self._database_url = database_url
        self._time_limit = time_limit or TimeLimit(DEFAULT_SECONDS, lambda: False)
        self.failed_statement: str | None = None
        """The statement at which the last transaction failed; None: in its begin or commit."""

    def clone(self) -> Repository:
        """Return a repository of the same database, with a new connection."""
        return Repository(self._database_url, self._time_limit)

    def check(self) -> None:
        """Connect, and raise `UnsafeRole` if the role sees through row-level security."""
        with self._connection() as connection:
            found = connection.execute(ROLE_CHECK, TABLES).fetchall()
        assert_safe_role(found)

    @contextmanager
    def transaction(self, organization_id: UUID) -> Iterator[Transaction]:
        """Run one transaction in which this process alone may change the organization's tags.

        Its statements are sent in two parts: the lock with all look-ups, and all writes with the
        commit.
        """
        transaction: Transaction | None = None
        try:
            with self._connection() as connection, connection.pipeline() as pipeline:
                self._uses += 1
                if should_discard_plans(self._uses):
                    connection.execute(DISCARD_PLANS)
                transaction = Transaction(connection, pipeline, organization_id, self._scope)
                yield transaction
                connection.execute("commit")  # not commit(): see _connection
        except psycopg.Error:
            self.failed_statement = transaction.failed_statement() if transaction else None
            raise

    def transact(self, organization_id: UUID, work: Callable[[Transaction], Result]) -> Result:
        """Do some work in one transaction; the first one of an organization adds its row before."""
        try:
            with self.transaction(organization_id) as transaction:
                return work(transaction)
        except UnknownOrganization:
            self._execute(organization_id, statements.ADD_ORGANIZATION)
            with self.transaction(organization_id) as transaction:
                return work(transaction)

    def organizations(self, after: UUID) -> list[UUID]:
        """Return the organizations with the next ids after this one, up to 1,000 of them."""
        rows = self._execute(after, statements.LIST_ORGANIZATIONS).fetchall()
        return [organization_id for (organization_id,) in rows]

    def purge_results(self, organization_id: UUID, age: timedelta) -> int:
        """Delete up to 1,000 stored results that are older than `age`; return how many."""
        return self._execute(organization_id, statements.PURGE_RESULTS, age=age).rowcount

    def purge_changes(self, organization_id: UUID, age: timedelta) -> int:
        """Delete up to 1,000 stored change events that are older than `age`; return how many."""
        return self._execute(organization_id, statements.PURGE_CHANGES, age=age).rowcount

    def _execute(
        self, organization_id: UUID, statement: LiteralString, **parameters: Any
    ) -> psycopg.Cursor[Any]:
        """Run one statement in a transaction of the organization, without its lock."""
        values = {"organization_id": organization_id, **parameters}
        with self._connection() as connection, connection.pipeline():
            connection.execute(self._scope, values)
            cursor = connection.execute(statement, values)
            connection.execute("commit")
        return cursor

    def forget_failure(self, organization_id: UUID, batch_id: UUID) -> bool:
        """Delete the stored `internal_error` of a batch, so that it can be applied under its id.

        Nothing else is ever deleted here: what took effect must not take effect again. Returns
        whether there was such a failure.
        """
        return self.transact(organization_id, lambda it: it.forget_failure(batch_id))

    def close(self) -> None:
        self._engine.dispose()

    def _prepare(self, connection: psycopg.Connection, _: Any) -> None:
        pg_arrays.register(connection)
        connection.prepare_threshold = 0
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.read_only = connection.deferrable = False
        found = connection.execute(SCHEMA).fetchone()
        schema = found[0] if found else "public"
        connection.execute(session_statement(schema).encode())
        connection.commit()
        self._scope = scope_statement("%(organization_id)s", schema).encode()
        self._uses = 0

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection]:
        """Lend psycopg's connection, for SQLAlchemy has no pipelines; replace a broken one.

        SQLAlchemy asks a server a few questions first. If they fail, it raises errors of its own:
        they are no batch's fault either, and may pass like psycopg's.

        In a pipeline, `commit()` waits for its answer while part of what was sent may still be in
        libpq's buffer: for ever, if that is more than the socket takes at once. The end of the
        pipeline sends everything before it waits.
        """
        try:
            lent = self._engine.raw_connection()
        except DBAPIError as error:
            raise psycopg.OperationalError(f"there is no connection: {error}") from error
        connection = cast(psycopg.Connection, lent.driver_connection)
        try:
            with self._time_limit.watch(connection):
                yield connection
        except BaseException as error:
            # After an error of the server's state, the next connection may lead to another server.
            if connection.closed or isinstance(error, psycopg.Error):
                lent.invalidate()
            raise
        finally:
            lent.close()


class Transaction:
    """What happens between the lock and the commit."""

    def __init__(
        self,
        connection: psycopg.Connection,
        pipeline: psycopg.Pipeline,
        organization_id: UUID,
        scope: bytes,
    ) -> None:
        self._connection = connection
        self._pipeline = pipeline
        self._sent: list[tuple[str | bytes, psycopg.Cursor[Any]]] = []
        self._organization_id = organization_id
        self._send(scope)
        self._locked = self._send(statements.LOCK)
        self._found: tuple[datetime, Cursor] | None = None

    @property
    def now(self) -> datetime:
        """The database's time, one clock for all workers, read while the lock is held.

        Raises `UnknownOrganization` if there is no row to lock: read this before any write.
        """
        return self._row[0]

    @property
    def _row(self) -> tuple[datetime, Cursor]:
        """What the lock returned: the time, and the organization's last change event."""
        if self._found is None:
            found = self._locked.fetchone()
            if found is None:
                raise UnknownOrganization
            now, position, changed_at = found
            at = None if changed_at is None else microseconds(changed_at)
            self._found = now, Cursor(position, at)
        return self._found

    def load(self, messages: Sequence[AuthorizedMessage]) -> Snapshot:
        """Return the state of all that the messages name."""
        names = rows.named(messages)
        found_batches = self._find_batches([each.message.batch_id for each in messages])
        found_executions = self._send(
            statements.LOAD_EXECUTIONS, flow_execution_ids=pg_arrays.uuids(list(names.executions))
        )
        found_tags: Iterable[Any] = []
        if names.tags:
            found_tags = self._send(
                statements.LOAD_TAGS,
                max_rows=rows.MAX_LOADED_TAGS,
                max_bytes=rows.MAX_LOADED_BYTES,
                **rows.key_columns(list(names.tags)),
            )
        found_types: Iterable[Any] = []
        if names.types:
            found_types = self._send(
                statements.LOAD_TYPES,
                max_of_type=MAX_OF_TYPE + 1,
                max_rows=rows.MAX_LOADED_TAGS,
                max_bytes=rows.MAX_LOADED_BYTES,
                **rows.type_columns(list(names.types)),
            )
        found_tasks: Iterable[Any] = []
        if names.tasks:
            found_tasks = self._send(statements.LOAD_TASKS, **rows.task_columns(list(names.tasks)))
        batches, seen = rows.batches(found_batches)
        tags: dict[TagKey, dict[bytes, Tag]] = {}
        _, last_tag = rows.tags(found_tags, tags)
        types, last_type = rows.types(found_types, tags, names)
        return Snapshot(
            batches=batches,
            executions=dict(map(rows.execution, found_executions)),
            tags=tags,
            types=types,
            tasks={row[:2]: Task(*row) for row in found_tasks},
            head=self._row[1],
            complete=rows.complete(messages, names, seen, last_tag, last_type),
        )

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
        if change_set.changes:
            position = change_set.changes[-1].position
            self._found = self.now, Cursor(position, microseconds(self.now))

    def batches(self, batch_ids: Sequence[UUID]) -> dict[UUID, StoredResult]:
        """Return what is stored of these batches, with the change events that they made."""
        return rows.batches(self._find_batches(batch_ids))[0]

    def wait(self) -> None:
        """Wait until all that was sent has succeeded. Raises the error of what did not."""
        self._pipeline.sync()

    def failed_statement(self) -> str | None:
        """Return the statement that failed; None if it was the begin or the commit."""
        for statement, cursor in self._sent[2:]:
            if cursor.pgresult is None:
                return str(statement)
        return None

    def forget_failure(self, batch_id: UUID) -> bool:
        _ = self.now  # the lock is held
        return bool(self._send(statements.FORGET_FAILURE, batch_id=batch_id).fetchall())

    def _find_batches(self, batch_ids: Sequence[UUID]) -> Iterable[Any]:
        ids = pg_arrays.uuids([id.int for id in batch_ids])
        return self._send(statements.LOAD_BATCHES, batch_ids=ids, max_bytes=MAX_GROUP_BYTES)

    def _send(self, statement: LiteralString | bytes, **parameters: Any) -> psycopg.Cursor[Any]:
        """Queue a statement; its result is waited for when it is read."""
        values = {"organization_id": self._organization_id, **parameters}
        if isinstance(statement, str) and "%(now)s" in statement:
            values["now"] = self.now
        cursor = self._connection.cursor(binary=True)
        self._sent.append((statement, cursor))
        return cursor.execute(statement, values)
