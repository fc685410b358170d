"""BatchBuilder: collects operations and conditions for one batch of a producer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, Self, TypeVar
from uuid import UUID

from producers.contract.messages import (
    ANY_METADATA,
    Condition,
    TagBatch,
    TagOperation,
    add,
    build,
    remove,
    set_tag,
    unless,
    when,
)

DEFAULT_TIMEOUT_SECONDS: Final = 30.0

Enqueued = TypeVar("Enqueued")
Applied = TypeVar("Applied")


class BatchBuilder(Generic[Enqueued, Applied]):
    """Collects operations, and enqueues or applies them as one batch of its producer."""

    def __init__(
        self,
        enqueue: Callable[[TagBatch], Enqueued],
        apply: Callable[[TagBatch, float | None], Applied],
        batch_id: UUID | None,
    ) -> None:
        self._enqueue = enqueue
        self._apply = apply
        self._batch_id = batch_id
        self._operations: list[TagOperation] = []
        self._conditions: list[Condition] = []

    def when(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str | None = None,
        tag_metadata: Any = ANY_METADATA,
    ) -> Self:
        """Let the batch take effect only if this tag, or any tag of the type, is active."""
        self._conditions.append(when(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def unless(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str | None = None,
        tag_metadata: Any = ANY_METADATA,
    ) -> Self:
        """Let the batch take effect only if no such tag is active."""
        self._conditions.append(unless(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def add(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str,
        tag_metadata: Any = None,
    ) -> Self:
        """Add a tag. The same tag with other metadata is another tag."""
        self._operations.append(add(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def remove(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str,
        tag_metadata: Any = ANY_METADATA,
    ) -> Self:
        """Remove the tag with any metadata, or exactly the one with this metadata (also None)."""
        self._operations.append(remove(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def set(
        self,
        flow_execution_id: UUID | str,
        task_name: str,
        tag_type: str,
        tag: str,
        tag_metadata: Any = None,
    ) -> Self:
        """Make the tag the only active one of its type on the task."""
        self._operations.append(set_tag(flow_execution_id, task_name, tag_type, tag, tag_metadata))
        return self

    def build(self) -> TagBatch:
        """Return the batch. Raises `InvalidMessage` if it has no operation, or more than 100."""
        given = {} if self._batch_id is None else {"batch_id": self._batch_id}
        fields = {"tags": self._operations, "conditions": self._conditions, **given}
        return build(TagBatch, fields)

    def enqueue(self) -> Enqueued:
        """Enqueue the batch; return its id. Raises as `TagProducer.enqueue` does."""
        return self._enqueue(self.build())

    def apply(self, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> Applied:
        """Enqueue the batch and wait for its result, as `TagProducer.apply` does."""
        return self._apply(self.build(), timeout)
