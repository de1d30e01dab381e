"""Responses: the parts of a turn become items, and the events that tell of their growth."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.answers.generation import TokenNote
from server.answers.parts import CallArguments, CallBegins, End, Part, Text, Turn
from server.errors import ApiError
from server.wire.chat import TokenLogprob
from server.wire.response_items import ItemStatus, NewId
from server.wire.response_objects import (
    ArgumentsDelta,
    ArgumentsDone,
    ErrorEvent,
    Event,
    IncompleteDetails,
    InputTokensDetails,
    ItemEvent,
    LikelyToken,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    ResponseFault,
    ResponseObject,
    ResponseUsage,
    StateEvent,
    StreamedLogprob,
    TextDelta,
    TextDone,
)

ToLogprobs = Callable[[Sequence[TokenNote]], list[TokenLogprob]]


class ResponseWriter:
    """Writes one response. `begin`, `push` for each part, then `finish` or `fail`; each gives the events that it causes.

    A whole answer is what the last of them shows, so streamed and whole answers cannot differ.
    """

    def __init__(self, fields: Mapping[str, Any], new_id: NewId, to_logprobs: ToLogprobs) -> None:
        """`fields`: those of the response that stay as they are."""
        self._fields = fields
        self._new_id = new_id
        self._to_logprobs = to_logprobs
        self._numbers = itertools.count()
        self._done: list[OutputItem] = []
        self._open: _OpenMessage | _OpenCall | None = None
        self._held_notes: tuple[TokenNote, ...] = ()  # of tokens that have shown no text yet
        self._finish_reason = "stop"

    def begin(self) -> list[Event]:
        """The first two events, before any output."""
        response = self._response("in_progress", None)
        return [
            self._event(StateEvent, type="response.created", response=response),
            self._event(StateEvent, type="response.in_progress", response=response),
        ]

    def push(self, part: Part) -> list[Event]:
        """What this part adds."""
        match part:
            case Text():
                return self._text(part)
            case CallBegins():
                self._held_notes = ()  # they were the call's beginning
                events = self._close("completed")
                self._open = _OpenCall(self._new_id("fc_"), part.id, part.name)
                added = self._open.item("in_progress")
                return [*events, self._item_event("response.output_item.added", added)]
            case CallArguments():
                assert isinstance(self._open, _OpenCall), "arguments follow their call's beginning"
                self._open.arguments.append(part.text)
                return [self._place(ArgumentsDelta, type="response.function_call_arguments.delta", delta=part.text)]
            case End():
                self._finish_reason = part.finish_reason
                return self._end("incomplete" if part.finish_reason == "length" else "completed")

    def finish(self, usage: ResponseUsage) -> tuple[ResponseObject, list[Event]]:
        """The whole response, and the last event. After `End` only."""
        status = "incomplete" if self._finish_reason == "length" else "completed"
        response = self._response(status, usage)
        return response, [self._event(StateEvent, type=f"response.{status}", response=response)]

    def fail(self, error: ApiError) -> tuple[ResponseObject, list[Event]]:
        """The response as far as it came, and the last events, at any time."""
        if self._open is not None:
            self._done.append(self._open.item("incomplete"))
            self._open = None
        response = self._response("failed", None, ResponseFault(code="server_error", message=error.message))
        return response, [
            self._event(ErrorEvent, type="error", code=error.code, message=error.message, param=error.param),
            self._event(StateEvent, type="response.failed", response=response),
        ]

    def _text(self, part: Text) -> list[Event]:
        if not part.text:
            if not isinstance(self._open, _OpenCall):
                self._held_notes += part.notes
            return []
        events: list[Event] = [] if isinstance(self._open, _OpenMessage) else self._open_message()
        return [*events, self._delta(part.text, part.notes)]

    def _delta(self, text: str, notes: Sequence[TokenNote]) -> Event:
        assert isinstance(self._open, _OpenMessage)
        logprobs = self._to_logprobs([*self._held_notes, *notes])
        self._held_notes = ()
        self._open.texts.append(text)
        self._open.logprobs += logprobs
        return self._place_in_part(
            TextDelta, type="response.output_text.delta", delta=text, logprobs=_streamed(logprobs)
        )

    def _open_message(self) -> list[Event]:
        events = self._close("completed")
        self._open = message = _OpenMessage(self._new_id("msg_"))
        return [
            *events,
            self._item_event("response.output_item.added", message.item("in_progress", begun=False)),
            self._place_in_part(PartEvent, type="response.content_part.added", part=_text_part("", [])),
        ]

    def _end(self, status: ItemStatus) -> list[Event]:
        events: list[Event] = []
        if self._open is None:  # the model said nothing
            events = self._open_message()
        if isinstance(self._open, _OpenMessage) and self._held_notes:
            events.append(self._delta("", ()))
        return events + self._close(status)

    def _close(self, status: ItemStatus) -> list[Event]:
        """End the item that is open, if one is."""
        match self._open:
            case None:
                return []
            case _OpenMessage() as message:
                part = message.part()
                events = [
                    self._place_in_part(
                        TextDone, type="response.output_text.done", text=part.text, logprobs=_streamed(part.logprobs)
                    ),
                    self._place_in_part(PartEvent, type="response.content_part.done", part=part),
                ]
            case _OpenCall() as call:
                events = [
                    self._place(
                        ArgumentsDone,
                        type="response.function_call_arguments.done",
                        name=call.name,
                        arguments="".join(call.arguments),
                    )
                ]
        item = self._open.item(status)
        events.append(self._item_event("response.output_item.done", item))
        self._done.append(item)
        self._open = None
        return events

    def _response(self, status: str, usage: ResponseUsage | None, error: ResponseFault | None = None) -> ResponseObject:
        return ResponseObject.model_construct(
            **self._fields,
            status=status,
            completed_at=int(time.time()) if status == "completed" else None,
            error=error,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            output=list(self._done),
            **({} if usage is None else {"usage": usage}),
        )

    def _event(self, kind: type[Event], **fields: Any) -> Event:
        return kind.model_construct(sequence_number=next(self._numbers), **fields)

    def _item_event(self, type_: str, item: OutputItem) -> Event:
        return self._event(ItemEvent, type=type_, output_index=len(self._done), item=item)

    def _place(self, kind: type[Event], **fields: Any) -> Event:
        """An event within the open item."""
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, output_index=len(self._done), **fields)

    def _place_in_part(self, kind: type[Event], **fields: Any) -> Event:
        return self._place(kind, content_index=0, **fields)


class _OpenMessage:
    """A message that grows; it has one part."""

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []

    def part(self) -> OutputText:
        return _text_part("".join(self.texts), self.logprobs)

    def item(self, status: ItemStatus, *, begun: bool = True) -> OutputMessage:
        content = [self.part()] if begun else []
        return OutputMessage.model_construct(
            id=self.id, type="message", status=status, role="assistant", content=content
        )


class _OpenCall:
    """A function call that grows."""

    def __init__(self, item_id: str, call_id: str, name: str) -> None:
        self.id = item_id
        self.call_id = call_id
        self.name = name
        self.arguments: list[str] = []

    def item(self, status: ItemStatus) -> OutputCall:
        return OutputCall.model_construct(
            id=self.id,
            type="function_call",
            status=status,
            call_id=self.call_id,
            name=self.name,
            arguments="".join(self.arguments),
        )


def _text_part(text: str, logprobs: Sequence[TokenLogprob]) -> OutputText:
    return OutputText.model_construct(type="output_text", text=text, annotations=[], logprobs=list(logprobs))


def _streamed(logprobs: Sequence[TokenLogprob]) -> list[StreamedLogprob]:
    return [
        StreamedLogprob.model_construct(
            token=entry.token,
            logprob=entry.logprob,
            top_logprobs=[
                LikelyToken.model_construct(token=top.token, logprob=top.logprob) for top in entry.top_logprobs
            ],
        )
        for entry in logprobs
    ]


def response_usage(turn: Turn) -> ResponseUsage:
    """Token counts of the turn so far."""
    generation = turn.generation
    return ResponseUsage(
        input_tokens=generation.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=generation.cached_tokens, cache_write_tokens=0),
        output_tokens=generation.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=generation.prompt_tokens + generation.completion_tokens,
    )


async def response_whole(new_writer: Callable[[], ResponseWriter], turn: Turn) -> ResponseObject:
    """Run a turn to its end; its response, by a writer made after the decision. Closes the generation, whatever happens."""
    try:
        await turn.generation.start()
        writer = new_writer()
        async for part in turn.parts():
            writer.push(part)
    finally:
        await turn.generation.aclose()
    return writer.finish(response_usage(turn))[0]
