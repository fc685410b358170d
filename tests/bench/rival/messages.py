"""Tag batches, and how they are read: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from tests.bench.rival.values import (
    Id,
    ReplyTo,
    StrictModel,
    TagMetadata,
    TagName,
    TagType,
    TaskName,
)

MAX_MESSAGE_BYTES: Final = 1024 * 1024
MAX_OPERATIONS: Final = 100
MAX_CONDITIONS: Final = 100


class TagOperation(StrictModel):
    """Adds or removes one tag, or sets it as the only one of its type on the task."""

    operation: Literal["add", "remove", "set"]
    flow_execution_id: Id
    task_name: TaskName
    tag_type: TagType
    tag: TagName
    tag_metadata: TagMetadata = None

    @property
    def any_metadata(self) -> bool:
        """Whether this removes the tag with any metadata."""
        return self.operation == "remove" and "tag_metadata" not in self.model_fields_set


class Condition(StrictModel):
    """A tag that must, or must not, be active for a batch to take effect."""

    flow_execution_id: Id
    task_name: TaskName
    tag_type: TagType
    tag: TagName | None = None
    tag_metadata: TagMetadata = None
    exists: bool

    @model_validator(mode="after")
    def _names_a_tag(self) -> Self:
        if self.tag is None and not self.any_metadata:
            raise PydanticCustomError("condition", "has tag_metadata without a tag")
        return self

    @property
    def any_metadata(self) -> bool:
        """Whether the tag is meant whatever its metadata is."""
        return "tag_metadata" not in self.model_fields_set

    def left_out(self) -> set[str]:
        """Return the fields that its canonical form does not have."""
        names = {"tag"} if self.tag is None else set()
        return names | {"tag_metadata"} if self.any_metadata else names


def _whole_number(value: Any) -> Any:
    if type(value) is not int:  # Literal[1] alone would accept true, which equals 1
        raise PydanticCustomError("literal_error", "must be {expected}", {"expected": "1"})
    return value


class TagBatch(StrictModel):
    """1 to 100 operations, applied together or not at all."""

    schema_version: Annotated[Literal[1], BeforeValidator(_whole_number)]
    batch_id: Id
    reply_to: ReplyTo | None = None
    kind: Literal["tag_batch"]
    tags: Annotated[list[TagOperation], Field(min_length=1, max_length=MAX_OPERATIONS)]
    conditions: Annotated[list[Condition], Field(max_length=MAX_CONDITIONS)] = Field(
        default_factory=list, exclude_if=lambda conditions: not conditions
    )

    @property
    def reply_channel_name(self) -> str:
        """The last part of the results channel: `reply_to`, or the batch id if there is none."""
        return self.reply_to or str(self.batch_id)

    def canonical_bytes(self) -> bytes:
        """Serialize in canonical form; `tag_metadata` stays out where that differs from null."""
        left_out: dict[str, Any] = {}
        without = {
            index: {"tag_metadata"}
            for index, operation in enumerate(self.tags)
            if operation.operation == "remove" and operation.any_metadata
        }
        if without:
            left_out["tags"] = without
        if self.conditions:
            left_out["conditions"] = {
                index: condition.left_out() for index, condition in enumerate(self.conditions)
            }
        return self.model_dump_json(exclude=left_out or None).encode()


def digest(canonical: bytes) -> bytes:
    """Return the SHA-256 digest of a message in canonical form, without what precedes `kind`."""
    return hashlib.sha256(canonical[canonical.index(b'"kind":') :]).digest()


class InvalidMessage(ValueError):
    """The message breaks the contract; `batch_id` is None if none could be read."""

    def __init__(self, batch_id: UUID | None) -> None:
        super().__init__("the message breaks the contract")
        self.batch_id = batch_id


_TAG_BATCH: Final = TypeAdapter(TagBatch)


def parse_canonical(raw: bytes) -> tuple[TagBatch, bytes]:
    """Read one batch; return it with its canonical form. Raises `InvalidMessage`."""
    if len(raw) <= MAX_MESSAGE_BYTES:
        try:
            batch = _TAG_BATCH.validate_json(raw)
        except ValidationError:
            raise InvalidMessage(_batch_id(raw)) from None
        return batch, batch.canonical_bytes()
    raise InvalidMessage(_batch_id(raw))


def _batch_id(raw: bytes) -> UUID | None:
    try:
        return UUID(from_json(raw)["batch_id"])
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
