"""Random messages and events, to compare worker/wire.py with the contract's models."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, Final
from uuid import UUID

import msgspec
from pydantic_core import from_json

from producers.contract.encoding import parse_message
from producers.contract.errors import InvalidMessage
from producers.contract.messages import TagBatch
from producers.contract.results import Change, ChangeEvent, StateChange, Tag, Task
from producers.contract.values import canonical_json, normal_metadata
from worker import wire

_TEXTS: Final = (
    *("a", "review_status", "é", "e\u0301", "名", "\U0001f600", "\x01", "\x1f", "\x7f", "\u2028"),
    *('"', "\\", "/", "\n", "\t", "\b", "\\u000", " ", "\ufffd", "\ud7ff", "\uffff", "<"),
)
_NUMBERS: Final = (
    *(2**63, -(2**63) - 1, 10**25),  # the first three are not valid
    *(0, 1, -1, 2**53, 2**63 - 1, -(2**63)),
    *(0.1, 1.0, -0.0, 1e16, 1e-7, 5e-324, 1.7976931348623157e308, 123456789.123, 2.5e-5, 1e22),
)
_LENGTHS: Final = (1, 2, 5, 25)
_BYTES: Final = b'"\\{}[]:, \n0123456789-+.eEaAfFtruenlsNI\x00\x7f\x80\xc3\xed\xa0\xf0\xff'


class Fuzz:
    """Makes messages from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.wild = False
        """Whether invalid values are among those that are made."""

    def text(self) -> str:
        if self.wild and self.random.random() < 0.1:
            return self.random.choice(("\0", "\\u0000", "", *(each * 201 for each in _TEXTS[:6])))
        if self.random.random() < 0.7:
            return "".join(self.random.choices(_TEXTS, k=self.random.randrange(1, 4)))
        return self.random.choice(_TEXTS[:4]) * self.random.choice(_LENGTHS)

    def value(self, depth: int = 0) -> Any:
        """Return a JSON value; some are no valid tag metadata."""
        kind = self.random.randrange(8 if depth < 3 else 5)
        if kind < 2:
            return self.random.choice((None, True, False, self.text()))
        if kind < 5:
            number = self.random.choice(_NUMBERS if self.wild else _NUMBERS[3:])
            return number if self.random.random() < 0.6 else self.random.random() * 10**kind
        size = self.random.randrange(4)
        if kind == 5:
            return [self.value(depth + 1) for _ in range(size)]
        if self.random.random() < 0.02:
            nested: Any = self.text()
            for _ in range(self.random.choice((30, 31, 32, 33, 300) if self.wild else (9, 29))):
                nested = [nested]
            return nested
        return {self.text(): self.value(depth + 1) for _ in range(size)}

    def id(self) -> str:
        return str(UUID(int=self.random.getrandbits(128)))

    def named(self) -> dict[str, Any]:
        return {
            "flow_execution_id": self.id(),
            "task_name": self.text(),
            "tag_type": self.text(),
            "tag": self.text(),
        }

    def operation(self) -> dict[str, Any]:
        operation = {"operation": self.random.choice(("add", "remove", "set")), **self.named()}
        if operation["operation"] != "remove" or self.random.random() < 0.5:
            operation["tag_metadata"] = self.value() if self.random.random() < 0.7 else None
        return operation

    def condition(self) -> dict[str, Any]:
        condition = self.named()
        if self.random.random() < 0.3:
            del condition["tag"]
        if (self.wild or "tag" in condition) and self.random.random() < 0.4:
            condition["tag_metadata"] = self.value()
        return {**condition, "exists": self.random.random() < 0.5}

    def batch(self) -> dict[str, Any]:
        batch = {
            "schema_version": 1,
            "batch_id": self.id(),
            "reply_to": self.random.choice((None, None, "runner-7", "a" * 200)),
            "kind": "tag_batch",
            "tags": [self.operation() for _ in range(self.random.choice((1, 1, 2, 3)))],
        }
        if self.wild and self.random.random() < 0.1:
            batch["reply_to"] = self.random.choice(("a b", "x\n", "", "a" * 201))
        if self.random.random() < 0.3:
            batch["conditions"] = [self.condition() for _ in range(self.random.randrange(3))]
        return batch

    def message(self) -> bytes:
        """Return a batch, half of the time in canonical form if it has one, or something near."""
        self.wild = self.random.random() < 0.3
        fields = self.batch()
        if self.wild and self.random.random() < 0.5:
            self._change_field(fields)
        raw = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(
            errors="surrogatepass"
        )
        if self.random.random() < 0.7:
            with suppress(InvalidMessage):
                raw = parse_message(raw).canonical_bytes()
        if self.random.random() < 0.3:
            raw = self._change_bytes(raw)
        return raw

    def _change_field(self, fields: dict[str, Any]) -> None:
        of = self.random.choice([fields, *fields["tags"], *fields.get("conditions", ())])
        name = self.random.choice([*of, "other"])
        if self.random.random() < 0.3:
            of.pop(name, None)
        elif self.random.random() < 0.2:
            of[name] = of.pop(name, 1)  # it goes to the end
        else:
            values: list[Any] = [1, 1.0, True, "1", [], {}, None, self.id().upper(), "add"]
            of[name] = self.random.choice([*values, self.value()])

    def _change_bytes(self, raw: bytes) -> bytes:
        place = self.random.randrange(len(raw))
        cut = self.random.choice((0, 1, 1, 2))
        more = bytes(self.random.choices(_BYTES, k=self.random.randrange(3)))
        return raw[:place] + more + raw[place + cut :]

    def event(self) -> ChangeEvent:
        """Return a change event with valid contents."""
        self.wild = False
        at = datetime(2026, 1, 1, tzinfo=timezone.utc)
        at += timedelta(microseconds=self.random.choice((0, 1, 120_000, 999_999, 10**15)))
        changes = [self._change(at) for _ in range(self.random.randrange(1, 4))]
        one, two, three = (UUID(self.id()) for _ in range(3))
        flow_id = self.random.choice((None, self.text()))
        return ChangeEvent(one, two, 5, three, self.text(), at, [*changes], flow_id, 7, "7-abc")

    def _change(self, at: datetime) -> Change | StateChange:
        one, two, three = (UUID(self.id()) for _ in range(3))
        if self.random.random() < 0.2:
            return StateChange("state", Task(one, self.text(), "running", at, self.text()))
        metadata = self.value()
        try:
            metadata = from_json(canonical_json(normal_metadata(metadata)))
        except ValueError:
            metadata = None
        names = (self.text(), self.text(), self.text(), metadata)
        removed = self.random.choice([(at, self.text()), (None, None)])
        tag = Tag(one, two, *names, three, "deleted" if removed[0] else "active", at, "x", *removed)
        return Change("removed" if removed[0] else "added", tag)


