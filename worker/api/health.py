"""Health: whether this process is alive, and whether its servers answer."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import BaseModel
from redis.exceptions import RedisError

from worker.api.errors import ERRORS, ApiError, documented_error
from worker.api.params import NoQuery, parse_query
from worker.api.reads import reader_of

router = APIRouter()

_READY_SECONDS: Final = 5.0


class Health(BaseModel):
    status: str


_STATE: Final[dict[int | str, dict[str, Any]]] = {
    number: ERRORS[number] for number in (400, 408, 413, 431, 500)
}


@router.get(
    "/healthz",
    summary="Whether this process is alive",
    responses={
        200: {"content": {"application/json": {"example": {"status": "alive"}}}},
        **_STATE,
    },
)
async def healthz(request: Request) -> Health:
    parse_query(request, NoQuery)
    return Health(status="alive")


@router.get(
    "/readyz",
    summary="Whether the database and Redis answer",
    responses={
        200: {"content": {"application/json": {"example": {"status": "ready"}}}},
        **_STATE,
        503: documented_error(
            "unavailable", "Redis does not answer; try again later", None, "Retry-After"
        ),
    },
)
async def readyz(request: Request) -> Health:
    parse_query(request, NoQuery)
    async with asyncio.timeout(_READY_SECONDS):
        await reader_of(request).check()
    try:
        await request.app.state.redis.ping()
    except (RedisError, OSError):
        raise ApiError(503, "unavailable", "Redis does not answer; try again later") from None
    return Health(status="ready")
