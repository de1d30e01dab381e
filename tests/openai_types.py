"""What the server sends, against the openai package's own types, strictly: nothing missing, nothing unknown, no type bent."""

from __future__ import annotations

from typing import Any

import openai
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

EXTRAS = {
    "Response": {"steering"},  # the wire extension
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},  # OpenAI's specification and its Node types have it
}


def valid(kind: Any, sent: Any) -> Any:
    """`sent` as a `kind`, an openai type. An AssertionError or ValidationError where it is not exactly that."""
    parsed = TypeAdapter(kind).validate_python(sent, strict=True)
    _nothing_unknown(parsed, "")
    return parsed


def valid_event(sent: dict[str, Any]) -> Any:
    """One event of a Responses stream."""
    event = valid(ResponseStreamEvent, sent)
    assert event.type == sent["type"]
    return event


def _nothing_unknown(value: Any, path: str) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _nothing_unknown(item, f"{path}[{i}]")
    elif isinstance(value, BaseModel):
        assert isinstance(value, openai.BaseModel)
        unknown = set(value.model_extra or {}) - EXTRAS.get(type(value).__name__, set())
        assert not unknown, f"{path}: {type(value).__name__} has no {sorted(unknown)}"
        for name in value.model_fields_set & set(type(value).model_fields):
            _nothing_unknown(getattr(value, name), f"{path}.{name}")
