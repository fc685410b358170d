"""The read endpoint over a real socket: answers, errors, limits, its exact OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from pydantic import SecretStr

from producers.client import TagProducer
from producers.contract.messages import TagBatch, add, register_execution, remove
from tests.support.api_errors import error_of
from tests.support.etag import revision_of
from tests.support.servers import Servers
from worker.api.app import create_app
from worker.api.limits import REQUEST_SECONDS


@pytest.fixture
def execution(producer: TagProducer) -> UUID:
    """An execution with three tags, of which one is removed again: revision 2."""
    execution = uuid4()
    producer.register(execution)
    producer.apply(
        TagBatch(
            tags=[
                add(execution, "extract", "status", "reviewed", {"b": [1, None], "a": "é"}),
                add(execution, "review", "status", "<b>approved</b>"),
                add(execution, "review", "status", "gone"),
            ]
        )
    )
    producer.apply(TagBatch(tags=[remove(execution, "review", "status", "gone")]))
    return execution


def read(http: httpx.Client, execution: UUID | str, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    query = {"flow_execution_id": str(execution), **more}
    return http.get("/task-tags", params=query, headers=headers)


def test_the_application_runs_without_its_server(
    servers: Servers, token: str, execution: UUID
) -> None:
    """As FastAPI users test and mount applications: what only the server adds is not needed."""
    urls = {"redis_url": servers.stack.redis_url, "database_url": servers.endpoint_url}
    secrets = {name: SecretStr(url) for name, url in urls.items()}
    query = {"flow_execution_id": str(execution)}
    app = create_app(servers.settings.model_copy(update=secrets))

    async def use() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client,
        ):
            refused = await client.get("/task-tags", params=query)
            assert error_of(refused)["code"] == "unauthorized"
            client.headers["Authorization"] = f"Bearer {token}"
            assert len((await client.get("/task-tags", params=query)).json()) == 2
            assert error_of(await client.get("/nothing"))["code"] == "not_found"

    asyncio.run(use())


def test_the_active_tags_of_an_execution_are_read(
    http: httpx.Client, execution: UUID, organization: UUID
) -> None:
    """All fields, in order of creation, with the revision as ETag; removed tags are not there."""
    response = read(http, execution)
    assert response.status_code == 200
    assert revision_of(response) == 2
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    first, second = response.json()
    assert (first["task_name"], first["tag_metadata"]) == ("extract", {"a": "é", "b": [1, None]})
    assert second["tag"] == "<b>approved</b>"
    assert list(first) == [
        "id",
        "flow_execution_id",
        "task_name",
        "tag_type",
        "tag",
        "tag_metadata",
        "organization_id",
        "status",
        "created_at",
        "created_by",
        "updated_at",
        "modified_by",
    ]
    assert first["organization_id"] == str(organization)
    assert (first["status"], first["updated_at"], first["modified_by"]) == ("active", None, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["created_at"])


def test_one_tasks_tags_are_read(http: httpx.Client, execution: UUID) -> None:
    """By name, exactly; an unknown task has none."""
    assert [tag["task_name"] for tag in read(http, execution, task_name="review").json()] == [
        "review"
    ]
    for unknown in ("Review", "review ", "'; --", "%"):
        response = read(http, execution, task_name=unknown)
        assert (response.status_code, response.json()) == (200, [])


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ('"2-{t}"', 304),
        ('W/"2-{t}"', 304),
        ('"1-{t}", "2-{t}"', 304),
        ('"1-{t}"', 200),
        ('"2-abc"', 200),
        ('"2"', 200),
        ("2-{t}", 200),
        ('"x"', 200),
        ('"02-{t}"', 200),
        ("*", 304),
        ("*" * 20_000, 200),
        ('"99999999999999999999999"', 200),
    ],
)
def test_a_reader_who_knows_the_revision_gets_304(
    http: httpx.Client, execution: UUID, header: str, status: int
) -> None:
    """And no body; what is no ETag of ours, or one of another history, matches nothing."""
    time = read(http, execution).headers["etag"].strip('"').partition("-")[2]
    header = header.replace("{t}", time)
    response = read(http, execution, headers={"If-None-Match": header})
    assert response.status_code == status
    of_two_lines = [("If-None-Match", '"1-abc"'), ("If-None-Match", header)]
    assert read(http, execution, headers=of_two_lines).status_code == status
    assert revision_of(response) == 2
    assert (response.content == b"") == (status == 304)


def test_an_unknown_and_a_foreign_execution_are_answered_alike(
    servers: Servers, http: httpx.Client, execution: UUID
) -> None:
    """Byte for byte, but for the request id: nobody learns which ids exist elsewhere."""
    with httpx.Client(
        base_url=servers.stack.endpoint_url,
        headers={"Authorization": f"Bearer {servers.token(uuid4())}"},
    ) as stranger:
        foreign, unknown = read(stranger, execution), read(stranger, uuid4())
    for response in (foreign, unknown):
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"
    mask = re.compile(rb'"request_id": "[^"]*"')
    assert mask.sub(b"", foreign.content) == mask.sub(b"", unknown.content)


def test_a_batchs_stored_result_is_read(
    servers: Servers, http: httpx.Client, producer: TagProducer
) -> None:
    """As it was published; 404 while it is unknown, and for other organizations."""
    record = producer.apply(register_execution(uuid4()))
    path = f"/task-tags/batches/{record.batch_id}"
    assert http.get(path).content == record.encode()
    assert http.get(f"/task-tags/batches/{uuid4()}").status_code == 404
    token = servers.token(uuid4())
    assert http.get(path, headers={"Authorization": f"Bearer {token}"}).status_code == 404


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "flow_execution_id"),
        ("flow_execution_id=", "flow_execution_id"),
        ("flow_execution_id=x", "flow_execution_id"),
        ("flow_execution_id=%00", "flow_execution_id"),
        ("flow_execution_id={id}&flow_execution_id={id}", "flow_execution_id"),
        ("flow_execution_id={id}&task_name=", "task_name"),
        ("flow_execution_id={id}&task_name=a%00b", "task_name"),
        ("flow_execution_id={id}&task_name=" + "x" * 201, "task_name"),
        ("flow_execution_id={id}&limit=-1", "limit"),
        ("flow_execution_id={id}&limit=abc", "limit"),
        ("flow_execution_id={id}&unknown=1", "unknown"),
    ],
)
def test_a_wrong_parameter_is_named(http: httpx.Client, query: str, field: str) -> None:
    """400 with the parameter and a reason, without its value."""
    response = http.get(f"/task-tags?{query.format(id=uuid4())}")
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "bad_request"
    assert [detail["field"] for detail in error["details"]] == [field]


@pytest.mark.parametrize(
    "path", ["/task-tags", "/task-executions", "/changes", "/task-tags/batches/x"]
)
def test_many_wrong_parameters_get_a_short_answer(http: httpx.Client, path: str) -> None:
    """Up to 600 of them are looked at, and 100 listed."""
    for count, least in ((400, 100), (3000, 1)):
        response = http.get(f"{path}?{'&'.join(f'x{number}=' for number in range(count))}")
        assert response.status_code == 400
        assert least <= len(error_of(response)["details"]) <= 100


def test_a_bad_batch_id_is_named(http: httpx.Client) -> None:
    """Path parameters are checked as well."""
    for wrong in ("x", "%00", "0" * 500):
        response = http.get(f"/task-tags/batches/{wrong}")
        assert response.status_code == 400
        assert error_of(response)["details"][0]["field"] == "batch_id"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "unauthorized"),
        ({"Authorization": "Bearer"}, 401, "unauthorized"),
        ({"Authorization": "Bearer garbage"}, 401, "unauthorized"),
        ({"Authorization": "Basic dTpw"}, 401, "unauthorized"),
        ({"Authorization": "Bearer " + "x" * 9000}, 401, "unauthorized"),
        ({"Authorization": b"Bearer \xff\xfe"}, 401, "unauthorized"),
    ],
)
def test_a_missing_or_wrong_token_is_401(
    servers: Servers, headers: dict[str, Any], status: int, code: str
) -> None:
    """It is checked before anything else, and it is not in the answer."""
    response = httpx.get(
        f"{servers.stack.endpoint_url}/task-tags?flow_execution_id={uuid4()}", headers=headers
    )
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers["www-authenticate"] == "Bearer"
    assert "garbage" not in response.text


def test_a_token_without_the_scope_is_403(servers: Servers, organization: UUID) -> None:
    """Writing is not reading."""
    token = servers.token(organization, "task-tags:write")
    response = httpx.get(
        f"{servers.stack.endpoint_url}/task-tags?flow_execution_id={uuid4()}",
        headers={"Authorization": f"Bearer {token}"},
    )
    assert response.status_code == 403
    assert error_of(response)["code"] == "forbidden"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(http: httpx.Client, method: str) -> None:
    """405 with all that are allowed; a method that HTTP does not know is a bad request."""
    response = http.request(method, "/task-tags")
    assert response.status_code == (400 if method == "BREW" else 405)
    error_of(response)
    if response.status_code == 405:
        assert response.headers["allow"] == "GET, HEAD, PATCH"


def test_allow_has_the_methods_of_all_routes_of_a_path(http: httpx.Client) -> None:
    """RFC 9110, 15.5.6."""
    allowed = {
        "/task-executions": "GET, HEAD, PUT",
        f"/flow-executions/{uuid4()}": "PUT",
        f"/task-tags/batches/{uuid4()}": "GET, HEAD",
        "/healthz": "GET, HEAD",
        "/": "GET, HEAD",
    }
    found = {path: http.delete(path).headers["allow"] for path in allowed}
    assert found == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/healthz",
        "/readyz",
        "/docs",
        "/openapi.json",
        "/nothing",
        "/task-tags?flow_execution_id={execution}",
        "/task-tags?flow_execution_id={execution}&limit=1",
        "/task-tags?flow_execution_id=x",
        "/task-executions?flow_execution_id={execution}",
        "/task-tags/changes?flow_execution_id={execution}",
        "/task-tags/changes/events?flow_execution_id={execution}",
        "/task-tags/batches/{execution}",
    ],
)
def test_head_is_get_without_the_body(http: httpx.Client, execution: UUID, path: str) -> None:
    """The same status and headers, on a connection that can be used again (RFC 9110, 9.3.2)."""
    url = path.format(execution=execution)
    head = http.head(url)
    assert head.content == b""
    with http.stream("GET", url) as response:
        assert head.status_code == response.status_code
        differing = {"x-request-id", "date"}
        assert {name: value for name, value in head.headers.items() if name not in differing} == {
            name: value
            for name, value in response.headers.items()
            if name not in {*differing, "transfer-encoding"}
        }
    assert http.get("/healthz").status_code == 200


def test_there_may_be_several_spaces_before_the_token(
    servers: Servers, token: str, execution: UUID
) -> None:
    """RFC 9110, 11.4."""
    url = f"{servers.stack.endpoint_url}/task-tags?flow_execution_id={execution}"
    for header, status in ((f"bearer   {token}", 200), (f"Bearer\t{token}", 401)):
        assert httpx.get(url, headers={"Authorization": header}).status_code == status


def test_proxies_are_told_not_to_hold_events_back(http: httpx.Client, execution: UUID) -> None:
    """https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_buffering"""
    url = f"/task-tags/changes/events?flow_execution_id={execution}"
    assert http.head(url).headers["x-accel-buffering"] == "no"


def test_unknown_paths_are_404_in_the_same_shape(http: httpx.Client) -> None:
    """Also with a slash too many, or something odd in them."""
    for path in ("/page", "/nothing", "/task-tags/", "/task-tags/%00", "/../etc/passwd"):
        response = http.get(path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"


def test_health_and_readiness_need_no_token(servers: Servers) -> None:
    """For orchestrators: alive, and able to reach the database and Redis."""
    for path, status in (("/healthz", "alive"), ("/readyz", "ready")):
        response = httpx.get(servers.stack.endpoint_url + path)
        assert (response.status_code, response.json()) == (200, {"status": status})


# --- Limits --------------------------------------------------------------------------------------


def test_a_large_body_is_413(http: httpx.Client) -> None:
    """Before any of it is read."""
    response = http.request("GET", "/task-tags", content=b"x" * (1024 * 1024 + 1))
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /task-tags HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 33_000 + b"\r\n\r\n",
        b"GET /task-tags HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 12_000,
        b"GET /task-tags?x=" + b"x" * 1024 * 1024 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_large_head_is_431(servers: Servers, request_head: bytes) -> None:
    """One long header, very many, or a query of a mebibyte."""
    status, body = raw_request(servers, request_head)
    assert status == 431
    assert json.loads(body)["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "garbage", [b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\x00"]
)
def test_what_is_not_http_is_400(servers: Servers, garbage: bytes) -> None:
    """In the shape of all errors."""
    status, body = raw_request(servers, garbage)
    assert status == 400
    assert json.loads(body)["error"]["code"] == "bad_request"


def test_a_slow_client_is_closed(servers: Servers) -> None:
    """A request that is not complete in time loses its connection; others are served meanwhile."""
    begin = time.monotonic()
    with connect(servers) as slow:
        slow.sendall(b"GET /task-tags HTTP/1.1\r\nHost:")
        assert httpx.get(f"{servers.stack.endpoint_url}/healthz").status_code == 200
        answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert slow.recv(4096) == b""
    assert time.monotonic() - begin >= REQUEST_SECONDS - 1


def test_one_connection_serves_many_requests(servers: Servers) -> None:
    """The limits start again with each request, and pipelined ones are all answered."""
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n"
    with connect(servers) as connection:
        connection.sendall(request * 3)
        received = b""
        while received.count(b'{"status":"alive"}') < 3:
            received += connection.recv(65536)
    assert received.count(b"HTTP/1.1 200") == 3


def connect(servers: Servers) -> socket.socket:
    address = httpx.URL(servers.stack.endpoint_url)
    return socket.create_connection((address.host, address.port or 80), timeout=20)


def raw_request(servers: Servers, head: bytes) -> tuple[int, bytes]:
    with connect(servers) as connection:
        answer = b""
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.sendall(head)
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                answer += chunk
    start, _, body = answer.partition(b"\r\n\r\n")
    return int(start.split(b" ")[1]), body


# --- The document --------------------------------------------------------------------------------


def test_the_document_is_valid_and_its_examples_fit(servers: Servers) -> None:
    """OpenAPI 3.1, with an example for each answer that has a body."""
    document = httpx.get(f"{servers.stack.endpoint_url}/openapi.json").json()
    validate(document)
    assert set(document["paths"]) == {
        "/task-tags",
        "/task-tags/batches/{batch_id}",
        "/task-tags/changes",
        "/task-tags/changes/events",
        "/changes",
        "/changes/events",
        "/task-executions",
        "/flow-executions/{flow_execution_id}",
        "/healthz",
        "/readyz",
    }
    for operation in (each for path in document["paths"].values() for each in path.values()):
        for status, response in operation["responses"].items():
            if status == "304":
                assert "content" not in response
                continue
            content = response["content"].get("application/json")
            if content is None:
                assert response["content"].keys() == {"text/event-stream"}
                continue
            schema = {**content["schema"], "components": document["components"]}
            Draft202012Validator(schema).validate(content["example"])


def test_every_answer_given_is_in_the_document(
    servers: Servers, http: httpx.Client, execution: UUID
) -> None:
    """Status and body of real answers, held against the document."""
    document = httpx.get(f"{servers.stack.endpoint_url}/openapi.json").json()
    tags, batches = "/task-tags", "/task-tags/batches/{batch_id}"
    anonymous = httpx.Client(base_url=servers.stack.endpoint_url)
    etag = read(http, execution).headers["etag"]
    answers = [
        (tags, read(http, execution)),
        (tags, read(http, execution, headers={"If-None-Match": etag})),
        (tags, read(http, uuid4())),
        (tags, read(http, "x")),
        (tags, read(anonymous, execution)),
        (tags, http.request("GET", "/task-tags", content=b"x" * (1024 * 1024 + 1))),
        (batches, http.get(f"/task-tags/batches/{uuid4()}")),
        (batches, http.get("/task-tags/batches/x")),
        ("/healthz", anonymous.get("/healthz")),
        ("/healthz", anonymous.get("/healthz?x=1")),
        ("/readyz", anonymous.get("/readyz")),
    ]
    anonymous.close()
    for path, answer in answers:
        described = document["paths"][path]["get"]["responses"][str(answer.status_code)]
        if answer.status_code == 304:
            continue
        schema = described["content"]["application/json"]["schema"]
        Draft202012Validator({**schema, "components": document["components"]}).validate(
            answer.json()
        )


def test_generated_requests_are_answered_as_the_document_says(
    servers: Servers, token: str, tmp_path: Path
) -> None:
    """No 5xx, no status, header or body that is not described, on all routes (schemathesis)."""
    document = Path(__file__).parents[2] / "docs" / "openapi.json"
    words = [sys.executable, "-m", "schemathesis.cli", "run", str(document), "--no-color"]
    words += ["--url", servers.stack.endpoint_url, "-H", f"Authorization: Bearer {token}"]
    words += ["--phases", "examples,fuzzing", "--max-examples", "8", "--generation-deterministic"]
    # What JSON Schema can't say is refused, too: a cursor that was never given, for example.
    words += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "10"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert "Tested: 12" in ended.stdout


def test_the_docs_page_works_offline(servers: Servers) -> None:
    """It loads nothing from another host."""
    page = httpx.get(f"{servers.stack.endpoint_url}/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        assert link.startswith("/")
        assert httpx.get(servers.stack.endpoint_url + link).status_code == 200
