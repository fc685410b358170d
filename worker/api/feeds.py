"""Change events over a WebSocket or as Server-Sent Events: stored events first, then live ones.

Each watcher has a cursor, which takes the next events from the hub's buffer or from the table.
These are sent before it takes more, so nothing is queued for a slow watcher. A watcher that reads
nothing is disconnected (worker/api/limits.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Annotated, Final, Literal, NamedTuple
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends, Header, Request, Response, WebSocket
from pydantic_core import from_json
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from producers.contract.cursors import Cursor
from producers.contract.errors import ErrorDetail
from producers.pubsub import first_completed, wait_at_most
from worker.api.auth import Reading, authenticate, bearer_token
from worker.api.change_hub import ChangeHub, Event, Feed
from worker.api.changes import GONE, change_filter, stored_changes
from worker.api.errors import (
    EXPIRED,
    ApiError,
    documented,
    problem_of,
    request_id_of,
    wrong_parameter,
)
from worker.api.params import LATEST, AllFeedQuery, FeedQuery, parse_query, query
from worker.api.queries import READ_ERRORS, Reader
from worker.api.responses import READ_PROBLEMS
from worker.auth import LEEWAY_SECONDS, READ, Principal

logger = logging.getLogger(__name__)

router = APIRouter(responses=READ_PROBLEMS)

TOKEN_SECONDS: Final = 10.0
PING_SECONDS: Final = 15.0
RENEWAL_SECONDS: Final = 1.0
"""The least time between two tokens that are received over one WebSocket."""
PASSED_SECONDS: Final = 10.0
PASSED_EVENTS: Final = 1000
"""After so many events that match no filter, or that long, a watcher is sent its cursor."""
_RETRY_SECONDS: Final = 1.0

_CLOSE_CODES: Final = {400: 4400, 401: 4401, 403: 4403, 404: 4404, 408: 4408, 410: 4410, 503: 1013}
_REASON_BYTES: Final = 123


# --- The events of one watcher -------------------------------------------------------------------


class Frame(NamedTuple):
    """What a watcher is sent: an event, or how far it has come."""

    kind: Literal["change", "cursor", "caught_up"]
    cursor: Cursor
    event: bytes = b""

    def text(self) -> bytes:
        """Return the frame as JSON."""
        if self.kind == "change":
            return self.event
        more = b',"caught_up":true' if self.kind == "caught_up" else b""
        return b'{"cursor":"%s"%s}' % (str(self.cursor).encode(), more)


class ChangeCursor:
    """What one watcher asked for, and the place that it has reached."""

    def __init__(
        self, connection: HTTPConnection, query: FeedQuery | AllFeedQuery, principal: Principal
    ) -> None:
        self._after = query.place
        self._execution = query.flow_execution_id
        self._hub: ChangeHub = connection.app.state.change_hub
        self._reader: Reader = connection.app.state.reader
        self._organization_id: UUID = principal.organization_id
        self._filter = change_filter(query)

    async def check(self) -> None:
        """Raise `ApiError` if there is no such execution, or its next changes can't be read."""
        feed = self._reader, self._organization_id, self._execution
        found = await stored_changes(*feed, self._after, limit=1)
        self._after = self._after or found.head

    @property
    def after(self) -> Cursor:
        """The place that was reached."""
        assert self._after is not None  # `check` was called
        return self._after

    async def frames(self) -> AsyncGenerator[Frame]:
        """Yield the events that pass the filters, in order and without end.

        A watcher of the organization is also sent a cursor when it has passed over 1,000 events,
        or events for 10 s, and once that it has caught up.

        Raises:
            ApiError: The events behind the place that was reached are no longer stored.
        """
        caught_up, passed, sent_at = self._execution is not None, 0, _now()
        with self._hub.watch(self._organization_id, self._execution) as feed:
            while True:
                news = feed.news
                events = await self._next(feed)
                for self._after, event in events:
                    wanted = self._filter(event)
                    if wanted is not None:
                        passed, sent_at = 0, _now()
                        yield Frame("change", self.after, wanted)
                    elif self._execution is None:
                        passed += 1
                        if passed == PASSED_EVENTS:
                            passed, sent_at = 0, _now()
                            yield Frame("cursor", self.after)
                if not events and not caught_up:
                    caught_up, passed, sent_at = True, 0, _now()
                    yield Frame("caught_up", self.after)
                elif passed and _now() - sent_at >= PASSED_SECONDS:
                    passed, sent_at = 0, _now()
                    yield Frame("cursor", self.after)
                if not events:
                    seconds = PASSED_SECONDS - (_now() - sent_at) if passed else None
                    await wait_at_most(seconds, feed.wait_past(self.after, news))

    async def _next(self, feed: Feed) -> Sequence[Event]:
        """Return the next events; while the database is unavailable, retry every second."""
        while True:
            try:
                return await feed.next(self.after)
            except READ_ERRORS as error:
                logger.warning("changes can't be read", extra={"error": type(error).__name__})
                await asyncio.sleep(_RETRY_SECONDS)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _expires_in(principal: Principal) -> float:
    return principal.expires_at + LEEWAY_SECONDS - time.time()


