"""Tokens of pages: where the next page of an answer begins. A token is valid for one query only."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from datetime import datetime
from hashlib import blake2b
from typing import Annotated, Final
from uuid import UUID

from pydantic import BaseModel, Field
from pydantic_core import to_json

from producers.contract.errors import ErrorDetail
from worker.api.errors import wrong_parameter

PageToken = Annotated[
    str | None, Field(description="The next_page of the answer before, to the same query.")
]

OF_TAGS: Final = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)
"""A place among tags: the time of creation and the id of the last one before it."""
OF_NAMES: Final = re.compile(r"([0-9]{1,9}) [^\x00]{1,200}")
"""A place among tasks: the number of the last name before it, and the name."""


def page_token(place: str, organization_id: UUID, path: str, query: BaseModel) -> str:
    """Return the token of the page that begins at a place, for the same query."""
    # Selectors are declared as the texts that they were parsed from: that is no reason to warn.
    asked = query.model_dump(mode="json", exclude={"limit", "page"}, warnings=False)
    about = to_json([place, organization_id, path, asked])
    token = f"{blake2b(about, digest_size=4).hexdigest()}{place}".encode()
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def place_of(
    token: str | None, form: re.Pattern[str], organization_id: UUID, path: str, query: BaseModel
) -> str | None:
    """Return the place where a page begins; None for the first page.

    Raises `ApiError` (400) if the token is not one of this organization and query.
    """
    if token is None:
        return None
    with suppress(ValueError):
        decoded = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        place = decoded[8:].decode()
        if (found := form.fullmatch(place)) and token == page_token(
            place, organization_id, path, query
        ):
            if form is OF_TAGS:
                datetime.fromisoformat(found[1])  # the pattern allows a thirteenth month
            return place
    message = "must be the next_page of an earlier answer to the same query"
    raise wrong_parameter([ErrorDetail(field="page", message=message)])
