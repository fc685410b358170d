"""An upgrade while batches are sent: workers first, then endpoints, then producers.

The other version is the commit before conditions, `set` and `clear`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from redis import Redis

from producers.client import TagProducer
from producers.contract.cursors import Cursor, microseconds
from producers.contract.messages import (
    Message,
    TagBatch,
    add,
    register_execution,
    set_tag,
    set_task_state,
    when,
)
from producers.contract.results import ChangeEvent
from producers.errors import BadRequest
from tests.support.database import own_database
from tests.support.processes import await_line, settings_of, started
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.db.migrate import migrate
from worker.local.stack import free_port

REPOSITORY = Path(__file__).parents[2]
BEFORE = "4969d9292b92ccc262062f0a3b5c38374f277faa"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older version's code."""
    archive = ["git", "archive", BEFORE, "producers", "worker", "celeryconfig.py", "task_tags.py"]
    found = subprocess.run(archive, cwd=REPOSITORY, capture_output=True)
    if found.returncode:
        pytest.skip(f"the commit {BEFORE[:7]} is not in this clone")
    directory = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as files:
        if sys.version_info >= (3, 12):  # Python 3.11.4 has it as well, and 3.11.2 does not
            files.extractall(directory, filter="data")
        else:
            files.extractall(directory)
    return directory


@pytest.fixture
def redis_url(servers: Servers, quiet_redis: Redis) -> str:
    return servers.stack.redis_url.replace("?db=0", "?db=1")


@contextmanager
def worker(servers: Servers, redis_url: str, log: Path, code: Path | None = None) -> Iterator[None]:
    environment = settings_of(servers, TASK_TAGS_REDIS_URL=redis_url)
    if code is not None:
        environment["PYTHONPATH"] = str(code)
    words = ["celery", "-A", "worker", "worker", "--without-gossip", "--without-mingle"]
    with started(words, log, environment):
        await_line(log, "ready.", 60)
        yield


def test_an_older_worker_refuses_what_it_does_not_know(
    servers: Servers, redis_url: str, organization: UUID, token: str, older: Path, tmp_path: Path
) -> None:
    """And changes nothing; the same batch takes effect once the worker knows it.

    What the older one stored has its place in the organization's feed behind the migration.
    """
    execution = uuid4()
    pending = set_tag(execution, "task", "status", "pending")
    label = add(execution, "task", "label", "x")
    conditional = TagBatch(tags=[label], conditions=[when(execution, "task", "status")])
    unknown: list[Message] = [
        TagBatch(tags=[pending]),
        conditional,
        set_task_state(execution, "task", "running", clear=["label"]),
    ]
    producing = TagProducer(redis_url=redis_url, organization_id=organization, token=token)
    with own_database(servers, "upgraded") as own, producing as producer:
        migrate_with(older, own.owner_url)
        with worker(own, redis_url, tmp_path / "older.log", older):
            producer.apply(register_execution(execution))
            for message in unknown:
                with pytest.raises(BadRequest):
                    producer.apply(message)
            for tag in ("older", "old"):
                producer.apply(TagBatch(tags=[add(execution, "task", "status", tag, 1e300)]))
        with own.owner() as owner:
            tags = owner.execute("select tag from task_tags order by created_at")
            assert tags.fetchall() == [("older",), ("old",)]
        migrate(own.owner_url, {})
        with worker(own, redis_url, tmp_path / "newer.log"):
            statuses = [producer.apply(message).statuses for message in unknown]
            assert statuses == [["replaced"], ["added"], ["recorded"]]
        with own.owner() as owner:
            rows = owner.execute(
                "select event::text, changed_at, position from tag_changes order by position"
            ).fetchall()
            heads = owner.execute(
                "select o.position, o.changed_at, e.revision, e.changed_at "
                "from organizations o join flow_executions e using (organization_id)"
            ).fetchall()
    events = [ChangeEvent.decode(text) for text, _, _ in rows]
    assert [(event.position, event.revision) for event in events] == [(n, n) for n in range(1, 6)]
    for (_, changed_at, position), event in zip(rows, events, strict=True):
        assert event.cursor == str(Cursor(position, microseconds(changed_at)))
    assert heads == [(5, rows[-1][1], 5, rows[-1][1])]
    assert "1e+300" in rows[0][0] or "1e300" in rows[0][0]


def migrate_with(code: Path, owner_url: str) -> None:
    """Bring a database to the schema of another version."""
    subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from worker.db.migrate import migrate; migrate(sys.argv[1], {})",
            owner_url,
        ],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd="/",
        check=True,
        timeout=60,
    )


