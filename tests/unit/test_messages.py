"""The contract (docs/concepts/contract.md): what is refused, and with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from producers.batch_builder import BatchBuilder
from producers.contract.encoding import parse_body, parse_message
from producers.contract.errors import InvalidMessage, describe
from producers.contract.messages import (
    TagBatch,
    add,
    register_execution,
    remove,
    set_task_state,
)
from producers.contract.results import ChangeEvent, ResultRecord
from producers.contract.schemas import json_schemas
from producers.contract.values import MAX_METADATA_BYTES, Uuid7

EXECUTION = "6f1c1f9e-3f0c-4b64-9b5f-0a4a6f6f0001"
BATCH = "6f1c1f9e-3f0c-4b64-9b5f-0a4a6f6f00b1"


def message(**fields: Any) -> dict[str, Any]:
    operation = {
        "operation": "add",
        "flow_execution_id": EXECUTION,
        "task_name": "extract_data",
        "tag_type": "review_status",
        "tag": "reviewed",
    }
    whole = {
        "schema_version": 1,
        "kind": "tag_batch",
        "batch_id": BATCH,
        "reply_to": None,
        "tags": [operation],
    }
    return {**whole, **fields}


def tagged(**fields: Any) -> dict[str, Any]:
    """A message with one operation that has these fields."""
    base = message()
    return {**base, "tags": [{**base["tags"][0], **fields}]}


def refused(raw: bytes | dict[str, Any]) -> InvalidMessage:
    with pytest.raises(InvalidMessage) as caught:
        parse_message(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    return caught.value


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (message(schema_version=2), "schema_version: must be 1"),
        (message(schema_version=True), "schema_version: must be 1"),
        (message(schema_version=1.0), "schema_version: must be 1"),
        (message(kind="tags"), "kind: must be 'tag_batch' or 'flow_execution' or 'task_execution'"),
        (message(kind=[]), "kind: must be 'tag_batch' or 'flow_execution' or 'task_execution'"),
        (message(extra=1), "extra: is not a known field"),
        ({**message(), "an odd, long name" * 9: 1}, "is not a known field"),
        (message(reply_to="a b"), "reply_to: must have 1 to 200 of the characters"),
        (message(reply_to="x" * 201), "reply_to: must have 1 to 200 of the characters"),
        (message(reply_to=""), "reply_to: must have 1 to 200 of the characters"),
        (message(reply_to="x\n"), "reply_to: must have 1 to 200 of the characters"),
        (message(tags=[]), "tags: must have at least 1 item(s)"),
        (message(tags=message()["tags"] * 101), "tags: must have at most 100 items"),
        (message(tags=None), "tags: must be a list"),
        (message(tags={}), "tags: must be a list"),
        (message(tags=[1]), "operation 0: must be an object"),
        (tagged(operation="replace"), "operation 0, operation: must be 'add', 'remove' or 'set'"),
        (tagged(flow_execution_id="x"), "operation 0, flow_execution_id: must be a UUID"),
        (tagged(flow_execution_id=7), "operation 0, flow_execution_id: must be a UUID"),
        (tagged(task_name=""), "operation 0, task_name: must have at least 1 character"),
        (tagged(task_name="x" * 201), "operation 0, task_name: must have at most 200 characters"),
        (tagged(tag_type="x" * 101), "operation 0, tag_type: must have at most 100 characters"),
        (tagged(tag="x" * 201), "operation 0, tag: must have at most 200 characters"),
        (tagged(tag=None), "operation 0, tag: must be a string"),
        (tagged(tag=5), "operation 0, tag: must be a string"),
        (tagged(tag="a\0"), "operation 0, tag: must not contain U+0000"),
        (tagged(tag="\ud800"), "operation 0, tag: must not contain lone surrogates"),
        (tagged(tag_metadata="\0"), "operation 0, tag_metadata: must not contain U+0000"),
        (tagged(tag_metadata={"\0": 1}), "operation 0, tag_metadata: must not contain U+0000"),
        (tagged(tag_metadata=["\udfff"]), "operation 0, tag_metadata: must not contain lone"),
        (tagged(tag_metadata=float("nan")), "operation 0, tag_metadata: must not contain NaN"),
        (tagged(tag_metadata=[float("-inf")]), "operation 0, tag_metadata: must not contain NaN"),
        (tagged(tag_metadata=2**63), "operation 0, tag_metadata: must not contain integers beyond"),
        (tagged(tag_metadata=-(2**63) - 1), "tag_metadata: must not contain integers beyond"),
        (tagged(tag_metadata=nested(33)), "tag_metadata: must not be nested deeper than 32 levels"),
        (tagged(tag_metadata="x" * (MAX_METADATA_BYTES - 1)), "must not be larger than 8192 bytes"),
        (
            tagged(tag_metadata="é" * (MAX_METADATA_BYTES // 2)),
            "must not be larger than 8192 bytes",
        ),
        (tagged(colour="red"), "operation 0, colour: is not a known field"),
    ],
)
def test_a_fault_is_named_with_its_place_and_never_quoted(sent: dict[str, Any], said: str) -> None:
    """Every fault has its index, field and reason; the batch id is found, for the answer."""
    error = refused(sent)
    assert said in str(error)
    assert error.batch_id == UUID(BATCH)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b" ", "the message is empty"),
        (b"hello", "the message is not JSON (column 1)"),
        (b'{\n "\xc3\xa4\xff"}', "the message is not UTF-8 (line 2, column 4)"),
        (b"42", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b"{}", "schema_version: is required"),
        (b'{\n\n"tags": [}', "the message is not JSON (line 3, column 10)"),
        (b"[" * 100_000, "the message is nested too deep"),
        (b'{"a":' * 100_000, "the message is nested too deep"),
        (json.dumps(message(batch_id="x")).encode(), "batch_id: must be a UUID"),
        (b'{"schema_version":1,"kind":"tag_batch","tags":[]}', "batch_id: is required"),
        (b'{"pad":"' + b"x" * (20 * 1024 * 1024) + b'"}', "must not be larger than 1048576 bytes"),
    ],
)
def test_a_message_without_a_readable_batch_id_has_nobody_to_answer(raw: bytes, said: str) -> None:
    """Such a message is refused as a whole, and without a crash."""
    error = refused(raw)
    assert said in str(error)
    assert error.batch_id is None


def test_all_faults_are_listed_not_the_first() -> None:
    """A sender learns everything that is wrong at once."""
    base = message()["tags"][0]
    sent = message(
        reply_to="?", tags=[{**base, "tag": "", "operation": "x"}, base, {**base, "task_name": 1}]
    )
    said = {describe(detail) for detail in refused(sent).details}
    assert said == {
        "reply_to: must have 1 to 200 of the characters A-Z a-z 0-9 . _ : -",
        "operation 0, operation: must be 'add', 'remove' or 'set'",
        "operation 0, tag: must have at least 1 character(s)",
        "operation 2, task_name: must be a string",
    }


def test_a_fault_in_a_list_names_its_item() -> None:
    """A registration has no operations."""
    sent = {**message(), "kind": "flow_execution", "flow_execution_id": str(uuid4())}
    del sent["tags"]
    (fault,) = refused({**sent, "task_names": ["a", ""]}).details
    assert describe(fault) == "task_names, item 1: must have at least 1 character(s)"


def test_what_was_sent_is_never_in_the_error() -> None:
    """An error can be logged and shown: neither values nor odd field names are in it."""
    secret = "s3cr3t value"
    sent = {**tagged(tag=secret * 50, operation=secret, flow_execution_id=secret), secret: secret}
    error = refused(sent)
    assert "s3cr3t" not in str(error)
    assert "s3cr3t" not in repr(error.details)


def test_an_error_is_addressed_as_well_as_can_be() -> None:
    """The reply_to of a refused message is used if it is a good one itself."""
    assert refused(message(reply_to="runner-7", tags=[])).reply_to == "runner-7"
    assert refused(message(reply_to="runner 7", tags=[])).reply_to is None


@pytest.mark.parametrize("where", ["schema_version", "tags", "metadata"])
def test_a_doubled_key_is_refused(where: str) -> None:
    """JSON parsers disagree about which of two equal keys counts, so none does."""
    raw = json.dumps(tagged(tag_metadata={"k": 1}))
    first = {"schema_version": "{", "tags": '"tags": [{', "metadata": '"tag_metadata": {'}[where]
    extra = {"schema_version": '"kind": 1, ', "tags": '"tag": "x", ', "metadata": '"k": 2, '}[where]
    error = refused(raw.replace(first, first + extra, 1).encode())
    assert "same key twice" in str(error)
    assert error.batch_id == UUID(BATCH)


@pytest.mark.parametrize("number", ["9" * 5000, "1e131071", "-1e400", "NaN", "Infinity"])
def test_numbers_that_can_not_be_stored_are_refused(number: str) -> None:
    """They would be read back as something else, or not at all."""
    raw = json.dumps(tagged(tag_metadata=7)).replace(
        '"tag_metadata": 7', f'"tag_metadata": {number}'
    )
    assert "tag_metadata: must not contain" in str(refused(raw.encode()))


def test_a_message_of_2_mib_is_answered() -> None:
    """Over the limit of 1 MiB, the batch id is still read."""
    error = refused(tagged(tag="x" * 2 * 1024 * 1024))
    assert "must not be larger than 1048576 bytes" in str(error)
    assert error.batch_id == UUID(BATCH)


@pytest.mark.parametrize(
    "fields",
    [
        {"tag": "x" * 200, "task_name": "y" * 200, "tag_type": "z" * 100},
        {"tag": "é"},
        {"tag": "e\u0301"},
        {"tag": "  spaces kept  "},
        {"tag": "עברית 🎉 \u202e"},
        {"tag": "<script>alert(1)</script>"},
        {"tag": "'; drop table task_tags; --"},
        {"tag_metadata": nested(32)},
        {"tag_metadata": "x" * (MAX_METADATA_BYTES - 2)},
        {"tag_metadata": [2**63 - 1, -(2**63), 0.1, 1e300, True, None, {"ключ": "значение"}]},
    ],
)
def test_what_is_within_the_limits_is_kept_code_point_by_code_point(fields: dict[str, Any]) -> None:
    """Nothing is trimmed, folded or normalised, and the limits themselves are allowed."""
    parsed = parse_message(json.dumps(tagged(**fields)).encode())
    assert isinstance(parsed, TagBatch)
    for name, value in fields.items():
        assert getattr(parsed.tags[0], name) == value


def test_a_message_survives_its_own_encoding() -> None:
    """What the SDK sends is what the worker reads, absent metadata included."""
    batch = TagBatch(
        reply_to="r",
        tags=[
            add(EXECUTION, "a", "t", "x", {"k": [1, 2.5]}),
            remove(EXECUTION, "a", "t", "x"),
            remove(EXECUTION, "a", "t", "x", None),
        ],
    )
    parsed = parse_message(batch.encode())
    assert parsed == batch
    assert isinstance(parsed, TagBatch)
    assert [operation.any_metadata for operation in parsed.tags] == [False, True, False]
    assert parsed.digest() == batch.digest()


def test_the_digest_is_of_what_is_asked_not_of_how_it_is_spelled() -> None:
    """Sender, order of keys and 1.0 for 1 do not count; any other difference does."""

    def digest(**fields: Any) -> bytes:
        return parse_message(json.dumps(message(**fields)).encode()).digest()

    def of(metadata: Any) -> bytes:
        return digest(tags=tagged(tag_metadata=metadata)["tags"])

    assert digest() == digest(reply_to="elsewhere") == digest(batch_id=str(uuid4()))
    assert of({"a": 1, "b": [2]}) == of({"b": [2.0], "a": 1.0})
    assert of({"a": 1}) != of({"a": 2}) != of(None)
    assert of(None) == digest()  # an `add` without metadata

    def removal(**fields: Any) -> bytes:
        return digest(tags=tagged(operation="remove", **fields)["tags"])

    assert removal() != removal(tag_metadata=None)  # any metadata, or none


@pytest.mark.parametrize("fields", [1, 2, 9000])
def test_unknown_fields_of_an_object_are_one_fault(fields: int) -> None:
    """However many, at the top and in each operation; so finding them takes little time."""
    unknown = {f"x{number}": 1 for number in range(fields)}
    operation = tagged()["tags"][0]
    body = {"tags": [operation, {**operation, **unknown}], **unknown}
    with pytest.raises(InvalidMessage) as caught:
        parse_body("tag_batch", json.dumps(body).encode())
    places = [(detail.index, detail.field, detail.message) for detail in caught.value.details]
    assert places == [(None, "x0", "is not a known field"), (1, "x0", "is not a known field")]


def test_the_sdk_refuses_what_the_worker_would_refuse() -> None:
    """A flow runner gets the error where it makes the value, and the error does not repeat it."""
    with pytest.raises(InvalidMessage, match="tag: must have at most 200 characters") as caught:
        add(EXECUTION, "a", "t", "secret" * 100)
    assert "secretsecret" not in str(caught.value)
    wrong: list[Callable[[], object]] = [
        lambda: remove("no id", "a", "t", "x"),
        lambda: register_execution(EXECUTION, "review"),
        lambda: set_task_state(EXECUTION, "a", "unheard of"),  # type: ignore[arg-type]
        lambda: BatchBuilder(str, str, None).build(),  # type: ignore[arg-type]
    ]
    for make in wrong:
        with pytest.raises(InvalidMessage):
            make()
    with pytest.raises(InvalidMessage, match="1048576"):
        register_execution(EXECUTION, [f"{i:0200d}" for i in range(6000)]).encode()


def test_ids_increase_in_the_order_in_which_they_are_made() -> None:
    """Ids sort in the order of creation, within a microsecond and when the clock steps back."""
    new_id = Uuid7()
    ids = [new_id() for _ in range(2000)] + [new_id(2_000_000_000_000_000) for _ in range(2000)]
    ids += [new_id(1_999_999_999_999_999)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {(id.version, id.variant) for id in ids} == {(7, "specified in RFC 4122")}
    assert ids[2000].int >> 80 == 2_000_000_000_000


def test_schemas_accept_what_the_models_make_and_refuse_what_they_refuse() -> None:
    """The exported JSON Schemas are valid, accept good messages and refuse bad ones."""
    schemas = json_schemas()
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schemas["message"])
    assert validator.is_valid(message())
    assert validator.is_valid(json.loads(TagBatch(tags=[add(EXECUTION, "a", "t", "x")]).encode()))
    for bad in (message(kind="x"), message(tags=[]), message(extra=1), tagged(tag="")):
        assert not validator.is_valid(bad)
    assert not validator.is_valid({k: v for k, v in message().items() if k != "batch_id"})


def test_schemas_do_not_say_that_metadata_left_out_are_null() -> None:
    """In `remove` and in conditions (rules 3 and 18) they differ: a client that fills in defaults
    would ask for something else."""
    models = json_schemas()["message"]["$defs"]
    for name in ("TagOperation", "Condition"):
        assert "tag_metadata" not in models[name]["required"]
        assert "default" not in models[name]["properties"]["tag_metadata"]
    assert models["Condition"]["properties"]["tag"]["default"] is None


@pytest.mark.parametrize(
    "record",
    [
        {"applied_at": "2026-01-01T00:00:00Z", "tags": [{"status": "added"}]},
        {"applied_at": "2026-01-01T00:00:00Z", "flow_execution": {"status": "registered"}},
        {"error": {"code": "conflict", "message": "m", "details": []}},
    ],
)
def test_a_result_record_has_one_outcome(record: dict[str, Any]) -> None:
    """Either statuses or one error, and it is written as it was read."""
    whole = {"batch_id": BATCH, "organization_id": EXECUTION, **record}
    assert json.loads(ResultRecord.decode(json.dumps(whole)).encode()) == whole
    for wrong in (
        {"batch_id": BATCH, "organization_id": EXECUTION},
        {**whole, "tags": [], "error": {"code": "conflict", "message": "m", "details": []}},
    ):
        with pytest.raises(ValidationError):
            ResultRecord.decode(json.dumps(wrong))


def test_a_reader_skips_what_a_newer_worker_says() -> None:
    """Workers and watchers need not be deployed at one moment."""
    event: dict[str, Any] = {
        "organization_id": EXECUTION,
        "flow_execution_id": EXECUTION,
        "flow_id": None,
        "revision": 1,
        "position": 2,
        "cursor": "2-abc",
        "batch_id": BATCH,
        "changed_by": "ada",
        "changed_at": "2026-01-01T00:00:00Z",
        "changes": [],
    }
    newer = {**event, "invented_later": True}
    assert json.loads(ChangeEvent.decode(json.dumps(newer)).encode()) == event


def test_a_reader_accepts_an_event_of_an_older_worker() -> None:
    """It has no place in the organization's feed."""
    event = {
        "organization_id": EXECUTION,
        "flow_execution_id": EXECUTION,
        "revision": 1,
        "batch_id": BATCH,
        "changed_by": "ada",
        "changed_at": "2026-01-01T00:00:00Z",
        "changes": [],
    }
    read = ChangeEvent.decode(json.dumps(event))
    assert (read.revision, read.position, read.cursor, read.flow_id) == (1, None, None, None)


def test_too_many_task_names_are_one_fault() -> None:
    """A mebibyte of wrong names is refused at once, and not name by name."""
    body = json.dumps({"task_names": [""] * 300_000}).encode()
    with pytest.raises(InvalidMessage) as refused:
        parse_body("flow_execution", body, flow_execution_id=uuid4())
    assert [detail.message for detail in refused.value.details] == ["must have at most 10000 items"]
