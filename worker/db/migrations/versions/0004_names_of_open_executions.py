"""The names that were given to an execution that allows every name are kept, in their order."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("alter table flow_executions add given_task_names jsonb")
