"""Who takes part in the benchmark's write side, and what each has to bring with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol
from uuid import UUID

from producers.contract.messages import TagBatch
from tests.bench.names import CELERY, OURS, RIVAL

Setting = dict[str, int | str]
"""One choice of concurrency. A worker reads it from the environment, as in BENCH_THREADS."""


class Item(NamedTuple):
    """One batch to enqueue; it is serialized by who sends it."""

    organization_id: UUID
    batch: TagBatch
    token: str


class Sender(Protocol):
    """A contender's producer, in the process of the benchmark."""

    def send(self, items: Sequence[Item]) -> None:
        """Enqueue many batches in the fastest documented way."""

    def send_one(self, item: Item) -> None:
        """Enqueue one batch with the ordinary call."""

    def close(self) -> None: ...


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """How to run the workers of one contender, and how to enqueue for them.

    Its settings, of servers and of tokens, come from the environment (`BenchServers.environment`).
    """

    name: str
    settings: Sequence[Setting]
    """The choices to try; the first one is used where there is no time for that."""
    commands: Callable[[Setting], list[list[str]]]
    """The command lines of the processes to start."""
    sender: Callable[[], Sender]
    prepare: Callable[[], None] = _nothing
    """What a fresh database needs besides the product's tables."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What its workers read from the environment, whatever the setting."""
    queue_in_database: bool = False
    """Whether it has connections to PostgreSQL that are not the job's, and must not be cut."""
    answers: bool = False
    """Whether `send_one` returns only when it has the result."""
    groups: bool = False
    """Whether it applies many messages in one transaction, as the product does."""
    ours: bool = False


_MODULES: Final = {
    OURS: "tests.bench.task_tags",
    RIVAL: "tests.bench.peers.grouping_stream",
    CELERY: "tests.bench.peers.plain_celery",
    "Dramatiq": "tests.bench.peers.dramatiq_redis",
    "RQ": "tests.bench.peers.rq_simple",
    "arq": "tests.bench.peers.arq_threads",
    "taskiq": "tests.bench.peers.taskiq_stream",
    "streaq": "tests.bench.peers.streaq_threads",
    "Procrastinate": "tests.bench.peers.procrastinate_threads",
    "DBOS": "tests.bench.peers.dbos_partitioned",
    "direct (FastAPI, ORM)": "tests.bench.peers.direct",
}
NAMES: Final = tuple(_MODULES)


def find(names: Iterable[str] = NAMES) -> tuple[list[Contender], dict[str, str]]:
    """Return the contenders that can be used, and why others can't. Needs the environment."""
    found, absent = [], {}
    for name in names:
        try:
            module: Any = importlib.import_module(_MODULES[name])
        except Exception as error:  # whatever a foreign package raises, it is named
            absent[name] = f"{type(error).__name__}: {error}"
        else:
            found.append(module.CONTENDER)
    return found, absent


def python(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module with this very Python."""
    return [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
