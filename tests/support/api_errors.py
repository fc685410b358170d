"""The one shape that all errors of the endpoint have."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Check the shape of an error response, and return what is under `error`."""
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"message", "code", "details"}
    assert UUID(body["request_id"])
    error: dict[str, Any] = body["error"]
    return error
