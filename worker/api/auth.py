"""Authenticates requests by the bearer token in their headers."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Security
from fastapi.security import HTTPBearer, SecurityScopes
from starlette.requests import HTTPConnection

from worker.api.errors import ApiError, forbidden
from worker.auth import (
    EXECUTIONS_WRITE,
    READ,
    WRITE,
    Authorizer,
    InvalidToken,
    Principal,
)
from worker.jwk_set import JwksUnavailable


def bearer_token(connection: HTTPConnection) -> str:
    """Return the bearer token in the headers, or an empty string."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    # Several spaces are allowed: https://www.rfc-editor.org/rfc/rfc9110#section-11.4
    return token.lstrip(" ") if scheme.lower() == "bearer" else ""


async def authenticate(connection: HTTPConnection, token: str, scope: str) -> Principal:
    """Return what a token proves now, if it has the scope.

    Raises:
        ApiError: 401, 403, or 503 if the keys can't be fetched.
    """
    if not token:
        raise ApiError(401, "unauthorized", "a bearer token is required")
    authorizer: Authorizer = connection.app.state.authorizer
    try:
        principal = authorizer.verify_now(token)
    except InvalidToken as error:
        raise ApiError(401, "unauthorized", str(error)) from None
    except JwksUnavailable:
        raise ApiError(503, "unavailable", "the signing keys are not available") from None
    if on_authenticated := getattr(connection.state, "on_authenticated", None):
        on_authenticated()  # for the limit of connections without a token (worker/api/limits.py)
    if not principal.allows(scope):
        raise forbidden(scope)
    return principal


async def require_scope(connection: HTTPConnection, scope: str) -> Principal:
    """Return what the bearer token in the headers proves, if it has the scope."""
    return await authenticate(connection, bearer_token(connection), scope)


_BEARER: Final = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)
"""For the OpenAPI document only: `bearer_token` reads the header, and is stricter."""


async def authorized(
    connection: HTTPConnection, scopes: SecurityScopes, _: Annotated[Any, Security(_BEARER)]
) -> Principal:
    """Return who asks, for a route that needs one scope; raise what `authenticate` raises."""
    (scope,) = scopes.scopes
    return await require_scope(connection, scope)


Reading = Annotated[Principal, Security(authorized, scopes=[READ])]
TagWriting = Annotated[Principal, Security(authorized, scopes=[WRITE])]
ExecutionWriting = Annotated[Principal, Security(authorized, scopes=[EXECUTIONS_WRITE])]
