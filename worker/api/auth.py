"""Authenticates requests by the bearer token in their headers."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from worker.api.errors import ApiError
from worker.auth import Authorizer, InvalidToken, JwksUnavailable, Principal


async def require_scope(connection: HTTPConnection, scope: str) -> Principal:
    """Return what the bearer token in the headers proves, if it has the scope.

    Raises:
        ApiError: 401, 403, or 503 if the keys can't be fetched.
    """
    return await authenticate(connection.app.state.authorizer, bearer_token(connection), scope)


def bearer_token(connection: HTTPConnection) -> str:
    """Return the bearer token in the headers, or an empty string."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


async def authenticate(authorizer: Authorizer, token: str, scope: str) -> Principal:
    """Return what a token proves now, if it has the scope.

    Raises:
        ApiError: 401, 403, or 503 if the keys can't be fetched.
    """
    if not token:
        raise ApiError(401, "unauthorized", "a bearer token is required")
    try:
        if authorizer.may_block:
            principal = await run_in_threadpool(authorizer.verify_now, token)
        else:
            principal = authorizer.verify_now(token)
    except InvalidToken as error:
        raise ApiError(401, "unauthorized", str(error)) from None
    except JwksUnavailable:
        raise ApiError(503, "unavailable", "the keys of tokens can't be fetched") from None
    if not principal.allows(scope):
        raise ApiError(403, "forbidden", f"the token lacks the scope {scope}")
    return principal
