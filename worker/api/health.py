"""Health: whether this process is alive, and whether its servers answer."""

from __future__ import annotations

import asyncio
import math
from typing import Final

from fastapi import APIRouter, Request
from pydantic import BaseModel
from redis import asyncio as async_redis
from redis.exceptions import RedisError

from worker.api.errors import ApiError, documented
from worker.api.params import NoParameters
from worker.api.queries import READ_ERRORS, Reader
from worker.api.responses import Database

router = APIRouter()

_READY_SECONDS: Final = 5.0
_FRESH_SECONDS: Final = 1.0
_NEEDS_WRITES: Final = "#!lua\nreturn 1"
_NO_REDIS: Final = ApiError(503, "unavailable", "Redis does not answer; try again later")


class Readiness:
    """Whether both servers can be written to; asked once a second at most, for all callers."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._checked_at = -math.inf
        self._error: Exception | None = None

    async def check(self, reader: Reader, redis: async_redis.Redis) -> None:
        """Raise what keeps the endpoint from being ready."""
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if now - self._checked_at >= _FRESH_SECONDS:
                self._error = None
                try:
                    async with asyncio.timeout(_READY_SECONDS):
                        await reader.check()
                        # Without flags, it is refused wherever a write would be.
                        await redis.eval(_NEEDS_WRITES, 0)
                except (RedisError, OSError) as error:
                    self._error = error if isinstance(error, TimeoutError) else _NO_REDIS
                    # It may no longer be the right server: the next check connects again.
                    await redis.connection_pool.disconnect(inuse_connections=False)
                except READ_ERRORS as error:
                    self._error = error
                self._checked_at = asyncio.get_running_loop().time()
            if self._error is not None:
                raise self._error


class Health(BaseModel):
    status: str


@router.get("/healthz", summary="Whether this process is alive")
async def healthz(parameters: NoParameters) -> Health:
    return Health(status="alive")


@router.get(
    "/readyz", summary="Whether the database and Redis answer", responses=documented(_NO_REDIS)
)
async def readyz(request: Request, parameters: NoParameters, reader: Database) -> Health:
    await request.app.state.readiness.check(reader, request.app.state.redis)
    return Health(status="ready")
