"""The errors of the endpoint: one shape for all (docs/concepts/contract.md#rule-14).

Also their descriptions in the OpenAPI document, which are made from the errors themselves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final
from uuid import uuid4

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope

from producers.contract.cursors import Cursor
from producers.contract.encoding import MAX_DETAILS
from producers.contract.errors import ErrorDetail
from worker.api.limits import MAX_BODY_BYTES, error_body
from worker.api.queries import READ_ERRORS

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """Ends a request with an error. The caller receives `message`, so it must not have secrets."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: list[ErrorDetail] | None = None,
        headers: Mapping[str, str] | None = None,
        cursor: Cursor | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details or []
        self.cursor = cursor
        self.headers = headers or _HEADERS.get(status, {})

    def body(self, request_id: str) -> bytes:
        details = [detail.model_dump(mode="json") for detail in self.details]
        more = {} if self.cursor is None else {"cursor": str(self.cursor)}
        return error_body(self.code, self.message, details, request_id, **more)


_HEADERS: Final = {
    401: {"WWW-Authenticate": "Bearer"},
    413: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}

EXPIRED: Final = ApiError(401, "unauthorized", "the token has expired")
NOT_FOUND: Final = ApiError(404, "not_found", "there is no such path")
UNKNOWN_EXECUTION: Final = ApiError(404, "not_found", "the flow execution is unknown")
NO_RESULT: Final = ApiError(404, "not_found", "no result of this batch is stored")
TOO_LARGE: Final = ApiError(413, "body_too_large", f"the body exceeds {MAX_BODY_BYTES} bytes")
FAULT: Final = ApiError(500, "internal_error", "the endpoint failed to process this request")
UNAVAILABLE: Final = ApiError(503, "unavailable", "the database does not answer; try again later")


def gone(head: Cursor) -> ApiError:
    text = "these changes are not stored; read the tags or tasks again and continue from `cursor`"
    return ApiError(410, "gone", text, cursor=head)


def forbidden(scope: str) -> ApiError:
    return ApiError(403, "forbidden", f"the token lacks the scope {scope}")


def wrong_parameter(details: list[ErrorDetail]) -> ApiError:
    return ApiError(400, "bad_request", "a parameter is missing or wrong", details)


def invalid_body(details: list[ErrorDetail]) -> ApiError:
    return ApiError(400, "bad_request", "the body breaks the contract", details)


# --- Exceptions ----------------------------------------------------------------------------------


async def answer(request: Request, error: Exception) -> Response:
    """Answer any exception in the one shape of errors."""
    problem = problem_of(error)
    if problem.status == 405:
        problem.headers = {"Allow": ", ".join(_methods(request))}
    if problem is UNAVAILABLE:
        logger.warning("the database can't be used", extra={"error": type(error).__name__})
    elif problem is FAULT:
        about = {"request_id": request_id_of(request.scope), "path": request.url.path[:200]}
        logger.error("a request failed", exc_info=error, extra=about)
    body = problem.body(request_id_of(request.scope))
    return Response(body, problem.status, problem.headers, "application/json")


def request_id_of(scope: Scope) -> str:
    """Return the id of a request, which gets one at the first call."""
    state: dict[str, str] = scope.setdefault("state", {})
    if "request_id" not in state:
        state["request_id"] = str(uuid4())
    return state["request_id"]


def _methods(request: Request) -> list[str]:
    """Return the methods of a path, of all its routes."""
    found = {
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] == Match.FULL
    }
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def problem_of(error: Exception) -> ApiError:
    """Return the error that the caller receives."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return wrong_parameter(parameter_faults(error.errors()))
        case HTTPException(status_code=405):
            text = "the method is not allowed for this path"
            return ApiError(405, "method_not_allowed", text)
        case HTTPException():
            return NOT_FOUND
        case ClientDisconnect():  # the answer is not sent
            return ApiError(400, "bad_request", "the client has disconnected")
    return UNAVAILABLE if isinstance(error, READ_ERRORS) else FAULT


HANDLERS: Final = dict.fromkeys(
    (
        *(ApiError, RequestValidationError, HTTPException, ClientDisconnect, *READ_ERRORS),
        Exception,
    ),
    answer,
)
"""The exception handlers of the application."""


def parameter_faults(faults: Iterable[Any]) -> list[ErrorDetail]:
    """Return pydantic's faults in words of our own: pydantic's may quote the value."""
    return [
        ErrorDetail(
            field=next(step for step in reversed(fault["loc"]) if isinstance(step, str))[:64],
            message=_PARAMETER_TEXTS.get(fault["type"], "is not valid"),
        )
        for fault in islice(faults, MAX_DETAILS)
    ]


_PARAMETER_TEXTS: Final = {
    "missing": "is required",
    "extra_forbidden": "is not a known parameter",
    "uuid_parsing": "must be a UUID",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "string_pattern_mismatch": "must not contain U+0000",
    "revision": "must be a revision, or `<revision>-<time>` as in an ETag",
    "position": "must be a cursor, 0 or latest",
    "selector": "must be like type:tag or type, with a backslash before : and \\ in the type",
    "too_long": "has too many values",
    "literal_error": "is not an allowed value",
    "number": "must be a whole number",
    "greater_than_equal": "is too small",
    "less_than_equal": "is too large",
}


# --- The OpenAPI document ------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    code: str
    details: list[ErrorDetail]
    cursor: str | None = Field(None, description="Only of `gone`: where to continue.")


class ErrorAnswer(BaseModel):
    """What every error looks like; `request_id` is also in the header X-Request-ID."""

    error: ErrorBody
    request_id: str


def text_header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """Return the OpenAPI description of a header of an answer."""
    return {name: {"description": description, "schema": {"type": "string", **schema}}}


def documented(*problems: ApiError) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of errors, by status."""
    return {
        problem.status: {
            "model": ErrorAnswer,
            "description": problem.message,
            "content": {
                "application/json": {
                    "example": json.loads(problem.body("3f7e1c1e-5a57-4f0c-9a0f-1b1f0c7f5a11"))
                }
            },
            "headers": {
                name: {"schema": {"type": "string"}}
                for name in problem.headers
                if name != "Connection"
            },
        }
        for problem in problems
    }


OF_EVERY_ROUTE: Final = documented(
    wrong_parameter([ErrorDetail(field="flow_execution_id", message="must be a UUID")]),
    ApiError(408, "request_timeout", "request timeout"),
    TOO_LARGE,
    ApiError(431, "headers_too_large", "request header fields too large"),
    FAULT,
)
