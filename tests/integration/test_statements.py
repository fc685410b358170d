"""What a statement reads is bounded by what it answers or writes, not by what is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
import pytest

from producers.contract.selectors import Selector
from tests.support.database import own_database
from tests.support.parameters import register
from tests.support.servers import Servers
from worker.api import queries
from worker.api.page_statements import BEFORE_ALL
from worker.db import pg_arrays, statements
from worker.db.connection import scope_statement
from worker.db.migrate import migrate
from worker.db.tables import metadata
from worker.wire import encode

# Three organizations have the same rows; the second is asked for. Each of 400 executions has 50
# active tags, ten on each of five tasks; the first 50 have 100 changes each, of a batch each. A
# hundred batches and changes are a day old.
FILL: Final = """
    create function pg_temp.id(n int) returns uuid return lpad(to_hex(n), 32, '0')::uuid;
    create function pg_temp.moment(n int) returns timestamptz
           return now() - interval '1 day' * (n < 100)::int + interval '1 ms' * n;
    insert into organizations
    select pg_temp.id(o), now(), 5000, now() from generate_series(1, 3) as o;
    insert into flow_executions
    select pg_temp.id(o), pg_temp.id(n), '["task-0", "task-1", "task-2", "task-3", "task-4"]',
           100, now(), null, 'epoch'
      from generate_series(1, 3) as o, generate_series(0, 399) as n;
    insert into task_tags
    select pg_temp.id(o), pg_temp.id(n), pg_temp.id(n % 400), 'task-' || n / 400 % 5, 'type',
           'tag-' || n / 400, json_build_object('n', n), int4send(n),
           case when n < 20000 then 'active' else 'deleted' end, pg_temp.moment(n), 'ada'
      from generate_series(1, 3) as o, generate_series(0, 24999) as n;
    insert into tag_batches
    select pg_temp.id(o), pg_temp.id(n), int4send(n), '{"error": {"code": "internal_error"}}',
           jsonb_build_object(pg_temp.id(n % 50), n / 50 + 1), 2, pg_temp.moment(n)
      from generate_series(1, 3) as o, generate_series(0, 4999) as n;
    insert into tag_changes
    select pg_temp.id(o), pg_temp.id(n % 50), n / 50 + 1, pg_temp.id(n), '{}', pg_temp.moment(n),
           n + 1
      from generate_series(1, 3) as o, generate_series(0, 4999) as n;
    insert into task_executions
    select pg_temp.id(o), pg_temp.id(n % 400), 'task-' || n / 400, 'queued', now(), 'ada'
      from generate_series(1, 3) as o, generate_series(0, 1999) as n;
    -- one more execution allows every name
    insert into flow_executions
    select pg_temp.id(o), pg_temp.id(400), null, 100, now(), null, now()
      from generate_series(1, 3) as o;
    insert into task_tags
    select pg_temp.id(o), pg_temp.id(n), pg_temp.id(400), 'task-' || n % 5, 'other type',
           'tag-' || n, json_build_object('n', n), int4send(n), 'active', now(), 'ada'
      from generate_series(1, 3) as o, generate_series(30000, 30049) as n;
    insert into task_executions
    select pg_temp.id(o), pg_temp.id(400), 'task-' || n, 'queued', now(), 'ada'
      from generate_series(1, 3) as o, generate_series(0, 4) as n;
    analyze;
