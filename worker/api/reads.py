"""The routes that read: tags, stored changes and stored results.

What they return is in docs/concepts/contract.md#rule-14.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import BaseModel, WithJsonSchema
from pydantic_core import to_json

from producers.contract.cursors import Cursor
from producers.contract.results import ResultRecord, Tag
from producers.pubsub import first_completed, wait_at_most
from worker.api.auth import Reading, require_scope
from worker.api.change_hub import ChangeHub
from worker.api.errors import (
    NO_RESULT,
    UNKNOWN_EXECUTION,
    ApiError,
    documented,
    text_header,
)
from worker.api.page_tokens import OF_TAGS, page_token, place_of
from worker.api.params import (
    NoParameters,
    TagsQuery,
    parse_query,
    query,
    wait_preference,
)
from worker.api.queries import Reader
from worker.api.responses import READ_PROBLEMS, Database, json_response, reader_of
from worker.auth import READ, Principal

ANSWER_TOO_LARGE: Final = ApiError(400, "too_large", "the answer has more than 8 MiB: use limit")

ANY_REVISION: Final = "*"
"""In If-None-Match (https://www.rfc-editor.org/rfc/rfc9110#section-13.1.2)."""
_OF_ALL_TAGS: Final = {"flow_execution_id", "task_name"}
"""With other parameters, tags are read page by page."""

router = APIRouter(responses=READ_PROBLEMS)


# --- Answers -------------------------------------------------------------------------------------


class TagPage(BaseModel):
    """A page of tags; `next_page` asks for the next page, and is null if there is none."""

    tags: list[Tag]
    next_page: str | None


_ETAG: Final = text_header(
    "ETag", "The execution's revision with its time, in quotes.", examples=['"42-hdpk3x2nz5s"']
)


def _headers(revision: Cursor) -> dict[str, str]:
    return {"ETag": f'"{revision}"', "Cache-Control": "private, no-cache"}


# --- Tags ----------------------------------------------------------------------------------------


@router.get(
    "/task-tags",
    summary="Read the active tags of a flow execution",
    response_model=list[Tag] | TagPage,
    response_description="The active tags, ordered by creation time; none for an unknown task. "
    "With `limit` or `page`, a page of them, which may be short and have a next one.",
    responses={
        200: {"headers": _ETAG},
        304: {"description": "If-None-Match names the execution's revision.", "headers": _ETAG},
    },
)
async def read_tags(
    request: Request,
    caller: Reading,
    query: Annotated[TagsQuery, Depends(query(TagsQuery))],
    reader: Database,
    prefer: Annotated[
        list[str],
        WithJsonSchema({"type": "string"}),
        Header(
            alias="Prefer",
            default_factory=list,
            description="With `wait=55` and If-None-Match, the answer comes when the revision is "
            "another one, or after 55 seconds (at most 60) as 304.",
        ),
    ],
    if_none_match: Annotated[
        list[str],
        WithJsonSchema({"type": "string"}),
        Header(
            alias="If-None-Match",
            default_factory=list,
            description="The ETag of an earlier answer.",
            examples=['"42-hdpk3x2nz5s"'],
        ),
    ],
) -> Response:
    """With `Prefer: wait` and `If-None-Match`, wait for the next revision; 304 if none comes."""
    answer = await _read_tags(caller, query, reader, if_none_match)
    seconds, _ = wait_preference(prefer)
    if answer.status_code != 304 or not seconds:
        return answer
    hub: ChangeHub = request.app.state.change_hub
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    ending: asyncio.Event = request.app.state.ending
    with hub.watch(caller.organization_id, query.flow_execution_id) as feed:
        while True:
            news = feed.news
            answer = await _read_tags(caller, query, reader, if_none_match)
            place = Cursor.parse(answer.headers["etag"].strip('"'))
            feed.compare(place)
            if answer.status_code != 304 or loop.time() >= end or ending.is_set():
                return answer
            changed = first_completed(feed.wait_past(place, news), ending.wait())
            await wait_at_most(end - loop.time(), changed)


async def _read_tags(
    caller: Principal, query: TagsQuery, reader: Reader, if_none_match: list[str]
) -> Response:
    if query.model_fields_set - _OF_ALL_TAGS:
        return await _read_page(caller.organization_id, query, reader, if_none_match)
    known = _known_revisions(if_none_match)
    found = await reader.tags(
        caller.organization_id, query.flow_execution_id, query.task_name, known
    )
    if found is None:
        raise UNKNOWN_EXECUTION
    revision, tags = found
    if revision in known or ANY_REVISION in if_none_match:
        return Response(status_code=304, headers=_headers(revision))
    if tags is None:
        return await _read_page(caller.organization_id, query, reader, if_none_match)
    return json_response(tags, _headers(revision))


async def read_tags_directly(request: Request) -> Response:
    """Read tags as `read_tags` does; resolve its dependencies in a tenth of FastAPI's time."""
    return await read_tags(
        request,
        await require_scope(request, READ),
        parse_query(request, TagsQuery),
        await reader_of(request),
        request.headers.getlist("prefer"),
        request.headers.getlist("if-none-match"),
    )


def _known_revisions(headers: list[str]) -> list[Cursor]:
    """Return the revisions that If-None-Match names; entity tags of other kinds match nothing."""
    revisions: list[Cursor] = []
    for tag in re.findall(r'(?:W/)?"([^"]*)"', ",".join(headers)[:4096])[:100]:
        with suppress(ValueError):
            revisions.append(Cursor.parse(tag))
    return [each for each in revisions if each.time is not None]


async def _read_page(
    organization_id: UUID, query: TagsQuery, reader: Reader, if_none_match: list[str]
) -> Response:
    limit = query.limit or (None if query.page is None else 1000)
    about: Any = (organization_id, "/task-tags", query)
    found = await reader.page(
        organization_id,
        query.flow_execution_id,
        query.task_name,
        query.tag_type,
        query.tag,
        place_of(query.page, OF_TAGS, *about),
        limit,
    )
    if found is None:
        raise UNKNOWN_EXECUTION
    if found.revision in _known_revisions(if_none_match) or ANY_REVISION in if_none_match:
        return Response(status_code=304, headers=_headers(found.revision))
    if found.tags is None:
        raise ANSWER_TOO_LARGE
    if limit is None:
        return json_response(found.tags, _headers(found.revision))
    next_page = None if found.after is None else page_token(found.after, *about)
    body = b'{"tags":%b,"next_page":%b}' % (found.tags, to_json(next_page))
    return json_response(body, _headers(found.revision))


# --- Results -------------------------------------------------------------------------------------


@router.get(
    "/task-tags/batches/{batch_id}",
    summary="Read the stored result record of a batch",
    response_model=ResultRecord,
    response_description="The result record, as it was published.",
    responses=documented(NO_RESULT),
)
async def read_batch(
    caller: Reading, batch_id: UUID, reader: Database, parameters: NoParameters
) -> Response:
    """Read the result of a batch. 404 until it is stored.

    The errors `not_found`, `precondition_failed`, `too_large` and `internal_error` are stored, too,
    and the `conflict` of a `flow_id`. The errors `bad_request`, `unauthorized`, `forbidden` and the
    `conflict` of a `batch_id` are never stored.
    """
    stored = await reader.record(caller.organization_id, batch_id)
    if stored is None:
        raise NO_RESULT
    return json_response(stored.record)
