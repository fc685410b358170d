"""Real servers for all tests: one stack of embedded PostgreSQL, Valkey, worker, beat and endpoint.

Tests are kept apart by organization, as users are: each makes its own. A test that the running
worker must not help uses Valkey's database 1, which that worker does not read.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from redis import Redis

from producers.client import TagProducer
from producers.contract.messages import register_execution
from producers.redis_client import open_redis
from tests.support.servers import RUNNING_STACK, Servers, attached_stack, servers_of
from tests.support.tenant import EXECUTION, Tenant, listening
from worker.auth import Authorizer
from worker.db.repository import Repository
from worker.local.servers import OUTSIDE
from worker.local.stack import run_stack

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background of a script: the processes under test would ignore Ctrl-C as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests start hundreds of processes; each would compile all modules again, which takes seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

for name in [name for name in os.environ if name.startswith("TASK_TAGS_")]:
    if (
        name != "TASK_TAGS_NO_BROWSER"
    ):  # says what can't be tested here; see tests/support/browser.py
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def data_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Delete the servers' data at the end, where root's is not in the directories of the tests."""
    yield
    for link in tmp_path_factory.getbasetemp().rglob("servers"):
        if link.is_symlink() and OUTSIDE in link.readlink().parents:
            shutil.rmtree(link.readlink(), ignore_errors=True)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if running := os.environ.get(RUNNING_STACK):
        yield servers_of(attached_stack(Path(running)))
        return
    directory = tmp_path_factory.mktemp("a stack")  # with a space, as a user's path may have one
    with run_stack(directory, port=0, workers=1, say=lambda _: None) as stack:
        yield servers_of(stack)


@pytest.fixture
def organization() -> UUID:
    return uuid4()


@pytest.fixture
def token(servers: Servers, organization: UUID) -> str:
    return servers.token(organization)


@pytest.fixture
def producer(servers: Servers, organization: UUID, token: str) -> Iterator[TagProducer]:
    with TagProducer(
        redis_url=servers.stack.redis_url, organization_id=organization, token=token
    ) as producer:
        yield producer


@pytest.fixture
def redis(servers: Servers) -> Iterator[Redis]:
    """The Redis of the running worker."""
    with open_redis(servers.stack.redis_url) as client:
        yield client


@pytest.fixture
def quiet_redis(servers: Servers) -> Iterator[Redis]:
    """A Redis database that no worker looks at."""
    with open_redis(servers.stack.redis_url.replace("?db=0", "?db=1")) as client:
        client.flushdb()
        yield client


@pytest.fixture
def repository(servers: Servers) -> Iterator[Repository]:
    repository = Repository(servers.worker_url)
    yield repository
    repository.close()


@pytest.fixture
def authorizer(servers: Servers) -> Authorizer:
    return Authorizer(servers.settings)


@pytest.fixture
def http(servers: Servers, token: str) -> Iterator[httpx.Client]:
    """A client of the endpoint with a token of the test's organization."""
    with httpx.Client(
        base_url=servers.stack.endpoint_url, headers={"Authorization": f"Bearer {token}"}
    ) as client:
        yield client


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A directory with a space in its name."""
    path = tmp_path / "with a space"
    path.mkdir()
    return path


@pytest.fixture
def tenant(
    servers: Servers,
    quiet_redis: Redis,
    repository: Repository,
    authorizer: Authorizer,
    organization: UUID,
    token: str,
) -> Iterator[Tenant]:
    """An organization with one execution; it collects everything that is published."""
    tenant = Tenant(servers, quiet_redis, repository, authorizer, organization, token)
    tenant.send(register_execution(EXECUTION))
    tenant.drain()
    with listening(tenant):
        yield tenant
