"""The one declaration of the schema: tables, constraints, indexes, policies and rights.

Nothing is created from it: migrations do that, and a test compares the two. Statements are in
worker/db/statements.py, and those of the endpoint in three modules of worker/api: queries.py,
page_statements.py and change_queries.py.

Every key begins with `organization_id`, and row-level security hides the rows of other
organizations, from the owner too. An index for a range has a condition that always holds, and only
the statements that are to use it have it, too: with statistics of small organizations PostgreSQL
takes any index that begins with the organization, and may read all rows of a large one. There are
no foreign keys: one transaction at a time writes for an organization, it has just read the
execution, and executions are never deleted.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

WORKER_ROLE: Final = "task_tags_worker"
ENDPOINT_ROLE: Final = "task_tags_endpoint"
ROLES: Final = (WORKER_ROLE, ENDPOINT_ROLE)

ROLE_SETTINGS: Final = {
    "statement_timeout": "30s",
    "lock_timeout": "100ms",
    "idle_in_transaction_session_timeout": "30s",
    "transaction_timeout": "60s",  # from PostgreSQL 17 on
    "timezone": "UTC",
    # The statements are few and go by key: planning them each time costs more than it gains.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}

# Unset, or left empty by an earlier transaction, the setting names no organization. In a subselect
# it is read once for each statement instead of once for each row.
_ORGANIZATION: Final = "(select nullif(current_setting('app.organization_id', true), '')::uuid)"

metadata: Final = MetaData()


def _table(name: str, *columns: Any, worker_may: str, fillfactor: int = 100) -> Table:
    """Declare a table of organizations' rows; the endpoint's role may read it."""
    organization_id = Column("organization_id", Uuid, primary_key=True)
    table = Table(name, metadata, organization_id, *columns)
    for statement in (
        f"alter table {name} enable row level security",
        f"alter table {name} force row level security",
        f"create policy organization on {name} using (organization_id = {_ORGANIZATION})",
        f"grant {worker_may} on {name} to {WORKER_ROLE}",
        f"grant select on {name} to {ENDPOINT_ROLE}",
        # SQLAlchemy 2.0 can't declare it.
        *([f"alter table {name} set (fillfactor = {fillfactor})"] if fillfactor < 100 else []),
    ):
        event.listen(table, "after_create", DDL(statement))  # type: ignore[no-untyped-call]
    return table


def _required(name: str, type_: Any) -> Column[Any]:
    return Column(name, type_, nullable=False)


_CODE_POINTS: Final = Text(collation="C")
_TIME: Final = DateTime(timezone=True)

# One row for each organization, which its transactions lock. The worker may list all organizations,
# to find work.
organizations = _table(
    "organizations",
    _required("created_at", _TIME),
    Column("position", BigInteger, nullable=False, server_default=text("0")),  # of the last event
    Column("changed_at", _TIME),  # of the last event; null: there was none
    worker_may="select, insert, update",
    fillfactor=50,
)
_LIST: Final = f"create policy list on organizations for select to {WORKER_ROLE} using (true)"
event.listen(organizations, "after_create", DDL(_LIST))  # type: ignore[no-untyped-call]

flow_executions = _table(
    "flow_executions",
    Column("flow_execution_id", Uuid, primary_key=True),
    Column("task_names", JSONB(none_as_null=True)),  # null: any task name may be tagged
    _required("revision", BigInteger),  # of the last change event
    _required("created_at", _TIME),
    Column("flow_id", _CODE_POINTS),  # of the first registration
    _required("changed_at", _TIME),  # of the last change event; before, of the registration
    Column("given_task_names", JSONB(none_as_null=True)),  # where task_names is null, if any
    worker_may="select, insert, update",
    fillfactor=70,
)

task_tags = _table(
    "task_tags",
    Column("id", Uuid, primary_key=True),
    _required("flow_execution_id", Uuid),
    _required("task_name", _CODE_POINTS),
    _required("tag_type", _CODE_POINTS),
    _required("tag", _CODE_POINTS),
    Column("tag_metadata", JSON),  # in canonical form; jsonb writes 1e300 in 301 digits
    _required("metadata_digest", LargeBinary),  # equal for equal metadata; empty for null
    _required("status", _CODE_POINTS),
    _required("created_at", _TIME),
    _required("created_by", Text),
    Column("updated_at", _TIME),
    Column("modified_by", Text),
    CheckConstraint("status in ('active', 'deleted')", name="task_tags_status_check"),
    worker_may="select, insert, update",
)

Index(  # finds a tag by its name, reads the tags of an execution or task, and allows one active row
    "task_tags_active",
    *(task_tags.c[name] for name in ("organization_id", "flow_execution_id", "task_name")),
    *(task_tags.c[name] for name in ("tag_type", "tag", "metadata_digest")),
    unique=True,
    postgresql_where=text("status = 'active'"),
)

# Only for a statement that has the same condition on the time, which always holds. Look-ups by name
# have not: with a plan from a moment without statistics, they could take these indexes and read all
# tags of an execution, or all tasks with a tag.
_IN_ORDER_OF_TIME: Final = text("status = 'active' and created_at > '-infinity'")

Index(  # reads the tasks that have a tag, longest waiting first
    "task_tags_work",
    *(task_tags.c[name] for name in ("organization_id", "tag_type", "tag", "created_at", "id")),
    postgresql_where=_IN_ORDER_OF_TIME,
)

Index(  # reads the tags of an execution page by page
    "task_tags_page",
    *(task_tags.c[name] for name in ("organization_id", "flow_execution_id", "created_at", "id")),
    postgresql_where=_IN_ORDER_OF_TIME,
)

tag_batches = _table(
    "tag_batches",
    Column("batch_id", Uuid, primary_key=True),
    _required("digest", LargeBinary),  # of the message
    _required("result_record", JSON),  # as it was published
    _required("revisions", JSONB),  # of the change events that the batch made, by execution
    _required("event_bytes", Integer),  # the length of these events
    _required("applied_at", _TIME),
    worker_may="select, insert, delete",
)

Index(  # finds the results that are old enough to be purged
    "tag_batches_age",
    tag_batches.c.organization_id,
    tag_batches.c.applied_at,
    postgresql_where=text("applied_at > '-infinity'"),  # it always holds: see above
)

tag_changes = _table(
    "tag_changes",
    Column("flow_execution_id", Uuid, primary_key=True),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    _required("batch_id", Uuid),
    _required("event", JSON),  # as it was published
    _required("changed_at", _TIME),
    _required("position", BigInteger),  # 1, 2, 3 … in the organization
    worker_may="select, insert, delete",
)

Index(  # reads the feed of an organization, and purges it from its beginning
    "tag_changes_position",
    tag_changes.c.organization_id,
    tag_changes.c.position,
    unique=True,
    postgresql_where=text("position > 0"),  # it always holds: see above
)

task_executions = _table(
    "task_executions",
    Column("flow_execution_id", Uuid, primary_key=True),
    Column("task_name", _CODE_POINTS, primary_key=True),
    _required("state", _CODE_POINTS),
    _required("state_changed_at", _TIME),
    _required("state_changed_by", Text),
    CheckConstraint(
        "state in ('queued', 'running', 'awaiting_input', 'completed', 'failed', 'cancelled', "
        "'skipped')",
        name="task_executions_state_check",
    ),
    worker_may="select, insert, update",
    fillfactor=70,
)