"""
ORGANIZATION: Final = UUID(int=2)
EXECUTION: Final = 7


class Case(NamedTuple):
    """How many rows a statement returns, aggregates or writes with these parameters."""

    rows: int
    parameters: dict[str, Any]


def case(rows: int, **parameters: Any) -> Case:
    return Case(rows, {"organization_id": ORGANIZATION, **parameters})


def uuids(*numbers: int) -> pg_arrays.Uuids:
    return pg_arrays.uuids(numbers)


def texts(pattern: str) -> pg_arrays.Texts:
    return pg_arrays.texts([pattern.format(n) for n in range(5)])


def by_id(value: Any, *numbers: int) -> pg_arrays.Jsonb:
    return pg_arrays.jsonb(encode({UUID(int=number): value for number in numbers}))


NOW: Final = {"now": datetime.now(timezone.utc)}
AGE: Final = {"age": timedelta(hours=1)}
EXECUTIONS: Final = {"flow_execution_ids": uuids(*range(5))}
TASKS: Final = {"flow_execution_ids": uuids(*[EXECUTION] * 5), "task_names": texts("task-{}")}
TAG_IDS: Final = [EXECUTION + 400 * n for n in range(5)]
TAG_KEYS: Final = {**TASKS, "tag_types": texts("type"), "tags": texts("tag-{}")}
NEW: Final = uuids(*range(100_000, 100_005))
DIGESTS: Final = pg_arrays.byteas([b"digest"] * 5)
JSON: Final = texts("{}")
BY: Final = texts("ada")
NOBODY: Final = pg_arrays.texts([None] * 5)
NEW_TAGS: Final = {"ids": NEW, "tag_metadata": JSON, "metadata_digests": DIGESTS, "created_by": BY}
NEW_CHANGES: Final = {
    "revisions": pg_arrays.bigints(range(101, 106)),
    "positions": pg_arrays.bigints(range(5001, 5006)),
    "batch_ids": NEW,
}
BOUND: Final = {"max_bytes": 1_000_000}
NEW_RESULTS: Final = {
    "batch_ids": NEW,
    "digests": DIGESTS,
    "records": JSON,
    "revisions": JSON,
    "event_bytes": pg_arrays.bigints([0] * 5),
}

# By the names in worker/db/statements.py and in queries.PREPARED, there with parameters in order.
# The first word is the name; others tell several cases of a statement apart.
OF_WORKER: Final = {
    "LOCK": case(1),
    "LOCK_NOW": case(1),
    "LIST_ORGANIZATIONS": case(1),
    "ADD_ORGANIZATION": case(0),
    "LOAD_BATCHES": case(
        5 + 5, batch_ids=uuids(*range(1000, 1005)), **BOUND
    ),  # with one event each
    "LOAD_EXECUTIONS": case(5, **EXECUTIONS),
    "LOAD_TASK_NAMES": case(5, **TASKS, long_ids=uuids(EXECUTION), whole_ids=uuids()),
    "LOAD_TAGS": case(5, **TAG_KEYS, whole=pg_arrays.bigints([1] * 5), max_rows=1000, **BOUND),
    "LOAD_TYPES": case(
        50,
        **{name: column for name, column in TAG_KEYS.items() if name != "tags"},
        whole=pg_arrays.bigints([1] * 5),
        max_of_type=100,
        max_rows=1000,
        **BOUND,
    ),
    "LOAD_TASKS": case(5, **TASKS),
    "SAVE_BATCHES": case(5, **NEW_RESULTS, **NOW),
    "SAVE_REGISTRATIONS": case(
        5,
        **EXECUTIONS,
        task_names=texts('["task-{}"]'),
        given_task_names=pg_arrays.texts([None] * 5),
        flow_ids=texts("flow"),
        **NOW,
    ),
    "SAVE_REVISIONS": case(5, **EXECUTIONS, revisions=by_id(101, *range(5)), **NOW),
    "SAVE_REMOVED": case(5, ids=uuids(*TAG_IDS), modified_by=by_id("ada", *TAG_IDS), **NOW),
    "SAVE_ADDED": case(5, **TAG_KEYS, **NEW_TAGS, modified_by=NOBODY, **NOW),
    "SAVE_TASKS": case(5, **TASKS, states=texts("failed"), state_changed_by=BY, **NOW),
    "SAVE_CHANGES": case(5, **EXECUTIONS, **NEW_CHANGES, events=JSON, position=5005, **NOW),
    "PURGE_RESULTS": case(100, **AGE),
    "PURGE_CHANGES": case(100, **AGE),
    "FORGET_FAILURE": case(1, batch_id=UUID(int=1000)),
}
FROM_BEGINNING: Final = dict(zip(("after", "after_id"), BEFORE_ALL.split(), strict=True))


def tasks_page(
    with_: Sequence[str] = (), without: Sequence[str] = (), **wanted: Any
) -> dict[str, Any]:
    """Return the parameters of a statement that reads a page of tasks."""
    selectors = [Selector.parse(each) for each in (*with_, *without)]
    states = wanted.get("states")
    return {
        "flow_execution_id": wanted.get("flow_execution_id"),
        "task_name": wanted.get("task_name"),
        "types": pg_arrays.texts([each.tag_type for each in selectors]),
        "tags": pg_arrays.texts([each.tag for each in selectors]),
        "wanted": len(with_),
        "states": None if states is None else pg_arrays.texts(states),
        "flow_id": None,
        **(FROM_BEGINNING if with_ else {"after": "0", "after_name": ""}),
        "limit": wanted["limit"],
    }


ONE: Final[dict[str, Any]] = {"flow_execution_id": UUID(int=EXECUTION)}
ANY: Final = {"task_name": None, "tag_types": None, "tags": None, **FROM_BEGINNING}
NONE_KNOWN: Final = {"known": pg_arrays.bigints([]), "times": pg_arrays.timestamps([])}
KNOWN: Final = {"known": pg_arrays.bigints([100]), "times": pg_arrays.timestamps([0])}
OF_ENDPOINT: Final = {
    "tags": case(1 + 50, **ONE, task_name=None, **NONE_KNOWN),
    "tags of a known revision": case(1, **ONE, task_name=None, **KNOWN),
    "task": case(1 + 10, **ONE, task_name="task-1", **NONE_KNOWN),
    "page of all": case(1 + 50, **ONE, **ANY, limit=None),
    "page of 5": case(1 + 5, **ONE, **ANY, limit=5),
    "page_of_task": case(1 + 10, **ONE, **{**ANY, "task_name": "task-1"}, limit=10),
    "work": case(2 + 5 * 13, **tasks_page(with_=["type:tag-3"], limit=5)),
    "work of 100": case(2 + 100 * 13, **tasks_page(with_=["type:tag-3"], limit=100)),
    "work with filters": case(
        2 + 5 * 18,
        **tasks_page(
            with_=["type:tag-3", "type", "type:tag-8"],
            without=["none", "type:none"],
            states=["queued"],
            task_name="task-3",
            limit=5,
        ),
    ),
    "work_of_execution": case(2 + 13, **tasks_page(**ONE, with_=["type:tag-3"], limit=5)),
    "work_of_task": case(
        2 + 13, **tasks_page(**ONE, with_=["type:tag-3"], task_name="task-3", limit=5)
    ),
    # for each task its registered name, its execution, its state and its tags
    "tasks": case(1 + 5 * 13, **tasks_page(**ONE, limit=10)),
    "tasks of a name": case(1 + 13, **tasks_page(**ONE, task_name="task-1", limit=10)),
    "tasks of unregistered names": case(
        1 + 5 * 13, **tasks_page(flow_execution_id=UUID(int=400), limit=10)
    ),
    "changes": case(1 + 1 + 10, after=20, limit=10, max_characters=1_000_000, **ONE),
    "feed": case(1 + 1 + 10, after=20, limit=10, max_characters=1_000_000),
    "heads": case(1 + 5, **EXECUTIONS),
    "recovery": case(1),
    "record": case(1, batch_id=UUID(int=1000)),
}
EXCEPTIONS: Final = {
    "PURGE_CHANGES": "the first 1,000 events are looked at, however many of them are old",
    "work_of_execution": "10,000 tags of the execution are looked at, at most",
}
PREPARED: Final = {head.split()[0]: (head, sql) for head, sql in queries.PREPARED.items()}
SCANS: Final = ("Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan")
REMOVED: Final = ("Rows Removed by Filter", "Rows Removed by Index Recheck")


@pytest.fixture(scope="module")
def filled(servers: Servers) -> Iterator[Servers]:
    with own_database(servers, "filled") as own:
        migrate(own.owner_url, {})
        with own.owner() as connection:
            connection.execute(FILL.encode())
        yield own


def explain(
    url: str, name: str, parameters: dict[str, Any], *, generic: bool = False
) -> dict[str, Any]:
    """Run a statement as it is run in production, prepared, and return its plan; undo it.

    EXPLAIN takes no parameters for a prepared statement, so they go to the server as in production
    and come back as types and literals.
    """
    with psycopg.connect(url) as connection:
        register(connection)
        if generic:
            connection.execute("set plan_cache_mode = force_generic_plan")
        scope = scope_statement("%(organization_id)s", "public").encode()
        connection.execute(scope, {"organization_id": ORGANIZATION})
        described = [
            connection.execute(
                "select quote_nullable(%(v)s::text), pg_typeof(%(v)s)::text", {"v": v}
            )
            for v in parameters.values()
        ]
        literals, types = zip(*[found.fetchall()[0] for found in described], strict=True)
        if name in PREPARED:
            head, sql = PREPARED[name]
        else:
            head, sql = f"{name} ({', '.join(types)})", getattr(statements, name)
            numbers = {parameter: f"${n}" for n, parameter in enumerate(parameters, 1)}
            sql = re.sub(r"%\((\w+)\)s", lambda mark: numbers[mark[1]], sql)
        connection.execute(f"prepare {head} as {sql}".encode())
        found = connection.execute(
            f"explain (analyze, format json) execute {name} ({', '.join(literals)})".encode()
        ).fetchall()
        connection.rollback()
    plan: dict[str, Any] = found[0][0][0]["Plan"]
    return plan


def scanned(plan: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each scan of a table with the number of rows that it read.

    Entries of an index that the scan passed over are not told by PostgreSQL.
    """
    if plan["Node Type"] in SCANS:
        rows = plan["Actual Rows"] + sum(plan.get(removed, 0) for removed in REMOVED)
        yield f"{plan['Node Type']} on {plan['Relation Name']}", rows * plan["Actual Loops"]
    for part in plan.get("Plans", ()):
        yield from scanned(part)


