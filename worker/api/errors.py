"""The errors of the endpoint: one shape for all (docs/concepts/contract.md#rule-14).

Also their descriptions in the OpenAPI document.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from producers.contract.errors import ErrorDetail
from worker.api.limits import MAX_BODY_BYTES, error_body
from worker.auth import READ

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """Ends a request with an error. The caller receives `message`, so it must not have secrets."""

    def __init__(
        self, status: int, code: str, message: str, details: list[ErrorDetail] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details or []

    def body(self, request_id: str) -> bytes:
        details = [detail.model_dump() for detail in self.details]
        return error_body(self.code, self.message, details, request_id)


class ErrorBody(BaseModel):
    message: str
    code: str
    details: list[ErrorDetail]


class ErrorAnswer(BaseModel):
    """What every error looks like; `request_id` is also in the header X-Request-ID."""

    error: ErrorBody
    request_id: str


UNAVAILABLE: Final = ApiError(503, "unavailable", "the database does not answer; try again later")
GONE: Final = ApiError(
    410, "gone", "older changes were purged; read the tags, and go on from there"
)
NOT_FOUND: Final = ApiError(404, "not_found", "there is no such thing here")


def response_to(request: Request, problem: ApiError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}
    if problem.status in (429, 503):
        headers["Retry-After"] = "1"
    body = problem.body(request.state.request_id)
    return Response(body, problem.status, headers, "application/json")


async def on_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, ApiError)
    return response_to(request, problem)


async def on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = ApiError(400, "bad_request", WRONG_PARAMETER, parameter_faults(error.errors()))
    return response_to(request, problem)


def parameter_faults(faults: Iterable[Any]) -> list[ErrorDetail]:
    return [
        ErrorDetail(
            field=next(step for step in reversed(fault["loc"]) if isinstance(step, str))[:64],
            message=_PARAMETER_TEXTS.get(fault["type"], "is not valid"),
        )
        for fault in faults
    ]


WRONG_PARAMETER: Final = "a parameter is missing or wrong"
_PARAMETER_TEXTS: Final = {
    "missing": "is required",
    "extra_forbidden": "is not a known parameter",
    "uuid_parsing": "must be a UUID",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "string_pattern_mismatch": "must not contain U+0000",
    "cursor": "must be the next_cursor of an earlier answer",
    "number": "must be a whole number",
    "greater_than_equal": "is too small",
    "less_than_equal": "is too large",
}


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        response = response_to(
            request, ApiError(405, "method_not_allowed", "this path has other methods")
        )
        response.headers.update(error.headers or {})
        return response
    return response_to(request, NOT_FOUND)


async def on_unavailable(request: Request, error: Exception) -> Response:
    logger.warning("the database can't be used", extra={"error": type(error).__name__})
    return response_to(request, UNAVAILABLE)


async def on_gone(request: Request, error: Exception) -> Response:
    """Return an answer that is not sent, because the client has disconnected."""
    return Response(status_code=400)


async def on_fault(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error, extra=_request_fields(request))
    problem = ApiError(500, "internal_error", "the endpoint failed at this request")
    return response_to(request, problem)


def _request_fields(request: Request) -> dict[str, str]:
    return {"request_id": request.state.request_id, "path": request.url.path[:200]}


# --- The OpenAPI document ------------------------------------------------------------------------


def documented_error(
    code: str, message: str, details: list[dict[str, Any]] | None = None, *headers: str
) -> dict[str, Any]:
    example = {
        "error": {"message": message, "code": code, "details": details or []},
        "request_id": "3f7e1c1e-5a57-4f0c-9a0f-1b1f0c7f5a11",
    }
    return {
        "model": ErrorAnswer,
        "description": message,
        "content": {"application/json": {"example": example}},
        "headers": {name: {"schema": {"type": "string"}} for name in ("X-Request-ID", *headers)},
    }


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: documented_error(
        "bad_request",
        "a parameter is missing or wrong",
        [{"index": None, "field": "flow_execution_id", "message": "must be a UUID"}],
    ),
    401: documented_error("unauthorized", "the token has expired", None, "WWW-Authenticate"),
    403: documented_error("forbidden", f"the token lacks the scope {READ}"),
    404: documented_error("not_found", "there is no such thing here"),
    408: documented_error("request_timeout", "request timeout"),
    413: documented_error("body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes"),
    431: documented_error("headers_too_large", "request header fields too large"),
    500: documented_error("internal_error", "the endpoint failed at this request"),
    503: documented_error("unavailable", UNAVAILABLE.message, None, "Retry-After"),
}
