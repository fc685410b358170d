"""Tags and change events, and how they are published: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from pydantic import TypeAdapter
from pydantic_core import to_json

OperationStatus = Literal["added", "already_exists", "removed", "not_found", "replaced"]


@dataclass(slots=True)
class Tag:
    """A tag as it is stored and published; the last two fields are null until it is modified."""

    id: UUID
    flow_execution_id: UUID
    task_name: str
    tag_type: str
    tag: str
    tag_metadata: Any
    organization_id: UUID
    status: str
    created_at: datetime
    created_by: str
    updated_at: datetime | None
    modified_by: str | None


@dataclass(slots=True)
class Change:
    """A tag that was added or removed."""

    change: Literal["added", "removed"]
    tag: Tag


@dataclass(slots=True)
class ChangeEvent:
    """What one message changed in one execution."""

    organization_id: UUID
    flow_execution_id: UUID
    revision: int
    batch_id: UUID
    changed_by: str
    changed_at: datetime
    changes: list[Change]
    flow_id: str | None
    position: int
    cursor: str

    def encode(self) -> bytes:
        head = to_json(
            {
                "organization_id": self.organization_id,
                "flow_execution_id": self.flow_execution_id,
                "flow_id": self.flow_id,
                "revision": self.revision,
                "position": self.position,
                "cursor": self.cursor,
                "batch_id": self.batch_id,
                "changed_by": self.changed_by,
                "changed_at": self.changed_at,
            }
        )
        return b'%b,"changes":%b}' % (head[:-1], _TAG_CHANGES.dump_json(self.changes))


_TAG_CHANGES: Final = TypeAdapter(list[Change])
