"""`/tokenize` and `/detokenize` on the wire, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from server.conversation import Conversation
from server.wire.base import RequestModel, ResponseModel, Unsupported, inconsistent
from server.wire.chat import Messages
from server.wire.sampling import TokenId
from server.wire.template import TemplateFields
from server.wire.tools import ToolFields

MAX_TOKENS = 2**20


class TokenizeRequest(TemplateFields, ToolFields):
    """The body of `POST /tokenize`: `prompt`, or `messages` and what else makes a chat's prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="Of a prompt: whether it gets the tokenizer's special tokens; it does unless false."
    )
    return_token_strs: bool | None = None

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "chat_template": Unsupported("Start the server with --chat-template FILE."),
    }

    @model_validator(mode="after")
    def _one_prompt(self) -> TokenizeRequest:
        if (self.messages is None) == (self.prompt is None):
            raise inconsistent("prompt", "send either prompt or messages")
        templated = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
        for name in templated if self.messages is None else ("add_special_tokens",):
            if getattr(self, name):
                raise inconsistent(name, f"goes with {'messages' if self.messages is None else 'prompt'} only")
        return self

    def conversation(self) -> Conversation:
        """What the template is to write; there must be messages."""
        messages = tuple(message.for_template() for message in self.messages or ())
        return Conversation(messages, self.tool_use(), **self.template_fields())


class TokenizeResponse(ResponseModel):
    """`token_strs`: how the vocabulary writes each token; null where they were not asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


class DetokenizeResponse(ResponseModel):
    prompt: str
