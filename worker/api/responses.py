"""What the routes that read have in common: the database, their errors, JSON as it is stored."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Depends, Response
from starlette.requests import HTTPConnection

from worker.api.errors import EXPIRED, UNAVAILABLE, UNKNOWN_EXECUTION, documented, forbidden
from worker.api.queries import Reader
from worker.auth import READ

READ_PROBLEMS: Final = documented(EXPIRED, forbidden(READ), UNKNOWN_EXECUTION, UNAVAILABLE)


async def reader_of(connection: HTTPConnection) -> Reader:
    reader: Reader = connection.app.state.reader
    return reader


Database = Annotated[Reader, Depends(reader_of)]


def json_response(body: bytes, headers: dict[str, str] | None = None) -> Response:
    """Return JSON as it came from the database."""
    return Response(body, headers=headers, media_type="application/json")
