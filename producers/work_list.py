"""Follows a work list: first its tasks, then each that comes, changes or leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

import httpx

from producers.contract.results import Change, ChangeEvent, StateChange, TaskExecution
from producers.endpoint import Page, get, read_answer, stream_changes
from producers.errors import ChangesRefused, RevisionExpired, Unavailable

logger = logging.getLogger(__name__)

_PATH: Final = "/task-executions"
_RETRY_SECONDS: Final = 1.0
_Key = tuple[UUID, str]


class _WorkPage(Page[TaskExecution]):
    cursor: str


async def follow_work_list(
    client: httpx.AsyncClient, query: dict[str, Any]
) -> AsyncGenerator[Sequence[TaskExecution], None]:
    """Yield the tasks of a work list, and then those that an event may have changed, without end.

    A task that has left the list is yielded once more, without `waiting_since` and tags. Raises
    what `endpoint.get` raises at the start; later, it waits for the endpoint.
    """
    listed: dict[_Key, TaskExecution] = {}
    page = read_answer(await get(client, _PATH, query), _WorkPage)
    while True:
        before, listed, cursor = listed, {}, page.cursor
        while True:
            listed |= {(task.flow_execution_id, task.task_name): task for task in page.items}
            yield page.items
            if page.next_page is None:
                break
            page = await _ask(client, {**query, "page": page.next_page})
        yield [_left(task) for key, task in before.items() if key not in listed]
        try:
            async with aclosing(stream_changes(client, cursor)) as changes:
                async for _, event in changes:
                    for key in _tasks_of(event, query):
                        if tasks := await _task(client, query, key):
                            listed[key] = tasks[0]
                            yield tasks
                        elif task := listed.pop(key, None):
                            yield [_left(task)]
        except RevisionExpired:
            pass
        except Unavailable:
            await asyncio.sleep(_RETRY_SECONDS)
        page = await _ask(client, query)  # what no event tells is read again


async def _task(client: httpx.AsyncClient, query: dict[str, Any], key: _Key) -> list[TaskExecution]:
    """Return a task if it matches; it does not if a restore has removed its execution."""
    one = {"flow_execution_id": str(key[0]), "task_name": key[1]}
    try:
        return (await _ask(client, {**query, **one})).items
    except ChangesRefused as error:
        if error.status == 404:
            return []
        raise


async def _ask(client: httpx.AsyncClient, query: dict[str, Any]) -> _WorkPage:
    """Read a page; while the endpoint can't be used, retry."""
    while True:
        try:
            return read_answer(await get(client, _PATH, query), _WorkPage)
        except Unavailable as error:
            logger.warning("the work list can't be read now; retrying: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)


def _tasks_of(event: ChangeEvent | None, query: dict[str, Any]) -> Iterator[_Key]:
    """Yield the tasks that an event changed, if the query may ask for them."""
    if event is None:
        return
    execution, name = query.get("flow_execution_id"), query.get("task_name")
    tags = (each.tag.task_name for each in event.changes if isinstance(each, Change))
    states = (each.task.task_name for each in event.changes if isinstance(each, StateChange))
    for changed in dict.fromkeys((*tags, *states)):
        if execution in (None, str(event.flow_execution_id)) and name in (None, changed):
            yield event.flow_execution_id, changed


def _left(task: TaskExecution) -> TaskExecution:
    return replace(task, tags=[], waiting_since=None, tags_next=None)
