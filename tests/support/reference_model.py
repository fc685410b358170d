"""The rules of a batch in their plainest form, to compare the product with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from producers.contract.messages import Message


@dataclass
class ReferenceModel:
    """A list of rows, one operation at a time: the rules in their plainest words."""

    names: dict[UUID, set[str] | None] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[UUID, tuple[str, Any]] = field(default_factory=dict)
    revisions: dict[UUID, int] = field(default_factory=dict)
    positions: list[UUID] = field(default_factory=list)
    """The executions of the organization's change events, in their order."""
    states: dict[tuple[UUID, str], str] = field(default_factory=dict)
    cleared: dict[str, int] = field(default_factory=dict)
    """How many tags were removed with a state, by batch id."""
    failed: dict[str, list[tuple[int, list[tuple[str, str]]]]] = field(default_factory=dict)
    """By batch id, each condition that failed, with what is there instead, as type and tag."""
    added: int = 0
    """How often a row was added."""

    def send(self, message: Message) -> Any:
        asked = json.loads(message.encode())
        asked.pop("reply_to")
        text = json.dumps(_plain(asked), sort_keys=True)
        if message.batch_id in self.answers:
            known, answer = self.answers[message.batch_id]
            return answer if known == text else "conflict"
        answer = {
            "flow_execution": self.register,
            "task_execution": self.record,
            "tag_batch": self.tag,
        }[asked["kind"]](asked)
        self.answers[message.batch_id] = text, answer
        return answer

    def register(self, asked: dict[str, Any]) -> list[str]:
        execution, names = UUID(asked["flow_execution_id"]), asked["task_names"]
        if execution not in self.names:
            self.names[execution] = None if names is None else set(names)
            return ["registered"]
        if names is None or self.names[execution] is None:
            self.names[execution] = None
        else:
            self.names[execution] |= set(names)  # type: ignore[operator]
        return ["already_exists"]

    def knows(self, asked: dict[str, Any]) -> bool:
        names = self.names.get(UUID(asked["flow_execution_id"]), set())
        return names is None or asked["task_name"] in names

    def record(self, asked: dict[str, Any]) -> Any:
        if not self.knows(asked):
            return "not_found"
        execution = UUID(asked["flow_execution_id"])
        cleared = [
            row
            for tag_type in dict.fromkeys(asked.get("clear", []))
            for row in self.of_type({**asked, "tag_type": tag_type})
        ]
        self.take(cleared)
        self.cleared[asked["batch_id"]] = len(cleared)
        if self.states.get((execution, asked["task_name"])) == asked["state"] and not cleared:
            return ["unchanged"]
        self.states[execution, asked["task_name"]] = asked["state"]
        self.change(execution)
        return ["recorded"]

    def tag(self, asked: dict[str, Any]) -> Any:
        conditions = asked.get("conditions", [])
        if not all(map(self.knows, asked["tags"] + conditions)):
            return "not_found"
        failed = [index for index, each in enumerate(conditions) if not self.holds(each)]
        if failed:
            found = [(index, self.instead(conditions[index])) for index in failed]
            self.failed[asked["batch_id"]] = found
            return "precondition_failed"
        changed: dict[UUID, None] = {}
        answer = []
        for operation in asked["tags"]:
            do = {"add": self.add, "remove": self.drop, "set": self.set}[operation["operation"]]
            status = do(operation)
            answer.append(status)
            if status in ("added", "removed", "replaced"):
                changed[UUID(operation["flow_execution_id"])] = None
        for execution in changed:
            self.change(execution)
        return answer

    def change(self, execution: UUID) -> None:
        self.revisions[execution] = self.revisions.get(execution, 0) + 1
        self.positions.append(execution)

    def matching(self, operation: dict[str, Any]) -> list[dict[str, Any]]:
        parts = ("flow_execution_id", "task_name", "tag_type", "tag")
        return [row for row in self.rows if all(row[part] == operation[part] for part in parts)]

    def add(self, operation: dict[str, Any]) -> str:
        metadata = operation.get("tag_metadata")
        if any(json_equal(row["tag_metadata"], metadata) for row in self.matching(operation)):
            return "already_exists"
        self.rows.append({**operation, "tag_metadata": metadata})
        self.added += 1
        return "added"

    def drop(self, operation: dict[str, Any]) -> str:
        gone = [
            row
            for row in self.matching(operation)
            if "tag_metadata" not in operation
            or json_equal(row["tag_metadata"], operation["tag_metadata"])
        ]
        self.take(gone)
        return "removed" if gone else "not_found"

    def set(self, operation: dict[str, Any]) -> str:
        metadata = operation.get("tag_metadata")
        same = [
            row for row in self.matching(operation) if json_equal(row["tag_metadata"], metadata)
        ]
        others = [row for row in self.of_type(operation) if row not in same]
        self.take(others)
        self.add(operation)
        return "replaced" if others else "already_exists" if same else "added"

    def holds(self, condition: dict[str, Any]) -> bool:
        return bool(self.meant(condition)) is condition["exists"]

    def instead(self, condition: dict[str, Any]) -> list[tuple[str, str]]:
        """Return the five oldest tags that made a condition fail."""
        found = self.of_type(condition) if condition["exists"] else self.meant(condition)
        return [(row["tag_type"], row["tag"]) for row in found[:5]]

    def meant(self, condition: dict[str, Any]) -> list[dict[str, Any]]:
        meant = self.matching(condition) if "tag" in condition else self.of_type(condition)
        if "tag_metadata" in condition:
            wanted = condition["tag_metadata"]
            meant = [row for row in meant if json_equal(row["tag_metadata"], wanted)]
        return meant

    def of_type(self, named: dict[str, Any]) -> list[dict[str, Any]]:
        parts = ("flow_execution_id", "task_name", "tag_type")
        return [row for row in self.rows if all(row[part] == named[part] for part in parts)]

    def take(self, gone: list[dict[str, Any]]) -> None:
        self.rows = [row for row in self.rows if not any(row is other for other in gone)]


def _plain(value: Any) -> Any:
    """Make numbers floats, so that 1 equals 1.0; booleans stay booleans."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def json_equal(one: Any, other: Any) -> bool:
    """JSON equality: 1 is 1.0, but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(json_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(json_equal(one[key], other[key]) for key in one)
    return bool(one == other)
