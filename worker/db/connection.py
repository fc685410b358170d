"""How to be connected to PostgreSQL, as which role, and which errors may pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from worker.db.tables import metadata

# A silent server is noticed within 3 s while connecting, and within about 20 s afterwards.
CONNECT_ARGUMENTS: Final[dict[str, Any]] = {
    "connect_timeout": 3,
    "client_encoding": "UTF8",
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

SCHEMA: Final = """
    select nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace
     where relname = 'organizations' and relkind = 'r' and has_schema_privilege(n.oid, 'usage')
     order by nspname = 'public' desc, nspname = any(current_schemas(false)) desc limit 1
"""
"""Returns the schema of the tables, or no row before `migrate` has run."""

# What a transaction sets for itself, whatever role, database, environment or pooler have set: all
# that can change bytes, meaning, isolation or how long a statement waits.
_SESSION_SETTINGS: Final = {
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "row_security": "on",
    "lock_timeout": "100ms",
    "idle_in_transaction_session_timeout": "30s",
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "enable_seqscan": "off",  # every statement has its index, also while a table is small
}


# What can still change a meaning or a wait behind a pooler: values are binary, or formatted by the
# statements themselves.
_COMPARED: Final = ("search_path", "timezone", "row_security", "statement_timeout", "lock_timeout")


def session_statement(schema: str, statement_timeout: str = "30s") -> str:
    """Return the statement that sets all session settings at connect."""
    settings = _settings(schema, statement_timeout)
    return f"select {', '.join(_set(*each, local=False) for each in settings)}"


def scope_statement(organization_id: str, schema: str, statement_timeout: str = "30s") -> str:
    """Return the statement that sets a transaction's organization, and what a pooler has changed.

    It only compares where `session_statement` was run on this server connection, which costs a
    fraction of setting.

    Args:
        organization_id: The placeholder for the organization's id.
        schema: The schema of the tables.
        statement_timeout: How long the server works on one statement; as at connect.
    """
    differing = ", ".join(
        f"case when current_setting('{name}') <> '{value}' then {_set(name, value, local=True)} end"
        for name, value in _settings(schema, statement_timeout)
        if name in _COMPARED
    )
    return f"""
        select set_config('app.organization_id', {organization_id}::text, true), {differing},
               case current_setting('synchronous_commit')
               when 'off' then set_config('synchronous_commit', 'on', true) end
    """


def _settings(schema: str, statement_timeout: str) -> list[tuple[str, str]]:
    changing = {"search_path": schema.replace("'", "''"), "statement_timeout": statement_timeout}
    return list({**changing, **_SESSION_SETTINGS}.items())


def _set(name: str, value: str, *, local: bool) -> str:
    return f"set_config('{name}', '{value}', {str(local).lower()})"


DISCARD_PLANS: Final = "discard plans"
"""Makes PostgreSQL plan the prepared statements of a connection again."""


class UnsafeRole(Exception):
    """The role sees through row-level security: connect as the one that `migrate` made."""


def assert_safe_role(found: Sequence[Any]) -> None:
    """Raise `UnsafeRole` if `ROLE_CHECK` found a role that sees through row-level security."""
    if found != [(False,)]:
        raise UnsafeRole(
            "this database role owns the tables, is a superuser or bypasses row-level security: "
            "connect as task_tags_worker or task_tags_endpoint (see task-tags-admin migrate)"
        )


def should_discard_plans(uses: int) -> bool:
    """Whether a connection should plan its statements again at this use: the 2nd, 4th, 8th …

    PostgreSQL keeps a prepared plan until the table is analyzed, which takes a minute or more. A
    plan made while an organization had a few hundred rows may read all of them for each look-up,
    and its cost then grows with what the organization stores.
    """
    return uses > 1 and uses & (uses - 1) == 0
