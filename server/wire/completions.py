"""`/v1/completions` on the wire, and the `usage` object that chat answers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.wire.base import ResponseModel, Unsupported, inconsistent
from server.wire.parsing import shown
from server.wire.sampling import SamplingFields
from server.wire.steering import SteeringReport

MAX_PROMPTS = 256
Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> Any:
    """A string, a list of strings, a list of token ids, or a list of such lists → a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise PydanticCustomError("prompt", f"must be a string, a list of strings or token ids, not {shown(value)}")
    if not value:
        raise PydanticCustomError("prompt", "must not be empty")
    if all(_is_token_id(item) for item in value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", f"must hold at most {MAX_PROMPTS} prompts, not {len(value)}")
    for i, item in enumerate(value):
        ids = isinstance(item, list) and item and all(_is_token_id(token) for token in item)
        if not isinstance(item, str) and not ids:
            raise PydanticCustomError("prompt", f"item {i} must be a string or a list of token ids, not {shown(item)}")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {}, "minItems": 1}]}),
]


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`. `prompt` is a tuple of `Prompt` once parsed."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "echo": Unsupported("Put the prompt before the answer yourself.", (False,)),
        "suffix": Unsupported("Remove the field.", ("",)),
    }

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise inconsistent("best_of", "must equal n; ask for n completions and choose among them yourself")
        return self


class Usage(ResponseModel):
    """Token counts of a request, all its completions together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(ResponseModel):
    """The old parallel-list form. `text_offset` counts characters of the completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(ResponseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(ResponseModel):
    """A whole answer or one event of a stream: OpenAI gives both the same `object`.

    `steering` is one object for one prompt, and a list in the prompts' order for several.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None
    steering: SteeringReport | list[SteeringReport]
