"""Indexes for ages and positions that no look-up by key can use, whatever the statistics say."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("drop index tag_batches_age, tag_changes_position")
    op.execute("""
        create index tag_batches_age on tag_batches (organization_id, applied_at)
            where applied_at > '-infinity'
    """)
    op.execute("""
        create unique index tag_changes_position on tag_changes (organization_id, position)
            where position > 0
    """)
