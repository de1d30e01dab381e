"""`/v1/responses` on the wire: what a request may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from server.conversation import TextFormat
from server.wire.base import RequestModel, Unsupported, inconsistent
from server.wire.response_items import ItemId, Items
from server.wire.response_text import TextConfig
from server.wire.response_tools import ResponseToolFields
from server.wire.sampling import SamplingFields, StreamOptions

Includable = Literal[
    "message.output_text.logprobs",
    # What follows belongs to tools, images and reasoning, which answers here never hold: asking for it adds nothing.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
_REMOVE = "Remove the field."


class ResponseStreamOptions(StreamOptions):
    """`stream_options`. Usage is in every stream's last event; it is not asked for."""

    include_usage: None = None


class ResponsesRequest(SamplingFields, ResponseToolFields):
    """The body of `POST /v1/responses`."""

    input: Items | None = None
    instructions: str | None = None
    previous_response_id: ItemId | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Bounds calls of built-in tools, of which there are none here."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Includable] | None = None
    text: TextConfig | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    stream_options: ResponseStreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = None
    n: Literal[1] | None = None

    no_ops: ClassVar[frozenset[str]] = SamplingFields.no_ops | {
        *("max_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key")
    }
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "access_programs": Unsupported(_REMOVE),
        "background": Unsupported("Responses are made while the client waits; send false or nothing.", (False,)),
        "background_options": Unsupported(_REMOVE),
        "context_management": Unsupported("Send a shorter input instead.", ([],)),
        "conversation": Unsupported("Continue with previous_response_id instead."),
        "image": Unsupported(_REMOVE),
        "moderation": Unsupported("Steering profiles do this server's part; remove the field."),
        "prompt": Unsupported("There are no stored prompts; send instructions and input."),
        "prompt_cache_options": Unsupported(_REMOVE),
        "prompt_cache_retention": Unsupported(_REMOVE),
        "reasoning": Unsupported(
            "There is no reasoning apart from the answer; remove the field.",
            ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
        ),
        "truncation": Unsupported('Input is never shortened; send "disabled" or nothing.', ("disabled",)),
    }

    @model_validator(mode="after")
    def _consistent(self) -> ResponsesRequest:
        if self.input is None and self.previous_response_id is None:
            raise inconsistent("input", "is required where there is no previous_response_id")
        if self.input == [] and self.previous_response_id is None:
            raise inconsistent("input", "must hold at least 1 item where there is no previous_response_id")
        return self

    @property
    def text_format(self) -> TextFormat:
        """What the answer's text must be."""
        return TextFormat() if self.text is None else self.text.text_format

    @property
    def num_logprobs(self) -> int | None:
        """`SamplingOptions.logprobs`; `top_logprobs` above 0 asks for them, too."""
        asked = "message.output_text.logprobs" in (self.include or ())
        return (self.top_logprobs or 0) if asked or self.top_logprobs else None


class RetrieveQuery(RequestModel):
    """The query of `GET /v1/responses/{id}`."""

    include: list[Includable] | None = None

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "stream": Unsupported("Only the whole response is kept; leave it out.", ("false",)),
        "starting_after": Unsupported("Only the whole response is kept; leave it out."),
        "include_obfuscation": Unsupported("Leave it out.", ("false",)),
    }


class InputItemsQuery(RequestModel):
    """The query of `GET /v1/responses/{id}/input_items`."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    include: list[Includable] | None = None
