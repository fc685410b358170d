"""Bounds of what a batch may change, and of what a transaction loads and publishes (rule 17)."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic_core import to_json

from producers.client import TagProducer
from producers.contract.errors import ErrorInfo
from producers.contract.messages import (
    Condition,
    Message,
    TagBatch,
    TagOperation,
    add,
    register_execution,
    remove,
    set_tag,
    set_task_state,
    unless,
    when,
)
from producers.contract.results import Change, ResultRecord
from tests.support.memory import max_resident
from tests.support.processes import await_line, settings_of, started
from tests.support.servers import Servers
from tests.support.tenant import EXECUTION, Tenant, listening
from worker import bounds, checks, rules
from worker.db import repository, rows
from worker.local.stack import WORKER
from worker.snapshot import AuthorizedMessage

BIG = "x" * 7_000


def adding(tag: str, *metadata: Any) -> TagBatch:
    return TagBatch(tags=[add(EXECUTION, "task", "type", tag, each) for each in metadata])


def removing(*tags: str) -> TagBatch:
    return TagBatch(tags=[remove(EXECUTION, "task", "type", each) for each in tags])


def fill(tenant: Tenant, tag: str, count: int = 250, text: str = "") -> None:
    """Add tags that differ in their metadata alone."""
    for first in range(0, count, 50):
        tenant.send(adding(tag, *[[n, text] for n in range(first, min(count, first + 50))]))
    tenant.drain()


def last_error(tenant: Tenant) -> Any:
    error = tenant.records()[-1].error
    assert error is not None
    return error


def test_250_active_tags_may_differ_in_their_metadata_alone(tenant: Tenant) -> None:
    """One more is too large: the batch changes nothing, is stored, and a removal makes room."""
    fill(tenant, "a", 249)
    batch = TagBatch(
        tags=[
            add(EXECUTION, "task", "type", "b"),
            add(EXECUTION, "task", "type", "a", "the 250th"),
            add(EXECUTION, "task", "type", "a", "one more"),
        ]
    )
    tenant.send(batch)
    tenant.drain()
    error = last_error(tenant)
    assert (error.code, error.details[0].index) == ("too_large", 2)
    assert Counter(tenant.tags()) == {"a": 249}
    tenant.send(adding("a", "the 250th"), TagBatch(tags=[*removing("a").tags, *batch.tags]), batch)
    tenant.drain()
    assert tenant.outcomes()[-3] == ["added"]
    assert tenant.outcomes()[-2] == ["removed", "added", "added", "added"]
    assert last_error(tenant) == error
    assert Counter(tenant.tags()) == {"a": 2, "b": 1}


def test_change_events_of_a_batch_are_bounded(tenant: Tenant) -> None:
    """The details name the operation that passes 4 MiB; what is before it can be removed alone."""
    for tag in "abc":
        fill(tenant, tag, text=BIG)
    tenant.send(adding("z", None), removing("z", "y", "a", "b", "c"))
    tenant.drain()
    error = last_error(tenant)
    assert (error.code, error.details[0].index) == ("too_large", 4)
    assert Counter(tenant.tags()) == {"a": 250, "b": 250, "c": 250, "z": 1}
    revision = tenant.events()[-1].revision
    tenant.send(removing("z", "a"), removing("b"))
    tenant.drain()
    assert tenant.outcomes()[-2:] == [["removed", "removed"], ["removed"]]
    assert tenant.events()[-1].revision == revision + 2
    assert all(len(payload) <= bounds.MAX_EVENT_BYTES for _, payload in tenant.published)


@pytest.mark.parametrize("size", [4_180, 4_186, 4_187, 4_190, 4_194, 4_196])
def test_the_event_of_a_clear_has_4_mib_at_most(tenant: Tenant, size: int) -> None:
    """1,000 tags whose removals have so many bytes each; else nothing changes, nor the state."""
    names = "abcd"
    tenant.send(adding("probe", [100, ""]), removing("probe"))
    tenant.drain()
    (probe,) = tenant.events()[-1].changes
    text = "x" * (size - len(to_json(probe)) + len("probe") - 1 - len(","))
    for first in range(100, 350, 50):
        tenant.send(
            *[adding(name, *[[n, text] for n in range(first, first + 50)]) for name in names]
        )
    tenant.drain()
    published = len(tenant.events())
    state = set_task_state(EXECUTION, "task", "running", clear=["type"])
    tenant.send(state)
    tenant.drain()
    (outcome,) = tenant.outcomes()[-1:]
    with tenant.servers.owner() as connection:
        row = connection.execute(
            "select max(octet_length(event::text)) from tag_changes where organization_id = %s",
            [tenant.organization],
        ).fetchone()
    assert row is not None
    (largest,) = row
    assert largest <= 4 * 1024 * 1024
    if outcome == ["recorded"]:
        assert size < 4_194
        assert tenant.tags() == []
        assert largest == max(len(payload) for _, payload in tenant.published) > 1_000 * size
        return
    assert outcome == "too_large"
    assert size > 4_180
    assert last_error(tenant).details[0].field == "clear"
    assert len(tenant.tags()) == 1_000
    assert len(tenant.events()) == published
    tenant.send(set_task_state(EXECUTION, "task", "running"))
    tenant.drain()
    assert tenant.outcomes()[-1] == ["recorded"]


def test_more_than_a_transaction_loads_is_too_large(tenant: Tenant) -> None:
    """A batch alone that names more than 8 MiB of metadata ends, and others go on."""
    tags = "abcdef"
    for tag in tags:
        fill(tenant, tag, text=BIG)
    tenant.send(adding("z", None), removing(*tags), adding("y", None), removing("z"))
    tenant.drain()
    assert tenant.outcomes()[-4:] == [["added"], "too_large", ["added"], ["removed"]]
    assert last_error_index(tenant, -3) == 2
    for tag in tags:
        tenant.send(removing(tag))
    tenant.drain()
    assert tenant.tags() == ["y"]


def last_error_index(tenant: Tenant, place: int) -> int | None:
    error = tenant.records()[place].error
    assert error is not None
    return error.details[0].index


def test_what_is_loaded_is_read_only_as_far_as_the_bound(tenant: Tenant) -> None:
    """100 names with 250 tags of 8 kB each would be 200 MB."""
    for number in range(8):
        fill(tenant, f"{number}", text=BIG)
    batch = removing(*[f"{number}" for number in range(8)])
    message = AuthorizedMessage.of(batch, "ada")
    with tenant.repository.transaction(tenant.organization) as transaction:
        snapshot = transaction.load([message, message])
    loaded = [tag for variants in snapshot.tags.values() for tag in variants.values()]
    assert snapshot.complete == 0
    assert len(loaded) == 2_000
    with_metadata = sum(tag.tag_metadata is not None for tag in loaded)
    assert with_metadata * 7_000 < rows.MAX_LOADED_BYTES + 16_000


def test_events_of_copies_are_published_once_in_a_group(tenant: Tenant) -> None:
    """100 copies of a small batch with a large event: 100 results, and one event."""
    fill(tenant, "a", text=BIG)
    before = len(tenant.events())
    tenant.send(*[removing("a")] * 100)
    tenant.drain()
    assert len(tenant.records()) == 5 + 100
    assert len(tenant.events()) == before + 1


def test_a_group_ends_where_its_events_reach_16_mib(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of new batches, and of stored ones that are answered again."""
    groups: list[int] = []
    original = type(tenant.inbox).ack_and_publish

    def ack_and_publish(
        self: Any, run: str, entries: Any, publications: Any, *rest: Any, **bounds: Any
    ) -> Any:
        groups.append(sum(len(payload) for _, payload in publications))
        return original(self, run, entries, publications, *rest, **bounds)

    tags = [f"{number}" for number in range(12)]
    for tag in tags:
        fill(tenant, tag, text=BIG)
    batches = [removing(tag) for tag in tags]
    with monkeypatch.context() as patched:
        patched.setattr(type(tenant.inbox), "ack_and_publish", ack_and_publish)
        for _ in range(2):
            tenant.send(*batches)
            tenant.drain()
    assert tenant.outcomes()[-24:] == [["removed"]] * 24
    assert sum(groups) > 40 * 1024 * 1024
    assert max(groups) < bounds.MAX_GROUP_BYTES + bounds.MAX_EVENT_BYTES


