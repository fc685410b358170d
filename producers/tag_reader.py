"""TagReader: reads work lists and tags from the endpoint, all pages of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final
from uuid import UUID

import httpx

from producers.contract.messages import TaskState
from producers.contract.results import Tag, TaskExecution
from producers.contract.selectors import Selector
from producers.endpoint import (
    Item,
    Page,
    check_answer,
    client_options,
    execution_id,
    get,
    read_answer,
    requesting,
)
from producers.pubsub import LoopThread, flatten
from producers.settings import load_settings, token_source
from producers.work_list import follow_work_list

Pair = tuple[str, str | None]

_TASKS: Final = "/task-executions"
_TAGS: Final = "/task-tags"
_PAGE: Final = 100


class TagReader:
    """Reads the work lists and tags of one organization. Threads may share it.

    Arguments that are left out come from the environment (`ProducerSettings`). `token` may be a
    function that returns a token, for use beyond the validity of one token. Raises
    `ConfigurationError`. Iterations read one page after the other, as they reach it, and raise:

    - `Unavailable`: The endpoint can't be used at present.
    - `ChangesRefused`: It refused the token, the execution or a parameter.
    """

    def __init__(
        self, *, endpoint_url: str | None = None, token: str | Callable[[], str] | None = None
    ) -> None:
        self._options = _options(endpoint_url, token)
        self._thread = LoopThread("task-tags-reader", self._begin)
        self._begin()

    def _begin(self) -> None:
        """Begin without connections, also in a fork: those of its parent are not its own."""
        self._client = httpx.Client(**self._options)

    def work_list(
        self,
        with_: Iterable[Pair] = (),
        without: Iterable[Pair] = (),
        *,
        task_name: str | None = None,
        state: TaskState | Sequence[TaskState] = (),
        flow_id: str | None = None,
        flow_execution_id: UUID | str | None = None,
        follow: bool = False,
    ) -> Iterator[TaskExecution]:
        """Yield the tasks that have some tags and not others, the longest waiting first.

        Args:
            with_: Pairs of type and tag, or of type and None for any tag of the type. The first
                has a tag, which gives the order. Without pairs, `flow_execution_id` is required,
                and its tasks are yielded in the order of their registration.
            without: Pairs, as in `with_`; at most ten together with those.
            task_name, state, flow_id, flow_execution_id: Yield only such tasks.
            follow: Go on with each task that comes or changes, without end. One that has left the
                list comes once more, without `waiting_since`.
        """
        filters = {"task_name": task_name, "state": state, "flow_id": flow_id}
        query = _query(flow_execution_id, with_, without, **filters)
        if follow:
            return self._thread.iterate(_follow(self._options, query))
        return self._items(_TASKS, query, Page[TaskExecution])

    def list_tags(
        self,
        flow_execution_id: UUID | str,
        *,
        task_name: str | None = None,
        tag_type: str | Sequence[str] = (),
        tag: str | Sequence[str] = (),
    ) -> Iterator[Tag]:
        """Yield the active tags of an execution, the oldest first; only those that match."""
        query = _query(flow_execution_id, task_name=task_name, tag_type=tag_type, tag=tag)
        return self._items(_TAGS, query, Page[Tag])

    def close(self) -> None:
        """Close the connections, and end iterations that follow a list."""
        self._client.close()
        self._thread.close()

    def __enter__(self) -> TagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _items(self, path: str, query: dict[str, Any], page: type[Page[Item]]) -> Iterator[Item]:
        while True:
            with requesting():
                response = self._client.get(path, params=query)
            check_answer(response)
            found = read_answer(response, page)
            yield from found.items
            if found.next_page is None:
                return
            query = {**query, "page": found.next_page}


class AsyncTagReader:
    """As `TagReader`, for asyncio: iterate with `async for`."""

    def __init__(
        self, *, endpoint_url: str | None = None, token: str | Callable[[], str] | None = None
    ) -> None:
        self._client = httpx.AsyncClient(**_options(endpoint_url, token))

    def work_list(
        self,
        with_: Iterable[Pair] = (),
        without: Iterable[Pair] = (),
        *,
        task_name: str | None = None,
        state: TaskState | Sequence[TaskState] = (),
        flow_id: str | None = None,
        flow_execution_id: UUID | str | None = None,
        follow: bool = False,
    ) -> AsyncIterator[TaskExecution]:
        """Yield the tasks that have some tags and not others; see `TagReader.work_list`."""
        filters = {"task_name": task_name, "state": state, "flow_id": flow_id}
        query = _query(flow_execution_id, with_, without, **filters)
        if follow:
            return flatten(follow_work_list(self._client, query))
        return self._items(_TASKS, query, Page[TaskExecution])

    def list_tags(
        self,
        flow_execution_id: UUID | str,
        *,
        task_name: str | None = None,
        tag_type: str | Sequence[str] = (),
        tag: str | Sequence[str] = (),
    ) -> AsyncIterator[Tag]:
        """Yield the active tags of an execution, the oldest first; only those that match."""
        query = _query(flow_execution_id, task_name=task_name, tag_type=tag_type, tag=tag)
        return self._items(_TAGS, query, Page[Tag])

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> AsyncTagReader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _items(
        self, path: str, query: dict[str, Any], page: type[Page[Item]]
    ) -> AsyncIterator[Item]:
        while True:
            found = read_answer(await get(self._client, path, query), page)
            for item in found.items:
                yield item
            if found.next_page is None:
                return
            query = {**query, "page": found.next_page}


async def _follow(
    options: dict[str, Any], query: dict[str, Any]
) -> AsyncGenerator[Sequence[TaskExecution], None]:
    async with (
        httpx.AsyncClient(**options) as client,
        aclosing(follow_work_list(client, query)) as tasks,
    ):
        async for some in tasks:
            yield some


def _options(endpoint_url: str | None, token: str | Callable[[], str] | None) -> dict[str, Any]:
    fixed = None if callable(token) else token
    settings = load_settings(endpoint_url=endpoint_url, token=fixed)
    return client_options(settings.endpoint_url, token_source(token, settings))


def _selectors(pairs: Iterable[Pair]) -> list[str]:
    found = list(pairs)
    if any(isinstance(pair, str) for pair in (pairs, *found)):
        raise TypeError('selectors are pairs of type and tag, like [("review_status", "pending")]')
    return [str(Selector(*pair)) for pair in found]


def _query(
    flow_execution_id: UUID | str | None,
    with_: Iterable[Pair] = (),
    without: Iterable[Pair] = (),
    **values: Any,
) -> dict[str, Any]:
    selectors = {"with": _selectors(with_), "without": _selectors(without)}
    execution = None if flow_execution_id is None else str(execution_id(flow_execution_id))
    given = {"flow_execution_id": execution, **selectors, **values, "limit": _PAGE}
    return {name: value for name, value in given.items() if value is not None}
