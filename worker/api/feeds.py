"""Change events over a WebSocket or as Server-Sent Events: stored events first, then live ones.

Each watcher has a cursor, which takes the next events from the hub's buffer or from the table.
These are sent before it takes more, so nothing is queued for a slow watcher. A watcher that reads
nothing is disconnected (worker/api/limits.py).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Annotated, Final
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends, Header, Request, Response, WebSocket
from pydantic_core import from_json
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from producers.contract.errors import ErrorDetail
from producers.pubsub import first_completed
from worker.api.auth import Reading, authenticate, bearer_token
from worker.api.change_hub import ChangeHub, ExecutionFeed
from worker.api.errors import (
    EXPIRED,
    GONE,
    ApiError,
    documented,
    problem_of,
    wrong_parameter,
)
from worker.api.params import FeedQuery, parse_query, query
from worker.api.queries import READ_ERRORS, Reader
from worker.api.reads import READ_PROBLEMS, change_filter, stored_changes
from worker.auth import LEEWAY_SECONDS, READ, Principal

logger = logging.getLogger(__name__)

router = APIRouter(responses=READ_PROBLEMS)

TOKEN_SECONDS: Final = 10.0
PING_SECONDS: Final = 15.0
RENEWAL_SECONDS: Final = 1.0
"""The least time between two tokens that are received over one WebSocket."""
_PAGE: Final = 100
_PAGE_BYTES: Final = 64 * 1024
_RETRY_SECONDS: Final = 1.0

_CLOSE_CODES: Final = {400: 4400, 401: 4401, 403: 4403, 404: 4404, 408: 4408, 410: 4410, 503: 1013}
_REASON_BYTES: Final = 123


# --- The events of one watcher -------------------------------------------------------------------

Event = tuple[int, bytes]
"""A revision, and its change event as it was published."""


class ChangeCursor:
    """What one watcher asked for, and the last revision that it has reached."""

    def __init__(self, connection: HTTPConnection, query: FeedQuery, principal: Principal) -> None:
        self.after = query.after
        self._query = query
        self._hub: ChangeHub = connection.app.state.change_hub
        self._reader: Reader = connection.app.state.reader
        self._organization_id: UUID = principal.organization_id
        self._filter = change_filter(query)

    async def check(self) -> None:
        """Raise `ApiError` if there is no such execution, or its next changes can't be read."""
        await stored_changes(self._reader, self._organization_id, self._query, self.after, limit=1)

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events that pass the filters in the order of their revisions, without end.

        While the database is unavailable, it retries every second.

        Raises:
            ApiError: Events were purged in the meantime.
        """
        execution = self._query.flow_execution_id
        with self._hub.watch(self._organization_id, execution) as feed:
            while True:
                for revision, event in feed.buffered_after(self.after) or await self._stored(feed):
                    self.after = revision
                    wanted = self._filter(event)
                    if wanted is not None:
                        yield revision, wanted
                await feed.wait_past(self.after)

    async def _stored(self, feed: ExecutionFeed) -> Sequence[Event]:
        while True:
            assumed = feed.revision
            try:
                found = await stored_changes(
                    self._reader, self._organization_id, self._query, self.after, _PAGE, _PAGE_BYTES
                )
            except READ_ERRORS as error:
                logger.warning("changes can't be read", extra={"error": type(error).__name__})
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                feed.reconcile(found.revision, assumed)
                return list(enumerate(found.events, self.after + 1))


def _expires_in(principal: Principal) -> float:
    return principal.expires_at + LEEWAY_SECONDS - time.time()


# --- WebSocket -----------------------------------------------------------------------------------


@router.websocket("/task-tags/changes")
async def watch_changes(websocket: WebSocket) -> None:
    """Send change events as text frames. The token is in a header, or in the first frame."""
    await websocket.accept()
    request_id = str(uuid4())
    try:
        query = parse_query(websocket, FeedQuery)
        token = bearer_token(websocket) or await _first_token(websocket)
        principal = await authenticate(websocket, token, READ)
        cursor = ChangeCursor(websocket, query, principal)
        await cursor.check()
        await first_completed(
            _send_events(websocket, cursor), _receive_tokens(websocket, principal)
        )
    except WebSocketDisconnect:
        return
    except (ApiError, *READ_ERRORS) as error:
        await _refuse(websocket, problem_of(error), request_id)


async def _send_events(websocket: WebSocket, cursor: ChangeCursor) -> None:
    async for _, event in cursor.events():
        await websocket.send_text(event.decode())


async def _receive_tokens(websocket: WebSocket, principal: Principal) -> None:
    """Receive new tokens until the last one expires.

    Raises:
        ApiError: It has expired, or a frame is not a new token of the same organization.
    """
    while True:
        try:
            async with asyncio.timeout(max(0, _expires_in(principal))):
                token = await receive_token(websocket)
        except TimeoutError:
            raise EXPIRED from None
        renewed = await authenticate(websocket, token, READ)
        if renewed.organization_id != principal.organization_id:
            raise ApiError(403, "forbidden", "the token is of another organization")
        principal = renewed
        await asyncio.sleep(RENEWAL_SECONDS)


async def _first_token(websocket: WebSocket) -> str:
    try:
        async with asyncio.timeout(TOKEN_SECONDS):
            return await receive_token(websocket)
    except TimeoutError:
        raise ApiError(408, "request_timeout", "no token in time") from None


async def receive_token(websocket: WebSocket) -> str:
    """Return the token in the next frame. Raises `ApiError` if the frame is anything else."""
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
    """Send the error in the shape that all errors have, and close."""
    code = _CLOSE_CODES[problem.status]
    reason = problem.message.encode()[:_REASON_BYTES].decode(errors="ignore")
    with suppress(WebSocketDisconnect, RuntimeError):
        await websocket.send_text(problem.body(request_id).decode())
        await websocket.close(code, reason)


# --- Server-Sent Events --------------------------------------------------------------------------


class EventStream(Response):
    """Sends events until the token expires, the client disconnects or the endpoint ends."""

    def __init__(
        self, cursor: ChangeCursor, principal: Principal, request_id: str, ending: asyncio.Event
    ) -> None:
        super().__init__()
        self._watcher = cursor
        self._principal = principal
        self._request_id = request_id
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would hold events back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(text: bytes) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": True})

        try:
            await write(b"retry: 1000\n\n")
            async with asyncio.timeout(max(0, _expires_in(self._principal))):
                await first_completed(
                    *(self._send_events(write), self._ping(write)),
                    *(_gone(receive), self._ending.wait()),
                )
        except ApiError as problem:
            await write(self._error(problem))
        except TimeoutError:
            await write(self._error(EXPIRED))
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        async for revision, event in self._watcher.events():
            await write(b"id: %d\nevent: change\ndata: %b\n\n" % (revision, event))

    async def _ping(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send a ping every 15 s: a comment, so that a dead connection is noticed, and an id.

        The id is the revision that was reached, for a watcher whose filters skip the last events.
        """
        while True:
            await asyncio.sleep(PING_SECONDS)
            await write(b": ping\nid: %d\n\n" % self._watcher.after)

    def _error(self, problem: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % problem.body(self._request_id)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@router.get(
    "/task-tags/changes/events",
    summary="Watch the change events of a flow execution as Server-Sent Events",
    response_class=Response,  # of no media type: that of errors is another
    response_description="The stored events after a revision, then each new one. "
    "`id` is the revision.",
    responses={200: {"content": {"text/event-stream": {}}}, **documented(GONE)},
)
async def stream_changes(
    request: Request,
    caller: Reading,
    query: Annotated[FeedQuery, Depends(query(FeedQuery))],
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="The revision of the last event received; takes precedence over `after`.",
        ),
    ] = None,
) -> Response:
    if last_event_id:
        if re.fullmatch(r"[0-9]{1,18}", last_event_id) is None:
            detail = ErrorDetail(field="Last-Event-ID", message="must be a revision")
            raise wrong_parameter([detail])
        query = query.model_copy(update={"after": int(last_event_id)})
    cursor = ChangeCursor(request, query, caller)
    await cursor.check()
    return EventStream(cursor, caller, request.state.request_id, request.app.state.ending)
