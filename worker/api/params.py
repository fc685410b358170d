"""Reads query strings: the parameters of every route, and the errors for wrong ones."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Annotated, Any, TypeVar, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import HTTPConnection

from producers.contract.errors import ErrorDetail
from producers.contract.values import Id, TagName, TagType, TaskName
from worker.api.errors import WRONG_PARAMETER, ApiError, parameter_faults

Query = TypeVar("Query", bound=BaseModel)


def parse_query(connection: HTTPConnection, model: type[Query]) -> Query:
    """Read the query string.

    Raises:
        ApiError: 400, with the parameters that are missing, wrong, unknown or repeated.
    """
    given = connection.query_params.multi_items()
    values: dict[str, Any] = dict(given)
    if len(values) < len(given) or not _repeatable(model).isdisjoint(values):
        counts = Counter(name for name, _ in given)
        for name in _repeatable(model) & counts.keys():
            values[name] = connection.query_params.getlist(name)
            del counts[name]
        doubled = [name for name, count in counts.items() if count > 1]
        if doubled:
            details = [
                ErrorDetail(field=name[:64], message="is given more than once") for name in doubled
            ]
            raise ApiError(400, "bad_request", WRONG_PARAMETER, details)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = parameter_faults(error.errors())
        raise ApiError(400, "bad_request", WRONG_PARAMETER, faults) from None


@cache
def _repeatable(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of parameters that may be given several times."""
    fields = model.model_fields.items()
    return frozenset(name for name, field in fields if get_origin(field.annotation) is list)


def openapi_parameters(model: type[BaseModel], *headers: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of the parameters that `parse_query` reads."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    query = [
        {"name": name, "in": "query", "required": name in required, "schema": described}
        for name, described in schema.get("properties", {}).items()
    ]
    return {"parameters": [*query, *headers]}


def _digits(value: Any) -> Any:
    """Convert digits to a number. Python alone would also accept "+1", " 1" and "1_0"."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    raise PydanticCustomError("number", "must be a whole number")


Number = Annotated[int, BeforeValidator(_digits)]


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExecutionQuery(NoQuery):
    flow_execution_id: Id = Field(description="The flow execution that is asked about.")
    task_name: TaskName | None = Field(None, description="Only what is of this task.")


class Filters(ExecutionQuery):
    """Which tags to return: each filter that is given must match, a list with one of its values."""

    tag_type: list[TagType] = Field([], max_length=100, description="Only tags of these types.")
    tag: list[TagName] = Field([], max_length=100, description="Only these tags.")


class FeedQuery(Filters):
    after: Number = Field(0, ge=0, description="The revision after which changes are wanted.")
