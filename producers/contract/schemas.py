"""The JSON Schemas of what is sent, and the AsyncAPI document that refers to them."""

from __future__ import annotations

import json
from importlib.resources import files
from textwrap import indent
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from producers.contract.messages import Message
from producers.contract.results import ChangeEvent, ResultRecord

_SCHEMAS: Final[dict[str, TypeAdapter[Any]]] = {
    "message": TypeAdapter(Annotated[Message, Field(discriminator="kind")]),
    "result": TypeAdapter(ResultRecord),
    "change_event": TypeAdapter(ChangeEvent),
}


def json_schemas() -> dict[str, Any]:
    """Return the JSON Schemas (2020-12) of messages, results and change events, by name."""
    return {
        name: {"$schema": "https://json-schema.org/draft/2020-12/schema", **adapter.json_schema()}
        for name, adapter in _SCHEMAS.items()
    }


class _WithoutDiscriminators(GenerateJsonSchema):
    """AsyncAPI has another kind of discriminator; the constants in the schemas say as much."""

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> dict[str, Any]:
        described = super().tagged_union_schema(schema)
        described.pop("discriminator", None)
        return described


def asyncapi_document() -> str:
    """Return the AsyncAPI document as YAML: asyncapi.yaml, then the schemas of all models.

    The file ends inside `components.schemas`. JSON is YAML, so each schema is added there as JSON.
    """
    _, described = TypeAdapter.json_schemas(
        [(name, "validation", adapter) for name, adapter in _SCHEMAS.items()],
        ref_template="#/components/schemas/{model}",
        schema_generator=_WithoutDiscriminators,
    )
    written = files("producers.contract").joinpath("asyncapi.yaml").read_text("utf-8")
    return written + "".join(
        f"    {name}:\n{indent(json.dumps(schema, indent=2), ' ' * 6)}\n"
        for name, schema in described["$defs"].items()
    )
