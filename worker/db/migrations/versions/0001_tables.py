"""The four tables, their row-level security and the two roles (design, section 5)."""

from alembic import op

revision = "0001"
down_revision = None

TABLES = ("flow_executions", "task_tags", "tag_batches", "tag_changes")
WORKER, ENDPOINT = "task_tags_worker", "task_tags_endpoint"


def upgrade() -> None:
    op.execute("""
        create table flow_executions (
            organization_id    uuid not null,
            flow_execution_id  uuid not null,
            task_names         jsonb,              -- null: any task name may be tagged
            revision           bigint not null,    -- of the last change event
            created_at         timestamptz not null,
            primary key (organization_id, flow_execution_id)
        ) with (fillfactor = 70)
    """)
    # No foreign keys: rows are written by one transaction at a time for each organization, which has just
    # read the execution, and executions are never deleted. A key would be looked up again for each row.
    op.execute("""
        create table task_tags (
            organization_id    uuid not null,
            id                 uuid not null,
            flow_execution_id  uuid not null,
            task_name          text collate "C" not null,
            tag_type           text collate "C" not null,
            tag                text collate "C" not null,
            tag_metadata       json,               -- as it was sent, keys sorted; jsonb would spell 1e300 out
            metadata_digest    bytea not null,     -- equal for equal metadata; empty for null
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
            digest             bytea not null,     -- of the request
            result_record      json not null,      -- as it was published
            revisions          jsonb not null,     -- of the change events it made, by execution
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
            event              json not null,      -- as it was published
            primary key (organization_id, flow_execution_id, revision)
        )
    """)
    for role in (WORKER, ENDPOINT):
        _create_role(role)
    for table in TABLES:
        _secure(table)
    op.execute(f"grant select, insert on {', '.join(TABLES)} to {WORKER}")
    op.execute(f"grant update on flow_executions, task_tags to {WORKER}")
    op.execute(f"grant delete on tag_batches to {WORKER}")
    op.execute(f"grant select on {', '.join(TABLES)} to {ENDPOINT}")


def _create_role(role: str) -> None:
    """Roles are the cluster's, so one may be there already. It must not see through the policies."""
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
        "lock_timeout": "1s",
        "idle_in_transaction_session_timeout": "30s",
        "timezone": "UTC",
        # The statements are few, go by key and run all the time: planning each anew costs more than it finds.
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


def _secure(table: str) -> None:
    """Rows of other organizations don't exist, for the owner neither; unset or empty is no organization."""
    op.execute(f"alter table {table} enable row level security")
    op.execute(f"alter table {table} force row level security")
    op.execute(f"""
        create policy organization on {table} using (
            organization_id = nullif(current_setting('app.organization_id', true), '')::uuid
        )
    """)


def downgrade() -> None:
    op.execute(f"drop table {', '.join(TABLES)}")