def answered(plan: dict[str, Any]) -> float:
    """Return how many rows a statement returns or writes."""
    if plan["Node Type"] == "ModifyTable":
        (plan,) = (part for part in plan["Plans"] if part["Parent Relationship"] == "Outer")
    return float(plan["Actual Rows"])


@pytest.mark.parametrize("name", [*OF_WORKER, *OF_ENDPOINT])
def test_a_statement_reads_what_it_answers_or_writes(filled: Servers, name: str) -> None:
    """At most three rows for each, and ten more, among thousands of its organization's rows and of
    others'. A statement that may read more must do so, or it is no exception any longer.
    """
    found = OF_WORKER.get(name) or OF_ENDPOINT[name]
    url = filled.worker_url if name in OF_WORKER else filled.endpoint_url
    plan = explain(url, name.split()[0], found.parameters)
    scans = list(scanned(plan))
    read, most = sum(rows for _, rows in scans), 3 * found.rows + 10
    assert max(read, answered(plan)) >= found.rows, "the case does not find what it says"
    if name in EXCEPTIONS:
        assert read > most, f"remove the exception: {scans}"
    else:
        assert read <= most, scans


SMALL: Final = """
    create function pg_temp.id(n int) returns uuid return lpad(to_hex(n), 32, '0')::uuid;
    insert into organizations
    select pg_temp.id(n), now(), 1, now() from generate_series(10000, 12999) as n;
    insert into flow_executions
    select pg_temp.id(n), pg_temp.id(n), null, 1, now(), null, now()
      from generate_series(10000, 12999) as n;
    insert into task_tags
    select pg_temp.id(n), pg_temp.id(n), pg_temp.id(n), 'task', 'type', 'tag', null, '', 'active',
           now(), 'ada'
      from generate_series(10000, 12999) as n;
    insert into tag_batches
    select pg_temp.id(n), pg_temp.id(n), '', '{}', '{}', 2, now()
      from generate_series(10000, 12999) as n;
    insert into tag_changes
    select pg_temp.id(n), pg_temp.id(n), 1, pg_temp.id(n), '{}', now(), 1
      from generate_series(10000, 12999) as n;
    insert into task_executions
    select pg_temp.id(n), pg_temp.id(n), 'task', 'queued', now(), 'ada'
      from generate_series(10000, 12999) as n;
    analyze;
    drop function pg_temp.id(int);
"""


