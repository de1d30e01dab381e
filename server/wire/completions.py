"""`/v1/completions` on the wire, and the `usage` object that chat answers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.wire.base import ResponseModel, Unsupported, absent, inconsistent
from server.wire.extras import NOT_BUILT, CommonExtras, PromptLogprobs
from server.wire.parsing import shown
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


class CompletionRequest(CommonExtras):
    """The body of `POST /v1/completions`. `prompt` is a tuple of `Prompt` once parsed."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(16, description="0 with `echo` only.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = Field(None, description="Give the prompt before each completion, in `logprobs` too.")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(
        None,
        description="Make so many completions and give the n whose tokens are likeliest on average; not in streams.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Whether a prompt that is text gets the tokenizer's special tokens; it does unless false."
    )

    unsupported: ClassVar[Mapping[str, Unsupported]] = NOT_BUILT | {
        "suffix": Unsupported("Remove the field.", ("",)),
    }

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise inconsistent("best_of", f"must be at least n, which is {n}")
        if self.best_of is not None and self.best_of > n and self.stream:
            raise inconsistent("best_of", f"must equal n, which is {n}, in streams: the best is known at the end only")
        if self.max_tokens == 0 and not self.echo:
            raise inconsistent("max_tokens", "must be at least 1, not 0; with echo it may be 0")
        if self.max_tokens == 0 and self.min_tokens:
            raise inconsistent("min_tokens", "must be at most max_tokens, which is 0")
        return self

    @property
    def num_completions(self) -> int:
        """How many the engine makes of a prompt."""
        return self.best_of or self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """`SamplingOptions.logprobs`: what is shown, and the chosen tokens' where the best are chosen by them."""
        return 0 if self.logprobs is None and self.num_completions > (self.n or 1) else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """`SamplingOptions.prompt_logprobs`: for the field of that name, and for the echo."""
        echoed = self.logprobs if self.echo else None
        return max((k for k in (self.prompt_logprobs, echoed) if k is not None), default=None)


class PromptTokensDetails(ResponseModel):
    """`cached_tokens`: of the prompt, found in the prefix cache, so that no layer had to compute them."""

    cached_tokens: int


class CompletionTokensDetails(ResponseModel):
    """Reasoning is text like any other here, so `reasoning_tokens` is 0."""

    reasoning_tokens: int


class Usage(ResponseModel):
    """Token counts of a request, all its completions together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TextLogprobs(ResponseModel):
    """The old parallel-list form, one item for each token, the one that ends the completion included.

    `tokens` are texts, or `bytes:\\xe2\\x80` where a token's bytes are no text by themselves. `top_logprobs` hold the
    likeliest tokens and the token itself. A prompt's first token, if it is echoed, has null in both lists of log-probabilities.
    `text_offset` counts characters from where the choice's text begins.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(ResponseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    prompt_logprobs: PromptLogprobs = absent()
    prompt_token_ids: list[int] = absent()
    token_ids: list[int] = absent()


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
    usage: Usage = absent()  # a stream's last chunk has it, if asked for; the others have no null as chat's do
    steering: SteeringReport | list[SteeringReport] = absent()
