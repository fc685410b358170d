"""The direct way: FastAPI and the SQLAlchemy ORM, one transaction a request, no queue.

The rules are the product's (`decide`); reading and writing is the ORM's. Handlers are synchronous
and run in threads, each with a connection of the pool.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Annotated, Any
from uuid import UUID

import anyio.to_thread
from fastapi import Depends, FastAPI, Header, Request, Response
from msgspec import Raw
from sqlalchemy import BigInteger, create_engine, literal_column, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.types import JSON, UserDefinedType

from producers.contract.values import Uuid7, canonical_json
from producers.inbox.protocol import StreamEntry
from producers.redis_client import open_redis
from tests.bench.contenders import Contender, Item, Setting, python
from tests.bench.job import freeze, publish
from tests.bench.peers.loop import Loop
from worker import rules
from worker.auth import Authorizer
from worker.drain.admission import Admitted, Refused, Unreadable, admit
from worker.drain.blame import is_server_fault
from worker.settings import driver_url, load_settings
from worker.snapshot import (
    AuthorizedMessage,
    ChangeSet,
    Execution,
    Outcome,
    Snapshot,
    StoredResult,
    TagKey,
    tag_key,
)
from worker.wire import Batch, Message, Tag

TAG_FIELDS = Tag.__struct_fields__


def threads() -> int:
    """Return how many requests one process works on at once."""
    return int(os.environ.get("BENCH_THREADS", "4"))


# --- Models --------------------------------------------------------------------------------------


class JsonText(UserDefinedType[str]):
    """A column of type json whose value is serialized already."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "JSON"


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSONB}  # noqa: RUF012


class FlowExecutionRow(Base):
    __tablename__ = "flow_executions"
    organization_id: Mapped[UUID] = mapped_column(primary_key=True)
    flow_execution_id: Mapped[UUID] = mapped_column(primary_key=True)
    task_names: Mapped[Any] = mapped_column(JSONB)
    given_task_names: Mapped[Any] = mapped_column(JSONB)
    revision: Mapped[int]
    created_at: Mapped[datetime]


class TagRow(Base):
    __tablename__ = "task_tags"
    organization_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    flow_execution_id: Mapped[UUID]
    task_name: Mapped[str]
    tag_type: Mapped[str]
    tag: Mapped[str]
    tag_metadata: Mapped[Any] = mapped_column(JSON(none_as_null=True))
    metadata_digest: Mapped[bytes]
    status: Mapped[str]
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    updated_at: Mapped[datetime | None]
    modified_by: Mapped[str | None]


class BatchRow(Base):
    __tablename__ = "tag_batches"
    organization_id: Mapped[UUID] = mapped_column(primary_key=True)
    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    digest: Mapped[bytes]
    result_record: Mapped[str] = mapped_column(JsonText)
    revisions: Mapped[dict[str, Any]]
    event_bytes: Mapped[int]
    applied_at: Mapped[datetime]


class ChangeRow(Base):
    __tablename__ = "tag_changes"
    organization_id: Mapped[UUID] = mapped_column(primary_key=True)
    flow_execution_id: Mapped[UUID] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[UUID]
    event: Mapped[str] = mapped_column(JsonText)
    changed_at: Mapped[datetime]
    position: Mapped[int] = mapped_column(BigInteger)


# --- The service ---------------------------------------------------------------------------------