OLDER_CLIENT = """
import json, sys
from uuid import uuid4
from task_tags import ResultRecord, TagProducer, add, parse_message
execution = uuid4()
with TagProducer() as producer:
    producer.register(execution)
    one = producer.apply(producer.batch().add(execution, "task", "label", "x").build())
    two = producer.apply(producer.batch().remove(execution, "task", "label", "x").build())
newer = ResultRecord.decode(sys.stdin.buffer.read())
print(json.dumps([one.statuses, two.statuses, newer.statuses]))
"""


def test_an_older_endpoint_works_with_a_newer_worker_and_then_a_newer_one_takes_over(
    servers: Servers, redis_url: str, organization: UUID, token: str, older: Path, tmp_path: Path
) -> None:
    """Writes and reads go on; only the newer endpoint knows conditions, `set` and `clear`."""
    execution, headers = str(uuid4()), {"Authorization": f"Bearer {token}"}
    named = {"flow_execution_id": execution, "task_name": "task", "tag_type": "status"}
    plain = {"tags": [{"operation": "add", **named, "tag": "pending"}]}
    decision = {
        "conditions": [{**named, "tag": "pending", "exists": True}],
        "tags": [{"operation": "set", **named, "tag": "approved"}],
    }
    again = {"flow_execution_id": execution, "task_name": "task", "state": "running"}
    again["clear"] = ["status"]  # type: ignore[assignment]
    with own_database(servers, "endpoints") as own:
        migrate_with(older, own.owner_url)
        migrate(own.owner_url, {})
        with worker(own, redis_url, tmp_path / "worker.log"):
            with endpoint(own, redis_url, headers, tmp_path / "older.log", older) as http:
                assert http.put(f"/flow-executions/{execution}", json={}).status_code == 201
                assert http.patch("/task-tags", json=plain).status_code == 200
                assert tags_of(http, execution) == ["pending"]
                assert http.patch("/task-tags", json=decision).status_code == 400
                assert http.put("/task-executions", json=again).status_code == 400
                assert tags_of(http, execution) == ["pending"]
            with endpoint(own, redis_url, headers, tmp_path / "newer.log") as http:
                assert tags_of(http, execution) == ["pending"]
                assert http.patch("/task-tags", json=decision).status_code == 200
                assert http.patch("/task-tags", json=decision).status_code == 412
                assert tags_of(http, execution) == ["approved"]
                assert http.put("/task-executions", json=again).json()["cleared"] == 1
                assert tags_of(http, execution) == []


def tags_of(http: httpx.Client, execution: str) -> list[str]:
    response = http.get("/task-tags", params={"flow_execution_id": execution})
    return [tag["tag"] for tag in response.json()]


@contextmanager
def endpoint(
    servers: Servers,
    redis_url: str,
    headers: dict[str, str],
    log: Path,
    code: Path | None = None,
) -> Iterator[httpx.Client]:
    """Run an endpoint of this version, or of other code; yield a client of it."""
    environment = settings_of(servers, TASK_TAGS_REDIS_URL=redis_url)
    environment["TASK_TAGS_DATABASE_URL"] = servers.endpoint_url
    if code is not None:
        environment["PYTHONPATH"] = str(code)
    port = free_port(0)
    with (
        started(["task-tags-admin", "endpoint", "--port", str(port)], log, environment),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as http,
    ):
        eventually(lambda: is_ready(http), 60)
        yield http


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_an_older_producer_works_with_a_newer_worker(
    servers: Servers, producer: TagProducer, organization: UUID, token: str, older: Path
) -> None:
    """And reads results that have a status which it does not know."""
    execution = uuid4()
    producer.register(execution)
    producer.apply(TagBatch(tags=[add(execution, "task", "status", "old")]))
    replaced = producer.apply(TagBatch(tags=[set_tag(execution, "task", "status", "new")]))
    settings = {
        "TASK_TAGS_REDIS_URL": servers.stack.redis_url,
        "TASK_TAGS_ORGANIZATION_ID": str(organization),
        "TASK_TAGS_TOKEN": token,
    }
    ended = subprocess.run(
        [sys.executable, "-c", OLDER_CLIENT],
        input=replaced.encode(),
        env={**os.environ, **settings, "PYTHONPATH": str(older)},
        cwd="/",
        capture_output=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert json.loads(ended.stdout) == [["added"], ["removed"], ["replaced"]]
