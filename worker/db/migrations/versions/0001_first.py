"""The first schema: tables, row-level security, and the two roles with their rights."""

from alembic import op

revision = "0001"
down_revision = None

WORKER, ENDPOINT = "task_tags_worker", "task_tags_endpoint"
GRANTS = {
    "organizations": "select, insert, update",
    "flow_executions": "select, insert, update",
    "task_tags": "select, insert, update",
    "tag_batches": "select, insert, delete",
    "tag_changes": "select, insert, delete",
    "task_executions": "select, insert, update",
}


def upgrade() -> None:
    op.execute("""
        create table organizations (
            organization_id    uuid not null primary key,
            created_at         timestamptz not null
        )
    """)
    op.execute("""
        create table flow_executions (
            organization_id    uuid not null,
            flow_execution_id  uuid not null,
            task_names         jsonb,
            revision           bigint not null,
            created_at         timestamptz not null,
            primary key (organization_id, flow_execution_id)
        ) with (fillfactor = 70)
    """)
    op.execute("""
        create table task_tags (
            organization_id    uuid not null,
            id                 uuid not null,
            flow_execution_id  uuid not null,
            task_name          text collate "C" not null,
            tag_type           text collate "C" not null,
            tag                text collate "C" not null,
            tag_metadata       json,
            metadata_digest    bytea not null,
            status             text collate "C" not null check (status in ('active', 'deleted')),
            created_at         timestamptz not null,
            created_by         text not null,
            updated_at         timestamptz,
            modified_by        text,
            primary key (organization_id, id)
        )
    """)
    op.execute("""
        create unique index task_tags_active on task_tags
            (organization_id, flow_execution_id, task_name, tag_type, tag, metadata_digest)
            where status = 'active'
    """)
    op.execute("""
        create table tag_batches (
            organization_id    uuid not null,
            batch_id           uuid not null,
            digest             bytea not null,
            result_record      json not null,
            revisions          jsonb not null,
            event_bytes        integer not null,
            applied_at         timestamptz not null,
            primary key (organization_id, batch_id)
        )
    """)
    op.execute("create index tag_batches_age on tag_batches (organization_id, applied_at)")
    op.execute("""
        create table tag_changes (
            organization_id    uuid not null,
            flow_execution_id  uuid not null,
            revision           bigint not null,
            batch_id           uuid not null,
            event              json not null,
            changed_at         timestamptz not null,
            primary key (organization_id, flow_execution_id, revision)
        )
    """)
    op.execute("create index tag_changes_age on tag_changes (organization_id, changed_at)")
    op.execute("""
        create table task_executions (
            organization_id    uuid not null,
            flow_execution_id  uuid not null,
            task_name          text collate "C" not null,
            state              text collate "C" not null
                               check (state in ('queued', 'running', 'completed', 'failed')),
            state_changed_at   timestamptz not null,
            state_changed_by   text not null,
            primary key (organization_id, flow_execution_id, task_name)
        ) with (fillfactor = 70)
    """)
    for role in (WORKER, ENDPOINT):
        _create_role(role)
    for table, rights in GRANTS.items():
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"""
            create policy organization on {table} using (organization_id =
                (select nullif(current_setting('app.organization_id', true), '')::uuid))
        """)
        op.execute(f"grant {rights} on {table} to {WORKER}")
        op.execute(f"grant select on {table} to {ENDPOINT}")
    op.execute(f"create policy list on organizations for select to {WORKER} using (true)")


def _create_role(role: str) -> None:
    """Create a role, which belongs to the whole cluster and so may exist already."""
    op.execute(f"""
        do $$ begin
            if not exists (select from pg_roles where rolname = '{role}') then
                create role {role} login;
            elsif exists (select from pg_roles
                           where rolname = '{role}' and (rolsuper or rolbypassrls)) then
                raise 'the role {role} is a superuser or bypasses row-level security';
            end if;
        end $$
    """)
    settings = {
        "statement_timeout": "30s",
        "lock_timeout": "100ms",
        "idle_in_transaction_session_timeout": "30s",
        "timezone": "UTC",
        "plan_cache_mode": "force_generic_plan",
        "jit": "off",
    }
    for name, value in settings.items():
        op.execute(f"alter role {role} set {name} = '{value}'")
    op.execute(f"""
        do $$ begin
            if current_setting('server_version_num')::int >= 170000 then
                alter role {role} set transaction_timeout = '60s';
            end if;
        end $$
    """)


def downgrade() -> None:
    op.execute(f"drop table {', '.join(GRANTS)}")
