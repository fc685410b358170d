"""The endpoint as one application: routes for reading, watching and writing, and the live page.

FastAPI makes its OpenAPI document; examples.json has the examples of successful answers. Its pages
load nothing from other servers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from importlib.resources import files
from typing import Any, Final

import psycopg
import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from pydantic import SecretStr, TypeAdapter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producers.enqueuer import Enqueuer
from producers.pubsub import PubSubMultiplexer
from producers.redis_client import open_async_redis
from worker.api import changes, feeds, health, reads, work_list, writes
from worker.api.change_hub import ChangeHub
from worker.api.errors import HANDLERS, OF_EVERY_ROUTE, TOO_LARGE, answer, request_id_of
from worker.api.health import Readiness
from worker.api.limits import ADMITTED, MAX_BODY_BYTES, RESERVED_FILES, LimitedProtocol
from worker.api.queries import Reader
from worker.api.websocket_limits import MAX_FRAME_BYTES, LimitedWebSocket
from worker.api.write_service import WriteService
from worker.auth import Authorizer
from worker.settings import Settings
from worker.startup import check_servers, freeze_garbage_collector

logger = logging.getLogger(__name__)

router = APIRouter()

# --- The page ------------------------------------------------------------------------------------

_PAGE: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/script.js": ("script.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


async def page(request: Request) -> Response:
    """Send a file of the live page."""
    name, kind = _PAGE[request.url.path]
    content = files("worker.api").joinpath("page", name).read_bytes()
    return Response(content, headers=_PAGE_HEADERS, media_type=kind)


for path in _PAGE:
    router.get(path, include_in_schema=False)(page)


# --- Middlewares ---------------------------------------------------------------------------------


class CancelledRequests:
    """Ends a request that is cancelled: nobody waits for the rest of its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with suppress(asyncio.CancelledError):
            await self._app(scope, receive, send)


class RequestIds:
    """Gives each request an id; it is in `request.state` and in the headers of the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                id_header = (b"x-request-id", request_id.encode())
                message["headers"] = [*message["headers"], id_header]
            await send(message)

        await self._app(scope, receive, send_with_id)


class HeadRequests:
    """Answers `HEAD` as `GET`, without the body.

    The rule is https://www.rfc-editor.org/rfc/rfc9110#section-9.3.2.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send(message)
            await send({"type": "http.response.body", "body": b""})
            raise asyncio.CancelledError  # the rest is not wanted, and may have no end

        await self._app({**scope, "method": "GET"}, receive, send_head)


class DeclaredBodyLimit:
    """Refuses a body that is declared too large, before any of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
                app = await answer(Request(scope), TOO_LARGE)
        await app(scope, receive, send)


class DirectRead:
    """Takes `GET /task-tags` past FastAPI's routing, which takes longer than the read."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", "/task-tags"):
            scope["app"] = self._app
            request = Request(scope, receive)
            try:
                app = await reads.read_tags_directly(request)
            except Exception as error:
                app = await answer(request, error)
        await app(scope, receive, send)


# --- The server ----------------------------------------------------------------------------------


_SWITCH_SECONDS: Final = 0.0001
"""The switch interval of the interpreter, for the threads that enqueue; Python's default is 5 ms.

A thread waits for the event loop about twenty times in a write, while the loop is busy with others.
"""
_FIRST_CHECK_SECONDS: Final = 2.0
"""How long a start waits for the database; signals are handled only after it."""


class Server(uvicorn.Server):
    """Logs that it listens. Ends streams of Server-Sent Events, for which uvicorn would wait."""

    def __init__(self, config: uvicorn.Config, ending: asyncio.Event) -> None:
        super().__init__(config)
        self._ending = ending

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            logger.info("ready")

    async def shutdown(self, sockets: Any = None) -> None:
        self._ending.set()
        await super().shutdown(sockets)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve the endpoint until a signal ends the process.

    Raises `ConfigurationError` if a server refuses the credentials or the role.
    """
    check_servers(settings)
    ADMITTED.set(RESERVED_FILES + settings.endpoint_connections)
    sys.setswitchinterval(_SWITCH_SECONDS)
    app = create_app(settings)
    # Around faults, too.
    around = CancelledRequests(RequestIds(HeadRequests(DeclaredBodyLimit(DirectRead(app)))))
    config = uvicorn.Config(
        around,
        host=host,
        port=port,
        loop="uvloop",
        http=LimitedProtocol,
        ws=LimitedWebSocket,
        ws_max_size=MAX_FRAME_BYTES,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        headers=[("x-content-type-options", "nosniff")],
        timeout_graceful_shutdown=10,
    )
    freeze_garbage_collector()
    Server(config, app.state.ending).run()


# --- The application -----------------------------------------------------------------------------


def create_app(settings: Settings) -> FastAPI:
    """Build the application. It connects at startup, but also starts without its servers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redis_url = settings.redis_url.get_secret_value()
        state = app.state
        state.reader = Reader(
            settings.database_url.get_secret_value(), settings.endpoint_connections
        )
        state.redis = open_async_redis(redis_url, socket_timeout=2)
        pubsub = PubSubMultiplexer(state.redis)
        enqueuer = Enqueuer(redis_url, settings.inbox_limit, settings.lease_ms, socket_timeout=2)
        state.change_hub = ChangeHub(pubsub, state.redis, state.reader)
        state.write_service = WriteService(enqueuer, pubsub, state.reader)
        state.readiness = Readiness()
        running = (pubsub.run(), state.change_hub.run(), state.reader.run())
        jobs = [asyncio.create_task(job) for job in running]
        await asyncio.to_thread(state.authorizer.fetch_keys)
        try:
            async with asyncio.timeout(_FIRST_CHECK_SECONDS):
                await state.reader.check()
        except (psycopg.Error, TimeoutError):
            logger.warning("the database has not answered yet; until it does, requests get 503")
        yield
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await state.redis.aclose()
        state.reader.close()
        enqueuer.close()

    app = FastAPIOffline(
        title="task tags",
        version="1.0.0",
        description="Read, watch and change the tags on the tasks of flow executions.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        responses=OF_EVERY_ROUTE,
        exception_handlers=HANDLERS,
    )
    app.state.authorizer = Authorizer(settings)
    app.state.ending = asyncio.Event()
    for each in (reads, work_list, changes, feeds, writes, health):
        app.include_router(each.router)
    app.include_router(router)
    document = app.openapi
    app.openapi = cache(lambda: _completed(document()))  # type: ignore[method-assign]
    return app


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document. It does not depend on settings, and reads no environment."""
    return create_app(Settings.model_construct(jwt_secret=SecretStr("-" * 32))).openapi()


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """Add to FastAPI's document what it can't know, and remove answers that are never sent."""
    examples = json.loads(files("worker.api").joinpath("examples.json").read_text("utf-8"))
    schemas = document["components"]["schemas"]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            responses = operation["responses"]
            if responses.get("422", {}).get("description") == "Validation Error":
                del responses["422"]  # FastAPI's own, which is sent as 400
            for response in responses.values():
                response.setdefault("headers", {})["X-Request-ID"] = {"schema": {"type": "string"}}
            # Here because FastAPI removes nulls from examples, and a tag has two.
            for status, example in examples[f"{method.upper()} {path}"].items():
                (content,) = responses[status]["content"].values()
                content["example"] = example
    for unused in ("HTTPValidationError", "ValidationError"):
        del schemas[unused]
    _, bodies = TypeAdapter.json_schemas(
        [(model, "validation", TypeAdapter(model)) for model in writes.BODIES],
        ref_template="#/components/schemas/{model}",
    )
    schemas.update(bodies["$defs"])
    return document