def compare_reading(raw: bytes) -> str:
    """Read a message both ways; return what it is. Raises `AssertionError` if they differ."""
    fast = wire.read_canonical(raw)
    try:
        strict = parse_message(raw)
    except InvalidMessage:
        assert fast is None, raw
        return "refused"
    canonical = strict.canonical_bytes()
    if fast is None:
        return "left to pydantic" if canonical == raw else "not canonical"
    assert isinstance(strict, TagBatch), raw
    assert canonical == raw
    assert (fast.batch_id, fast.reply_channel_name) == (strict.batch_id, strict.reply_channel_name)
    pairs: list[tuple[Any, Any]] = [*zip(fast.tags, strict.tags, strict=True)]
    for mine, theirs in (*pairs, *zip(fast.conditions, strict.conditions, strict=True)):
        for name in type(theirs).model_fields:
            value = getattr(mine, name)
            if name == "tag_metadata":
                assert mine.any_metadata is theirs.any_metadata
                value = None if mine.any_metadata else from_json(bytes(value))
            assert value == getattr(theirs, name), raw
            assert type(value) is type(getattr(theirs, name)), raw
    return "read"


def to_wire(event: ChangeEvent) -> wire.ChangeEvent:
    """Return the event as a worker writes it."""

    def changed(each: Any) -> wire.Change | wire.StateChange:
        if isinstance(each, StateChange):
            return wire.StateChange("state", each.task)
        fields = {name: getattr(each.tag, name) for name in wire.Tag.__struct_fields__}
        fields["tag_metadata"] = msgspec.Raw(canonical_json(fields["tag_metadata"]))
        return wire.Change(each.change, wire.Tag(**fields))

    assert event.position is not None
    assert event.cursor is not None
    return wire.ChangeEvent(
        event.organization_id,
        event.flow_execution_id,
        event.flow_id,
        event.revision,
        event.position,
        event.cursor,
        event.batch_id,
        event.changed_by,
        event.changed_at,
        [changed(each) for each in event.changes],
    )


def compare(seed: int, count: int) -> Counter[str]:
    """Compare that many messages, and an event for each tenth of them; return what they were."""
    fuzz = Fuzz(seed)
    found: Counter[str] = Counter()
    for number in range(count):
        found[compare_reading(fuzz.message())] += 1
        if number % 10 == 0:
            event = fuzz.event()
            assert wire.encode(to_wire(event)) == event.encode(), event
            found["events"] += 1
    return found
