"""The AsyncAPI and OpenAPI documents: they are valid, and true to the code.

asyncapi-3.0.0.schema.json is the official JSON Schema of AsyncAPI, as it is in @asyncapi/specs
6.11.1 (schemas/3.0.0-without-$id.json). Apache-2.0; Copyright 2016-2025 AsyncAPI Initiative. This
product includes software developed at AsyncAPI Initiative (http://www.asyncapi.com/).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
from jsonschema import Draft7Validator, FormatChecker
from ruamel.yaml import YAML

from producers.contract.channels import (
    changes_channel,
    inbox_key,
    positions_channel,
    results_channel,
)
from producers.contract.cursors import Cursor
from producers.contract.encoding import MAX_DETAILS, parse_message
from producers.contract.errors import ErrorDetail, ErrorInfo, InvalidMessage
from producers.contract.messages import (
    ANY_METADATA,
    MAX_MESSAGE_BYTES,
    RegisterExecution,
    SetTaskState,
    TagBatch,
    add,
    remove,
)
from producers.contract.results import (
    Change,
    ChangeEvent,
    OperationResult,
    Recording,
    Registration,
    ResultRecord,
    StateChange,
    Tag,
    Task,
    encode_position,
)
from producers.contract.schemas import asyncapi_document, json_schemas
from producers.contract.values import uuid7
from worker.api.errors import ApiError, ErrorAnswer
from worker.api.feeds import Frame, receive_token

REPOSITORY: Final = Path(__file__).parents[2]
OPENAPI: Final = REPOSITORY / "docs" / "openapi.json"
INBOX: Final = {
    "tag_batch": "TagBatch",
    "flow_execution": "RegisterExecution",
    "task_execution": "SetTaskState",
}

document: Final = YAML(typ="safe", pure=True).load(asyncapi_document())
"""No key is doubled in it: this parser would refuse that."""
openapi: Final = json.loads(OPENAPI.read_text())
specification: Final = Draft7Validator(
    json.loads((REPOSITORY / "tests" / "support" / "asyncapi-3.0.0.schema.json").read_text())
)


def schema(name: str) -> Draft7Validator:
    """Return a validator for a schema of the AsyncAPI document, whose dialect extends draft 7."""
    root = {"allOf": [{"$ref": f"#/components/schemas/{name}"}], "components": components()}
    return Draft7Validator(root, format_checker=FormatChecker())


def components() -> Any:
    return document["components"]


def references(node: Any) -> Iterator[dict[str, Any]]:
    """Yield each object of the document that has a reference."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolved(reference: dict[str, str]) -> Any:
    """Return what a reference in the document stands for; `KeyError` if it leads nowhere."""
    node: Any = document
    start, *steps = reference["$ref"].split("/")
    assert start == "#"
    for step in steps:
        node = node[step]
    return node


def without_nulls(value: Any) -> Any:
    def kept(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: each for name, each in fields.items() if each is not None}

    return json.loads(json.dumps(value), object_hook=kept)


# --- The AsyncAPI document -----------------------------------------------------------------------


def test_the_asyncapi_document_is_valid() -> None:
    """By the official JSON Schema of AsyncAPI 3.0.0, which does refuse what is wrong."""
    assert [error.message for error in specification.iter_errors(document)] == []
    wrong = deepcopy(document)
    wrong["operations"]["send_result"]["action"] = "publish"
    assert not specification.is_valid(wrong)
    wrong = deepcopy(document)
    wrong["components"]["schemas"]["Tag"]["type"] = "thing"
    assert not specification.is_valid(wrong)


def test_every_reference_leads_somewhere() -> None:
    """And stands alone: in draft 7, what is beside a reference does not count."""
    found = list(references(document))
    assert len(found) > 40
    for reference in found:
        assert reference.keys() == {"$ref"}
        resolved(reference)


