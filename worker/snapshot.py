"""What the rules read and what they decide: snapshot, change set and outcomes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from uuid import UUID

from msgspec import UNSET

from producers.contract import messages
from producers.contract.cursors import BEGINNING, Cursor
from producers.contract.errors import CONDITIONS
from producers.contract.messages import SetTaskState
from producers.contract.results import Task
from worker.wire import Batch, Condition, Message, Metadata, Operation, Tag, read_message

TagKey = tuple[int, str, str, str]
"""Flow execution, task name, tag type, tag. Together with the metadata they identify a tag.

Ids are looked up as integers, here and below, because a UUID hashes and compares in Python.
"""

TypeKey = tuple[int, str, str]
"""Flow execution, task name and tag type."""

TaskKey = tuple[UUID, str]
"""A flow execution's id and a task name. Together they identify a task."""


def tag_key(named: Operation | Tag) -> TagKey:
    return named.flow_execution_id.int, named.task_name, named.tag_type, named.tag


def type_key(named: Operation | Condition | Tag) -> TypeKey:
    return named.flow_execution_id.int, named.task_name, named.tag_type


def types_of(message: Message) -> Iterator[tuple[int | None, str | None, TypeKey, bool]]:
    """Yield the types all of whose tags on a task a message depends on.

    Each with the place and field that name it, and whether their metadata is needed.
    """
    if isinstance(message, Batch):
        for index, condition in enumerate(message.conditions):
            yield index, CONDITIONS, type_key(condition), False
        for index, operation in enumerate(message.tags):
            if operation.operation == "set":
                yield index, None, type_key(operation), True
    elif isinstance(message, SetTaskState):
        for tag_type in message.clear or ():
            yield None, "clear", (message.flow_execution_id.int, message.task_name, tag_type), True


def stored_metadata(tag_metadata: Metadata | None) -> tuple[bytes | None, bytes]:
    """Return canonical metadata as it is stored, and its digest of 16 bytes.

    For null, these are None and no bytes. Two digests are equal if and only if the metadata are the
    same (docs/concepts/contract.md#rule-2).
    """
    if tag_metadata is None or tag_metadata is UNSET:
        return None, b""
    text = bytes(tag_metadata)
    if text == b"null":
        return None, b""
    hasher = _NEW_HASHER()  # a copy is cheaper than parsing the options again
    hasher.update(text)
    return text, hasher.digest()


_NEW_HASHER: Final = hashlib.blake2b(digest_size=16).copy


class AuthorizedMessage(NamedTuple):
    """A message that is well formed and authorized.

    Its actor is that of its token (docs/concepts/contract.md#rule-7).
    """

    message: Message
    actor: str
    digest: bytes
    """Equal for two messages that ask for the same."""
    may_read: bool = False
    """The token allows to read: an error may say what is there."""

    @staticmethod
    def of(message: messages.Message, actor: str, *, may_read: bool = False) -> AuthorizedMessage:
        """Authorize a message that was built, not read."""
        read, canonical = read_message(message.canonical_bytes())
        return AuthorizedMessage(read, actor, messages.digest(canonical), may_read)


@dataclass(slots=True)
class Execution:
    """A registered flow execution."""

    id: UUID
    task_names: dict[str, None]
    """The registered ones, in the order in which they were first given."""
    any_task_name: bool
    """Every task name is allowed, also one that is not registered."""
    revision: int
    flow_id: str | None = None


class StoredResult(NamedTuple):
    """What is stored of a batch: enough to answer it again."""

    digest: bytes
    record: bytes
    events: tuple[tuple[UUID, bytes], ...] = ()
    """The change events, each with its execution's id, in the order in which they were made."""


@dataclass(slots=True)
class Snapshot:
    """What is stored of everything that the messages name. `decide_in_parts` updates it."""

    batches: dict[UUID, StoredResult] = field(default_factory=dict)
    executions: dict[int, Execution] = field(default_factory=dict)
    tags: dict[TagKey, dict[bytes, Tag]] = field(default_factory=dict)
    """The active tags by key, and then by the digest of their metadata."""
    types: dict[TypeKey, dict[TagKey, None]] = field(default_factory=dict)
    """The keys in `tags` of the types that `types_of` names: all of them, up to the bound."""
    tasks: dict[TaskKey, Task] = field(default_factory=dict)
    """The tasks that have a state."""
    head: Cursor = BEGINNING
    """The organization's last change event."""
    complete: int = sys.maxsize
    """For how many messages, counted from the first, everything was loaded."""


class NewTag(NamedTuple):
    tag: Tag
    metadata: bytes | None
    metadata_digest: bytes


class NewBatch(NamedTuple):
    batch_id: UUID
    digest: bytes
    record: bytes
    revisions: dict[UUID, int]
    event_bytes: int = 0


class NewChange(NamedTuple):
    flow_execution_id: UUID
    revision: int
    position: int
    batch_id: UUID
    event: bytes


@dataclass(slots=True)
class ChangeSet:
    """What must be stored before the outcomes are published. Every value is final."""

    batches: list[NewBatch] = field(default_factory=list)
    registrations: dict[UUID, Execution] = field(default_factory=dict)
    revisions: dict[UUID, int] = field(default_factory=dict)
    added: dict[int, NewTag] = field(default_factory=dict)
    """New rows by id, also of tags that are removed again (docs/concepts/contract.md#rule-4)."""
    removed: dict[int, Tag] = field(default_factory=dict)
    tasks: dict[TaskKey, Task] = field(default_factory=dict)
    changes: list[NewChange] = field(default_factory=list)
    """In the order of their positions."""


class Outcome(NamedTuple):
    """What is published for a message: its result record and its change events."""

    record: bytes
    events: tuple[tuple[UUID, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcomes of messages, the first ones, and the change set to store with them."""

    outcomes: list[Outcome]
    change_set: ChangeSet
    head: Cursor
    """The organization's last change event, with those of the change set."""