@pytest.fixture(scope="module")
def beside_small(servers: Servers) -> Iterator[Servers]:
    """The same rows, with statistics from a time when each organization had one of each kind."""
    with own_database(servers, "small") as own:
        migrate(own.owner_url, {})
        with own.owner() as connection:
            for table in metadata.tables:
                connection.execute(f"alter table {table} set (autovacuum_enabled = off)".encode())
            connection.execute(SMALL.encode())
            connection.execute(FILL.replace("analyze;", "").encode())
        yield own


@pytest.mark.parametrize("name", [*OF_WORKER, *OF_ENDPOINT])
def test_an_organization_that_grows_beside_small_ones_is_read_by_the_same_indexes(
    beside_small: Servers, name: str
) -> None:
    """With a plan for organizations of one row, any index with the organization seems as good."""
    found = OF_WORKER.get(name) or OF_ENDPOINT[name]
    url = beside_small.worker_url if name in OF_WORKER else beside_small.endpoint_url
    scans = list(scanned(explain(url, name.split()[0], found.parameters, generic=True)))
    if name not in {*EXCEPTIONS, "LIST_ORGANIZATIONS"}:
        assert sum(rows for _, rows in scans) <= 3 * found.rows + 10, scans


UNKNOWN: Final = """
    alter table task_tags set (autovacuum_enabled = false);
    insert into organizations values (lpad('2', 32, '0')::uuid, now(), 1, now());
    insert into flow_executions
    values (lpad('2', 32, '0')::uuid, lpad('7', 32, '0')::uuid, null, 1, now(), null, now());
    insert into task_tags
    select lpad('2', 32, '0')::uuid, gen_random_uuid(), lpad('7', 32, '0')::uuid, 'task-' || n,
           type, case type when 'type' then 'pending' else n::text end, null, '', 'active',
           now() + interval '1 ms' * n, 'ada'
      from generate_series(1, 3000) as n, unnest(array['type', 'number']) as type;
"""