def test_everything_that_is_described_is_used() -> None:
    """Channels by operations, messages by channels and by operations in each direction."""
    operations = document["operations"].values()
    used = {operation["channel"]["$ref"] for operation in operations}
    assert used == {f"#/channels/{name}" for name in document["channels"]}
    for name, channel in document["channels"].items():
        carried = {
            message["$ref"]
            for operation in operations
            if operation["channel"]["$ref"] == f"#/channels/{name}"
            for message in operation["messages"]
        }
        assert carried == {f"#/channels/{name}/messages/{each}" for each in channel["messages"]}
    messages = {name for channel in document["channels"].values() for name in channel["messages"]}
    assert messages == components()["messages"].keys()
    parameters = {
        (name, reference["$ref"])
        for channel in document["channels"].values()
        for name, reference in channel.get("parameters", {}).items()
    }
    described = components()["parameters"]
    assert parameters == {(name, f"#/components/parameters/{name}") for name in described}


def test_messages_are_named_for_their_schemas() -> None:
    """As the models are, and those of the inbox by their kinds."""
    messages = components()["messages"]
    for message in messages.values():
        assert message["payload"]["$ref"] == f"#/components/schemas/{message['name']}"
    assert {name: messages[name]["name"] for name in INBOX} == INBOX


def test_channel_names_are_those_of_the_contract() -> None:
    """With its parameters filled in, an address is the name that the product uses, with braces."""
    organization, execution = uuid4(), uuid4()
    values = {
        "organization_in_braces": f"{{{organization}}}",
        "reply_to": "runner-9",
        "flow_execution_id": str(execution),
    }
    named = {}
    for name, channel in document["channels"].items():
        address = channel["address"]
        for parameter in channel.get("parameters", {}):
            assert address.count(f"{{{parameter}}}") == 1
            address = address.replace(f"{{{parameter}}}", f"<{parameter}>")
        assert "{" not in address
        for parameter, value in values.items():
            address = address.replace(f"<{parameter}>", value)
        named[name] = address
    assert named == {
        "inbox": inbox_key(organization),
        "results": results_channel(organization, "runner-9"),
        "changes": changes_channel(organization, execution),
        "positions": positions_channel(organization),
        "watch": "/task-tags/changes",
        "watch_all": "/changes",
    }


def test_the_limit_of_a_message_is_that_of_the_contract() -> None:
    """The AsyncAPI document has no keyword for it, so the description says it."""
    assert f" {MAX_MESSAGE_BYTES} bytes at most" in document["channels"]["inbox"]["description"]


def test_the_number_of_faults_that_are_listed_is_that_of_the_contract() -> None:
    contract = (REPOSITORY / "docs" / "concepts" / "contract.md").read_text("utf-8")
    assert f"at most {MAX_DETAILS} faults" in contract


def test_schemas_are_those_that_the_models_have() -> None:
    """What `task-tags schema` prints, and nothing else but what the endpoint adds."""
    expected: dict[str, Any] = {}
    for described in json_schemas().values():
        expected.update(described.pop("$defs"))
        if "title" in described:
            del described["$schema"]
            expected[described["title"]] = described
    rewritten = json.loads(json.dumps(expected).replace("#/$defs/", "#/components/schemas/"))
    del rewritten["ChangeEvent"]["properties"]["changes"]["items"]["discriminator"]
    schemas = dict(components()["schemas"])
    for added in ("Token", "Position", "Progress", "ErrorAnswer", "ErrorBody"):
        del schemas[added]
    assert schemas == rewritten


def test_both_documents_say_that_clear_needs_a_second_scope() -> None:
    """Or a flow runner learns it from the refusal."""
    described = openapi["components"]["schemas"]["StateBody"]["properties"]["clear"]["description"]
    assert "task-tags:write" in described
    message = document["components"]["messages"]["task_execution"]
    assert "`clear` also `task-tags:write`" in message["description"]


def test_both_documents_say_the_same_of_the_endpoint() -> None:
    """The AsyncAPI document has its own copy of a watcher's query string and errors."""
    assert document["info"]["version"] == openapi["info"]["version"]
    assert document["info"]["title"] == openapi["info"]["title"]
    for name in ("ErrorAnswer", "ErrorBody"):
        assert components()["schemas"][name] == openapi["components"]["schemas"][name]
    for channel, path in (("watch", "/task-tags/changes"), ("watch_all", "/changes")):
        query = document["channels"][channel]["bindings"]["ws"]["query"]
        parameters = openapi["paths"][f"{path}/events"]["get"]["parameters"]
        asked = {each["name"]: each for each in parameters if each["in"] == "query"}
        described = {name: each["schema"] for name, each in asked.items()}
        assert without_nulls(query["properties"]) == described  # as FastAPI leaves them out
        assert query["required"] == [name for name, each in asked.items() if each["required"]]


