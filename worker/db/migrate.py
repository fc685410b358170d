"""Brings a database to the current schema and roles, as the owner of the tables."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from worker.db.connection import CONNECT_ARGUMENTS
from worker.settings import driver_url

_LOCK: Final = 0x7461_736B_7461_6773  # "tasktags"


def migrate(owner_url: str, passwords: dict[str, str]) -> None:
    """Run the missing migrations and set passwords of roles, by role name.

    Several at once wait for one another. A password reaches the server as a SCRAM verifier, so no
    log has it. Raises SQLAlchemy's `DBAPIError` if the server can't be reached or the role may not
    do that, and Alembic's `CommandError` if the database is of a newer or unknown version.
    """
    config = Config()
    config.set_main_option("script_location", str(files("worker.db") / "migrations"))
    config.set_main_option("path_separator", "os")
    engine = create_engine(
        driver_url(owner_url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args=CONNECT_ARGUMENTS,
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"select pg_advisory_lock({_LOCK})")
        connection.commit()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()
        raw = connection.connection.driver_connection
        assert raw is not None
        for role, password in passwords.items():
            verifier = raw.pgconn.encrypt_password(
                password.encode(), role.encode(), b"scram-sha-256"
            ).decode()
            raw.execute(
                sql.SQL("alter role {} password {}").format(
                    sql.Identifier(role), sql.Literal(verifier)
                )
            )
        raw.commit()
