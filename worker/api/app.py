"""The endpoint as one application: routes for reading, watching and writing, and the live page.

Its OpenAPI document has every answer that it can give. Its pages load nothing from other servers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Final
from uuid import uuid4

import psycopg
import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from producers.contract.messages import TagOperation
from producers.enqueuer import Enqueuer
from producers.pubsub import PubSubMultiplexer
from producers.redis_client import open_async_redis
from worker.api import feeds, health, reads, writes
from worker.api.change_hub import ChangeHub
from worker.api.errors import (
    ApiError,
    on_fault,
    on_gone,
    on_http_error,
    on_invalid,
    on_problem,
    on_unavailable,
    response_to,
)
from worker.api.limits import MAX_BODY_BYTES, MAX_FRAME_BYTES, LimitedProtocol, LimitedWebSocket
from worker.api.queries import Reader
from worker.auth import Authorizer
from worker.db.connection import UnsafeRole
from worker.settings import Settings

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


# --- The application -----------------------------------------------------------------------------


class Endpoint:
    """The ASGI application. Gives requests ids, and refuses a body that is declared too large.

    The most frequent request, `GET /task-tags`, goes directly to its handler, because FastAPI's
    routing takes longer than the read.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def end_streams(self) -> None:
        """End the streams of Server-Sent Events, which have no end by themselves."""
        self._app.state.ending.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(uuid4())
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
            problem = ApiError(413, "body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes")
            await response_to(Request(scope), problem)(scope, receive, send_with_id)
            return
        if scope["path"] == "/task-tags" and scope["method"] == "GET":
            scope["app"] = self._app
            response = await self._read_tags(Request(scope, receive))
            await response(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)

    async def _read_tags(self, request: Request) -> Response:
        """Call the handler of `GET /task-tags`, and answer its exceptions as FastAPI does."""
        try:
            return await reads.read_tags(request)
        except Exception as error:
            handlers: Any = self._app.exception_handlers
            kinds = (kind for kind in type(error).__mro__ if kind in handlers)
            response: Response = await handlers[next(kinds)](request, error)
            return response


class Server(uvicorn.Server):
    """Ends the endpoint's streams at shutdown; otherwise uvicorn waits for them."""

    def __init__(self, config: uvicorn.Config, endpoint: Endpoint) -> None:
        super().__init__(config)
        self._endpoint = endpoint

    async def shutdown(self, sockets: Any = None) -> None:
        self._endpoint.end_streams()
        await super().shutdown(sockets)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve the endpoint until a signal ends the process."""
    endpoint = create_app(settings)
    config = uvicorn.Config(
        endpoint,
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
        timeout_graceful_shutdown=10,
    )
    Server(config, endpoint).run()


def create_app(settings: Settings) -> Endpoint:
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
        state.change_hub = ChangeHub(pubsub, state.reader)
        state.write_service = writes.WriteService(enqueuer, pubsub, state.reader)
        jobs = [asyncio.create_task(job) for job in (pubsub.run(), state.change_hub.run())]
        try:
            await state.reader.check()
        except (psycopg.Error, TimeoutError):
            logger.warning("the database does not answer yet: requests get 503 until it does")
        logger.info("ready")
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
    )
    app.state.authorizer = Authorizer(settings)
    app.state.ending = asyncio.Event()
    for each in (reads.router, feeds.router, writes.router, health.router, router):
        app.include_router(each)
    app.add_exception_handler(ApiError, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    for unavailable in (psycopg.Error, TimeoutError, UnsafeRole):
        app.add_exception_handler(unavailable, on_unavailable)
    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(Exception, on_fault)
    document = app.openapi
    app.openapi = lambda: _exact(document())  # type: ignore[method-assign]
    return Endpoint(app)


def _exact(described: dict[str, Any]) -> dict[str, Any]:
    """Return FastAPI's document with the bearer scheme, and without answers that are never sent.

    FastAPI keeps the document, so this may receive one that it has changed already.
    """
    if "securitySchemes" in described.get("components", {}):
        return described
    for path, item in described["paths"].items():
        for operation in item.values():
            operation["responses"].pop("422", None)
            if not path.endswith("z"):
                operation["security"] = [{"bearer": []}]
    # FastAPI leaves nulls out of examples, and a tag has two.
    examples = {
        "/task-tags": reads.TAG_EXAMPLE,
        "/task-tags/changes": reads.EVENT_EXAMPLE,
        "/task-executions": reads.TASK_EXAMPLE,
    }
    for path, example in examples.items():
        read = described["paths"][path]["get"]["responses"]["200"]
        read["content"]["application/json"]["example"] = [example]
    stream = described["paths"]["/task-tags/changes/events"]["get"]["responses"]["200"]
    del stream["content"]["application/json"]  # FastAPI adds it to every answer
    components = described.setdefault("components", {})
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    }
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    # The routes read bodies themselves, so FastAPI does not know the models.
    operation = TagOperation.model_json_schema(ref_template="#/components/schemas/{model}")
    components["schemas"].setdefault("TagOperation", operation)
    return described
