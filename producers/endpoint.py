"""The SDK's way to the endpoint over HTTP: clients, stored changes, and errors in one line."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import httpx
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from producers.contract.results import ChangeEvent
from producers.contract.values import TolerantModel
from producers.errors import ChangesRefused, ConfigurationError, RevisionExpired, Unavailable

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer", bound=BaseModel)

_RETRY_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.1
"""Before a stream that has ended, as with its token, is opened again."""
_STREAM_TIMEOUT: Final = httpx.Timeout(10, read=45.0)
"""After 45 s without a ping, which comes every 15 s, a stream is lost."""
_ANOTHER_SERVER: Final = "{} is not a task tags endpoint (TASK_TAGS_ENDPOINT_URL)"


class TokenAuth(httpx.Auth):
    """Sends the token that a function returns, asked for each request."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token()}"
        yield request

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        token = await asyncio.to_thread(self._token)  # it may fetch one
        request.headers["Authorization"] = f"Bearer {token}"
        yield request


def client_options(url: str, token: Callable[[], str]) -> dict[str, Any]:
    """Return the arguments of an httpx client, without a proxy for an endpoint on this machine.

    Raises `ConfigurationError` if httpx can't use the URL, or what the environment says.
    """
    try:
        trust_env = httpx.URL(url).host not in ("localhost", "127.0.0.1", "::1")
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"TASK_TAGS_ENDPOINT_URL: {error}") from None
    try:
        verify = httpx.create_ssl_context(trust_env=trust_env)
    except OSError as error:
        names = "SSL_CERT_FILE, SSL_CERT_DIR or SSLKEYLOGFILE"
        raise ConfigurationError(f"{names} can't be used: {error.strerror or error}") from None
    options: dict[str, Any] = {
        "base_url": url,
        "auth": TokenAuth(token),
        "timeout": 10,
        "trust_env": trust_env,
        "verify": verify,
    }
    try:
        httpx.Client(**options).close()
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        names = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY"
        raise ConfigurationError(f"{names} can't be used: {error}") from None
    return options


def execution_id(flow_execution_id: UUID | str) -> UUID:
    """Return the id; it is compared with those of events. Raises `ChangesRefused`."""
    try:
        return UUID(str(flow_execution_id))
    except ValueError:
        raise ChangesRefused("flow_execution_id: must be a UUID", 400) from None


async def get(client: httpx.AsyncClient, path: str, query: dict[str, Any]) -> httpx.Response:
    """Send a request; return its answer of status 200.

    Raises:
        Unavailable: The endpoint can't be used now.
        RevisionExpired, ChangesRefused: Asking again does not help.
    """
    with requesting():
        response = await client.get(path, params=query)
    check_answer(response)
    return response


class Page(TolerantModel, Generic[Item]):
    """A page of tags or of tasks."""

    items: list[Item] = Field(validation_alias=AliasChoices("task_executions", "tags"))
    next_page: str | None


class _Place(TolerantModel):
    cursor: str


def read_answer(response: httpx.Response, model: type[Answer]) -> Answer:
    """Read the body. Raises `Unavailable` if it is something else, as of another server."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError:
        raise Unavailable(_ANOTHER_SERVER.format(response.url.host)) from None


async def last_cursor(client: httpx.AsyncClient) -> str:
    """Return the place behind the organization's last event. Raises what `get` raises."""
    response = await get(client, "/changes", {"after": "latest"})
    return read_answer(response, _Place).cursor


