"""A feed of each organization, a work list across executions, and more states of tasks."""

from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = ("organizations", "flow_executions", "tag_changes")
"""What is filled here; an owner that is no superuser sees no rows while their policies hold."""


def upgrade() -> None:
    op.execute(
        "alter table organizations "
        "add position bigint not null default 0, "
        "add changed_at timestamptz"
    )
    op.execute("alter table organizations set (fillfactor = 50)")
    op.execute("""
        alter table flow_executions add flow_id text collate "C", add changed_at timestamptz
    """)
    op.execute("alter table tag_changes add position bigint")
    for table in TABLES:
        op.execute(f"alter table {table} no force row level security")
    _fill()
    for table in TABLES:
        op.execute(f"alter table {table} force row level security")
    op.execute("alter table flow_executions alter changed_at set not null")
    op.execute("alter table tag_changes alter position set not null")
    op.execute("drop index tag_changes_age")
    op.execute("""
        create unique index tag_changes_position on tag_changes (organization_id, position)
    """)
    op.execute("""
        create index task_tags_work on task_tags
            (organization_id, tag_type, tag, created_at, id)
            where status = 'active' and created_at > '-infinity'
    """)
    op.execute("""
        create index task_tags_page on task_tags
            (organization_id, flow_execution_id, created_at, id)
            where status = 'active' and created_at > '-infinity'
    """)
    op.execute("""
        alter table task_executions
            drop constraint task_executions_state_check,
            add constraint task_executions_state_check check (state in
                ('queued', 'running', 'awaiting_input', 'completed', 'failed', 'cancelled',
                 'skipped'))
    """)


def _fill() -> None:
    """Give stored events their positions, and all heads their times."""
    op.execute("""
        create function pg_temp.base36(number bigint) returns text language sql as $$
            with recursive digits (rest, text) as (
                   select number, ''
                    union all
                   select rest / 36,
                          substr('0123456789abcdefghijklmnopqrstuvwxyz', (rest % 36)::int + 1, 1)
                          || text
                     from digits where rest > 0)
            select text from digits where rest = 0
        $$
    """)
    op.execute("""
        update tag_changes c
           set position = n.position,
               event = regexp_replace(c.event::text, ',"batch_id":',
                   format(',"position":%s,"cursor":"%s-%s","batch_id":', n.position, n.position,
                          pg_temp.base36((extract(epoch from c.changed_at) * 1000000)::bigint))
                   )::json
          from (select organization_id, flow_execution_id, revision,
                       row_number() over (partition by organization_id
                                          order by changed_at, flow_execution_id, revision)
                       as position
                  from tag_changes) n
         where (c.organization_id, c.flow_execution_id, c.revision)
             = (n.organization_id, n.flow_execution_id, n.revision)
    """)
    op.execute("""
        update organizations o
           set position = coalesce(last.position, 0), changed_at = last.changed_at
          from organizations p
          left join lateral (
               select position, changed_at from tag_changes c
                where c.organization_id = p.organization_id
                order by position desc limit 1) last on true
         where o.organization_id = p.organization_id
    """)
    op.execute("""
        update flow_executions e
           set changed_at = coalesce((
               select changed_at from tag_changes c
                where (c.organization_id, c.flow_execution_id, c.revision)
                    = (e.organization_id, e.flow_execution_id, e.revision)), created_at)
    """)


def downgrade() -> None:
    raise NotImplementedError("restore a backup instead")
