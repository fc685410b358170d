"""What a batch may change at most: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from producers.contract.errors import ErrorDetail, ErrorInfo
from tests.bench.rival.messages import TagBatch
from tests.bench.rival.results import Change

MAX_VARIANTS: Final = 250
"""Active tags of a task that differ in their metadata alone."""
MAX_OF_TYPE: Final = 1_000
"""Active tags of one type on a task, for a condition or `set`."""
MAX_OF_TYPES: Final = 25_000
"""Active tags of all types that one message names, in conditions and in operations."""
MAX_FOUND: Final = 5
"""Tags that the error for a failed condition names."""
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""Of the change events of one batch together."""
MAX_GROUP_BYTES: Final = 16 * 1024 * 1024
"""At which a group ends: of what it publishes, and of the stored events that it loads."""


class Refusal(Exception):
    """The batch is answered with an error, and changes nothing."""

    def __init__(self, error: ErrorInfo) -> None:
        self.error = error


class TooLarge(Refusal):
    """The batch would pass a bound; `index` is the operation or condition at which it does."""

    def __init__(self, index: int | None, message: str, field: str | None = None) -> None:
        text = "the batch would change more than a batch may"
        details = [ErrorDetail(index=index, field=field, message=message)]
        super().__init__(ErrorInfo(code="too_large", message=text, details=details))


ExecutionChanges = dict[int, list[Change]]
"""What one message changes, by execution, in the order of its operations."""


def check_size(batch: TagBatch, events: tuple[tuple[UUID, bytes], ...]) -> None:
    """Raise `TooLarge` if the change events pass their bound, without finding out where."""
    if sum(len(event) for _, event in events) > MAX_EVENT_BYTES:
        text = f"the change events would be larger than {MAX_EVENT_BYTES} bytes"
        raise TooLarge(len(batch.tags) - 1, text)