class Service:
    """What the handlers of one process share."""

    def __init__(self) -> None:
        settings = load_settings()
        self.redis = open_redis(settings.redis_url.get_secret_value())
        self.authorizer = Authorizer(settings)
        self.new_id = Uuid7()
        engine = create_engine(
            driver_url(settings.database_url.get_secret_value()),
            pool_size=threads(),
            max_overflow=0,
        )
        self.sessions = sessionmaker(engine, expire_on_commit=False)

    def apply(self, message: bytes, token: str, organization_id: UUID) -> bytes:
        """Apply one batch; return its result record."""
        now = datetime.now(timezone.utc)
        entry = StreamEntry(f"{int(now.timestamp() * 1000)}-0".encode(), message, token.encode())
        match admit(entry, organization_id, self.authorizer, now):
            case Admitted(message=authorized) as admitted:
                reply_to, outcome = admitted.reply_to, self._transact(organization_id, authorized)
            case Refused(reply_to=reply_to, record=record):
                outcome = Outcome(record)
            case Unreadable():
                return b"{}"
        publish(self.redis, organization_id, reply_to, outcome)
        return outcome.record

    def _transact(self, organization_id: UUID, request: AuthorizedMessage) -> Outcome:
        try:
            return self._once(organization_id, request)
        except DBAPIError as error:
            if error.orig is None or not is_server_fault(error.orig):
                raise
            return self._once(organization_id, request)  # on another connection

    def _once(self, organization_id: UUID, request: AuthorizedMessage) -> Outcome:
        with self.sessions.begin() as session:
            now = session.scalar(
                text("select clock_timestamp() from set_config('app.organization_id', :id, true)"),
                {"id": str(organization_id)},
            )
            assert now is not None
            executions = _lock(session, organization_id, request.message)
            tags = _tags(session, organization_id, request.message)
            state = Snapshot(
                batches=_known(session, organization_id, request.message.batch_id),
                executions={each.flow_execution_id.int: _execution(each) for each in executions},
                tags=_by_key(tags),
            )
            decision = rules.decide(organization_id, [request], state, now=now, new_id=self.new_id)
            _save(session, organization_id, decision.change_set, executions, tags, now)
        return decision.outcomes[0]


def _lock(
    session: OrmSession, organization_id: UUID, message: Message
) -> Sequence[FlowExecutionRow]:
    """Load the executions that are named, for nobody else to change meanwhile."""
    if isinstance(message, Batch):
        ids = {operation.flow_execution_id for operation in message.tags}
    else:
        ids = {message.flow_execution_id}
    query = (
        select(FlowExecutionRow)
        .where(
            FlowExecutionRow.organization_id == organization_id,
            FlowExecutionRow.flow_execution_id.in_(ids),
        )
        .order_by(FlowExecutionRow.flow_execution_id)
        .with_for_update()
    )
    return session.scalars(query).all()


def _tags(session: OrmSession, organization_id: UUID, message: Message) -> Sequence[TagRow]:
    """Load the active tags of all names that the batch has, and of names mixed from them."""
    if not isinstance(message, Batch):
        return []
    tags = message.tags
    query = select(TagRow).where(
        TagRow.organization_id == organization_id,
        TagRow.status == literal_column("'active'"),  # so that the partial index can be used
        TagRow.flow_execution_id.in_({each.flow_execution_id for each in tags}),
        TagRow.task_name.in_({each.task_name for each in tags}),
        TagRow.tag_type.in_({each.tag_type for each in tags}),
        TagRow.tag.in_({each.tag for each in tags}),
    )
    return session.scalars(query.order_by(TagRow.created_at, TagRow.id)).all()


def _known(session: OrmSession, organization_id: UUID, batch_id: UUID) -> dict[UUID, StoredResult]:
    """Load the batch if it came before, and the events that it made."""
    row = session.get(BatchRow, (organization_id, batch_id))
    if row is None:
        return {}
    keys = [(organization_id, UUID(id), revision) for id, revision in row.revisions.items()]
    changes = [session.get_one(ChangeRow, key) for key in keys]
    events = tuple((each.flow_execution_id, _encoded(each.event)) for each in changes)
    return {batch_id: StoredResult(row.digest, _encoded(row.result_record), events)}


def _encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _execution(row: FlowExecutionRow) -> Execution:
    names = row.task_names or row.given_task_names or ()
    any_name = row.task_names is None
    return Execution(row.flow_execution_id, dict.fromkeys(names), any_name, row.revision)


def _by_key(rows: Iterable[TagRow]) -> dict[TagKey, dict[bytes, Tag]]:
    tags: dict[TagKey, dict[bytes, Tag]] = {}
    for row in rows:
        fields = {name: getattr(row, name) for name in TAG_FIELDS}
        if row.tag_metadata is not None:
            fields["tag_metadata"] = Raw(canonical_json(row.tag_metadata))
        tag = Tag(**fields)
        tags.setdefault(tag_key(tag), {})[row.metadata_digest] = tag
    return tags


