"""What must be true at the end, after all faults: the comparison with a sequential model."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from uuid import UUID

import psycopg

from producers.contract.messages import Message, TagBatch
from tests.support.reference_model import ReferenceModel, json_equal
from tests.support.waiting import eventually

MOST_STORIES: Final = 20


@dataclass
class Verdict:
    """How many of each kind of broken promise were found, and what is known of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    stories: list[str] = field(default_factory=list)
    batch_ids: dict[UUID, None] = field(default_factory=dict)
    """The batches that the stories are about."""

    def add(self, kind: str, story: str, batch_id: UUID | None = None) -> None:
        self.counts[kind] += 1
        if len(self.stories) < MOST_STORIES:
            self.stories.append(f"{kind}: {batch_id or ''} {story}")
            if batch_id is not None:
                self.batch_ids[batch_id] = None


class Model(ReferenceModel):
    """The reference model, in which a batch that the database refuses has no effect."""

    def tag(self, asked: dict[str, Any]) -> Any:
        poisoned = any(
            operation["operation"] == "add" and operation["tag"] == "poison"
            for operation in asked["tags"]
        )
        known = all(UUID(each["flow_execution_id"]) in self.names for each in asked["tags"])
        if not all(map(self.holds, asked.get("conditions", []))):
            return super().tag(asked)
        return "internal_error" if poisoned and known else super().tag(asked)


@dataclass
class Sent:
    """What one producer sent, in its order, and which of it is known to be accepted."""

    by: str
    messages: list[Message]
    accepted: set[UUID]


def check(
    connection: psycopg.Connection,
    organization: UUID,
    sent: list[Sent],
    published: dict[UUID, set[bytes]],
    flushed: set[UUID],
    verdict: Verdict,
) -> int:
    """Compare one organization's tables with the model; return how many batches took effect.

    `flushed`: batches in an inbox that was flushed; they may be missing, or out of order.
    """
    messages = {message.batch_id: message for each in sent for message in each.messages}
    stored = connection.execute(
        "select batch_id, result_record::text from tag_batches "
        "where organization_id = %s order by seq",
        [organization],
    ).fetchall()
    effects = [batch_id for batch_id, _ in stored]
    check_presence(sent, effects, flushed, verdict)
    _check_order(sent, effects, flushed, verdict)
    model = _replay(messages, stored, verdict)
    _check_tags(connection, organization, model, verdict)
    _check_changes(connection, organization, model, verdict)
    for batch_id, record in stored:
        if batch_id in messages:
            if batch_id not in published:
                verdict.add("missing_results", "was never published", batch_id)
            elif published[batch_id] != {record.encode()}:
                verdict.add(
                    "doubled", f"was published as {published[batch_id]!r}, not {record}", batch_id
                )
    return len(effects)


def check_presence(
    sent: list[Sent], effects: list[UUID], flushed: set[UUID], verdict: Verdict
) -> None:
    """Nothing that was accepted is missing, and nothing is there twice."""
    present = set(effects)
    for batch_id, count in Counter(effects).items():
        if count > 1:
            verdict.add("doubled", f"is stored {count} times", batch_id)
    for each in sent:
        for batch_id in each.accepted - present - flushed:
            verdict.add("lost", "was accepted and never took effect", batch_id)


def _check_order(
    sent: list[Sent], effects: list[UUID], flushed: set[UUID], verdict: Verdict
) -> None:
    """A batch is out of its turn if one that was sent after it took effect before it."""
    place = {batch_id: number for number, batch_id in enumerate(effects)}
    for each in sent:
        earliest = len(effects)
        for message in reversed(each.messages):
            number = place.get(message.batch_id)
            if number is None or message.batch_id in flushed:
                continue
            if number > earliest:
                verdict.add("reordered", "came after what was sent behind it", message.batch_id)
            earliest = min(earliest, number)


def _replay(
    messages: dict[UUID, Message], stored: list[tuple[UUID, str]], verdict: Verdict
) -> Model:
    """Send the batches to the model in the order in which they took effect."""
    model = Model()
    for batch_id, text in stored:
        message = messages.get(batch_id)
        if message is None:
            verdict.add("doubled", "was never sent", batch_id)
            continue
        expected, outcome = model.send(message), outcome_of(json.loads(text))
        if outcome != expected:
            kind = "wrongly_refused" if isinstance(outcome, str) else "doubled"
            verdict.add(kind, f"{outcome} instead of {expected}", batch_id)
    return model


def outcome_of(record: dict[str, Any]) -> Any:
    """Return the statuses of a result record, or the code of its error."""
    if "error" in record and record["error"] is not None:
        return record["error"]["code"]
    single = record.get("flow_execution") or record.get("task_execution")
    return [each["status"] for each in ([single] if single else record["tags"])]


def _check_tags(
    connection: psycopg.Connection, organization: UUID, model: Model, verdict: Verdict
) -> None:
    rows = connection.execute(
        "select flow_execution_id::text, task_name, tag_type, tag, tag_metadata from task_tags "
        "where organization_id = %s and status = 'active'",
        [organization],
    ).fetchall()
    parts = ("flow_execution_id", "task_name", "tag_type", "tag")
    if len(rows) != len(model.rows):
        verdict.add("lost", f"{len(rows)} active tags instead of {len(model.rows)}")
    for row in rows:
        named = dict(zip(parts, row[:4], strict=True))
        if not any(json_equal(each["tag_metadata"], row[4]) for each in model.matching(named)):
            verdict.add("doubled", f"the active tag {row} is not the model's")


