"""What is sent, and to what: batches, their executions, and databases that have tags already."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Final
from uuid import NAMESPACE_OID, UUID, uuid5

import psycopg
from msgspec import Raw

from producers.contract.messages import TagBatch, add
from producers.contract.values import canonical_json
from tests.bench import collector
from tests.bench.contenders import Item
from tests.bench.servers import EMPTY, BenchServers
from worker.snapshot import stored_metadata

REPLY_TO: Final = "bench"
ORGANIZATIONS: Final = 200
"""So many have executions, unless a load has more of them."""
EXECUTIONS: Final = 5
"""Flow executions of each organization."""
METADATA: Final = {"reviewer": "ada"}


@dataclass(frozen=True)
class Load:
    """Batches of `operations` distinct tags, over `organizations`, onto `prefilled` tags."""

    operations: int
    organizations: int
    batches: int = 0
    prefilled: int = 0
    by_organization: bool = False
    """Whether all batches of an organization are enqueued before those of the next one. Otherwise,
    organizations take turns."""

    def __str__(self) -> str:
        order = ", by organization" if self.by_organization else ""
        return (
            f"{self.operations} operations, {self.organizations} organizations{order}, "
            f"{self.prefilled} tags"
        )

    @property
    def template(self) -> str:
        """The name of the database that a run's is a copy of."""
        return f"tags_{self.prefilled}" if self.prefilled else EMPTY


@cache
def organization(number: int) -> UUID:
    return uuid5(NAMESPACE_OID, f"task tags bench, organization {number}")


@cache
def execution(number: int, of: int) -> UUID:
    return uuid5(organization(of), f"execution {number}")


@dataclass
class Batches:
    """Makes the batches of all loads, once: they are the same for each round and contender."""

    servers: BenchServers
    _made: dict[tuple[str, int, int], list[Item]] = field(default_factory=dict)
    _tokens: dict[int, str] = field(default_factory=dict)

    def take(self, load: Load, prefix: str = "t") -> list[Item]:
        """Return the batches of a load. `prefix` begins the names of its tags."""
        made = self._made.setdefault((prefix, load.operations, load.organizations), [])
        if len(made) < load.batches:
            made += [self._make(load, prefix, number) for number in range(len(made), load.batches)]
            collector.freeze()
        taken = made[: load.batches]
        if load.by_organization:
            taken.sort(key=lambda item: item.organization_id.int)
        return taken

    def _make(self, load: Load, prefix: str, number: int) -> Item:
        turn, of = divmod(number, load.organizations)
        flow_execution_id = execution(turn % EXECUTIONS, of)
        tag = f"{prefix}-{load.operations}-{load.organizations}-{number}"  # of no other load
        tags = [
            add(flow_execution_id, f"task-{i}", "review_status", tag, METADATA)
            for i in range(load.operations)
        ]
        return Item(organization(of), TagBatch(reply_to=REPLY_TO, tags=tags), self._token(of))

    def _token(self, of: int) -> str:
        if of not in self._tokens:
            self._tokens[of] = self.servers.token(organization(of))
        return self._tokens[of]


def register(connection: psycopg.Connection, organizations: int = 0) -> None:
    """Store the flow executions of organizations, as their registration would have."""
    numbers = range(max(ORGANIZATIONS, organizations))
    rows = [(organization(of), execution(n, of)) for of in numbers for n in range(EXECUTIONS)]
    connection.execute(
        """
        insert into flow_executions
               (organization_id, flow_execution_id, task_names, revision, created_at,
                changed_at)
        select organization_id, flow_execution_id, null, 0, now(), now()
          from unnest(%s::uuid[], %s::uuid[]) as e (organization_id, flow_execution_id)
            on conflict do nothing
        """,
        [list(column) for column in zip(*rows, strict=True)],
    )


def prefill(servers: BenchServers, load: Load) -> None:
    """Make the database of a load with active tags, spread evenly over all executions."""
    servers.copy(EMPTY, load.template)
    each = load.prefilled // (ORGANIZATIONS * EXECUTIONS)
    text, digest = stored_metadata(Raw(canonical_json(METADATA)))
    with servers.owner(load.template) as connection:
        register(connection)
        connection.execute(
            """
            insert into task_tags (organization_id, id, flow_execution_id, task_name, tag_type, tag,
                                   tag_metadata, metadata_digest, status, created_at, created_by)
            select organization_id, uuidv7(), flow_execution_id, 'task-' || number %% 10,
                   'review_status', 'p' || number, %s::json, %s, 'active', now(), 'bench'
              from generate_series(1, %s) as number, flow_executions
            """,
            [(text or b"").decode(), digest, each],
        )
        connection.execute("vacuum (analyze)")
        connection.execute("checkpoint")