def test_a_worker_needs_less_than_400_mb(servers: Servers, producer: TagProducer) -> None:
    """Also for metadata that take thirty times their size when they are read."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    (worker,) = [p for child, p in servers.stack.supervisor.running if child.name == "worker-1"]
    empty: list[Any] = []
    names = [f"{number}" for number in range(6)]
    futures = [
        producer.submit(
            TagBatch(
                tags=[
                    add(execution, "task", "type", name, [number, *[empty] * 2_600])
                    for number in range(first, first + 50)
                ]
            )
        )
        for name in names
        for first in range(0, 250, 50)
    ]
    by_name = [remove(execution, "task", "type", name) for name in names]
    futures += [producer.submit(TagBatch(tags=by_name)) for _ in range(4)]
    futures += [producer.submit(TagBatch(tags=[each])) for each in by_name]
    errors = [record.error for future in futures if (record := future.result(60)).error]
    assert [error.code for error in errors] == ["too_large"] * 4
    assert max_resident(worker.pid) < 400


# --- What a batch is answered does not depend on what it was grouped with ------------------------


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that batches of a few operations meet often."""
    monkeypatch.setattr(rules, "MAX_VARIANTS", 6)
    for module in (checks, repository, rows):
        monkeypatch.setattr(module, "MAX_OF_TYPE", 8)
    monkeypatch.setattr(checks, "MAX_OF_TYPES", 24)
    for module in (rules, bounds):
        monkeypatch.setattr(module, "MAX_EVENT_BYTES", 3_000)
    for module in (rules, repository, rows):
        monkeypatch.setattr(module, "MAX_GROUP_BYTES", 9_000)
    monkeypatch.setattr(rules, "EVENT_FRAME_BYTES", 100)
    monkeypatch.setattr(rows, "MAX_LOADED_BYTES", 7_600)  # as much more than events as by default
    monkeypatch.setattr(rows, "MAX_LOADED_TAGS", 4 * 6 + 1)


