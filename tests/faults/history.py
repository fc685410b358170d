"""All that is known of one batch, printed when a promise was broken."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Final
from uuid import UUID

import psycopg

from producers.contract.messages import Message
from tests.faults.check import Sent
from tests.faults.harness import FaultOrganization, Harness

_NEIGHBOURS: Final = 3
_SECONDS: Final = 15.0


def history(harness: Harness, connection: psycopg.Connection, batch_id: UUID) -> Iterator[str]:
    """Yield the history of a batch, line by line.

    It has who sent it, what is stored and was published, what workers logged, and the faults that
    were injected around the time when it was made.
    """
    yield f"history of {batch_id}, made at {_clock(_made_at(batch_id))}"
    for organization in harness.organizations:
        places = [
            (sent, place)
            for sent in organization.sent()
            for place, message in enumerate(sent.messages)
            if message.batch_id == batch_id
        ]
        for sent, place in places[:_NEIGHBOURS]:
            yield from _sent(connection, organization, sent, place)
        if places:
            yield from _stored(connection, organization, batch_id)
            for record in organization.published.get(batch_id, ()):
                yield f"  published {record.decode()}"
            if batch_id in organization.flushed:
                yield "  flushed   it was in an inbox at a FLUSHALL"
            yield from _logged(harness, batch_id)
    made_at = _made_at(batch_id)
    for at, fault in harness.faults:
        if abs(at - made_at) < _SECONDS:
            yield f"  fault     {_clock(at)} {fault}"


def _sent(
    connection: psycopg.Connection, organization: FaultOrganization, sent: Sent, place: int
) -> Iterator[str]:
    message = sent.messages[place]
    known = "known to be accepted" if message.batch_id in sent.accepted else "not known as accepted"
    yield f"  sent      by {sent.by}, number {place} of {len(sent.messages)}, {known}"
    yield f"  message   {message.encode().decode()}"
    for near in sent.messages[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]:
        number = _number(connection, organization, near)
        yield f"  near it   {near.batch_id} took effect as number {number}"


def _number(
    connection: psycopg.Connection, organization: FaultOrganization, message: Message
) -> str:
    row = connection.execute(
        "select seq from tag_batches where organization_id = %s and batch_id = %s",
        [organization.id, message.batch_id],
    ).fetchone()
    return "none" if row is None else str(row[0])


def _stored(
    connection: psycopg.Connection, organization: FaultOrganization, batch_id: UUID
) -> Iterator[str]:
    rows = connection.execute(
        "select seq, applied_at, result_record::text from tag_batches "
        "where organization_id = %s and batch_id = %s",
        [organization.id, batch_id],
    ).fetchall()
    for number, applied_at, record in rows:
        yield f"  stored    number {number} at {_clock(applied_at.timestamp())}: {record}"
    events = connection.execute(
        "select flow_execution_id, revision, event::text from tag_changes "
        "where organization_id = %s and batch_id = %s",
        [organization.id, batch_id],
    ).fetchall()
    for execution, revision, event in events:
        yield f"  changed   {execution} #{revision}: {event}"


def _logged(harness: Harness, batch_id: UUID) -> Iterator[str]:
    """Yield what workers said of a batch, errors with their tracebacks."""
    for name, text in harness.worker_logs():
        for line in text.splitlines():
            if str(batch_id) in line:
                yield f"  {name:9} {line}"


def _made_at(batch_id: UUID) -> float:
    """Return the time in a UUID of version 7, in seconds since the epoch."""
    return (batch_id.int >> 80) / 1000


def _clock(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        return "an unknown time"  # of an id of another version
