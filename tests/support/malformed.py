"""Input that must do no harm: malformed stream entries and malformed Celery messages."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
from typing import Any, Final
from uuid import uuid4

from producers.inbox.drain_message import DRAIN_TASK, QUEUE

ORGANIZATION: Final = b"01970000-0000-7000-8000-000000000404"
_MEBIBYTE: Final = 1024 * 1024


def stream_entries() -> dict[str, dict[str, bytes | str]]:
    """Return entries of an inbox that nobody can apply, by what is wrong with each."""
    messages: dict[str, bytes | str] = {
        "nothing": "",
        "a word": "hello",
        "not UTF-8": b"\xff\xfe",
        "a number": "42",
        "null": "null",
        "a list": "[]",
        "an empty object": "{}",
        "100,000 levels": "[" * 100_000,
        "an integer of 5,000 digits": _message(number=0).replace("0", "9" * 5000),
        "20 MB": "x" * 20 * _MEBIBYTE,
        "20 MB of a batch": _message(tags="x" * 20 * _MEBIBYTE),
        "doubled keys": '{"batch_id": "1", "batch_id": "2"}',
        "an unknown kind": _message(kind="unknown"),
        "an unknown version": _message(schema_version=2),
        "an unknown field": _message(unknown=1),
        "no operations": _message(tags=[]),
        "101 operations": _message(tags=[_operation()] * 101),
        **{
            f"a wrong {name}": _message(**{name: [{}]}) for name in ("kind", "batch_id", "reply_to")
        },
        **{f"a wrong {name}": _message(tags=[_operation(**{name: {}})]) for name in _operation()},
    }
    entries: dict[str, dict[str, bytes | str]] = {
        name: {"message": message, "token": "t"} for name, message in messages.items()
    }
    return {"no fields of ours": {"x": "y"}, "no token": {"message": _message()}, **entries}


def _message(**fields: Any) -> str:
    base = {"schema_version": 1, "kind": "tag_batch", "batch_id": str(uuid4()), "reply_to": None}
    return json.dumps({**base, "tags": [_operation()], **fields})


def _operation(**fields: Any) -> dict[str, Any]:
    tag = {"task_name": "task", "tag_type": "type", "tag": "tag"}
    return {"operation": "add", "flow_execution_id": str(uuid4()), **tag, **fields}


def celery_messages() -> dict[str, bytes]:
    """Return malformed messages for the Celery queue, by what is wrong with each."""
    wrong: dict[str, Any] = {
        "null": None,
        "a list": [],
        "an empty object": {},
        "a number": 5,
        "no headers": _envelope(headers=None),
        "headers that are a list": _envelope(headers=[]),
        "no properties": _envelope(properties={}),
        "properties null": _envelope(properties=None),
        "no delivery info": _envelope(properties={"delivery_tag": "x"}),
        "no id": _envelope(headers={"task": DRAIN_TASK}),
        "no task": _envelope(headers={"id": str(uuid4())}),
        "unknown task": _drain(task="unknown"),
        "a task that is a list": _drain(task=["x"]),
        "an id that is a list": _drain(id=["x"]),
        "pickle": _envelope(pickle.dumps([[], {}, {}]), "application/x-python-serialize", "binary"),
        "yaml": _envelope(b"- []\n- {}\n- {}\n", "application/x-yaml"),
        "no content type": {**_envelope(), "content-type": None},
        "an encoding that is none": {**_envelope(), "content-encoding": "no such"},
        "a body that is not base64": {**_envelope(), "body": "\x00!"},
        "a body that is null": _envelope(b"null"),
        "a body that is cut off": _envelope(b'[["a", "b"'),
        "a body of other types": _envelope(b'["a", "b", "c"]'),
        "a gzip bomb": _bomb(),
        "an eta that is none": _drain(eta="garbage"),
        "an eta far away": _drain(eta="9999-12-31T23:59:59+00:00"),
        "an expiry that is none": _drain(expires="garbage"),
        "a time limit that is none": _drain(timelimit="garbage"),
        "callbacks": _embedding(callbacks=[{"task": "unknown", "args": [], "options": {}}]),
        "callbacks that are none": _embedding(callbacks=[5], errbacks="x"),
        "a chain that is none": _embedding(chain=[None]),
        "a chord": _embedding(chord={"task": "unknown", "args": [], "kwargs": {}, "options": {}}),
        "no arguments": _drain([]),
        "wrong arguments": _drain([None, 5]),
        "too many arguments": _drain(["a", "b", "c"]),
        "an unknown organization": _drain([str(uuid4()), str(uuid4())]),
    }
    return {
        "not JSON": b"not json",
        "not UTF-8": b"\xff\xfe",
        "nothing": b"",
        "100,000 levels": b"[" * 100_000,
        **{name: json.dumps(each).encode() for name, each in wrong.items()},
    }


def _drain(arguments: list[Any] | None = None, **headers: Any) -> dict[str, Any]:
    arguments = [str(uuid4()), str(uuid4())] if arguments is None else arguments
    body = json.dumps([arguments, {}, {}]).encode()
    return _envelope(body, headers={**_headers(), **headers})


def _embedding(**embedded: Any) -> dict[str, Any]:
    return _envelope(json.dumps([[str(uuid4()), str(uuid4())], {}, embedded]).encode())


def _bomb() -> dict[str, Any]:
    body = gzip.compress(b"[" + b" " * 40 * _MEBIBYTE + b"]")
    return _envelope(body, headers={**_headers(), "compression": "application/x-gzip"})


def _headers() -> dict[str, Any]:
    return {"task": DRAIN_TASK, "id": str(uuid4()), "lang": "py"}


def _envelope(
    body: bytes = b'[["%b", "%b"], {}, {}]' % (ORGANIZATION, ORGANIZATION),
    content_type: str = "application/json",
    content_encoding: str = "utf-8",
    **changes: Any,
) -> dict[str, Any]:
    return {
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": content_encoding,
        "headers": _headers(),
        "properties": {
            "delivery_tag": "x",
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
        **changes,
    }
