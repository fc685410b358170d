"""What a worker reads and writes most, as structs: tag batches, and change events.

The contract's models (producers/contract) say what is valid, and what is wrong with what is not.
msgspec reads and writes the same bytes in a fifth of their time: batches in canonical form, as the
SDK sends them, and all events. tests/unit/test_wire.py holds the two to be the same.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Final, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from pydantic_core import PydanticCustomError, from_json

from producers.contract import messages
from producers.contract.encoding import parse_message
from producers.contract.messages import (
    MAX_CONDITIONS,
    MAX_MESSAGE_BYTES,
    MAX_OPERATIONS,
    OperationName,
    RegisterExecution,
    SetTaskState,
)
from producers.contract.results import TagStatus, Task
from producers.contract.values import (
    MAX_NAME_LENGTH,
    MAX_TYPE_LENGTH,
    REPLY_TO_PATTERN,
    canonical_json,
    normal_metadata,
)

encode: Final = msgspec.json.Encoder().encode
"""Serializes structs, and all that they are made of, as the contract's models do."""

Metadata = Raw | UnsetType
"""Canonical JSON; unset where any metadata is meant."""
_Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
_TagType = Annotated[str, Meta(min_length=1, max_length=MAX_TYPE_LENGTH)]


# --- Tag batches ---------------------------------------------------------------------------------


class Operation(Struct, forbid_unknown_fields=True, gc=False):
    """Adds, removes or sets a tag (messages.TagOperation)."""

    operation: OperationName
    flow_execution_id: UUID
    task_name: _Name
    tag_type: _TagType
    tag: _Name
    tag_metadata: Metadata = UNSET

    @property
    def any_metadata(self) -> bool:
        """Whether this removes the tag with any metadata (docs/concepts/contract.md#rule-3)."""
        return self.tag_metadata is UNSET


class Condition(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """A tag, or any tag of a type, that must or must not be active (messages.Condition)."""

    flow_execution_id: UUID
    task_name: _Name
    tag_type: _TagType
    tag: _Name | None = None
    tag_metadata: Metadata = UNSET
    exists: bool

    @property
    def any_metadata(self) -> bool:
        """Whether the tag is meant whatever its metadata is."""
        return self.tag_metadata is UNSET


class Batch(Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Operations that are applied together or not at all (messages.TagBatch)."""

    schema_version: Literal[1]
    batch_id: UUID
    reply_to: str | None
    kind: Literal["tag_batch"]
    tags: Annotated[list[Operation], Meta(min_length=1, max_length=MAX_OPERATIONS)]
    conditions: Annotated[list[Condition], Meta(max_length=MAX_CONDITIONS)] = []

    @property
    def reply_channel_name(self) -> str:
        """The last part of the results channel, as for the contract's messages."""
        return self.reply_to or str(self.batch_id)


Message = Batch | RegisterExecution | SetTaskState

_DECODE: Final = msgspec.json.Decoder(Batch).decode
_is_reply_to: Final = re.compile(REPLY_TO_PATTERN).fullmatch


def read_message(raw: bytes) -> tuple[Message, bytes]:
    """Read one message; return it with its canonical form, from which its digest is made.

    Whatever is no tag batch in canonical form is read by the contract's models. Raises
    `InvalidMessage` as `parse_message` does.
    """
    batch = read_canonical(raw)
    if batch is not None:
        return batch, raw
    message = parse_message(raw)
    canonical = message.canonical_bytes()
    return (_DECODE(canonical) if isinstance(message, messages.TagBatch) else message), canonical


def read_canonical(raw: bytes) -> Batch | None:
    """Read a valid tag batch that is in canonical form; None for all else."""
    if len(raw) > MAX_MESSAGE_BYTES or b"\\u0000" in raw:
        return None
    try:
        batch = _DECODE(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    for operation in batch.tags:
        if operation.tag_metadata is UNSET:
            if operation.operation != "remove":
                return None
        elif not _is_canonical(operation.tag_metadata):
            return None
    for condition in batch.conditions:
        metadata = condition.tag_metadata
        if metadata is not UNSET and (condition.tag is None or not _is_canonical(metadata)):
            return None
    if batch.reply_to is not None and not _is_reply_to(batch.reply_to):
        return None
    return batch if encode(batch) == raw else None


def _is_canonical(metadata: Raw) -> bool:
    """Whether JSON is valid tag metadata in the form that equal values share."""
    text = bytes(metadata)
    if text == b"null":
        return True
    try:
        return canonical_json(normal_metadata(from_json(text))) == text
    except (PydanticCustomError, ValueError):
        return False


# --- Change events -------------------------------------------------------------------------------


class Tag(Struct, gc=False):
    """A tag as it is stored and published (results.Tag); its metadata are canonical JSON."""

    id: UUID
    flow_execution_id: UUID
    task_name: str
    tag_type: str
    tag: str
    tag_metadata: Raw | None
    organization_id: UUID
    status: TagStatus
    created_at: datetime
    created_by: str
    updated_at: datetime | None
    modified_by: str | None


class Change(Struct, gc=False):
    """A tag that was added or removed (results.Change)."""

    change: Literal["added", "removed"]
    tag: Tag


class StateChange(Struct, gc=False):
    """A task that has a new state (results.StateChange)."""

    change: Literal["state"]
    task: Task


class ChangeEvent(Struct, gc=False):
    """What one message changed in one execution (results.ChangeEvent)."""

    organization_id: UUID
    flow_execution_id: UUID
    flow_id: str | None
    revision: int
    position: int
    cursor: str
    batch_id: UUID
    changed_by: str
    changed_at: datetime
    changes: list[Change | StateChange]