def random_messages(chance: random.Random) -> list[Message]:
    """Batches over a few names and metadata; some come again, some again with other operations."""
    messages: list[Message] = []
    for _ in range(60):
        again = chance.choice(messages) if messages and chance.random() < 0.2 else None
        if again is not None and chance.random() < 0.8:
            messages.append(again)
            continue
        if chance.random() < 0.05:
            clear = chance.sample(["type", "other"], chance.randint(1, 2))
            messages.append(set_task_state(EXECUTION, "task", "running", clear=clear))
            continue
        tags = [random_operation(chance) for _ in range(chance.randint(1, 4))]
        batch = TagBatch(tags=tags, conditions=random_conditions(chance))
        if again is not None:
            batch = batch.model_copy(update={"batch_id": again.batch_id})
        messages.append(batch)
    return messages


def random_operation(chance: random.Random) -> TagOperation:
    name = (EXECUTION, "task", chance.choice(["type", "other"]), chance.choice("ab"))
    if chance.random() < 0.1:
        return remove(*name)
    metadata = ["x" * chance.choice([1, 100, 400]), chance.randint(0, 9)]
    if chance.random() < 0.05:
        return set_tag(*name, metadata)
    return (add if chance.random() < 0.8 else remove)(*name, metadata)


def random_conditions(chance: random.Random) -> list[Condition]:
    if chance.random() < 0.8:
        return []
    return [
        chance.choice([when, when, when, unless])(
            EXECUTION, "task", chance.choice(["type", "other"]), chance.choice([None, "a", "b"])
        )
        for _ in range(chance.randint(1, 4))
    ]


def answers(tenant: Tenant, messages: list[Message], sizes: Iterator[int]) -> tuple[Any, Any]:
    """Return results and change events, without times and ids, for groups of these sizes."""
    with listening(tenant):
        tenant.published.clear()
        tenant.send(*messages)
        while tenant.drain(group_size=next(sizes), budget_seconds=0.0):
            pass
        results = [explained(record.error) or record.statuses for record in tenant.records()]
        seen: dict[int, Any] = {}
        for event in tenant.events():
            changes = [
                (each.change, each.tag.tag, json.dumps(each.tag.tag_metadata), each.tag.status)
                if isinstance(each, Change)
                else each.change
                for each in event.changes
            ]
            assert seen.setdefault(event.revision, changes) == changes
    return results, seen


def explained(error: ErrorInfo | None) -> tuple[str, Any] | None:
    """Return all that an error says, without times."""
    if error is None:
        return None
    return error.code, [
        (each.index, each.field, each.message, [tag.tag for tag in each.found or ()])
        for each in error.details
    ]


