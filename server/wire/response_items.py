"""The items of a Responses conversation, as clients send them and as the server keeps them.

A kept item is a dict that is an item of OpenAI's `ResponseItem`: it has an id and a status, and its content is a list of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.wire.base import RequestModel, inconsistent, unsupported
from server.wire.parsing import shown

MAX_ITEMS = 4096
MAX_ID = 256  # characters
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
KeptItem = dict[str, Any]
NewId = Callable[[str], str]

# What a client may send back with a part that it was given; none of it changes what the model reads.
_PART_FIELDS = frozenset({"type", "text", "refusal", "annotations", "logprobs", "parsed", "prompt_cache_breakpoint"})
_TEXT_OF = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def _parts(content: Any) -> Any:
    """A string, or a list of text parts → a tuple of `(type, text)`; a string's type is None."""
    if isinstance(content, str):
        return ((None, content),)
    if not isinstance(content, list):
        raise PydanticCustomError("content", f"must be a string or a list of text parts, not {shown(content)}")
    if not content:
        raise PydanticCustomError("content", "must hold at least 1 part")
    return tuple(_part(i, part) for i, part in enumerate(content))


def _part(i: int, part: Any) -> tuple[str, str]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise PydanticCustomError("content", f"part {i} must be an object with a type, not {shown(part)}")
    kind = part["type"]
    if kind not in _TEXT_OF:
        raise PydanticCustomError("unsupported", f"part {i} has type {shown(kind)}; this server reads text parts only")
    text = part.get(_TEXT_OF[kind])
    if not isinstance(text, str):
        raise PydanticCustomError("content", f"part {i} must hold a string in {_TEXT_OF[kind]}")
    if unknown := [name for name in part if name not in _PART_FIELDS]:
        raise PydanticCustomError("content", f"part {i} has an unknown field {shown(unknown[0])}")
    return kind, text


Parts = Annotated[
    Any,
    BeforeValidator(_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]}),
]


class Message(RequestModel):
    """A turn: OpenAI's easy message, input message or output message."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Parts
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: None = None

    @model_validator(mode="after")
    def _parts_fit_the_role(self) -> Message:
        fitting = ("output_text", "refusal") if self.role == "assistant" else ("input_text",)
        for i, (kind, _) in enumerate(self.content):
            if kind is not None and kind not in fitting:
                raise inconsistent("content", f"part {i} of a message with role {self.role} must be {fitting[0]}")
        return self

    def kept(self, new_id: NewId) -> KeptItem:
        return {
            "id": self.id or new_id("msg_"),
            "type": "message",
            "role": self.role,
            "status": self.status or "completed",
            "content": [self._kept_part(kind, text) for kind, text in self.content],
        }

    def _kept_part(self, kind: str | None, text: str) -> dict[str, Any]:
        if kind == "refusal":
            return {"type": "refusal", "refusal": text}
        if self.role == "assistant":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "input_text", "text": text}


class Direct(RequestModel):
    """The one kind of caller there is: the model itself."""

    type: Literal["direct"]


class FunctionCall(RequestModel):
    """A call that the model made earlier. `arguments`: JSON text."""

    type: Literal["function_call"]
    call_id: ItemId
    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str
    id: ItemId | None = None
    status: ItemStatus | None = None
    namespace: None = None
    caller: Direct | None = None

    def kept(self, new_id: NewId) -> KeptItem:
        return {
            "id": self.id or new_id("fc_"),
            "type": "function_call",
            "status": self.status or "completed",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class FunctionCallOutput(RequestModel):
    """What the function gave back."""

    type: Literal["function_call_output"]
    call_id: ItemId
    output: Parts
    id: ItemId | None = None
    status: ItemStatus | None = None
    name: str | None = None
    namespace: None = None
    caller: Direct | None = None

    @model_validator(mode="after")
    def _is_input(self) -> FunctionCallOutput:
        for i, (kind, _) in enumerate(self.output):
            if kind not in (None, "input_text"):
                raise inconsistent("output", f"part {i} must be input_text")
        return self

    def kept(self, new_id: NewId) -> KeptItem:
        return {
            "id": self.id or new_id("fco_"),
            "type": "function_call_output",
            "status": self.status or "completed",
            "call_id": self.call_id,
            "output": "\n".join(text for _, text in self.output),
        }


class ItemReference(RequestModel):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: ItemId


_KINDS: Mapping[str, str] = {
    get_args(model.model_fields["type"].annotation)[0]: f"<{model.__name__}>"
    for model in (Message, FunctionCall, FunctionCallOutput, ItemReference)
}


def _known(item: Any) -> Any:
    """Refuse an item of a kind that this server does not read, by the kind's name."""
    if not isinstance(item, dict):
        raise PydanticCustomError("item", f"must be an object, not {shown(item)}")
    kind = item.get("type")
    if kind is None and "role" not in item and set(item) - {"type"} != {"id"}:
        raise inconsistent("type", "is required where there is no role")
    if kind is not None and not isinstance(kind, str):
        raise inconsistent("type", f"must be a string, not {shown(kind)}")
    if kind is not None and kind not in _KINDS:
        raise unsupported("type", f"{shown(kind)} items are not read by this server; there are {', '.join(_KINDS)}")
    return item


def _tag(item: Any) -> str:
    """The union's member; in angle brackets, which keep it out of the path that a message names."""
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    return _KINDS[kind]


def _without_null_type(item: Any) -> Any:
    return {key: value for key, value in item.items() if key != "type" or value is not None}


def _items(value: Any) -> Any:
    """A string is one user message."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input", f"must be a string or a list of items, not {shown(value)}")
    return value


Item = Annotated[
    Annotated[Message, Tag("<Message>")]
    | Annotated[FunctionCall, Tag("<FunctionCall>")]
    | Annotated[FunctionCallOutput, Tag("<FunctionCallOutput>")]
    | Annotated[ItemReference, Tag("<ItemReference>")],
    Discriminator(_tag),
    BeforeValidator(_without_null_type),
    BeforeValidator(_known),
]
Items = Annotated[
    list[Item],
    Field(max_length=MAX_ITEMS),
    BeforeValidator(_items),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]
