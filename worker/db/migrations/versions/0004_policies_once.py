"""A policy looks its organization up once for each statement, not for each row."""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = ("flow_executions", "task_tags", "tag_batches", "tag_changes", "task_executions")
ORGANIZATION = "nullif(current_setting('app.organization_id', true), '')::uuid"


def upgrade() -> None:
    _alter(f"(select {ORGANIZATION})")


def downgrade() -> None:
    _alter(ORGANIZATION)


def _alter(organization: str) -> None:
    for table in TABLES:
        op.execute(f"alter policy organization on {table} using (organization_id = {organization})")