def _check_changes(
    connection: psycopg.Connection, organization: UUID, model: Model, verdict: Verdict
) -> None:
    events = connection.execute(
        "select flow_execution_id, revision, event, position from tag_changes "
        "where organization_id = %s order by position",
        [organization],
    ).fetchall()
    revisions: dict[UUID, list[int]] = defaultdict(list)
    replayed: set[str] = set()
    states: dict[tuple[UUID, str], str] = {}
    for execution, revision, event, _ in events:
        revisions[execution].append(revision)
        for change in event["changes"]:
            if change["change"] == "state":
                states[execution, change["task"]["task_name"]] = change["task"]["state"]
            elif change["change"] == "added":
                replayed.add(change["tag"]["id"])
            elif change["tag"]["id"] not in replayed:
                verdict.add("gaps", f"{execution} #{revision} removes what was not there")
            else:
                replayed.remove(change["tag"]["id"])
    if [(row[3], row[0]) for row in events] != list(enumerate(model.positions, 1)):
        verdict.add("gaps", f"{len(events)} positions are not the model's {len(model.positions)}")
    for execution, found in revisions.items():
        if found != list(range(1, model.revisions.get(execution, 0) + 1)):
            verdict.add("gaps", f"{execution} has {len(found)} revisions up to {found[-1]}")
    active = connection.execute(
        "select id::text from task_tags where organization_id = %s and status = 'active'",
        [organization],
    ).fetchall()
    if replayed != {row[0] for row in active}:
        verdict.add("gaps", "the change events don't add up to the active tags")
    recorded = connection.execute(
        "select flow_execution_id, task_name, state from task_executions "
        "where organization_id = %s",
        [organization],
    ).fetchall()
    if (
        not states
        == model.states
        == {(execution, name): state for execution, name, state in recorded}
    ):
        verdict.add("gaps", "the change events don't add up to the states of the tasks")


def check_watched(
    connection: psycopg.Connection,
    organization: UUID,
    watched: dict[UUID, list[int]],
    verdict: Verdict,
) -> None:
    """A watcher of the endpoint received every revision once and in order."""
    for execution, received in watched.items():
        row = connection.execute(
            "select revision from flow_executions "
            "where organization_id = %s and flow_execution_id = %s",
            [organization, execution],
        ).fetchone()
        assert row is not None
        expected = list(range(1, row[0] + 1))
        with suppress(AssertionError):
            eventually(partial(_reached, received, row[0]), _patience(verdict))
        if received != expected:
            verdict.add("gaps", f"a watcher of {execution} has {len(received)} of {row[0]} events")


def check_feed(
    connection: psycopg.Connection,
    organization: UUID,
    followed: dict[str, list[Any]],
    verdict: Verdict,
) -> None:
    """A reader of all events has each position once; those of a filter rebuild its tags."""
    row = connection.execute(
        "select position from organizations where organization_id = %s", [organization]
    ).fetchone()
    assert row is not None
    (last,) = row
    for tag, events in followed.items():
        found = connection.execute(
            "select id::text from task_tags where organization_id = %s and status = 'active' "
            "and (tag = %s or %s = '')",
            [organization, tag, tag],
        ).fetchall()
        _check_reader(tag, events, last, {id for (id,) in found}, verdict)


def _check_reader(
    tag: str, events: list[Any], last: int, active: set[str], verdict: Verdict
) -> None:
    def positions() -> list[int]:
        return [event["position"] for event in events]

    def is_done() -> bool:
        return _rebuilt(events) == active and (bool(tag) or _reached(positions(), last))

    with suppress(AssertionError):
        eventually(is_done, _patience(verdict))
    if not tag and positions() != list(range(1, last + 1)):
        verdict.add("gaps", f"a reader of the feed has {len(events)} of {last} events")
    if positions() != sorted(set(positions())):
        verdict.add("gaps", f"a reader of {tag or 'all'} has events twice or out of order")
    if _rebuilt(events) != active:
        verdict.add("gaps", f"the feed of {tag or 'all'} does not rebuild the active tags")


def _rebuilt(events: list[Any]) -> set[str]:
    """Return the ids of the tags that are active after these events."""
    active: set[str] = set()
    for change in (change for event in events for change in event["changes"]):
        if change["change"] == "added":
            active.add(change["tag"]["id"])
        elif change["change"] == "removed":
            active.discard(change["tag"]["id"])
    return active


def _patience(verdict: Verdict) -> float:
    """Return how many seconds to wait for a reader: what is broken already won't come."""
    return 1.0 if verdict.counts["gaps"] else 30.0


def _reached(revisions: list[int], last: int) -> bool:
    return bool(revisions) and revisions[-1] >= last


__all__ = ["Message", "Sent", "TagBatch", "Verdict", "check", "check_feed", "check_watched"]
