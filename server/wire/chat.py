"""`/v1/chat/completions` on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.conversation import Conversation, TextFormat
from server.wire.base import RequestModel, ResponseModel, Unsupported, absent, inconsistent
from server.wire.completions import Usage
from server.wire.extras import NOT_BUILT, CommonExtras, PromptLogprobs
from server.wire.parsing import shown
from server.wire.response_format import ResponseFormat
from server.wire.steering import SteeringFields, SteeringReport
from server.wire.template import TemplateFields
from server.wire.tools import MAX_TOOLS, CallDelta, PastToolCall, ToolCall, ToolFields

Role = Literal["system", "developer", "user", "assistant", "tool"]


def _text(content: Any) -> Any:
    """A string, or a list of text and refusal parts, joined by newlines. Other kinds of part are refused by their type."""
    if isinstance(content, str) or content is None:
        return content
    if not isinstance(content, list):
        raise PydanticCustomError("content", f"must be a string or a list of text parts, not {shown(content)}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("content", f"part {i} must be an object with a type, not {shown(part)}")
        kind = part["type"]
        if kind not in ("text", "refusal"):
            raise PydanticCustomError(
                "unsupported", f"part {i} has type {shown(kind)}; this server reads text parts only"
            )
        if not isinstance(part.get(kind), str):
            raise PydanticCustomError("content", f"part {i} must hold a string in {kind}")
        texts.append(part[kind])
    return "\n".join(texts)


Content = Annotated[
    str | None,
    BeforeValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class ChatMessage(RequestModel):
    """One turn. The fields that a client gets back with an answer and may send again are accepted while they are empty.

    `parsed` is what the official clients' own helpers add to an answer; they send it back with the conversation.
    """

    role: Role
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = None
    tool_calls: Annotated[list[PastToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _belongs_to_its_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise inconsistent("tool_calls", "belong to assistant messages")
        if self.refusal is not None and self.role != "assistant":
            raise inconsistent("refusal", "belongs to assistant messages")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise inconsistent("tool_call_id", "is required in tool messages, and belongs to no others")
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise inconsistent("content", "is required")
        return self

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees. `developer` is OpenAI's newer name for `system`."""
        content = self.content if self.content is not None else self.refusal
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in optional.items() if value is not None}


MAX_MESSAGES = 4096
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]

_OLD_TOOLS = "It is OpenAI's old form; send tools and tool_choice."


class ChatCompletionRequest(TemplateFields, CommonExtras, ToolFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    no_ops: ClassVar[frozenset[str]] = CommonExtras.no_ops | {
        *("service_tier", "safety_identifier", "prompt_cache_key")
    }
    unsupported: ClassVar[Mapping[str, Unsupported]] = NOT_BUILT | {
        "functions": Unsupported(_OLD_TOOLS, ([],)),
        "function_call": Unsupported(_OLD_TOOLS, ("none", "auto")),
        "modalities": Unsupported('Answers are text; send ["text"] or nothing.', (["text"],)),
        "audio": Unsupported("Answers are text; remove the field."),
        "prediction": Unsupported("Remove the field."),
        "reasoning_effort": Unsupported("Remove the field."),
        "verbosity": Unsupported("Remove the field."),
        "web_search_options": Unsupported("The server does not search; remove the field."),
        "moderation": Unsupported("Steering profiles do this server's part; remove the field."),
        "store": Unsupported("Nothing is stored; send false or nothing.", (False,)),
        "prompt_cache_options": Unsupported("Remove the field."),
        "prompt_cache_retention": Unsupported("Remove the field."),
    }

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise inconsistent("top_logprobs", "needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise inconsistent("max_completion_tokens", "differs from max_tokens, its old name; send one of them")
        return self

    def conversation(self) -> Conversation:
        """What the model is to answer."""
        text_format = TextFormat() if self.response_format is None else self.response_format.text_format()
        messages = tuple(message.for_template() for message in self.messages)
        return Conversation(messages, self.tool_use(), text_format, **self.template_fields())

    @property
    def completion_limit(self) -> int | None:
        """The most tokens that a completion may have; None = as many as fit."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """`SamplingOptions.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ScoreRequest(SteeringFields):
    """The body of `POST /v1/steering/score`: `messages`, or a raw `prompt`, never both."""

    model: str | None = None
    messages: Messages | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> ScoreRequest:
        if (self.messages is None) == (self.prompt is None):
            raise inconsistent("messages", "send either messages or prompt")
        return self


class TopLogprob(ResponseModel):
    """A likely token. `bytes`: its UTF-8 bytes, since a character may be spread over several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(ResponseModel):
    """The chosen token and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(ResponseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = absent()


class ChatChoice(ResponseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str
    token_ids: list[int] = absent()


class ChatCompletion(ResponseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = absent()
    choices: list[ChatChoice]
    usage: Usage
    steering: SteeringReport = absent()
    prompt_logprobs: PromptLogprobs = absent()
    prompt_token_ids: list[int] = absent()


class Delta(ResponseModel):
    role: Literal["assistant"] = absent()
    content: str = absent()
    refusal: None = absent()
    tool_calls: list[CallDelta] = absent()


class ChunkChoice(ResponseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    token_ids: list[int] = absent()


class ChatCompletionChunk(ResponseModel):
    """One event of a streamed answer. The first and the last one hold `steering`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = absent()
    choices: list[ChunkChoice]
    usage: Usage | None = absent()
    steering: SteeringReport = absent()
    prompt_token_ids: list[int] = absent()
