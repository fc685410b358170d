"""The public names of the SDK: `from task_tags import TagProducer`.

They are loaded at their first use, so `import task_tags` is fast. A name that is not listed here is
private, and may change without notice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# fmt: off
if TYPE_CHECKING:
    from producers.batch_builder import BatchBuilder
    from producers.client import AsyncTagProducer, TagProducer
    from producers.contract.encoding import parse_message
    from producers.contract.errors import ErrorDetail, ErrorInfo, FoundTag, InvalidMessage
    from producers.contract.messages import (
        ANY_METADATA, Condition, Message, RegisterExecution, SetTaskState, TagBatch, TagOperation,
        add, claim, decide, register_execution, release, remove, set_tag, set_task_state,
        split_batches, unless, when
    )
    from producers.contract.results import (
        Change, ChangeEvent, OperationResult, ResultRecord, StateChange, Tag, Task,
        TaskExecution, UnknownChange
    )
    from producers.contract.values import batch_id_for
    from producers.errors import (
        BadRequest, BatchIdInUse, BatchRefused, ChangesRefused, ConfigurationError, Conflict,
        Forbidden, InboxFull, InternalError, NotFound,
        PreconditionFailed, ProducerClosed, RedisOutOfMemory, ResultTimeout, RevisionExpired,
        TaskTagsError, TokenExpired, TooLarge, Unauthorized, Unavailable, WaitTimeout
    )
    from producers.subscriber import Subscriber
    from producers.tag_reader import AsyncTagReader, TagReader

__all__ = [
    "ANY_METADATA", "AsyncTagProducer", "AsyncTagReader", "BadRequest", "BatchBuilder",
    "BatchIdInUse", "BatchRefused", "Change", "ChangeEvent", "ChangesRefused", "Condition",
    "ConfigurationError", "Conflict", "ErrorDetail", "ErrorInfo", "Forbidden", "FoundTag",
    "InboxFull", "InternalError", "InvalidMessage", "Message", "NotFound", "OperationResult",
    "PreconditionFailed", "ProducerClosed", "RedisOutOfMemory", "RegisterExecution", "ResultRecord",
    "ResultTimeout", "RevisionExpired", "SetTaskState", "StateChange", "Subscriber", "Tag",
    "TagBatch", "TagOperation", "TagProducer", "TagReader", "Task", "TaskExecution",
    "TaskTagsError", "TokenExpired", "TooLarge", "Unauthorized", "Unavailable", "UnknownChange",
    "WaitTimeout", "add", "batch_id_for", "claim", "decide", "parse_message",
    "register_execution", "release", "remove", "set_tag", "set_task_state", "split_batches",
    "unless", "when",
]
# fmt: on

_MODULES = (
    *("contract.values", "contract.errors", "contract.messages", "contract.encoding"),
    *("contract.results", "errors"),
    *("client", "subscriber", "tag_reader"),
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f"producers.{module}"))
            if name in found:
                return globals().setdefault(name, found[name])
    raise AttributeError(f"module 'task_tags' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
