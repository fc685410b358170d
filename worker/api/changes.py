"""The routes that read stored change events, of one execution or of the organization.

What they return is in docs/concepts/contract.md#rule-12 and #rule-21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from producers.contract.cursors import BEGINNING, Cursor
from producers.contract.errors import ErrorDetail
from producers.contract.results import ChangeEvent
from worker.api.auth import Reading
from worker.api.change_queries import StoredChanges
from worker.api.errors import (
    UNKNOWN_EXECUTION,
    documented,
    gone,
    text_header,
    wrong_parameter,
)
from worker.api.params import AllChangesQuery, AllFeedQuery, ChangesQuery, FeedQuery, query
from worker.api.queries import Reader
from worker.api.responses import READ_PROBLEMS, Database, json_response

MAX_PAGE_BYTES: Final = 1024 * 1024
_BEYOND: Final = 10**18
GONE: Final = gone(Cursor(1207, 1_767_268_800_123_456))

router = APIRouter(responses=READ_PROBLEMS)

_LINK: Final = text_header("Link", 'The URL of the next events, if there are more: `rel="next"`.')


class ChangesPage(BaseModel):
    """Events of an organization; `cursor` is the place behind the last one that was looked at."""

    changes: list[ChangeEvent]
    cursor: str


async def stored_changes(
    reader: Reader,
    organization_id: UUID,
    flow_execution_id: UUID | None,
    after: Cursor | None,
    limit: int,
    max_bytes: int = MAX_PAGE_BYTES,
) -> StoredChanges:
    """Return the stored events of an execution, or of all, behind a place; None is the end.

    Raises:
        ApiError: 404 if there is no such execution, 400 if a plain revision is beyond its last one,
            410 if the event at that place is another one or not stored, or the next was purged.
    """
    number = _BEYOND if after is None else after.number
    found = await reader.changes(organization_id, flow_execution_id, number, limit, max_bytes)
    if found is None:
        if flow_execution_id is not None:
            raise UNKNOWN_EXECUTION
        found = StoredChanges(BEGINNING, None, [])
    head = found.head
    if after is None:
        return found
    if after.number > head.number and after.time is None:
        message = f"is beyond the last revision, {head.number}"
        raise wrong_parameter([ErrorDetail(field="after", message=message)])
    time = head.time if after.number == head.number else found.at
    if after.time not in (None, time):
        raise gone(head)
    if after.number < head.number and (
        not found.events or found.events[0][0].number != after.number + 1
    ):
        raise gone(head)
    return found


def change_filter(wanted: FeedQuery | AllFeedQuery) -> Callable[[bytes], bytes | None]:
    """Return a function that filters the changes of an event; it returns None if none match."""
    names, types, tags = wanted.task_names, wanted.tag_type, wanted.tag
    flows = wanted.flow_id if isinstance(wanted, AllFeedQuery) else []
    if not (names or types or tags or flows):
        return lambda event: event

    def fits(change: dict[str, Any]) -> bool:
        about = change.get("tag") or change["task"]
        return (
            (not names or about["task_name"] in names)
            and (not types or about.get("tag_type") in types)
            and (not tags or about.get("tag") in tags)
        )

    def reduced(encoded: bytes) -> bytes | None:
        event = from_json(encoded)
        if flows and event.get("flow_id") not in flows:
            return None
        event["changes"] = list(filter(fits, event["changes"]))
        return to_json(event) if event["changes"] else None

    return reduced


def _page(
    request: Request, query: FeedQuery | AllFeedQuery, found: StoredChanges
) -> tuple[bytes, Cursor, dict[str, str]]:
    """Return the events that match, the place that was reached, and the link to the next ones."""
    reached = found.events[-1][0] if found.events else query.place or found.head
    events = map(change_filter(query), (event for _, event in found.events))
    headers = {}
    if reached.number < found.head.number:
        url = request.url.include_query_params(after=str(reached))
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return b",".join(filter(None, events)), reached, headers


@router.get(
    "/task-tags/changes",
    summary="Read the stored change events of a flow execution",
    response_model=list[ChangeEvent],
    response_description="The events after a revision, in order; none if there are no more.",
    responses={200: {"headers": _LINK}, **documented(GONE)},
)
async def read_changes(
    request: Request,
    caller: Reading,
    query: Annotated[ChangesQuery, Depends(query(ChangesQuery))],
    reader: Database,
) -> Response:
    """Each event says who changed what, when, and in which batch, as it was published.

    With filters, events have only the changes that match, and events without any are left out.
    """
    found = await stored_changes(
        reader, caller.organization_id, query.flow_execution_id, query.place, query.limit
    )
    events, _, headers = _page(request, query, found)
    return json_response(b"[%b]" % events, headers)


@router.get(
    "/changes",
    summary="Read the stored change events of the organization",
    response_model=ChangesPage,
    response_description="The events behind a cursor, in order; none if there are no more, or none "
    "of those that were looked at matches.",
    responses={200: {"headers": _LINK}, **documented(GONE)},
)
async def read_all_changes(
    request: Request,
    caller: Reading,
    query: Annotated[AllChangesQuery, Depends(query(AllChangesQuery))],
    reader: Database,
) -> Response:
    """Events of all executions, in the order in which they took effect.

    With filters, events have only the changes that match, and events without any are left out; the
    cursor passes over them.
    """
    found = await stored_changes(reader, caller.organization_id, None, query.place, query.limit)
    events, reached, headers = _page(request, query, found)
    body = b'{"changes":[%b],"cursor":%b}' % (events, to_json(str(reached)))
    return json_response(body, headers)
