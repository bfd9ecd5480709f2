"""The part of the OpenAPI document that describes answers. Answers are made without it, so it costs them nothing."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"


class Shape(BaseModel):
    """An answer, or a part of one. It has these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


def described(shape: type[BaseModel], event: type[BaseModel] | None = None, told: str = "the answer") -> dict[str, Any]:
    """Returns an answer for the document.

    event: the JSON in the data of server-sent events, if the answer may also come as a stream of these.
    """
    content: dict[str, Any] = {"application/json": {"schema": reference(shape)}}
    return {"description": told, "content": {**content, **(stream_of(event) if event else {})}}


def stream_of(event: type[BaseModel]) -> dict[str, Any]:
    """Returns the content of an answer that comes as server-sent events."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": reference(event)}
    properties = {"event": {"type": "string"}, "id": {"type": "string"}, "data": data}
    return {"text/event-stream": {"schema": {"type": "object", "required": ["data"], "properties": properties}}}


def reference(shape: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=shape.__name__)}


def install(app: FastAPI, *shapes: type[BaseModel]) -> None:
    """Puts the shapes, and the shapes in them, into the document of an application. Call it before the document is
    asked for."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, found = models_json_schema([(shape, "validation") for shape in shapes], ref_template=REFERENCE)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            twice = schemas.keys() & found["$defs"].keys()
            assert not twice, f"shapes of requests and answers have one name: {twice}"
            schemas.update(found["$defs"])
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
