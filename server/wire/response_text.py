"""`text` of a Responses request: what the answer's text must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from server.conversation import TextFormat
from server.wire.base import RequestModel, unsupported
from server.wire.parsing import shown

PARAM = "text.format.schema"


class PlainFormat(RequestModel):
    type: Literal["text"]

    def text_format(self) -> TextFormat:
        return TextFormat("text", param=PARAM)


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]

    def text_format(self) -> TextFormat:
        return TextFormat("json_object", param=PARAM)


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None

    def text_format(self) -> TextFormat:
        return TextFormat("json_schema", self.name, self.schema_, self.strict is True, PARAM)


def _tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) else None


class TextConfig(RequestModel):
    """`text`."""

    format: (
        Annotated[
            Annotated[PlainFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
            Discriminator(
                _tag,
                custom_error_type="format",
                custom_error_message="must be an object whose type is 'text', 'json_object' or 'json_schema'",
            ),
        ]
        | None
    ) = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _medium(self) -> TextConfig:
        if self.verbosity not in (None, "medium"):
            raise unsupported("verbosity", f"{shown(self.verbosity)} is not supported by this server. Remove the field")
        return self

    @property
    def text_format(self) -> TextFormat:
        return TextFormat(param=PARAM) if self.format is None else self.format.text_format()

    def shown_format(self) -> dict[str, Any]:
        """`format` as the response repeats it."""
        if self.format is None:
            return {"type": "text"}
        format_ = self.format.model_dump(by_alias=True, exclude_none=True)
        if isinstance(self.format, JsonSchemaFormat):
            format_["strict"] = self.format.strict is True
        return format_
