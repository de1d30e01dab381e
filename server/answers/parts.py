"""An answer as a stream of parts: text, tool calls, ends. What both chat APIs are written from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from server.answers.generation import Generation, TextDelta, TokenNote

PartFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Text:
    """Text of completion `index`, which is no tool call."""

    index: int
    text: str
    notes: tuple[TokenNote, ...] = ()


@dataclass(frozen=True)
class CallBegins:
    """Call number `call` (from 0) of a completion; its arguments follow."""

    index: int
    call: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, JSON text."""

    index: int
    call: int
    text: str


@dataclass(frozen=True)
class End:
    """A completion's end."""

    index: int
    finish_reason: PartFinish


Part = Text | CallBegins | CallArguments | End


@dataclass(frozen=True)
class Found:
    """What a piece of text turned out to hold, in order: plain text, the name of a call that begins, more of its arguments."""

    kind: Literal["text", "call", "arguments"]
    text: str


class CallParser(Protocol):
    """Finds the tool calls in one completion's text as it grows; holds back what may become one."""

    def push(self, text: str, *, last: bool) -> Sequence[Found]: ...


@dataclass(frozen=True)
class Turn:
    """The assistant's turn in a conversation: a generation, and how its text is read.

    Attributes:
        new_parser: for each completion; None where no tools are at hand.
        new_call_id: makes the id of a call.
        called: the finish reason of a completion that called and then ended by itself.
    """

    generation: Generation
    new_parser: Callable[[], CallParser] | None = None
    new_call_id: Callable[[], str] = str
    called: PartFinish = "tool_calls"

    async def parts(self) -> AsyncIterator[Part]:
        """Of a generation that has been started: its completions' parts, interleaved, each completion ending with `End`."""
        if self.new_parser is None:
            async for delta in self.generation.deltas():
                if delta.text or delta.notes:
                    yield Text(delta.index, delta.text, delta.notes)
                if delta.finish_reason is not None:
                    yield End(delta.index, delta.finish_reason)
            return
        readers = [
            _Reader(i, self.new_parser(), self.new_call_id, self.called) for i in range(self.generation.request.n)
        ]
        async for delta in self.generation.deltas():
            for part in readers[delta.index].read(delta):
                yield part


class _Reader:
    """Makes parts of one completion's deltas."""

    def __init__(self, index: int, parser: CallParser, new_call_id: Callable[[], str], called: PartFinish) -> None:
        self._index = index
        self._parser = parser
        self._new_call_id = new_call_id
        self._called = called
        self._num_calls = 0
        self._notes: list[TokenNote] = []

    def read(self, delta: TextDelta) -> Iterator[Part]:
        """What a delta adds. Notes go with text; those of a call's tokens are dropped."""
        self._notes += delta.notes
        last = delta.finish_reason is not None
        for found in self._parser.push(delta.text, last=last):
            match found.kind:
                case "text":
                    yield Text(self._index, found.text, tuple(self._notes))
                case "call":
                    self._num_calls += 1
                    yield CallBegins(self._index, self._num_calls - 1, self._new_call_id(), found.text)
                case "arguments":
                    yield CallArguments(self._index, self._num_calls - 1, found.text)
            self._notes = []
        if delta.finish_reason is not None:
            called = self._num_calls > 0 and delta.finish_reason == "stop"
            yield End(self._index, self._called if called else delta.finish_reason)


@dataclass
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str


@dataclass
class Answer:
    """A whole completion."""

    text: str = ""
    notes: list[TokenNote] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: PartFinish = "stop"


async def collect(turn: Turn) -> list[Answer]:
    """Run a turn to its end; its n answers in order. Closes the generation, also when it fails or is cancelled."""
    answers = [Answer() for _ in range(turn.generation.request.n)]
    try:
        await turn.generation.start()
        async for part in turn.parts():
            answer = answers[part.index]
            match part:
                case Text():
                    answer.text += part.text
                    answer.notes += part.notes
                case CallBegins():
                    answer.calls.append(Call(part.id, part.name, ""))
                case CallArguments():
                    answer.calls[part.call].arguments += part.text
                case End():
                    answer.finish_reason = part.finish_reason
    finally:
        await turn.generation.aclose()
    return answers