def other_tenant(tenant: Tenant) -> Tenant:
    organization = uuid4()
    token = tenant.servers.token(organization)
    other = Tenant(
        tenant.servers, tenant.redis, tenant.repository, tenant.authorizer, organization, token
    )
    other.send(register_execution(EXECUTION))
    other.drain()
    return other


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize("seed", range(12))
def test_answers_do_not_depend_on_groups(tenant: Tenant, seed: int) -> None:
    """One by one, or in random groups: the same results, errors with details, and events."""
    chance = random.Random(seed)
    messages = random_messages(chance)
    ones = answers(other_tenant(tenant), messages, iter(lambda: 1, 0))
    groups = answers(other_tenant(tenant), messages, iter(lambda: chance.randint(2, 40), 0))
    assert ones[0] == groups[0]
    assert ones[1] == groups[1]
    if not seed:
        codes = {each[0] for each in ones[0] if not isinstance(each, list)}
        assert codes >= {"too_large", "precondition_failed"}


def test_a_record_of_the_error_is_read_by_the_sdk() -> None:
    """Its code is part of the contract."""
    error = {"code": "too_large", "message": "m", "details": []}
    record = {"batch_id": str(uuid4()), "organization_id": str(UUID(int=1)), "error": error}
    read = ResultRecord.decode(json.dumps(record).encode())
    assert read.error is not None
    assert read.error.code == "too_large"


def test_executions_with_many_task_names_are_like_any_other(tenant: Tenant) -> None:
    """Their names are not loaded whole, but where more are added; then in their order."""
    executions = [uuid4() for _ in range(6)]
    names = [f"{number:0200}" for number in range(1_000)]
    tenant.send(*(register_execution(each, names) for each in executions))
    tenant.drain()
    first, *others = executions
    known, unknown = names[500], "0" * 199 + "x"
    tenant.send(
        TagBatch(tags=[add(each, known, "type", "tag") for each in executions]),
        TagBatch(
            tags=[add(first, names[1], "type", "other")],
            conditions=[unless(first, names[2], "type")],
        ),
        TagBatch(tags=[add(first, unknown, "type", "tag")]),
        set_task_state(first, names[3], "running"),
        set_task_state(first, unknown, "running"),
        *(register_execution(each, [names[7], "new"]) for each in executions),
        TagBatch(tags=[add(each, "new", "type", "tag") for each in others]),
    )
    tenant.drain()
    assert tenant.outcomes()[6:] == [
        *(["added"] * 6, ["added"], "not_found", ["recorded"], "not_found"),
        *(["already_exists"] * 6),
        ["added"] * 5,
    ]
    with tenant.servers.owner() as connection:
        stored = connection.execute(
            "select task_names from flow_executions where flow_execution_id = any(%s)",
            [executions],
        ).fetchall()
    assert stored == [([*names, "new"],)] * 6


def test_a_batch_over_executions_with_many_task_names_needs_little_memory(
    servers: Servers, tmp_path: Path
) -> None:
    """200 MB of them are not loaded, and another organization does not wait for it."""
    organization, other = uuid4(), uuid4()
    executions, growing = [uuid4() for _ in range(100)], [uuid4() for _ in range(4)]
    url = servers.stack.redis_url.replace("?db=0", "?db=8")
    fill_names = """
        insert into flow_executions (organization_id, flow_execution_id, task_names, revision,
                                     created_at, changed_at)
        select %s, id, (select jsonb_agg(rpad(n::text, 200, %s))
                          from generate_series(1, 9900) as n), 0, now(), now()
          from unnest(%s::uuid[]) as id
    """
    batch = TagBatch(tags=[add(each, "1".ljust(200, "x"), "type", "tag") for each in executions])
    with ExitStack() as stack:
        log = tmp_path / "log"
        worker = stack.enter_context(
            started(WORKER, log, settings_of(servers, TASK_TAGS_REDIS_URL=url))
        )
        await_line(log, '"ready"')
        first, second = (
            stack.enter_context(
                TagProducer(redis_url=url, organization_id=each, token=servers.token(each))
            )
            for each in (organization, other)
        )
        first.apply(register_execution(uuid4()))
        with servers.owner() as connection:
            connection.execute(fill_names, [organization, "x", executions])
            connection.execute(fill_names, [organization, "\N{GRINNING FACE}", growing])
        result = first.submit(batch)
        second.apply(register_execution(uuid4()))
        assert set(result.result(60).statuses) == {"added"}
        assert max_resident(worker.pid) < 250
        more = [register_execution(each, [str(n)]) for n in range(10) for each in growing]
        first.enqueue_many(more)
        first.apply(register_execution(uuid4()), timeout=60)
        assert max_resident(worker.pid) < 400
