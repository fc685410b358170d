"""A work list and the feed behind its cursor are one: by what HTTP gives, compared with SQL."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from producers.client import TagProducer
from producers.contract.messages import (
    TagBatch,
    TagOperation,
    add,
    register_execution,
    remove,
    set_tag,
    set_task_state,
)
from tests.support.servers import Servers

TYPES, TAGS, TASKS = ("review_status", "a:b"), ("pending", "approved"), ("one", "two", "three")


@pytest.fixture
def http(servers: Servers, token: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=servers.stack.endpoint_url, headers=headers) as client:
        yield client


def random_operation(chance: random.Random, executions: list[UUID]) -> TagOperation:
    named = chance.choice(executions), chance.choice(TASKS), chance.choice(TYPES)
    tag = chance.choice(TAGS)
    if chance.random() < 0.1:
        return set_tag(*named, tag)
    if chance.random() < 0.4:
        return remove(*named, tag)
    return add(*named, tag, chance.choice([None, 1, {"by": "ada"}]))


def write(producer: TagProducer, executions: list[UUID], count: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        if chance.random() < 0.05:
            task = chance.choice(executions), chance.choice(TASKS)
            producer.apply(set_task_state(*task, "running", clear=[chance.choice(TYPES)]))
        else:
            some = [random_operation(chance, executions) for _ in range(chance.randint(1, 4))]
            producer.apply(TagBatch(tags=some))


def listed(http: httpx.Client, tag_type: str, tag: str) -> tuple[set[str], str]:
    """Return the ids of the tags that a work list has, page by page, and its first cursor."""
    selector = f"{tag_type.replace(':', chr(92) + ':')}:{tag}"
    query: dict[str, Any] = {"with": selector, "limit": 7}
    found, cursor, seen = set(), None, set()
    while True:
        answer = http.get("/task-executions", params=query).raise_for_status().json()
        cursor = cursor or answer["cursor"]
        for task in answer["task_executions"]:
            name = task["flow_execution_id"], task["task_name"]
            assert name not in seen or cursor != answer["cursor"]
            seen.add(name)
            found |= {each["id"] for each in task["tags"] if is_one(each, tag_type, tag)}
        if answer["next_page"] is None:
            return found, str(cursor)
        query["page"] = answer["next_page"]


def is_one(tag: dict[str, Any], tag_type: str, tag_name: str) -> bool:
    return bool(tag["tag_type"] == tag_type and tag["tag"] == tag_name)


def advanced(
    http: httpx.Client, active: set[str], cursor: str, tag_type: str, tag: str
) -> set[str]:
    """Apply the events behind a cursor to the ids of active tags, by HTTP alone."""
    query: dict[str, Any] = {"after": cursor, "tag_type": tag_type, "tag": tag, "limit": 1000}
    while True:
        response = http.get("/changes", params=query).raise_for_status()
        for change in (each for event in response.json()["changes"] for each in event["changes"]):
            (active.add if change["change"] == "added" else active.discard)(change["tag"]["id"])
        if "next" not in response.links:
            return active
        query["after"] = response.json()["cursor"]


def test_a_work_list_and_the_events_behind_its_cursor_are_the_table(
    servers: Servers, http: httpx.Client, producer: TagProducer, organization: UUID
) -> None:
    """Clients begin at any moment, and read page by page while two writers go on."""
    executions = [uuid4() for _ in range(12)]
    for each in executions:
        producer.apply(register_execution(each))
    writers = [
        threading.Thread(target=write, args=(producer, executions, 300, seed)) for seed in (1, 2)
    ]
    for writer in writers:
        writer.start()
    begun = []
    while any(writer.is_alive() for writer in writers):
        for tag_type in TYPES:
            for tag in TAGS:
                begun.append((tag_type, tag, *listed(http, tag_type, tag)))
    for writer in writers:
        writer.join()
    assert len(begun) >= 20
    with servers.owner() as owner:
        rows = owner.execute(
            "select tag_type, tag, id::text from task_tags "
            "where organization_id = %s and status = 'active'",
            [organization],
        ).fetchall()
    for tag_type, tag, found, cursor in begun:
        expected = {id for of, name, id in rows if (of, name) == (tag_type, tag)}
        assert advanced(http, found, cursor, tag_type, tag) == expected