# --- WebSocket -----------------------------------------------------------------------------------


@router.websocket("/task-tags/changes")
async def watch_changes(websocket: WebSocket) -> None:
    """Send change events of an execution as text frames.

    The token is in a header, or in the first frame.
    """
    await _watch(websocket, FeedQuery)


@router.websocket("/changes")
async def watch_all_changes(websocket: WebSocket) -> None:
    """Send change events of the organization as text frames, with the token as above."""
    await _watch(websocket, AllFeedQuery)


async def _watch(websocket: WebSocket, model: type[FeedQuery] | type[AllFeedQuery]) -> None:
    await websocket.accept()
    request_id = str(uuid4())
    try:
        query = parse_query(websocket, model)
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
    async for frame in cursor.frames():
        await websocket.send_text(frame.text().decode())


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
        async for frame in self._watcher.frames():
            id, kind = str(frame.cursor).encode(), frame.kind.encode()
            await write(b"id: %b\nevent: %b\ndata: %b\n\n" % (id, kind, frame.text()))

    async def _ping(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send a ping every 15 s: a comment, so that a dead connection is noticed, and an id.

        The id is the place that was reached, for a watcher whose filters skip the last events.
        """
        while True:
            await asyncio.sleep(PING_SECONDS)
            await write(b": ping\nid: %b\n\n" % str(self._watcher.after).encode())

    def _error(self, problem: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % problem.body(self._request_id)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        description="The id of the last event received; takes precedence over `after`.",
    ),
]


@router.get(
    "/task-tags/changes/events",
    summary="Watch the change events of a flow execution as Server-Sent Events",
    response_class=Response,  # without a media type: errors are JSON
    response_description="The stored events after a revision, then each new one. "
    "`id` is the revision with its time.",
    responses={200: {"content": {"text/event-stream": {}}}, **documented(GONE)},
)
async def stream_changes(
    request: Request,
    caller: Reading,
    query: Annotated[FeedQuery, Depends(query(FeedQuery))],
    last_event_id: LastEventId = None,
) -> Response:
    return await _stream(request, caller, query, last_event_id)


@router.get(
    "/changes/events",
    summary="Watch the change events of the organization as Server-Sent Events",
    response_class=Response,
    response_description="The stored events behind a cursor, then each new one. `id` is a cursor. "
    "The events `cursor` and `caught_up` say how far the stream has come.",
    responses={200: {"content": {"text/event-stream": {}}}, **documented(GONE)},
)
async def stream_all_changes(
    request: Request,
    caller: Reading,
    query: Annotated[AllFeedQuery, Depends(query(AllFeedQuery))],
    last_event_id: LastEventId = None,
) -> Response:
    return await _stream(request, caller, query, last_event_id)


async def _stream(
    request: Request,
    caller: Principal,
    query: FeedQuery | AllFeedQuery,
    last_event_id: str | None,
) -> Response:
    if last_event_id:
        after = {"after": last_event_id}
        try:
            if last_event_id == LATEST:
                raise ValueError
            query = query.model_validate({**query.model_dump(by_alias=True), **after})
        except ValueError:
            detail = ErrorDetail(field="Last-Event-ID", message="must be the id of an event")
            raise wrong_parameter([detail]) from None
    cursor = ChangeCursor(request, query, caller)
    await cursor.check()
    return EventStream(cursor, caller, request_id_of(request.scope), request.app.state.ending)