# --- What is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", components()["messages"])
def test_examples_fit_their_schemas(name: str) -> None:
    """Each message has at least one, with fitting headers; the parser takes those of the inbox."""
    message = components()["messages"][name]
    assert message["examples"]
    for example in message["examples"]:
        for part in ("headers", "payload"):
            assert (part in example) == (part in message)
            if part in message:
                schema(message[part]["$ref"].rpartition("/")[2]).validate(example[part])
        if name in INBOX:
            assert parse_message(json.dumps(example["payload"]).encode()).kind == name


def payloads(name: str) -> list[bytes]:
    """Return the examples of a message as JSON, fields in the order of the document."""
    return [compact(each["payload"]) for each in components()["messages"][name]["examples"]]


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def received_and_sent(name: str, sent: bytes) -> bytes:
    """Let the code read a message, and return what it makes of the values that it read."""
    if name in INBOX:
        return parse_message(sent).encode()
    if name == "result":
        return ResultRecord.decode(sent).encode()
    if name == "change_event":
        return ChangeEvent.decode(sent).encode()
    if name == "error":
        answer = ErrorAnswer.model_validate_json(sent)
        problem = ApiError(401, answer.error.code, answer.error.message, answer.error.details)
        return compact(json.loads(problem.body(answer.request_id)))
    if name == "position":
        read = json.loads(sent)
        touched = [UUID(each) for each in read["flow_executions"] or ()]
        return encode_position(Cursor.parse(read["cursor"]), touched or [uuid4()] * 101)
    if name == "progress":
        read = json.loads(sent)
        kind: Any = "caught_up" if "caught_up" in read else "cursor"
        return Frame(kind, Cursor.parse(read["cursor"])).text()
    assert name == "token"
    frame = {"type": "websocket.receive", "text": sent.decode()}
    websocket = SimpleNamespace(receive=AsyncMock(return_value=frame))
    return compact({"token": asyncio.run(receive_token(cast(Any, websocket)))})


@pytest.mark.parametrize("name", components()["messages"])
def test_examples_are_what_the_code_reads_and_writes(name: str) -> None:
    """To the byte: no field is missing, unknown, or in another form or order."""
    for sent in payloads(name):
        assert received_and_sent(name, sent) == sent


def test_correlation_ids_are_where_the_document_says() -> None:
    """In the payloads of all messages that have one."""
    described = components()["correlationIds"]["batch_id"]
    assert described["location"] == "$message.payload#/batch_id"
    for message in components()["messages"].values():
        for example in message["examples"]:
            assert ("batch_id" in example["payload"]) == ("correlationId" in message)


def test_examples_of_parameters_and_messages_belong_together() -> None:
    """Addresses with the examples of parameters are those that the examples of messages name."""

    def addresses(name: str) -> set[str]:
        channel = document["channels"][name]
        found = {channel["address"]}
        for parameter, reference in channel["parameters"].items():
            found = {
                address.replace(f"{{{parameter}}}", value)
                for address in found
                for value in resolved(reference)["examples"]
            }
        return found

    messages = [parse_message(sent) for name in INBOX for sent in payloads(name)]
    records = [ResultRecord.decode(sent) for sent in payloads("result")]
    events = [ChangeEvent.decode(sent) for sent in payloads("change_event")]
    organization = events[0].organization_id
    assert {each.organization_id for each in events} == {organization}
    assert {each.organization_id for each in records} == {organization}
    assert addresses("inbox") == {inbox_key(organization)}
    assert addresses("results") == {
        results_channel(organization, each.reply_channel_name) for each in messages
    }
    assert addresses("positions") == {positions_channel(organization)}
    assert addresses("changes") == {
        changes_channel(organization, each.flow_execution_id) for each in events
    }
    location = components()["parameters"]["flow_execution_id"]["location"]
    assert location == "$message.payload#/flow_execution_id"


