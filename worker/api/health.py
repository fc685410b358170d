"""Health: whether this process is alive, and whether its servers answer."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter, Request
from pydantic import BaseModel
from redis.exceptions import RedisError

from worker.api.errors import ApiError, documented
from worker.api.params import NoParameters
from worker.api.reads import Database

router = APIRouter()

_READY_SECONDS: Final = 5.0
_NO_REDIS: Final = ApiError(503, "unavailable", "Redis does not answer; try again later")


class Health(BaseModel):
    status: str


@router.get("/healthz", summary="Whether this process is alive")
async def healthz(parameters: NoParameters) -> Health:
    return Health(status="alive")


@router.get(
    "/readyz", summary="Whether the database and Redis answer", responses=documented(_NO_REDIS)
)
async def readyz(request: Request, parameters: NoParameters, reader: Database) -> Health:
    async with asyncio.timeout(_READY_SECONDS):
        await reader.check()
    try:
        await request.app.state.redis.ping()
    except (RedisError, OSError):
        raise _NO_REDIS from None
    return Health(status="ready")
