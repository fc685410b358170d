"""How to connect to PostgreSQL, as which role, and which errors may pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import psycopg
from sqlalchemy import make_url

from worker.db.tables import metadata

# A silent server is noticed within 5 s while connecting, and within about 20 s afterwards.
CONNECT_ARGUMENTS: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}

ROLE_CHECK: Final = """
    select rolsuper or rolbypassrls or exists (
               select from pg_class c
                where c.relname = any(%(tables)s)
                  and pg_has_role(current_user, c.relowner, 'usage'))
      from pg_roles where rolname = current_user
"""
"""Returns one row: whether the current role sees through row-level security. Takes `TABLES`."""
TABLES: Final = {"tables": list(metadata.tables)}

DISCARD_PLANS: Final = "discard plans"


class UnsafeRole(Exception):
    """The role sees through row-level security: connect as the one that `migrate` made."""


def driver_url(database_url: str) -> Any:
    """Return the URL with psycopg 3 as its driver, however `postgresql://` was written."""
    return make_url(database_url).set(drivername="postgresql+psycopg")


def assert_safe_role(found: Sequence[Any]) -> None:
    """Raise `UnsafeRole` if `ROLE_CHECK` found a role that sees through row-level security."""
    if found != [(False,)]:
        raise UnsafeRole(
            "this database role owns the tables, is a superuser or bypasses row-level security: "
            "connect as task_tags_worker or task_tags_endpoint (task-tags-admin migrate makes them)"
        )


def should_discard_plans(uses: int) -> bool:
    """Whether a connection should plan its statements again at this use: the 2nd, 4th, 8th, 16th …

    PostgreSQL keeps a prepared plan until the table is analyzed, which takes a minute or more. A
    plan made while an organization had a few hundred rows may read all of them for each look-up,
    and its cost then grows with what the organization stores.
    """
    return uses > 1 and uses & (uses - 1) == 0


_TRANSIENT_CLASSES: Final = ("08", "0A", "40", "53", "57", "58")
_TRANSIENT_STATES: Final = (
    "42P01",  # a migration is missing: there is no such table
    "42703",  # no such column
    "42883",  # no such function
    "42501",  # no such right
    "25006",  # a standby, after a failover
    "25P03",  # the session was idle too long: this process stood still in a transaction
    "25P04",  # so did the transaction
    "55P03",  # a lock was held too long
)


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed later, as after a lost connection or a deadlock.

    A missing table, column or right and an outdated plan count too: statements are the same for all
    batches, and a migration cures them. The codes are listed at
    https://www.postgresql.org/docs/current/errcodes-appendix.html.
    """
    if isinstance(error, psycopg.Error) and (state := error.sqlstate):
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_STATES
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
