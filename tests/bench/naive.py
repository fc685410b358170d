"""The endpoint written in the most obvious way: FastAPI, SQLAlchemy's ORM, a response model.

For comparison only. It reads the same tables as worker/api/app.py as the same role, and gives the
same answers to good requests.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import jwt
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from sqlalchemy import JSON, BigInteger, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SECRET = os.environ["TASK_TAGS_JWT_SECRET"]
URL = make_url(os.environ["TASK_TAGS_DATABASE_URL"]).set(drivername="postgresql+asyncpg")

# --- Models --------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class RegisterExecution(Base):
    __tablename__ = "flow_executions"

    organization_id: Mapped[UUID] = mapped_column(primary_key=True)
    flow_execution_id: Mapped[UUID] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger)


class TaskTag(Base):
    __tablename__ = "task_tags"

    organization_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    flow_execution_id: Mapped[UUID]
    task_name: Mapped[str]
    tag_type: Mapped[str]
    tag: Mapped[str]
    tag_metadata: Mapped[Any | None] = mapped_column(JSON)
    status: Mapped[str]
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    updated_at: Mapped[datetime | None]
    modified_by: Mapped[str | None]


class TaskTagOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: UUID
    flow_execution_id: UUID
    task_name: str
    tag_type: str
    tag: str
    tag_metadata: Any
    organization_id: UUID
    status: str
    created_at: datetime
    created_by: str
    updated_at: datetime | None
    modified_by: str | None


# --- What a request needs ------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = create_async_engine(URL)
    app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
bearer = HTTPBearer()


async def organization(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)],
) -> UUID:
    try:
        claims = jwt.decode(credentials.credentials, SECRET, algorithms=["HS256"])
        organization_id = UUID(claims["org"])
    except (jwt.InvalidTokenError, KeyError, ValueError):
        raise HTTPException(401, "the token is not valid") from None
    if "task-tags:read" not in claims.get("scope", "").split():
        raise HTTPException(403, "the token lacks the scope task-tags:read")
    return organization_id


async def session(
    request: Request, organization_id: Annotated[UUID, Depends(organization)]
) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions() as opened:
        await opened.execute(
            select(func.set_config("app.organization_id", str(organization_id), True))
        )
        yield opened


# --- The path ------------------------------------------------------------------------------------


@app.get("/task-tags", response_model=list[TaskTagOut])
async def read_tags(
    flow_execution_id: UUID,
    organization_id: Annotated[UUID, Depends(organization)],
    db: Annotated[AsyncSession, Depends(session)],
    response: Response,
    task_name: str | None = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Any:
    execution = await db.get(RegisterExecution, (organization_id, flow_execution_id))
    if execution is None:
        raise HTTPException(404, "there is no such flow execution")
    etag = f'"{execution.revision}"'
    if if_none_match and etag in if_none_match:
        return Response(status_code=304, headers={"ETag": etag})
    response.headers["ETag"] = etag
    tags = (
        select(TaskTag)
        .where(
            TaskTag.organization_id == organization_id,
            TaskTag.flow_execution_id == flow_execution_id,
            TaskTag.status == "active",
        )
        .order_by(TaskTag.created_at, TaskTag.id)
    )
    if task_name is not None:
        tags = tags.where(TaskTag.task_name == task_name)
    return (await db.scalars(tags)).all()
