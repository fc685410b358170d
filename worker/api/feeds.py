"""Change events as they happen, over a WebSocket or as Server-Sent Events: first what is stored, then what comes.

A watcher is a revision and nothing more: it takes the next events from worker/api/change_hub.py or from the table, sends them, and
only then looks for more. So nothing is kept for one that is slow; one that takes nothing is let go (worker/api/limits.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
from fastapi import APIRouter, Request, Response, WebSocket
from pydantic_core import from_json
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from producers.contract.messages import ErrorDetail
from worker.api.change_hub import ChangeHub, Event, ExecutionFeed
from worker.api.errors import (
    ERRORS,
    GONE,
    UNAVAILABLE,
    WRONG_PARAMETER,
    ApiError,
    documented_error,
    error_body_of,
)
from worker.api.params import (
    FeedQuery,
    authenticate,
    openapi_parameters,
    parse_query,
    require_scope,
    token_of,
)
from worker.api.reads import EVENT_EXAMPLE, change_filter, reader_of, stored_changes
from worker.auth import LEEWAY_SECONDS, READ, Principal
from worker.db.repository import UnsafeRole

logger = logging.getLogger(__name__)

router = APIRouter()

TOKEN_SECONDS: Final = 10.0
PING_SECONDS: Final = 15.0
_PAGE: Final = 100
_PAGE_BYTES: Final = 64 * 1024
_RETRY_SECONDS: Final = 1.0

_CLOSE_CODES: Final = {400: 4400, 401: 4401, 403: 4403, 404: 4404, 408: 4408, 410: 4410, 503: 1013}
_REASON_BYTES: Final = 123


# --- The events of one watcher -------------------------------------------------------------------


class ChangeCursor:
    """One who watches an execution: what it asked, and how far it has come."""

    def __init__(self, connection: HTTPConnection, query: FeedQuery, grant: Principal) -> None:
        self.after = query.after
        self._query = query
        self._live: ChangeHub = connection.app.state.live
        self._reader = reader_of(connection)
        self._organization_id: UUID = grant.organization_id
        self._only = change_filter(query)

    async def check(self) -> None:
        """Raise a `ApiError` if there is no such execution, or its changes after that revision can't be had."""
        await stored_changes(self._reader, self._organization_id, self._query, self.after, limit=1)

    async def events(self) -> AsyncIterator[Event]:
        """Yield events in the order of their revisions, for ever; None stands for one of which nothing is wanted.

        Raises a `ApiError` if events were purged meanwhile. While the database is away it waits.
        """
        execution = self._query.flow_execution_id
        with self._live.watch(self._organization_id, execution) as watched:
            while True:
                for revision, event in watched.recent(self.after) or await self._stored(watched):
                    self.after = revision
                    wanted = self._only(event)
                    if wanted is not None:
                        yield revision, wanted
                await watched.beyond(self.after)

    async def _stored(self, watched: ExecutionFeed) -> Sequence[Event]:
        while True:
            believed = watched.revision
            try:
                found = await stored_changes(
                    self._reader, self._organization_id, self._query, self.after, _PAGE, _PAGE_BYTES
                )
            except (psycopg.Error, UnsafeRole, TimeoutError) as error:
                logger.warning("changes can't be read", extra={"error": type(error).__name__})
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                watched.settle(found.revision, believed)
                return list(enumerate(found.events, self.after + 1))


def _expires_in(grant: Principal) -> float:
    return grant.expires_at + LEEWAY_SECONDS - time.time()


_EXPIRED: Final = ApiError(401, "unauthorized", "the token has expired")


# --- WebSocket -----------------------------------------------------------------------------------


@router.websocket("/task-tags/changes")
async def watch_changes(websocket: WebSocket) -> None:
    """Send each change event as a text frame. The token comes in a header, or in the first frame."""
    await websocket.accept()
    request_id = str(uuid4())
    try:
        query = parse_query(websocket, FeedQuery)
        token = token_of(websocket) or await _first_token(websocket)
        grant = await authenticate(websocket.app.state.authorizer, token, READ)
        watcher = ChangeCursor(websocket, query, grant)
        await watcher.check()
        await first_completed(_send_events(websocket, watcher), _hear_tokens(websocket, grant))
    except WebSocketDisconnect:
        return
    except ApiError as problem:
        await _refuse(websocket, problem, request_id)
    except (psycopg.Error, UnsafeRole, TimeoutError):
        await _refuse(websocket, UNAVAILABLE, request_id)


