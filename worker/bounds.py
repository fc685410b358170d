"""What a batch may change at most (docs/concepts/contract.md#rule-17), and how it is refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, assert_never
from uuid import UUID

from producers.contract.errors import ErrorDetail, ErrorInfo
from worker.snapshot import stored_metadata, tag_key, type_key
from worker.wire import Batch, Change, Operation, StateChange, encode

MAX_VARIANTS: Final = 250
"""Active tags of a task that differ in their metadata alone."""
MAX_OF_TYPE: Final = 1_000
"""Active tags of one type on a task, for a condition, `set` or `clear`."""
MAX_OF_TYPES: Final = 25_000
"""Active tags of all types that one message names, in conditions and in operations."""
MAX_FOUND: Final = 5
"""Tags that the error for a failed condition names."""
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""Of the change events of one batch together."""
EVENT_FRAME_BYTES: Final = 8 * 1024
"""Of an event without its removals, at most: its own fields, and the change of a state."""
MAX_GROUP_BYTES: Final = 16 * 1024 * 1024
"""A group ends when what it publishes, or the stored events that it loads, reach this size."""


class Refusal(Exception):
    """The batch is answered with an error, and changes nothing."""

    def __init__(self, error: ErrorInfo) -> None:
        self.error = error


class TooLarge(Refusal):
    """The batch would pass a bound; `index` is the operation or condition at which it does."""

    def __init__(self, index: int | None, message: str, field: str | None = None) -> None:
        text = "the message exceeds what one message may change"
        details = [ErrorDetail(index=index, field=field, message=message)]
        super().__init__(ErrorInfo(code="too_large", message=text, details=details))


ExecutionChanges = dict[int, list[Change | StateChange]]
"""What one message changes, by execution, in the order of its operations."""

EVENTS_TOO_LARGE: Final = f"the change events would be larger than {MAX_EVENT_BYTES} bytes"


def check_size(
    batch: Batch,
    changes: ExecutionChanges,
    events: tuple[tuple[UUID, bytes], ...],
) -> None:
    """Raise `TooLarge` with the operation at which the change events pass their bound.

    Only a removal by name alone, and `set`, make more than one change.
    """
    if sum(len(event) for _, event in events) <= MAX_EVENT_BYTES:
        return
    left = {key: deque(changed) for key, changed in changes.items()}
    size = 0
    for index, operation in enumerate(batch.tags):
        of_execution = left.get(operation.flow_execution_id.int, deque())
        size += sum(len(encode(each)) for each in _changes_of(operation, of_execution))
        if size > MAX_EVENT_BYTES:
            raise TooLarge(index, EVENTS_TOO_LARGE)
    raise TooLarge(len(batch.tags) - 1, EVENTS_TOO_LARGE)


def _changes_of(
    operation: Operation, left: deque[Change | StateChange]
) -> Iterator[Change | StateChange]:
    """Take from an execution's changes those of its next operation."""
    wanted = stored_metadata(operation.tag_metadata)

    def is_one(change: Change) -> bool:
        same_tag = tag_key(change.tag) == tag_key(operation)
        is_exact = same_tag and stored_metadata(change.tag.tag_metadata) == wanted
        match operation.operation:
            case "add":
                return change.change == "added" and is_exact
            case "remove":
                is_wanted = same_tag if operation.any_metadata else is_exact
                return change.change == "removed" and is_wanted
            case "set":  # first what it removes, then what it adds
                of_type = type_key(change.tag) == type_key(operation)
                return is_exact if change.change == "added" else of_type and not is_exact
            case _:
                assert_never(operation.operation)

    while left and isinstance(first := left[0], Change) and is_one(first):
        yield left.popleft()
        if first.change == "added" or not (operation.any_metadata or operation.operation == "set"):
            return
