"""When a change was made, beside its event, so that old ones can be purged; the worker may do that."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("alter table tag_changes add column changed_at timestamptz")
    # As the owner, who is no organization: the policies would hide every row.
    op.execute("alter table tag_changes no force row level security")
    op.execute("update tag_changes set changed_at = (event ->> 'changed_at')::timestamptz")
    op.execute("alter table tag_changes force row level security")
    op.execute("alter table tag_changes alter column changed_at set not null")
    op.execute("grant delete on tag_changes to task_tags_worker")


def downgrade() -> None:
    op.execute("revoke delete on tag_changes from task_tags_worker")
    op.execute("alter table tag_changes drop column changed_at")