async def stream_changes(
    client: httpx.AsyncClient,
    after: str,
    filters: Mapping[str, Sequence[str]] | None = None,
    flow_execution_id: UUID | None = None,
    on_open: Callable[[], None] = lambda: None,
) -> AsyncGenerator[tuple[str, ChangeEvent | None]]:
    """Yield the events behind a cursor without end, each with its own cursor.

    None instead of an event says how far the stream has come. A connection that is lost, or ends
    with its token, is opened again.

    Args:
        flow_execution_id: Of this execution alone, and not of the organization.
        on_open: Called when the stream begins, for the first time or again.

    Raises:
        Unavailable: The endpoint can't be used at the start.
        RevisionExpired, ChangesRefused: Asking again does not help.
    """
    path, query = "/changes/events", dict[str, Any](filters or {})
    if flow_execution_id:
        path, query["flow_execution_id"] = f"/task-tags{path}", str(flow_execution_id)
    reached = is_lost = False
    while True:
        try:
            query["after"] = after
            stream = client.stream("GET", path, params=query, timeout=_STREAM_TIMEOUT)
            with requesting():
                async with stream as response:
                    await _check_stream(response)
                    if is_lost:
                        logger.warning("the stream of changes continues")
                    reached, is_lost = True, False
                    on_open()
                    async for kind, id, data in _server_sent(response.aiter_lines()):
                        if kind == "error" and json.loads(data)["error"]["code"] == "gone":
                            raise _expired(data)
                        if id:
                            event = ChangeEvent.decode(data) if kind == "change" else None
                            yield (after := id), event
            await asyncio.sleep(_PAUSE_SECONDS)
        except (Unavailable, ValidationError) as error:
            if not reached:
                raise
            if not is_lost:
                name = type(error.__cause__ or error).__name__
                logger.warning("the stream of changes is lost; reconnecting: %s", name)
            is_lost = True
            await asyncio.sleep(_RETRY_SECONDS)


async def _check_stream(response: httpx.Response) -> None:
    """Raise what `get` raises, unless a stream of events begins."""
    if response.status_code != 200:
        await response.aread()
    check_answer(response)
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        raise Unavailable(_ANOTHER_SERVER.format(response.url.host))


async def _server_sent(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, str, str]]:
    """Yield type, id and data of each event (https://html.spec.whatwg.org/multipage/#parsing)."""
    fields: dict[str, str] = {}
    async for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif fields:
            yield fields.get("event", ""), fields.get("id", ""), fields.get("data", "")
            fields = {}


@contextmanager
def requesting() -> Iterator[None]:
    """Raise `Unavailable`, which names the endpoint and its setting, for what httpx raises.

    Raises `ChangesRefused` if the request can't be sent at all.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        raise ChangesRefused("an argument is not UTF-8", 400) from error
    except httpx.InvalidURL as error:
        raise ChangesRefused(f"an argument is too long: {error}", 400) from error
    except httpx.RequestError as error:
        url = error.request.url
        at = f"{url.scheme}://{url.netloc.decode()}"
        text = f"the endpoint at {at} can't be used (TASK_TAGS_ENDPOINT_URL)"
        raise Unavailable(f"{text}: {str(error) or type(error).__name__}") from error


def check_answer(response: httpx.Response) -> None:
    """Raise what `get` raises, unless the status is 200."""
    if response.status_code == 410:
        raise _expired(response.text)
    if response.status_code >= 500 or response.status_code in (408, 429):  # or of a proxy
        raise Unavailable(f"the endpoint can't be used: {error_summary(response)}")
    if response.status_code != 200:
        raise ChangesRefused(error_summary(response), response.status_code)


def _expired(body: str) -> RevisionExpired:
    try:
        error = json.loads(body)["error"]
        text, cursor = error["message"], error.get("cursor")
    except (ValueError, LookupError, TypeError, AttributeError):
        return RevisionExpired("the endpoint answered 410")
    return RevisionExpired(text if cursor is None else f"{text} {cursor}", cursor)


def error_summary(response: httpx.Response) -> str:
    """Return what an error of the endpoint says, in one line."""
    try:
        error = response.json()["error"]
        details = "; ".join(f"{each['field']}: {each['message']}" for each in error["details"])
        return f"{error['message']}{f' ({details})' if details else ''}"
    except (ValueError, LookupError, TypeError):
        return f"the endpoint answered {response.status_code}"
