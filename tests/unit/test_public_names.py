"""What is public in the SDK, and what it costs to import it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import task_tags

PUBLIC = [
    "ANY_METADATA",
    "AsyncTagProducer",
    "AsyncTagReader",
    "BadRequest",
    "BatchBuilder",
    "BatchIdInUse",
    "BatchRefused",
    "Change",
    "ChangeEvent",
    "ChangesRefused",
    "Condition",
    "ConfigurationError",
    "Conflict",
    "ErrorDetail",
    "ErrorInfo",
    "Forbidden",
    "FoundTag",
    "InboxFull",
    "InternalError",
    "InvalidMessage",
    "Message",
    "NotFound",
    "OperationResult",
    "PreconditionFailed",
    "ProducerClosed",
    "RedisOutOfMemory",
    "RegisterExecution",
    "ResultRecord",
    "ResultTimeout",
    "RevisionExpired",
    "SetTaskState",
    "StateChange",
    "Subscriber",
    "Tag",
    "TagBatch",
    "TagOperation",
    "TagProducer",
    "TagReader",
    "Task",
    "TaskExecution",
    "TaskTagsError",
    "TokenExpired",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnknownChange",
    "WaitTimeout",
    "add",
    "batch_id_for",
    "claim",
    "decide",
    "parse_message",
    "register_execution",
    "release",
    "remove",
    "set_tag",
    "set_task_state",
    "split_batches",
    "unless",
    "when",
]


def test_the_public_names_are_these() -> None:
    """A name that is added, renamed or removed is a change of the public interface."""
    assert sorted(task_tags.__all__) == sorted(PUBLIC)
    assert dir(task_tags) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(task_tags, name) is not None
    with pytest.raises(AttributeError):
        _ = task_tags.Inbox


def test_importing_the_module_loads_nothing_of_the_sdk() -> None:
    """So it takes less than 30 ms (here 300): names are loaded at their first use."""
    program = """
import sys, time
began = time.perf_counter()
import task_tags
assert time.perf_counter() - began < 0.3
assert not {"producers", "redis", "pydantic"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
