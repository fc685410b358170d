"""What was sent stays the same, and what is read may be of a later version."""

from __future__ import annotations

import base64
import json
import os
import time
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import TagProducer, _is_expired
from producers.contract.encoding import parse_message
from producers.contract.messages import TagBatch, add
from producers.contract.results import ChangeEvent, ResultRecord, StateChange, UnknownChange
from producers.contract.values import Uuid7
from producers.errors import BatchRefused, TokenExpired, refusal

EXECUTION = "01970000-0000-7000-8000-00000000e001"
BATCH = "01970000-0000-7000-8000-00000000b001"


def operation(name: str, **fields: Any) -> dict[str, Any]:
    named = {"task_name": "review", "tag_type": "status", "tag": "done"}
    return {"operation": name, "flow_execution_id": EXECUTION, **named, **fields}


PINNED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "tag_batch", "tags": [operation("add")]}, "6dcec56a243f016a"),
    (
        {
            "kind": "tag_batch",
            "tags": [operation("add", tag_metadata={"b": 1.0, "a": [True, None, "é"]})],
        },
        "ed1c5970308af2c1",
    ),
    ({"kind": "tag_batch", "tags": [operation("remove")]}, "6271ac0b9c5488f5"),
    ({"kind": "tag_batch", "tags": [operation("remove", tag_metadata=None)]}, "ef21c9d89da7baaa"),
    (
        {
            "kind": "tag_batch",
            "reply_to": "runner-7",
            "tags": [operation("add"), operation("remove", tag_metadata=1e300)],
        },
        "8caf6c45e252ee82",
    ),
    ({"kind": "flow_execution", "flow_execution_id": EXECUTION}, "e34b127d928fac5c"),
    (
        {"kind": "flow_execution", "flow_execution_id": EXECUTION, "task_names": ["b", "a"]},
        "6a5567de8d6095a1",
    ),
    (
        {"kind": "flow_execution", "flow_execution_id": EXECUTION, "task_names": []},
        "ac720b9c64b36220",
    ),
    (
        {
            "kind": "task_execution",
            "flow_execution_id": EXECUTION,
            "task_name": "review",
            "state": "running",
        },
        "263a0c1cc5655290",
    ),
    (
        {
            "kind": "task_execution",
            "flow_execution_id": EXECUTION,
            "task_name": "名",
            "state": "failed",
        },
        "c198c15a1352ffde",
    ),
]


@pytest.mark.parametrize(("fields", "digest"), PINNED)
def test_the_digest_of_a_message_stays_the_same(fields: dict[str, Any], digest: str) -> None:
    """So that "the same batch again" is recognized across versions."""
    message = {"schema_version": 1, "batch_id": BATCH, **fields}
    assert parse_message(json.dumps(message).encode()).digest().hex()[:16] == digest


def test_a_reader_takes_words_of_a_later_version_as_their_text() -> None:
    """Statuses, error codes, states and kinds of changes; unknown fields are skipped."""
    head = {"batch_id": BATCH, "organization_id": BATCH, "later": 1}
    applied = {**head, "applied_at": "2026-01-01T00:00:00Z"}
    record = ResultRecord.decode(json.dumps({**applied, "tags": [{"status": "replaced", "x": 1}]}))
    assert record.statuses == ["replaced"]
    refused = ResultRecord.decode(
        json.dumps({**head, "error": {"code": "too_new", "message": "m", "details": []}})
    )
    assert type(refusal(refused)) is BatchRefused
    task = {"flow_execution_id": EXECUTION, "task_name": "t", "state": "paused"}
    event = ChangeEvent.decode(
        json.dumps(
            {
                "organization_id": BATCH,
                "flow_execution_id": EXECUTION,
                "revision": 1,
                "batch_id": BATCH,
                "changed_by": "ada",
                "changed_at": "2026-01-01T00:00:00Z",
                "changes": [
                    {"change": "moved", "to": "x"},
                    {
                        "change": "state",
                        "task": {
                            **task,
                            "state_changed_at": "2026-01-01T00:00:00Z",
                            "state_changed_by": "ada",
                        },
                    },
                ],
            }
        )
    )
    unknown, state = event.changes
    assert isinstance(unknown, UnknownChange)
    assert unknown.change == "moved"
    assert isinstance(state, StateChange)
    assert str(state.task.state) == "paused"


def token(**claims: Any) -> str:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{body}.x"


def test_a_token_that_expired_is_noticed_before_anything_is_enqueued() -> None:
    """After asking a token function once more. What is no JWT is left to the worker."""
    assert _is_expired(token(exp=time.time() - 61))
    deep = base64.urlsafe_b64encode(b"[" * 3000).decode()
    others = (token(), token(exp="x"), token(exp=time.time() - 50), f"a.{deep}.c")
    for passes in ("", "no jwt", "a.b.c", *others):
        assert not _is_expired(passes)
    asked = 0

    def expired() -> str:
        nonlocal asked
        asked += 1
        return token(exp=1)

    with TagProducer(
        redis_url="unix:///nowhere", organization_id=uuid4(), token=expired
    ) as producer:
        with pytest.raises(TokenExpired):
            producer.enqueue(TagBatch(tags=[add(EXECUTION, "t", "t", "x")]))
    assert asked == 2


def test_a_fork_makes_ids_of_its_own_and_does_not_hang() -> None:
    """Also if another thread holds the generator's lock, or the clock was ahead."""
    new_id = Uuid7()
    ahead = time.time_ns() // 1000 + 3_600_000_000
    new_id(ahead)
    with new_id._lock:
        ids = [_in_child(new_id) for _ in range(2)]
    assert len({*ids, str(new_id(ahead))}) == 3


def _in_child(new_id: Uuid7) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, str(new_id()).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as output:
        return str(UUID(output.read()))