def _save(
    session: OrmSession,
    organization_id: UUID,
    writes: ChangeSet,
    executions: Iterable[FlowExecutionRow],
    tags: Iterable[TagRow],
    now: datetime,
) -> None:
    """Copy the decision to the objects of the session, which writes them when it commits."""
    for execution in executions:
        if execution.flow_execution_id in writes.revisions:
            execution.revision = writes.revisions[execution.flow_execution_id]
    for row in tags:
        removed = writes.removed.get(row.id.int)
        if removed is not None:
            row.status, row.updated_at, row.modified_by = "deleted", now, removed.modified_by
    session.add_all(_tag_row(*new) for new in writes.added.values())
    session.add_all(
        ChangeRow(
            organization_id=organization_id,
            flow_execution_id=change.flow_execution_id,
            revision=change.revision,
            batch_id=change.batch_id,
            event=change.event.decode(),
            changed_at=now,
            position=secrets.randbits(62),  # it keeps no order in an organization
        )
        for change in writes.changes
    )
    session.add_all(
        BatchRow(
            organization_id=organization_id,
            batch_id=batch.batch_id,
            digest=batch.digest,
            result_record=batch.record.decode(),
            revisions={str(id): revision for id, revision in batch.revisions.items()},
            event_bytes=batch.event_bytes,
            applied_at=now,
        )
        for batch in writes.batches
    )


def _tag_row(tag: Tag, metadata: bytes | None, digest: bytes) -> TagRow:
    fields = {name: getattr(tag, name) for name in TAG_FIELDS}
    fields["tag_metadata"] = json.loads(metadata or b"null")
    return TagRow(**fields, metadata_digest=digest)


# --- HTTP ----------------------------------------------------------------------------------------


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = threads()
    app.state.service = Service()
    freeze()
    yield


async def _body(request: Request) -> bytes:
    return await request.body()


app = FastAPI(lifespan=_lifespan, openapi_url=None)


@app.post("/organizations/{organization_id}/batches")
def apply(
    request: Request,
    organization_id: UUID,
    message: Annotated[bytes, Depends(_body)],
    authorization: Annotated[str, Header()],
) -> Response:
    service: Service = request.app.state.service
    token = authorization.removeprefix("Bearer ")
    return Response(service.apply(message, token, organization_id), media_type="application/json")


def commands(setting: Setting) -> list[list[str]]:
    options = ["--workers", setting["processes"], "--loop", "uvloop", "--http", "httptools"]
    options += ["--no-access-log", "--log-level", "warning", "--uds", os.environ["BENCH_SOCKET"]]
    return [python("uvicorn", "tests.bench.peers.direct:app", *options)]


# --- The client ----------------------------------------------------------------------------------


class Sender:
    """Requests on kept connections: one and a half times as many as handlers have threads."""

    def __init__(self) -> None:
        self._loop = Loop()
        self._count = int(os.environ["BENCH_PROCESSES"]) * threads() * 3 // 2
        self._connections: list[Connection] = []

    def send(self, items: Sequence[Item]) -> None:
        self._loop.run(self._send(items))

    def send_one(self, item: Item) -> None:
        self._loop.run(self._post(item))

    async def _post(self, item: Item) -> None:
        await self._connect(1)
        await self._connections[0].post(item)

    async def _connect(self, count: int) -> None:
        while len(self._connections) < count:
            streams = await asyncio.open_unix_connection(os.environ["BENCH_SOCKET"])
            self._connections.append(Connection(*streams))

    async def _send(self, items: Sequence[Item]) -> None:
        await self._connect(self._count)
        waiting = iter(items)

        async def work(connection: Connection) -> None:
            for item in waiting:
                await connection.post(item)

        await asyncio.gather(*(work(connection) for connection in self._connections))

    def close(self) -> None:
        for connection in self._connections:
            connection.writer.close()
        self._loop.close()


class Connection:
    """One HTTP connection: a request, then its response."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def post(self, item: Item) -> bytes:
        """Send a batch; return the result record. Raises `RuntimeError` for any other answer."""
        body = item.batch.encode()
        head = (
            f"POST /organizations/{item.organization_id}/batches HTTP/1.1\r\nHost: bench\r\n"
            f"Authorization: Bearer {item.token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
        record = await self.reader.readexactly(length)
        if not answer.startswith(b"http/1.1 200 "):
            raise RuntimeError(f"{answer!r}: {record!r}")
        return record


CONTENDER = Contender(
    name="direct (FastAPI, ORM)",
    settings=[
        {"processes": 2, "threads": 8},
        {"processes": 3, "threads": 4},
    ],
    commands=commands,
    sender=Sender,
    answers=True,
)
