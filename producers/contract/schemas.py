"""The JSON Schemas of messages, results and change events."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter

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