async def first_completed(*jobs: Awaitable[None]) -> None:
    """Do both until one ends; raise what it raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send_events(websocket: WebSocket, watcher: ChangeCursor) -> None:
    async for _, event in watcher.events():
        await websocket.send_text(event.decode())


async def _hear_tokens(websocket: WebSocket, grant: Principal) -> None:
    """Raise a `ApiError` when the token expires, unless a new one of the same organization came before."""
    while True:
        try:
            async with asyncio.timeout(max(0, _expires_in(grant))):
                token = await receive_token(websocket)
        except TimeoutError:
            raise _EXPIRED from None
        renewed = await authenticate(websocket.app.state.authorizer, token, READ)
        if renewed.organization_id != grant.organization_id:
            raise ApiError(403, "forbidden", "the token is of another organization")
        grant = renewed


async def _first_token(websocket: WebSocket) -> str:
    try:
        async with asyncio.timeout(TOKEN_SECONDS):
            return await receive_token(websocket)
    except TimeoutError:
        raise ApiError(408, "request_timeout", "no token in time") from None


async def receive_token(websocket: WebSocket) -> str:
    """Return the token of the next frame. Raises a `ApiError` if it is anything else."""
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    try:
        frame = from_json(message.get("text") or b"")
    except ValueError:
        frame = None
    token = frame.get("token") if isinstance(frame, dict) and len(frame) == 1 else None
    if not isinstance(token, str):
        raise ApiError(400, "bad_request", 'a frame must be {"token": "..."}, as text')
    return token


async def _refuse(websocket: WebSocket, problem: ApiError, request_id: str) -> None:
    """Say why, as every error is said, and close."""
    code = _CLOSE_CODES[problem.status]
    reason = problem.message.encode()[:_REASON_BYTES].decode(errors="ignore")
    with suppress(WebSocketDisconnect, RuntimeError):
        await websocket.send_text(error_body_of(problem, request_id).decode())
        await websocket.close(code, reason)


# --- Server-Sent Events --------------------------------------------------------------------------


class EventStream(Response):
    """An answer that goes on."""

    def __init__(
        self, watcher: ChangeCursor, grant: Principal, request_id: str, ending: asyncio.Event
    ) -> None:
        super().__init__()
        self._watcher = watcher
        self._grant = grant
        self._request_id = request_id
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(text: bytes) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": True})

        try:
            await write(b"retry: 1000\n\n")
            async with asyncio.timeout(max(0, _expires_in(self._grant))):
                await first_completed(
                    self._send_events(write), self._ping(write), _gone(receive), _end(self._ending)
                )
        except ApiError as problem:
            await write(self._error(problem))
        except TimeoutError:
            await write(self._error(_EXPIRED))
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        async for revision, event in self._watcher.events():
            await write(b"id: %d\nevent: change\ndata: %b\n\n" % (revision, event))

    async def _ping(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Show that the connection lives; and how far a watcher with filters has come."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            await write(b": ping\nid: %d\n\n" % self._watcher.after)

    def _error(self, problem: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error_body_of(problem, self._request_id)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(ending: asyncio.Event) -> None:
    await ending.wait()


_LAST_EVENT_ID: Final[dict[str, Any]] = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The revision of the last event that was received; it goes before `after`.",
    "schema": {"type": "string"},
}


@router.get(
    "/task-tags/changes/events",
    summary="Watch the change events of a flow execution as Server-Sent Events",
    response_model=None,
    responses={
        200: {
            "description": "First the stored events after a revision, then each that comes: `id` is its revision.",
            "content": {
                "text/event-stream": {
                    "example": f"id: 42\nevent: change\ndata: {json.dumps(EVENT_EXAMPLE)}\n\n"
                }
            },
        },
        **ERRORS,
        410: documented_error("gone", GONE.message),
    },
    openapi_extra=openapi_parameters(FeedQuery, _LAST_EVENT_ID),
)
async def stream_changes(request: Request) -> Any:
    grant = await require_scope(request, READ)
    query = parse_query(request, FeedQuery)
    if last := request.headers.get("last-event-id"):
        if re.fullmatch(r"[0-9]{1,18}", last) is None:
            details = [ErrorDetail(field="Last-Event-ID", message="must be a revision")]
            raise ApiError(400, "bad_request", WRONG_PARAMETER, details)
        query = query.model_copy(update={"after": int(last)})
    watcher = ChangeCursor(request, query, grant)
    await watcher.check()
    return EventStream(watcher, grant, request.state.request_id, request.app.state.ending)
