"""One transaction for the batches of an organization: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, LiteralString, cast
from uuid import UUID

import psycopg

from producers.contract.cursors import Cursor, microseconds
from tests.bench.rival import arrays, rows, statements
from tests.bench.rival.bounds import MAX_GROUP_BYTES, MAX_OF_TYPE
from tests.bench.rival.results import Tag
from tests.bench.rival.rules import decide
from tests.bench.rival.snapshot import AuthorizedMessage, ChangeSet, Decision, Snapshot, TagKey
from tests.bench.rival.values import Uuid7

_SESSION: Final = """
    select set_config('timezone', 'UTC', false),
           set_config('plan_cache_mode', 'force_generic_plan', false),
           set_config('jit', 'off', false),
           set_config('enable_seqscan', 'off', false),
           set_config('lock_timeout', '30s', false)
"""
_SCOPE: Final = "select set_config('app.organization_id', %(organization_id)s::text, true)"


class _UnknownOrganization(Exception):
    pass


class Repository:
    """One connection, opened at the first transaction, and again after one that failed."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._open: psycopg.Connection | None = None
        self._uses = 0
        self._new_id = Uuid7()

    def apply(self, organization_id: UUID, messages: Sequence[AuthorizedMessage]) -> Decision:
        """Load, decide and save in one transaction; the first one adds the organization before."""
        try:
            return self._transact(organization_id, messages)
        except _UnknownOrganization:
            values = {"organization_id": organization_id}
            with self._connection() as connection, connection.pipeline():
                connection.execute(_SCOPE, values)
                connection.execute(statements.ADD_ORGANIZATION, values)
                connection.execute("commit")
            return self._transact(organization_id, messages)

    def _transact(self, organization_id: UUID, messages: Sequence[AuthorizedMessage]) -> Decision:
        connection = self._connection()
        try:
            with connection.pipeline():
                self._uses += 1
                if self._uses > 1 and self._uses & (self._uses - 1) == 0:
                    connection.execute("discard plans")
                transaction = _Transaction(connection, organization_id)
                snapshot = transaction.load(messages)
                now = transaction.now
                decision = decide(
                    organization_id,
                    messages,
                    snapshot,
                    now=now,
                    new_id=partial(self._new_id, microseconds(now)),
                )
                transaction.save(decision.change_set)
                connection.execute("commit")
        except _UnknownOrganization:
            connection.rollback()
            raise
        except BaseException:
            connection.close()
            raise
        return decision

    def _connection(self) -> psycopg.Connection:
        if self._open is None or self._open.closed:
            self._open = psycopg.connect(self._url)
            arrays.register(self._open)
            self._open.prepare_threshold = 0
            self._open.execute(_SESSION)
            self._open.commit()
            self._uses = 0
        return self._open


class _Transaction:
    """What happens between the lock and the commit."""

    def __init__(self, connection: psycopg.Connection, organization_id: UUID) -> None:
        self._connection = connection
        self._organization_id = organization_id
        self._send(_SCOPE)
        self._locked = self._send(statements.LOCK)
        self._found: tuple[datetime, Cursor] | None = None

    @property
    def now(self) -> datetime:
        """The database's time, read while the lock is held."""
        return self._row[0]

    @property
    def _row(self) -> tuple[datetime, Cursor]:
        """What the lock returned: the time, and the organization's last change event."""
        if self._found is None:
            found = self._locked.fetchone()
            if found is None:
                raise _UnknownOrganization
            now, position, changed_at = found
            at = None if changed_at is None else microseconds(changed_at)
            self._found = now, Cursor(position, at)
        return self._found

    def load(self, messages: Sequence[AuthorizedMessage]) -> Snapshot:
        """Return the state of all that the messages name."""
        names = rows.named(messages)
        found_batches = self._send(
            statements.LOAD_BATCHES,
            batch_ids=arrays.uuids([each.message.batch_id.int for each in messages]),
            max_bytes=MAX_GROUP_BYTES,
        )
        found_executions = self._send(
            statements.LOAD_EXECUTIONS, flow_execution_ids=arrays.uuids(list(names.executions))
        )
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
        batches, seen = rows.batches(found_batches)
        tags: dict[TagKey, dict[bytes, Tag]] = {}
        _, last_tag = rows.tags(found_tags, tags)
        types, last_type = rows.types(found_types, tags, names)
        return Snapshot(
            batches=batches,
            executions=dict(map(rows.execution, found_executions)),
            tags=tags,
            types=types,
            head=self._row[1],
            complete=rows.complete(messages, names, seen, last_tag, last_type),
        )

    def save(self, change_set: ChangeSet) -> None:
        """Store what was decided. A statement that has nothing to do is left out."""
        for statement, found, columns in (
            (statements.SAVE_REVISIONS, change_set.revisions, rows.revision_columns),
            (statements.SAVE_REMOVED, change_set.removed, rows.removed_columns),
            (statements.SAVE_ADDED, change_set.added, rows.added_columns),
            (statements.SAVE_CHANGES, change_set.changes, rows.change_columns),
            (statements.SAVE_BATCHES, change_set.batches, rows.batch_columns),
        ):
            if found:
                self._send(statement, now=self.now, **cast(Any, columns)(found))

    def _send(self, statement: LiteralString, **parameters: Any) -> psycopg.Cursor[Any]:
        """Queue a statement; its result is waited for when it is read."""
        values = {"organization_id": self._organization_id, **parameters}
        return self._connection.cursor(binary=True).execute(statement, values)
