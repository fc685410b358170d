"""The state of each task of an execution, as it was last recorded."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("""
        create table task_executions (
            organization_id    uuid not null,
            flow_execution_id  uuid not null,
            task_name          text collate "C" not null,
            state              text collate "C" not null check (state in ('queued', 'running', 'completed', 'failed')),
            state_changed_at   timestamptz not null,
            state_changed_by   text not null,
            primary key (organization_id, flow_execution_id, task_name)
        ) with (fillfactor = 70)
    """)
    op.execute("alter table task_executions enable row level security")
    op.execute("alter table task_executions force row level security")
    op.execute("""
        create policy organization on task_executions using (
            organization_id = nullif(current_setting('app.organization_id', true), '')::uuid
        )
    """)
    op.execute("grant select, insert, update on task_executions to task_tags_worker")
    op.execute("grant select on task_executions to task_tags_endpoint")


def downgrade() -> None:
    op.execute("drop table task_executions")
