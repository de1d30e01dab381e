"""`response_format` of chat completions: the form that an answer must have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.conversation import TextFormat
from server.wire.base import RequestModel, inconsistent


class JsonSchema(RequestModel):
    """A named schema. With `strict` true, what cannot be enforced is refused; else as much is enforced as can be."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """Text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            sentence = "is required" if self.json_schema is None else 'is read only with type "json_schema"'
            raise inconsistent("json_schema", sentence)
        return self

    def text_format(self) -> TextFormat:
        """The same for the server."""
        if self.json_schema is None:
            return TextFormat(self.type)
        return TextFormat(
            self.type, self.json_schema.name, self.json_schema.schema_, strict=bool(self.json_schema.strict)
        )
