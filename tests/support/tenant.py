"""One organization's inbox on real PostgreSQL and Valkey, and a drain that a test starts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID, uuid4

from producers.contract.channels import lease_key
from producers.contract.messages import Message, TagBatch, add, when
from producers.contract.results import ChangeEvent, ResultRecord
from producers.contract.values import Uuid7
from producers.inbox.drain_message import QUEUE
from producers.inbox.protocol import Inbox
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.auth import Authorizer
from worker.db.repository import Repository, Transaction
from worker.drain.path import Drain
from worker.rules import decide
from worker.snapshot import AuthorizedMessage, Decision

EXECUTION = uuid4()


@dataclass
class Tenant:
    """An organization's inbox, and a drain of it that the test starts by hand."""

    servers: Servers
    redis: Any
    repository: Repository
    authorizer: Authorizer
    organization: UUID
    token: str
    published: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.redis, self.organization)

    def send(self, *messages: Message | bytes, token: str | None = None) -> None:
        raw = [each if isinstance(each, bytes) else each.encode() for each in messages]
        self.inbox.append(raw, self.token if token is None else token, "lease")

    def drain(self, **changes: Any) -> int:
        arguments: dict[str, Any] = {
            "inbox": self.inbox,
            "organization_id": self.organization,
            "run_id": "run",
            "repository": self.repository,
            "authorizer": self.authorizer,
            "rescue": lambda: None,
            "group_size": 100,
            "budget_seconds": 60.0,
            "stopping": lambda: False,
        }
        return Drain(**(arguments | changes)).run()

    def is_requeued(self) -> bool:
        """Return whether the drain is at the end of the Celery queue, and has the lease there."""
        newest = self.redis.lindex(QUEUE, 0)
        if newest is None:
            return False
        arguments = json.loads(base64.b64decode(json.loads(newest)["body"]))[0]
        held = self.redis.get(lease_key(self.organization))
        return (arguments, held) == ([str(self.organization), "run"], b"queued run")

    def records(self) -> list[ResultRecord]:
        return [
            ResultRecord.decode(payload)
            for channel, payload in self.published
            if ":results:" in channel
        ]

    def events(self) -> list[ChangeEvent]:
        return [
            ChangeEvent.decode(payload)
            for channel, payload in self.published
            if ":changes:" in channel
        ]

    def outcomes(self) -> list[Any]:
        """Return the statuses, or the code of the error, of each record that was published."""
        return [outcome(record) for record in self.records()]

    def tags(self) -> list[str]:
        with self.servers.owner() as connection:
            rows = connection.execute(
                "select tag from task_tags where organization_id = %s and status = 'active' "
                "order by created_at, id",
                [self.organization],
            ).fetchall()
        return [tag for (tag,) in rows]


def outcome(record: ResultRecord) -> Any:
    if record.error is not None:
        return record.error.code
    return record.statuses if record.flow_execution is None else record.statuses[0]


@contextmanager
def listening(tenant: Tenant) -> Iterator[None]:
    """Collect what is published, until all of a drain's publications have arrived."""
    original = tenant.drain
    with tenant.redis.pubsub() as pubsub:
        pubsub.psubscribe(f"task-tags:{{{tenant.organization}}}:*")
        eventually(lambda: pubsub.get_message(timeout=1))

        def drain(**changes: Any) -> int:
            try:
                return original(**changes)
            finally:
                tenant.redis.publish(f"task-tags:{{{tenant.organization}}}:end", b"")
                while (each := eventually(lambda: pubsub.get_message(timeout=1)))["data"]:
                    tenant.published.append((each["channel"].decode(), each["data"]))

        tenant.drain = drain  # type: ignore[method-assign]
        yield


@contextmanager
def broken_for(tenant: Tenant, tag: str) -> Iterator[None]:
    """Make the database refuse one tag, as a fault of ours would."""
    with tenant.servers.owner() as connection:
        connection.execute(
            f"alter table task_tags add constraint broken check (tag <> '{tag}') not valid".encode()
        )
        try:
            yield
        finally:
            connection.execute("alter table task_tags drop constraint broken")


@contextmanager
def slow(
    servers: Servers, organization: UUID, work: str, statement: Literal["look-up", "write"]
) -> Iterator[None]:
    """Let PostgreSQL do some work for each batch of an organization, or for its executions."""
    name, of_this = f"slow_{organization.hex}", f"= '{organization}'"
    sql = {
        "write": f"""
            create function {name}() returns trigger language plpgsql as $$ begin
                if new.organization_id {of_this} then {work}; end if;
                return new;
            end $$;
            create trigger {name} before insert on tag_batches
            for each row execute function {name}()
        """,
        "look-up": f"""
            create function {name}() returns boolean language plpgsql as $$ begin
                {work}; return true;
            end $$;
            create policy {name} on flow_executions as restrictive for select to task_tags_worker
            using (case when organization_id {of_this} then {name}() else true end)
        """,
    }
    with servers.owner() as connection:
        connection.execute(sql[statement].encode())
        try:
            yield
        finally:
            connection.execute(f"drop function {name} cascade".encode())


def large_batch(number: int) -> TagBatch:
    """Return a batch of 400 kB, as its look-ups are: names of characters that take four bytes."""
    face = "\U0001f600"

    def key(name: str) -> tuple[str, str, str]:
        return f"{face * 180}{name}{number}", face * 90, face * 180

    names = [f"{each:03}" for each in range(100)]
    return TagBatch(
        tags=[add(EXECUTION, *key(f"t{name}")) for name in names],
        conditions=[when(EXECUTION, *key(f"c{name}")) for name in names],
    )


def tagging(tag: str, **fields: Any) -> TagBatch:
    return TagBatch(tags=[add(EXECUTION, "task", "type", tag)], **fields)


def killed(*_: Any, **__: Any) -> Any:
    """Stands in for a step at which the worker dies."""
    raise RuntimeError("killed")


def requests_of(*messages: Message) -> list[AuthorizedMessage]:
    return [AuthorizedMessage.of(message, "ada") for message in messages]


def applied(repository: Repository, organization: UUID, *messages: Message) -> Decision:
    """Apply messages in one transaction, as a drain does, and return what was decided."""
    requests = requests_of(*messages)

    def apply(transaction: Transaction) -> Decision:
        snapshot, now = transaction.load(requests), transaction.now
        decision = decide(organization, requests, snapshot, now=now, new_id=Uuid7())
        transaction.save(decision.change_set)
        return decision

    return repository.transact(organization, apply)
