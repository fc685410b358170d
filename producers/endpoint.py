"""The SDK's way to the endpoint over HTTP: clients, stored changes, and errors in one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, Final
from uuid import UUID

import httpx
from pydantic import TypeAdapter, ValidationError

from producers.contract.results import ChangeEvent
from producers.errors import ChangesRefused, ConfigurationError, RevisionExpired, Unavailable

_PAGE_EVENTS: Final = 100
_EVENTS: Final = TypeAdapter(list[ChangeEvent])


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


async def fetch_changes(
    client: httpx.AsyncClient, flow_execution_id: UUID, after: int
) -> Sequence[ChangeEvent]:
    """Return stored events of an execution after a revision, in order; none if there are no more.

    Raises:
        Unavailable: The endpoint can't be used now.
        RevisionExpired, ChangesRefused: Asking again does not help.
    """
    query: dict[str, str | int] = {
        "flow_execution_id": str(flow_execution_id),
        "after": after,
        "limit": _PAGE_EVENTS,
    }
    try:
        response = await client.get("/task-tags/changes", params=query)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise Unavailable(f"the endpoint can't be used: {type(error).__name__}") from error
    if response.status_code == 200:
        try:
            return _EVENTS.validate_json(response.content)
        except ValidationError:
            raise Unavailable("the endpoint's answer is not a list of changes") from None
    if response.status_code == 410:
        raise RevisionExpired(error_summary(response))
    if response.status_code >= 500:
        raise Unavailable(f"the endpoint can't be used: {error_summary(response)}")
    raise ChangesRefused(error_summary(response))


def error_summary(response: httpx.Response) -> str:
    """Return what an error of the endpoint says, in one line."""
    try:
        error = response.json()["error"]
        details = "; ".join(f"{each['field']}: {each['message']}" for each in error["details"])
        return f"{error['message']}{f' ({details})' if details else ''}"
    except (ValueError, LookupError, TypeError):
        return f"the endpoint answered {response.status_code}"
