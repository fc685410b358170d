"""Reads query strings: parameters of several routes, and the errors for wrong ones."""

# Without `from __future__ import annotations`: `query` makes annotations from its argument.

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_origin

from fastapi import Depends, Query
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import HTTPConnection

from producers.contract.cursors import BEGINNING, Cursor
from producers.contract.errors import ErrorDetail
from producers.contract.values import FlowId, Id, TagName, TagType, TaskName
from worker.api.errors import parameter_faults, wrong_parameter
from worker.api.page_tokens import PageToken

Model = TypeVar("Model", bound=BaseModel)

MAX_PARAMETERS: Final = 600
"""More than any request needs; wrong ones take time."""


def query(model: type[Model]) -> Callable[..., Any]:
    """Return the dependency that reads the query string as FastAPI does, but none twice."""

    async def once(connection: HTTPConnection) -> None:
        _refuse_doubled(connection, model)

    async def read(
        once: Annotated[None, Depends(once)],
        values: Annotated[model, Query()],  # type: ignore[valid-type]
    ) -> Model:
        return values

    return read


def parse_query(connection: HTTPConnection, model: type[Model]) -> Model:
    """Read the query string of a request that FastAPI does not route, with the same answers.

    Raises:
        ApiError: 400, with the parameters that are missing, wrong, unknown or repeated.
    """
    _refuse_doubled(connection, model)
    values: dict[str, Any] = dict(connection.query_params)
    for name in _repeatable(model) & values.keys():
        values[name] = connection.query_params.getlist(name)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise wrong_parameter(parameter_faults(error.errors())) from None


def _refuse_doubled(connection: HTTPConnection, model: type[BaseModel]) -> None:
    """Raise `ApiError` if a parameter is given twice that has one value, or if there are many."""
    if connection.scope["query_string"].count(b"&") >= MAX_PARAMETERS:
        raise wrong_parameter([ErrorDetail(message="there are too many parameters")])
    given = connection.query_params.multi_items()
    if len(given) == len(connection.query_params):
        return
    counts = Counter(name for name, _ in given)
    doubled = [name for name, count in counts.items() if count > 1]
    details = [
        ErrorDetail(field=name[:64], message="is given more than once")
        for name in doubled
        if name not in _repeatable(model)
    ]
    if details:
        raise wrong_parameter(details)


@cache
def _repeatable(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of parameters that may be given several times."""
    fields = model.model_fields.items()
    return frozenset(
        field.alias or name for name, field in fields if get_origin(field.annotation) is list
    )


MAX_WAIT_SECONDS: Final = 60
LATEST: Final = "latest"
"""Stands for the place behind the last event."""


def wait_preference(prefer: list[str]) -> tuple[int | None, bool]:
    """Read the headers Prefer (https://www.rfc-editor.org/rfc/rfc7240#section-4).

    Returns how many seconds to wait, at most 60, or None, and whether `respond-async` is preferred,
    over which `wait` takes precedence.
    """
    wanted = [each.partition(";")[0].strip().lower() for each in ",".join(prefer)[:1024].split(",")]
    form = re.compile(r'wait\s*=\s*("?)([0-9]{1,9})\1')
    waits = [found[2] for each in wanted if (found := form.fullmatch(each))]
    return min(int(waits[0]), MAX_WAIT_SECONDS) if waits else None, "respond-async" in wanted


# --- Values --------------------------------------------------------------------------------------


def _digits(value: Any) -> Any:
    """Convert digits to a number. Python alone would also accept "+1", " 1" and "1_0"."""
    if type(value) is int:  # a default, which FastAPI before 0.130 validates as well
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    raise PydanticCustomError("number", "must be a whole number")


def _revision(text: str) -> str:
    with suppress(ValueError):
        Cursor.parse(text)
        return text
    raise PydanticCustomError("revision", "must be a revision")


def _position(text: str) -> str:
    if text == LATEST:
        return text
    with suppress(ValueError):
        if (cursor := Cursor.parse(text)) == BEGINNING or cursor.time is not None:
            return text
    raise PydanticCustomError("position", "must be a cursor")


Number = Annotated[int, BeforeValidator(_digits)]


# --- The parameters of the routes ----------------------------------------------------------------


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExecutionQuery(NoQuery):
    flow_execution_id: Id = Field(description="The flow execution that is asked about.")
    task_name: TaskName | None = Field(None, description="Only what is of this task.")


class Filters(ExecutionQuery):
    """Which tags to return: each filter that is given must match, a list with one of its values."""

    tag_type: list[TagType] = Field([], max_length=100, description="Only tags of these types.")
    tag: list[TagName] = Field([], max_length=100, description="Only these tags.")


class TagsQuery(Filters):
    limit: Number | None = Field(
        None, ge=1, le=1000, description="Return a page of at most this many tags."
    )
    page: PageToken = None


class FeedQuery(Filters):
    after: Annotated[str, AfterValidator(_revision)] = Field(
        "0",
        description="The revision after which changes are wanted; as `<revision>-<t>`, the one "
        "that an ETag or the id of an event has, it is checked.",
    )

    @property
    def place(self) -> Cursor:
        return Cursor.parse(self.after)

    @property
    def task_names(self) -> list[str]:
        return [] if self.task_name is None else [self.task_name]


class AllFeedQuery(NoQuery):
    """Which events of the organization to return; each filter may be one of several values."""

    flow_execution_id: ClassVar[None] = None
    task_names: list[TaskName] = Field(
        [], alias="task_name", max_length=100, description="Only changes of these tasks."
    )
    tag_type: list[TagType] = Field([], max_length=100, description="Only tags of these types.")
    tag: list[TagName] = Field([], max_length=100, description="Only these tags.")
    flow_id: list[FlowId] = Field([], max_length=100, description="Only executions of these flows.")
    after: Annotated[str, AfterValidator(_position)] = Field(
        "0",
        description="The cursor behind which events are wanted; `0` is the beginning, `latest` the "
        "end.",
    )

    @property
    def place(self) -> Cursor | None:
        """The place behind which events are wanted; None is the end."""
        return None if self.after == LATEST else Cursor.parse(self.after)


_Limit = Annotated[
    Number,
    Field(ge=1, le=1000, description="The most events in one answer, which ends at about 1 MiB."),
]


class ChangesQuery(FeedQuery):
    limit: _Limit = 100


class AllChangesQuery(AllFeedQuery):
    limit: _Limit = Field(
        100, description="The most events that are looked at, up to about 1 MiB of them."
    )


NoParameters = Annotated[NoQuery, Depends(query(NoQuery))]
