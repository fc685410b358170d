"""Changes of an organization that a test makes itself, and watchers of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from redis import Redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from producers.contract.channels import position_key, positions_channel
from producers.contract.cursors import Cursor
from producers.contract.messages import TagBatch, add, register_execution
from producers.contract.results import encode_position
from tests.support.servers import Servers
from tests.support.tenant import applied
from worker.db.repository import Repository

SECONDS = 15.0


def batch(execution: UUID, tag: str, tag_type: str = "type", metadata: Any = None) -> TagBatch:
    return TagBatch(tags=[add(execution, "task", tag_type, tag, metadata)])


class ChangeSource:
    """An organization whose changes the test stores, and publishes only if it says so."""

    def __init__(
        self, servers: Servers, repository: Repository, redis: Redis, organization: UUID
    ) -> None:
        self.servers = servers
        self.repository = repository
        self.redis = redis
        self.organization = organization
        self.token = servers.token(organization)
        self.count = 0

    def execution(self) -> UUID:
        execution = uuid4()
        applied(self.repository, self.organization, register_execution(execution))
        return execution

    def change(self, execution: UUID, publish: bool = True, **fields: Any) -> bytes:
        """Make one change; return its event. Unless it is published, its announcement is lost."""
        self.count += 1
        decision = applied(
            self.repository, self.organization, batch(execution, f"{self.count}", **fields)
        )
        ((_, event),) = decision.outcomes[0].events
        self.redis.set(position_key(self.organization), str(decision.head))
        if publish:
            self.announce(execution)
        return event

    def announce(self, *executions: UUID, payload: bytes | None = None) -> None:
        announced = payload or encode_position(Cursor(self.count), executions)
        self.redis.publish(positions_channel(self.organization), announced)

    def url(self, execution: UUID | str | None, **query: Any) -> str:
        """Return the URL of a feed; without an execution, that of the organization."""
        of_one = {} if execution is None else {"flow_execution_id": str(execution)}
        parameters = httpx.QueryParams({**of_one, **query})
        path = "/changes" if execution is None else "/task-tags/changes"
        return f"{self.servers.stack.endpoint_url}{path}?{parameters}"

    def watch(self, execution: UUID | str | None, **query: Any) -> ClientConnection:
        """Watch with the token in the header."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self.url(execution, **query).replace("http://", "ws://")
        return connect(url, additional_headers=headers, max_size=None, max_queue=None)

    def watch_with(self, frame: str | bytes, execution: UUID | str, **query: Any) -> Any:
        """Watch with a first frame, as browsers do."""
        socket = connect(self.url(execution, **query).replace("http://", "ws://"), max_size=None)
        socket.send(frame)
        return socket

    @contextmanager
    def stream(
        self, execution: UUID | None, last: str = "", **query: Any
    ) -> Iterator[Iterator[str]]:
        """Watch as Server-Sent Events, line by line."""
        headers = {
            "Authorization": f"Bearer {self.token}",
            **({"Last-Event-ID": last} if last else {}),
        }
        url = self.url(execution, **query).replace("/changes?", "/changes/events?")
        with httpx.stream("GET", url, headers=headers, timeout=SECONDS) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            yield response.iter_lines()


def take(watching: ClientConnection, count: int) -> list[int]:
    """Return the revisions of the next events."""
    return [json.loads(watching.recv(SECONDS))["revision"] for _ in range(count)]


def nothing_more(watching: ClientConnection) -> None:
    """Check that nothing else was sent: a ping is answered behind all that was."""
    assert watching.ping().wait(SECONDS)
    with pytest.raises(TimeoutError):
        watching.recv(0)


def refused(watching: ClientConnection) -> tuple[int, str]:
    """Return the code of the close frame, and the code of the error before it."""
    error = json.loads(watching.recv(SECONDS))
    assert error.keys() == {"error", "request_id"}
    with pytest.raises(ConnectionClosed) as closed:
        watching.recv(SECONDS)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.reason == error["error"]["message"]
    return closed.value.rcvd.code, error["error"]["code"]