def test_without_statistics_pages_are_read_by_the_same_indexes(servers: Servers) -> None:
    """As soon after the first tags, when all are of one execution and none are counted yet."""
    with own_database(servers, "unknown") as own:
        migrate(own.owner_url, {})
        with own.owner() as connection:
            connection.execute(UNKNOWN.encode())
        one: dict[str, Any] = {"flow_execution_id": UUID(int=7)}
        selectors = {"with_": ["type:pending", "number"], "without": ["none", "type:none"]}
        for name, wanted in (
            ("work", tasks_page(**selectors, limit=10)),
            ("work_of_execution", tasks_page(**one, **selectors, limit=10)),
            ("work_of_task", tasks_page(**one, **selectors, task_name="task-9", limit=10)),
            ("tasks", tasks_page(**one, without=["none"], limit=10)),
            ("page", {**one, **ANY, "limit": 10}),
            ("page_of_task", {**one, **ANY, "task_name": "task-9", "limit": 10}),
        ):
            parameters = {"organization_id": ORGANIZATION, **wanted}
            scans = list(scanned(explain(own.endpoint_url, name, parameters)))
            assert sum(rows for _, rows in scans) < 200, (name, scans)


def test_every_statement_has_a_case() -> None:
    """None is added without one, and no case or exception is of a statement that is gone."""
    assert set(OF_WORKER) == {name for name in vars(statements) if name.isupper()}
    assert {name.split()[0] for name in OF_ENDPOINT} == set(PREPARED)
    assert set(EXCEPTIONS) <= {*OF_WORKER, *OF_ENDPOINT}
