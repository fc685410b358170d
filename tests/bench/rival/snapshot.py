"""What the rules read and what they decide: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

from producers.contract.cursors import BEGINNING, Cursor
from producers.contract.errors import CONDITIONS
from tests.bench.rival.messages import Condition, TagBatch, TagOperation
from tests.bench.rival.results import Tag
from tests.bench.rival.values import canonical_json

TagKey = tuple[int, str, str, str]
"""Flow execution, task name, tag type, tag. Together with the metadata they identify a tag.

Ids are looked up as integers, here and below, because a UUID hashes and compares in Python.
"""

TypeKey = tuple[int, str, str]
"""Flow execution, task name and tag type."""


def tag_key(named: TagOperation | Tag) -> TagKey:
    return named.flow_execution_id.int, named.task_name, named.tag_type, named.tag


def type_key(named: TagOperation | Condition | Tag) -> TypeKey:
    return named.flow_execution_id.int, named.task_name, named.tag_type


def types_of(message: TagBatch) -> Iterator[tuple[int, str | None, TypeKey, bool]]:
    """Yield the types all of whose tags on a task a message depends on.

    Each with the place and field that name it, and whether their metadata is needed.
    """
    for index, condition in enumerate(message.conditions):
        yield index, CONDITIONS, type_key(condition), False
    for index, operation in enumerate(message.tags):
        if operation.operation == "set":
            yield index, None, type_key(operation), True


def stored_metadata(tag_metadata: Any) -> tuple[bytes | None, bytes]:
    """Return validated metadata as it is stored: canonical JSON, and its digest of 16 bytes.

    For null, these are None and no bytes. Two digests are equal if and only if the metadata are the
    same.
    """
    if tag_metadata is None:
        return None, b""
    text = canonical_json(tag_metadata)
    hasher = _NEW_HASHER()  # a copy is cheaper than parsing the options again
    hasher.update(text)
    return text, hasher.digest()


_NEW_HASHER: Final = hashlib.blake2b(digest_size=16).copy


class AuthorizedMessage(NamedTuple):
    """A message that is well formed and authorized; its actor is that of its token."""

    message: TagBatch
    actor: str
    digest: bytes
    """Equal for two messages that ask for the same."""
    may_read: bool = False
    """The token allows to read: an error may say what is there."""


@dataclass(slots=True)
class Execution:
    """A registered flow execution; `task_names` None allows every task name."""

    id: UUID
    task_names: dict[str, None] | None
    """In the order in which they were first given."""
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
    """What is stored of everything that the messages name. `decide` updates it."""

    batches: dict[UUID, StoredResult] = field(default_factory=dict)
    executions: dict[int, Execution] = field(default_factory=dict)
    tags: dict[TagKey, dict[bytes, Tag]] = field(default_factory=dict)
    """The active tags by key, and then by the digest of their metadata."""
    types: dict[TypeKey, dict[TagKey, None]] = field(default_factory=dict)
    """The keys in `tags` of the types that `types_of` names: all of them, up to the bound."""
    head: Cursor = BEGINNING
    """The organization's last change event."""
    complete: int = sys.maxsize
    """Of how many messages, the first ones, all that they name was loaded."""


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
    revisions: dict[UUID, int] = field(default_factory=dict)
    added: dict[int, NewTag] = field(default_factory=dict)
    """New rows by id, also of tags that are removed again."""
    removed: dict[int, Tag] = field(default_factory=dict)
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
