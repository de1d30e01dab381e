"""What `/openapi.json` says of an operation: its body, its answers, its events, and every status that it may have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.wire.base import RequestModel, ResponseModel
from server.wire.errors import ErrorBody

SCHEMAS = "#/components/schemas/"
STATUSES = {
    400: "A field is missing, unknown, out of range, or not supported; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The operator's policy does not let a client ask for this.",
    404: "No such model, profile or object.",
    405: "The path has other methods; `Allow` lists them.",
    413: "The body is too large.",
    415: "The body is no JSON, by its own headers.",
    429: "The key has asked for as much as it may for now; `Retry-After` says when to try again.",
    500: "A defect, or a generation that failed alone.",
    503: "The queue is full (`Retry-After` says when to try again), or the engine is not ready.",
}
EXTRA_BODY = {"type": ["object", "null"], "description": "Its fields are read as if they stood beside it."}
# The models that the routes' descriptions name, as their modules are imported.
_BODIES: dict[type[BaseModel], None] = {}
_ANSWERS: dict[type[BaseModel], None] = {}
READS = (401, 405, 500)  # of every operation under /v1
GENERATES = (400, 401, 403, 404, 405, 413, 415, 429, 500, 503)


def documented(
    answer: type[ResponseModel],
    errors: Sequence[int],
    *,
    body: type[RequestModel] | None = None,
    events: type[ResponseModel] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a route's decorator.

    Args:
        answer: of status 200.
        errors: the other statuses, of `STATUSES`.
        body: what the route reads by `read_body`.
        events: what each `data:` line holds where the answer is a stream; its last one is `[DONE]`.
    """
    content: dict[str, Any] = {"application/json": {"schema": _reference(answer)}}
    if events is not None:
        content["text/event-stream"] = {"schema": _reference(events)}
    _ANSWERS.update({model: None for model in (answer, events, ErrorBody) if model is not None})
    extra: dict[str, Any] = {}
    if body is not None:
        _BODIES[body] = None
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    responses: dict[int | str, Any] = {200: {"description": "The answer.", "content": content}}
    return {"responses": responses | refusals(errors), "openapi_extra": extra}


def refusals(statuses: Sequence[int]) -> dict[int | str, Any]:
    """The `responses` of a route that may answer with these errors."""
    content = {"application/json": {"schema": _reference(ErrorBody)}}
    return {status: {"description": STATUSES[status], "content": content} for status in statuses}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": SCHEMAS + model.__name__}


def describe(app: FastAPI) -> None:
    """Have `app.openapi()` hold the wire models that its routes' `documented` name, under their own names."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_models(
                get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_models(description: dict[str, Any]) -> dict[str, Any]:
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # the framework's own way to refuse; ours is 400
    sent = _definitions(_ANSWERS, "serialization")
    read = _definitions(_BODIES, "validation")
    for body in _BODIES:
        read[body.__name__]["properties"]["extra_body"] = EXTRA_BODY
    twofold = {
        name for name in read.keys() & sent.keys() if read[name] != sent[name]
    }  # clients may send less than we do
    text = json.dumps({f"{name}-Input" if name in twofold else name: schema for name, schema in read.items()})
    for name in twofold:
        text = text.replace(f'"{SCHEMAS}{name}"', f'"{SCHEMAS}{name}-Input"')
    description["components"] = {"schemas": sent | json.loads(text)}
    return description


def _definitions(models: dict[type[BaseModel], None], mode: Any) -> dict[str, Any]:
    _, found = models_json_schema([(model, mode) for model in models], ref_template=SCHEMAS + "{model}")
    return found.get("$defs", {})