EXECUTION: Final = uuid4()
NOW: Final = datetime.now(timezone.utc)
TAG: Final = Tag(
    id=uuid4(),
    flow_execution_id=EXECUTION,
    task_name="é",
    tag_type="t" * 100,
    tag="🎉",
    tag_metadata=[1.5, {"a": None}],
    organization_id=uuid4(),
    status="deleted",
    created_at=NOW,
    created_by="ada",
    updated_at=NOW,
    modified_by="bob",
)
TASK: Final = Task(EXECUTION, "é", "failed", NOW, "ada")
OUTCOMES: Final[list[dict[str, Any]]] = [
    {"tags": [OperationResult(status="not_found")], "applied_at": NOW},
    {"flow_execution": Registration(status="already_exists"), "applied_at": NOW},
    {"task_execution": Recording(status="unchanged"), "applied_at": NOW},
    {"error": ErrorInfo(code="conflict", message="no")},
    {"error": ErrorInfo(code="bad_request", message="no", details=[ErrorDetail(message="bad")])},
]


@pytest.mark.parametrize(
    "sent",
    [
        TagBatch(tags=[add(EXECUTION, "é", "t", "x", {"a": [1, None]})] * 100),
        TagBatch(
            reply_to="a.b_c:d-e",
            tags=[remove(EXECUTION, "t", "t", "x", meta) for meta in (ANY_METADATA, None, 0)],
        ),
        RegisterExecution(flow_execution_id=EXECUTION),
        RegisterExecution(flow_execution_id=EXECUTION, task_names=["é", "b"]),
        SetTaskState(flow_execution_id=EXECUTION, task_name="é", state="queued"),
        *(ResultRecord(batch_id=uuid7(), organization_id=uuid4(), **each) for each in OUTCOMES),
        ChangeEvent(
            organization_id=uuid4(),
            flow_execution_id=EXECUTION,
            revision=1,
            batch_id=uuid7(),
            changed_by="ada",
            changed_at=NOW,
            changes=[Change("removed", TAG), StateChange("state", TASK), Change("added", TAG)],
        ),
    ],
    ids=lambda sent: type(sent).__name__,
)
def test_what_is_really_sent_fits_the_schemas(
    sent: TagBatch | RegisterExecution | SetTaskState | ResultRecord | ChangeEvent,
) -> None:
    """Messages, results and events as the models encode them; each required field is required."""
    name = type(sent).__name__
    fields = json.loads(sent.encode())
    schema(name).validate(fields)
    for required in components()["schemas"][name]["required"]:
        short = {field: value for field, value in fields.items() if field != required}
        assert not schema(name).is_valid(short)


def test_schemas_and_parser_agree_on_the_sample_flow() -> None:
    """Line by line: what the parser takes fits, what it refuses does not."""
    lines = (REPOSITORY / "examples" / "document-review.jsonl").read_bytes().splitlines()
    agreed = []
    for line in lines:
        fields = json.loads(line)
        try:
            parse_message(line)
        except InvalidMessage:
            taken = False
        else:
            taken = True
        assert schema(INBOX[fields["kind"]]).is_valid(fields) == taken, line
        agreed.append(taken)
    assert agreed.count(True) > 20
    assert False in agreed


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "flow_execution"},
        {"schema_version": 2},
        {"batch_id": "x"},
        {"reply_to": "a b"},
        {"tags": []},
        {"surplus": 1},
    ],
)
def test_schemas_refuse_what_the_parser_refuses(change: dict[str, Any]) -> None:
    """So a sender in another language learns of its mistakes before it enqueues."""
    fields = json.loads(TagBatch(tags=[add(EXECUTION, "t", "t", "x")]).encode())
    schema("TagBatch").validate(fields)
    with pytest.raises(InvalidMessage):
        parse_message(json.dumps({**fields, **change}).encode())
    assert not schema("TagBatch").is_valid({**fields, **change})
