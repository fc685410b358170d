"""Runs migrations on the connection that worker/db/migrate.py passes in."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
