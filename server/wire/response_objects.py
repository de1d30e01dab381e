"""`/v1/responses` on the wire: what the server answers. Every field of OpenAI's that may be null is sent, as null if need be."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from server.wire.base import ResponseModel, absent
from server.wire.chat import TokenLogprob
from server.wire.response_items import ItemStatus
from server.wire.steering import SteeringReport


class OutputText(ResponseModel):
    """A message's text. `logprobs` is empty where none were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(ResponseModel):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(ResponseModel):
    """A function call. `call_id` ties its output to it; `id` is the item's."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(ResponseModel):
    """Not counted per request; always 0. `/metrics` has the prefix cache's hits."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseModel):
    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFault(ResponseModel):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(ResponseModel):
    reason: Literal["max_output_tokens"]


class ResponseObject(ResponseModel):
    """A response, finished or not."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage = absent()
    user: str = absent()
    steering: SteeringReport = absent()


class DeletedResponse(ResponseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(ResponseModel):
    """A page of a response's input items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Event(ResponseModel):
    """One event of a stream."""

    type: str
    sequence_number: int


class StateEvent(Event):
    """The response as it stands."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseObject


class ItemEvent(Event):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class PartEvent(Event):
    """A part of a message begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class LikelyToken(ResponseModel):
    token: str
    logprob: float


class StreamedLogprob(ResponseModel):
    """As in the finished part, without bytes."""

    token: str
    logprob: float
    top_logprobs: list[LikelyToken]


class TextDelta(Event):
    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[StreamedLogprob]


class TextDone(Event):
    type: Literal["response.output_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[StreamedLogprob]


class ArgumentsDelta(Event):
    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event):
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


class ErrorEvent(Event):
    """What went wrong in mid-stream; `response.failed` follows."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


class ResponseStreamEvent(
    RootModel[StateEvent | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone | ErrorEvent]
):
    """Any event of a stream, for the API's description."""
