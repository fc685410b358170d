"""Structs and the contract's models read and write the same (worker/wire.py)."""

from __future__ import annotations

import json

import pytest

from producers.contract.errors import InvalidMessage
from producers.contract.messages import TagBatch, add, register_execution, remove, unless, when
from tests.support.message_fuzz import compare, compare_reading
from worker.wire import Batch, read_message

ONE = "01970000-0000-7000-8000-00000000e001"
BATCH = TagBatch(
    tags=[
        add(ONE, "task", "type", "tag", {"a": 1.5, "b": ["é"]}),
        remove(ONE, "task", "type", "x"),
    ],
    conditions=[when(ONE, "task", "type"), unless(ONE, "task", "type", "tag", None)],
)


def test_random_messages_and_events_are_the_same_both_ways() -> None:
    """What is read without pydantic, pydantic reads alike; and events have the same bytes."""
    found = compare(seed=20, count=4_000)
    assert found["read"] > 1_000
    assert found["refused"] > 500
    assert found["not canonical"] > 100
    assert found["left to pydantic"] < 100


def test_what_the_sdk_sends_is_read_without_pydantic() -> None:
    """A batch in canonical form, with all that it may have."""
    assert compare_reading(BATCH.encode()) == "read"


@pytest.mark.parametrize(
    ("part", "other", "kind"),
    [
        (b"01970000-0000-7000-8000-00000000e001", ONE.upper().encode(), "not canonical"),
        (b'"schema_version":1', b'"schema_version":1.0', "refused"),
        (b'"schema_version":1', b'"schema_version":true', "refused"),
        (b'"reply_to":null', b'"reply_to":"x\\n"', "refused"),
        (b'"reply_to":null', b'"reply_to":"x"', "read"),
        (b'"a":1.5', b'"a":1.50', "not canonical"),
        (b'"a":1.5', b'"a":1e400', "refused"),
        (b'"a":1.5', b'"c":1', "not canonical"),
        (b'"a":1.5', b'"b":1', "refused"),
        (b'"a":1.5', b'"a":9223372036854775808', "refused"),
        (b'"tag":"x"', b'"tag":"x\\u0000"', "refused"),
        (b'"tag":"x"', b'"tag":"x\\\\u0000"', "left to pydantic"),
        (b'"tag":"x"', b'"tag":"\xff"', "refused"),
        (b'"tag":"x"', b'"tag":"x","tag":"x"', "refused"),
        (b'"tag":"x"', b'"tag":"x","other":1', "refused"),
        (b'"tag":"x"', b'"tag":"x","tag_metadata":null', "read"),
        (b'"tag":"x"', b'"tag":"%s"' % (b"x" * 200), "read"),
        (b'"tag":"x"', b'"tag":"%s"' % (b"x" * 201), "refused"),
        (b'"tag":"x"', b'"tag":"%s"' % ("名" * 200).encode(), "read"),
        (b',"exists":true', b',"tag":null,"exists":true', "not canonical"),
        (b',"exists":true', b',"tag_metadata":null,"exists":true', "refused"),
        (b'"conditions":', b'"conditions": ', "not canonical"),
    ],
)
def test_what_is_near_to_it_is_left_to_pydantic(part: bytes, other: bytes, kind: str) -> None:
    """Forms that are valid but not canonical, and faults: never read as something else."""
    assert BATCH.encode().count(part) >= 1
    assert compare_reading(BATCH.encode().replace(part, other)) == kind


def test_an_empty_list_of_conditions_is_not_canonical() -> None:
    """The field is left out of the canonical form while it has its default."""
    raw = TagBatch(tags=[remove(ONE, "task", "type", "x")]).encode()
    assert compare_reading(raw) == "read"
    assert compare_reading(raw[:-1] + b',"conditions":[]}') == "not canonical"


def test_a_message_has_one_form_however_it_came() -> None:
    """The digest is made of the canonical form, whatever was sent."""
    fields = json.loads(BATCH.encode())
    spread = json.dumps(dict(sorted(fields.items())), indent=1).encode()
    read, canonical = read_message(spread)
    assert canonical == BATCH.encode()
    assert isinstance(read, Batch)
    assert read == read_message(canonical)[0]


def test_other_messages_are_the_models() -> None:
    """Registrations and states are rare: pydantic reads them."""
    message = register_execution(ONE, ["task"])
    assert read_message(message.encode()) == (message, message.encode())
    with pytest.raises(InvalidMessage):
        read_message(message.encode()[:-1])
