"""The routes that read: tags, tasks, stored changes and stored results.

What they return is in docs/concepts/contract.md#rule-14.
"""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json, to_json

from producers.contract.errors import ErrorDetail
from producers.contract.messages import TaskState
from producers.contract.results import ChangeEvent, ResultRecord, Tag
from worker.api.auth import require_scope
from worker.api.errors import ERRORS, GONE, NOT_FOUND, WRONG_PARAMETER, ApiError, documented_error
from worker.api.params import (
    ExecutionQuery,
    FeedQuery,
    Filters,
    NoQuery,
    Number,
    openapi_parameters,
    parse_query,
)
from worker.api.queries import Reader, StoredChanges, TagFilter
from worker.auth import READ

router = APIRouter()


def reader_of(request: Any) -> Reader:
    reader: Reader = request.app.state.reader
    return reader


# --- Parameters ----------------------------------------------------------------------------------


def _cursor(value: Any) -> tuple[str, str]:
    """Parse a cursor: the time of creation and the id of the last tag of the previous page."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{8,200}", value):
        text = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode("ascii", "replace")
        with suppress(ValueError):
            if found := _CURSOR.fullmatch(text):
                datetime.fromisoformat(found[1])  # the pattern allows a thirteenth month
                return found[1], found[2]
    raise PydanticCustomError("cursor", "must be the next_cursor of an earlier answer")


_CURSOR: Final = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
)


class TagsQuery(Filters):
    limit: Number | None = Field(
        None, ge=1, le=1000, description="Return a page of at most this many tags."
    )
    cursor: Annotated[
        tuple[str, str] | None,
        BeforeValidator(_cursor),
        WithJsonSchema({"type": "string", "description": "The next_cursor of the previous page."}),
    ] = None


class ChangesQuery(FeedQuery):
    limit: Number = Field(
        100,
        ge=1,
        le=1000,
        description="The most events in one answer, which ends earlier at about 1 MiB.",
    )


def _known_revisions(header: str | None) -> list[int]:
    """Return the revisions that If-None-Match names; entity tags of other kinds match nothing."""
    if header is None:
        return []
    tags = re.findall(r'(?:W/)?"([0-9]{1,18})"', header[:4096])
    return [int(tag) for tag in tags[:100]]


# --- Answers -------------------------------------------------------------------------------------


class TagPage(BaseModel):
    """A page of tags; `next_cursor` asks for the next page, and is null if there is none."""

    tags: list[Tag]
    next_cursor: str | None


class TaskAnswer(BaseModel):
    """A task of an execution: its last recorded state, if it has one, and its active tags."""

    flow_execution_id: UUID
    task_name: str
    state: TaskState | None
    state_changed_at: str | None
    state_changed_by: str | None
    tags: list[Tag]


_EXECUTION: Final = "01970000-0000-7000-8000-00000000e001"
TAG_EXAMPLE: Final = {
    "id": "01970000-0000-7000-8000-00000000a001",
    "flow_execution_id": _EXECUTION,
    "task_name": "extract_data",
    "tag_type": "review_status",
    "tag": "reviewed",
    "tag_metadata": {"reviewer": "ada"},
    "organization_id": "01970000-0000-7000-8000-0000000000a0",
    "status": "active",
    "created_at": "2026-01-01T12:00:00.000000Z",
    "created_by": "ada",
    "updated_at": None,
    "modified_by": None,
}
EVENT_EXAMPLE: Final = {
    "organization_id": "01970000-0000-7000-8000-0000000000a0",
    "flow_execution_id": _EXECUTION,
    "revision": 42,
    "batch_id": "01970000-0000-7000-8000-00000000b001",
    "changed_by": "ada",
    "changed_at": "2026-01-01T12:00:00.000000Z",
    "changes": [{"change": "added", "tag": TAG_EXAMPLE}],
}
TASK_EXAMPLE: Final = {
    "flow_execution_id": _EXECUTION,
    "task_name": "extract_data",
    "state": "completed",
    "state_changed_at": "2026-01-01T12:00:00.000000Z",
    "state_changed_by": "runner-7",
    "tags": [TAG_EXAMPLE],
}
_RECORD: Final = {
    "batch_id": "01970000-0000-7000-8000-00000000b001",
    "organization_id": "01970000-0000-7000-8000-0000000000a0",
    "applied_at": "2026-01-01T12:00:00.000000Z",
    "tags": [{"status": "added"}, {"status": "already_exists"}],
}
_ETAG: Final = {
    "ETag": {
        "description": "The execution's revision, in quotes.",
        "schema": {"type": "string", "examples": ['"42"']},
    },
    "X-Request-ID": {"schema": {"type": "string"}},
}


def _headers(revision: int | str) -> dict[str, str]:
    return {"ETag": f'"{revision}"', "Cache-Control": "private, no-cache"}


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, headers=headers, media_type="application/json")


# --- Paths ---------------------------------------------------------------------------------------


@router.get(
    "/task-tags",
    summary="Read the active tags of a flow execution",
    response_model=list[Tag] | TagPage,
    responses={
        200: {
            "description": "The active tags by time of creation; none for an unknown task. "
            "With `limit` or `cursor`, a page of them.",
            "content": {"application/json": {"example": [TAG_EXAMPLE]}},
            "headers": _ETAG,
        },
        304: {"description": "If-None-Match names the execution's revision.", "headers": _ETAG},
        **ERRORS,
    },
    openapi_extra=openapi_parameters(
        TagsQuery,
        {
            "name": "If-None-Match",
            "in": "header",
            "description": "The ETag of an earlier answer.",
            "schema": {"type": "string", "examples": ['"42"']},
        },
    ),
)
async def read_tags(request: Request) -> Response:
    principal = await require_scope(request, READ)
    query = parse_query(request, TagsQuery)
    known = _known_revisions(request.headers.get("if-none-match"))
    organization_id, execution = principal.organization_id, query.flow_execution_id
    if query.tag_type or query.tag or query.limit or query.cursor:
        return await _read_page(request, organization_id, query, known)
    found = await reader_of(request).tags(organization_id, execution, query.task_name, known)
    if found is None:
        raise NOT_FOUND
    revision, tags = found
    if tags is None:
        return Response(status_code=304, headers=_headers(revision))
    return _json(tags, _headers(revision))


async def _read_page(
    request: Request, organization_id: UUID, query: TagsQuery, known: list[int]
) -> Response:
    limit = query.limit or (1000 if query.cursor else None)
    wanted = TagFilter(query.task_name, query.tag_type, query.tag)
    found = await reader_of(request).page(
        organization_id, query.flow_execution_id, wanted, query.cursor, limit
    )
    if found is None:
        raise NOT_FOUND
    if found.revision in known:
        return Response(status_code=304, headers=_headers(found.revision))
    if limit is None:
        return _json(found.tags, _headers(found.revision))
    cursor = None
    if found.after is not None:
        cursor = base64.urlsafe_b64encode(found.after.encode()).decode().rstrip("=")
    body = b'{"tags":%b,"next_cursor":%b}' % (found.tags, to_json(cursor))
    return _json(body, _headers(found.revision))


@router.get(
    "/task-executions",
    summary="Read the tasks of a flow execution, with their states and tags",
    response_model=list[TaskAnswer],
    responses={
        200: {
            "description": "Each task that is registered or has an active tag or a state, by name.",
            "content": {"application/json": {"example": [TASK_EXAMPLE]}},
            "headers": {
                **_ETAG,
                "ETag": {
                    "description": "The execution's revision and the number of registered task "
                    "names, in quotes.",
                    "schema": {"type": "string", "examples": ['"42.3"']},
                },
            },
        },
        **ERRORS,
    },
    openapi_extra=openapi_parameters(ExecutionQuery),
)
async def read_tasks(request: Request) -> Response:
    principal = await require_scope(request, READ)
    query = parse_query(request, ExecutionQuery)
    found = await reader_of(request).tasks(
        principal.organization_id, query.flow_execution_id, query.task_name
    )
    if found is None:
        raise NOT_FOUND
    return _json(found.tasks, _headers(f"{found.revision}.{found.registered}"))


@router.get(
    "/task-tags/changes",
    summary="Read the stored change events of a flow execution",
    response_model=list[ChangeEvent],
    responses={
        200: {
            "description": "The events after a revision, in order; none if there are no more.",
            "content": {"application/json": {"example": [EVENT_EXAMPLE]}},
            "headers": {
                "Link": {
                    "description": 'The URL of the next events, if there are more: `rel="next"`.',
                    "schema": {"type": "string"},
                },
                "X-Request-ID": {"schema": {"type": "string"}},
            },
        },
        **ERRORS,
        410: documented_error("gone", GONE.message),
    },
    openapi_extra=openapi_parameters(ChangesQuery),
)
async def read_changes(request: Request) -> Response:
    """Read who changed what, when, and in which batch. Events are as they were published.

    With filters, events have only the changes that match, and events without any are left out.
    """
    principal = await require_scope(request, READ)
    query = parse_query(request, ChangesQuery)
    found = await stored_changes(
        reader_of(request), principal.organization_id, query, query.after, query.limit
    )
    reached = query.after + len(found.events)
    headers = {}
    if reached < found.revision:
        url = request.url.include_query_params(after=reached)
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    events = [event for event in map(change_filter(query), found.events) if event is not None]
    return _json(b"[" + b",".join(events) + b"]", headers)


async def stored_changes(
    reader: Reader,
    organization_id: UUID,
    query: FeedQuery,
    after: int,
    limit: int,
    max_bytes: int = 1024 * 1024,
) -> StoredChanges:
    """Return the stored events after a revision, with all their changes.

    Raises:
        ApiError: 404 if there is no such execution, 400 if `after` is beyond its last revision, 410
            if the next event was purged.
    """
    found = await reader.changes(organization_id, query.flow_execution_id, after, limit, max_bytes)
    if found is None:
        raise NOT_FOUND
    if after > found.revision:
        detail = ErrorDetail(
            field="after", message=f"is beyond the last revision, {found.revision}"
        )
        raise ApiError(400, "bad_request", WRONG_PARAMETER, [detail])
    if after < found.revision and found.first != after + 1:
        raise GONE
    return found


def change_filter(wanted: Filters) -> Any:
    """Return a function that keeps the wanted changes of an event, or returns None without any."""
    if not (wanted.task_name or wanted.tag_type or wanted.tag):
        return lambda event: event

    def fits(change: dict[str, Any]) -> bool:
        about = change.get("tag") or change["task"]
        return (
            (not wanted.task_name or about["task_name"] == wanted.task_name)
            and (not wanted.tag_type or about.get("tag_type") in wanted.tag_type)
            and (not wanted.tag or about.get("tag") in wanted.tag)
        )

    def reduced(encoded: bytes) -> bytes | None:
        event = from_json(encoded)
        event["changes"] = list(filter(fits, event["changes"]))
        return to_json(event) if event["changes"] else None

    return reduced


@router.get(
    "/task-tags/batches/{batch_id}",
    summary="Read the stored result record of a batch",
    response_model=ResultRecord,
    responses={
        200: {
            "description": "The result record, as it was published.",
            "content": {"application/json": {"example": _RECORD}},
        },
        **ERRORS,
    },
)
async def read_batch(request: Request, batch_id: UUID) -> Response:
    """Read the result of a batch. 404 until it is stored.

    The errors `bad_request`, `unauthorized` and `forbidden` are never stored.
    """
    principal = await require_scope(request, READ)
    parse_query(request, NoQuery)
    stored = await reader_of(request).record(principal.organization_id, batch_id)
    if stored is None:
        raise NOT_FOUND
    return _json(stored.record)
