"""Tool calls in a model's text, as each template family writes them; text that only looks like one stays text."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator

from server.answers.parts import Found
from server.tools.call_reader import CallReader, JsonValue

Waits = Generator[None, None, bool]  # yields where more text must come first


class Parser(ABC):
    """One completion's. `_run` reads what is held, says what it finds, and yields where it needs more."""

    def __init__(self, names: Collection[str]) -> None:
        """`names`: of the tools that may be called; a call of another is text."""
        self._names = names
        self._held = ""
        self._found: list[Found] = []
        self._space = ""  # what stood before a marker, shown only where no call follows
        self._last = self._has_called = False
        self._running = self._run()

    def push(self, text: str, *, last: bool) -> list[Found]:
        """Read on; `last`: nothing more comes."""
        self._held += text
        self._last = last
        next(self._running, None)
        found, self._found = self._found, []
        return found

    @abstractmethod
    def _run(self) -> Waits:
        """The whole text."""

    def _say(self, text: str) -> None:
        if text:
            self._found.append(Found("text", text))

    def _text_until(self, marker: str) -> Waits:
        """Show text up to a marker and take the marker away; False where the text ended. Space before calls is not shown."""
        while (at := self._held.find(marker)) < 0:
            if self._last:
                self._say("" if self._has_called and self._held.isspace() else self._held)
                self._held = ""
                return False
            shown = len(self._held) - _may_begin(self._held, marker)
            self._say(self._held[:shown])
            self._held = self._held[shown:]
            yield
        text = self._held[:at].rstrip()
        self._say(text)
        self._space = self._held[len(text) : at]
        self._held = self._held[at + len(marker) :]
        return True

    def _next_is(self, marker: str) -> Waits:
        """Whether `marker` comes next, after space; then both are taken away."""
        while not (rest := self._held.lstrip()).startswith(marker):
            if self._last or not marker.startswith(rest):
                return False
            yield
        self._held = rest[len(marker) :]
        return True

    def _call(self, opening: str) -> Waits:
        """Read a call's object. False where it is none and was shown as text after `opening`, the marker that led here."""
        reader, announced = CallReader(self._names), False
        while True:
            arguments, self._held = reader.push(self._held)
            if arguments and not announced:
                assert reader.name is not None
                self._begin(reader.name)
                announced = True
            if arguments:
                self._found.append(Found("arguments", arguments))
            if reader.done or reader.broken or self._last:
                break
            yield
        if not announced:  # what was passed on could not be taken back
            self._say(self._space + opening + reader.text)
        self._space = ""
        return announced

    def _begin(self, name: str) -> None:
        self._has_called = True
        self._found.append(Found("call", name))


class HermesParser(Parser):
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, any number: Hermes, Qwen 2.5, Qwen 3."""

    def _run(self) -> Waits:
        while (yield from self._text_until("<tool_call>")):
            if (yield from self._call("<tool_call>")):
                yield from self._next_is("</tool_call>")
        return True


class LlamaParser(Parser):
    """`{"name": …, "parameters": …}` as the whole answer, `;` between several: Llama 3.x. Else the answer is text."""

    def _run(self) -> Waits:
        yield from self._next_is("<|python_tag|>")
        while (yield from self._sees("{")) and (yield from self._call("")):
            yield from self._next_is(";")
        while not self._last:
            self._say(self._held)
            self._held = ""
            yield
        self._say("" if self._has_called and self._held.isspace() else self._held)
        return True

    def _sees(self, char: str) -> Waits:
        while not (rest := self._held.lstrip()):
            if self._last:
                return False
            yield
        return rest.startswith(char)


class MistralParser(Parser):
    """`[TOOL_CALLS][{"name": …, "arguments": …}, …]`, or, from 2025 on, `[TOOL_CALLS]name[ARGS]{…}` for each call."""

    MARKER = "[TOOL_CALLS]"
    HEAD = re.compile(r"\s*([A-Za-z0-9_.-]+)(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?\s*(?=\{)")
    LONGEST_HEAD = 256

    def _run(self) -> Waits:
        while (yield from self._text_until(self.MARKER)):
            if (yield from self._next_is("[")):
                opening = self.MARKER + "["
                while (yield from self._call(opening)) and (yield from self._next_is(",")):
                    opening = ""
                yield from self._next_is("]")
            else:
                yield from self._named()
        return True

    def _named(self) -> Waits:
        while (head := self.HEAD.match(self._held)) is None or head[1] not in self._names:
            if self._last or head is not None or len(self._held) > self.LONGEST_HEAD:
                self._say(self._space + self.MARKER)
                return False
            yield
        self._begin(head[1])
        self._held = self._held[head.end() :]
        value = JsonValue()
        while not value.done:
            size = next(
                (at for at, char in enumerate(self._held, 1) if value.push(char) and value.done), len(self._held)
            )
            if size:
                self._found.append(Found("arguments", self._held[:size]))
            self._held = self._held[size:]
            if not value.done:
                if self._last:
                    break
                yield
        return True


def _may_begin(text: str, marker: str) -> int:
    """Length of the end of `text` that must be held back: space, and the longest beginning of `marker`."""
    begun = next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
    rest = text[: len(text) - begun]
    return begun + len(rest) - len(rest.rstrip())
