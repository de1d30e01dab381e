"""Reads one tool call that is written as a JSON object, piece by piece, so that its arguments can be passed on as they come."""

from __future__ import annotations

import json
from collections.abc import Collection

NAME_KEY = "name"
ARGUMENT_KEYS = ("arguments", "parameters")


class _NotACallError(ValueError):
    """The text is no call of one of the tools."""


class JsonValue:
    """Follows one JSON value through a growing text, far enough to know where it ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self._begun = False
        self.done = False

    def push(self, char: str) -> bool:
        """Add a character; returns whether it belongs to the value. A number or word ends at what follows it."""
        if self._in_string:
            self._string(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]" and self._depth:
            self._depth -= 1
            self.done = not self._depth
        elif not self._depth and (char in ",}]" or (char.isspace() and self._begun)):
            self.done = True
            return False
        self._begun = self._begun or not char.isspace()
        return True

    def _string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.done = not self._depth


class CallReader:
    """One call: an object with a name and arguments, in either order, under the keys that models use.

    Attributes:
        name: once it is known, which is before any arguments come out.
        done: the object is closed.
        broken: the text is no call of one of the tools, or stopped being one.
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names`: of the tools that may be called."""
        self._names = names
        self._read = ""  # everything so far, to be shown where this turns out to be no call
        self._key: str | None = None
        self._value: JsonValue | None = None
        self._value_text = ""
        self._state = "open"
        self._early = ""  # arguments that are not out yet: the name comes first
        self._has_arguments = False
        self.name: str | None = None
        self.done = self.broken = False

    @property
    def text(self) -> str:
        """What was read."""
        return self._read

    def push(self, text: str) -> tuple[str, str]:
        """Read on; returns the arguments that `text` adds, and what of it lies behind the object, or behind what broke it.

        Arguments come out once the name is known; an object without any has `{}`.
        """
        arguments = ""
        for at, char in enumerate(text):
            self._read += char
            try:
                arguments += self._push(char)
            except _NotACallError:
                self.broken = True
            if self.done and not self._has_arguments:
                arguments += "{}"
            if self.done or self.broken:
                return arguments, text[at + 1 :]
        return arguments, ""

    def _push(self, char: str) -> str:
        if self._value is not None:
            if self._value.push(char):
                return self._add(char)
            self._close_value()
            return self._push(char)
        if char.isspace():
            return ""
        match self._state, char:
            case "open", "{":
                self._state = "key"
            case "key" | "next key", '"':
                self._key, self._value, self._value_text = None, JsonValue(), ""
                return self._push(char)
            case "colon", ":":
                self._value, self._value_text = JsonValue(), ""
                self._state = "value"
            case "comma", ",":
                self._state = "next key"
            case "key" | "comma", "}":
                if self.name is None:
                    raise _NotACallError("it names no tool")
                self.done = True
            case _:
                raise _NotACallError(f"unexpected {char!r}")
        return ""

    def _add(self, char: str) -> str:
        """A character of the current key or value; what may be shown after it."""
        assert self._value is not None
        self._value_text += char
        is_arguments = self._state == "value" and self._key in ARGUMENT_KEYS
        if is_arguments and self._value_text.strip():
            self._has_arguments = True
            self._early += char
        if self._value.done:
            self._close_value()
        if self.name is None:
            return ""
        shown, self._early = self._early, ""
        return shown

    def _close_value(self) -> None:
        text, self._value = self._value_text, None
        if self._state != "value":  # that was a key
            try:
                self._key = json.loads(text)
            except ValueError as error:
                raise _NotACallError("a key is no string") from error
            self._state = "colon"
            return
        self._state = "comma"
        if self._key == NAME_KEY:
            try:
                name = json.loads(text)
            except ValueError as error:
                raise _NotACallError("its name is no string") from error
            if name not in self._names or self.name is not None:
                raise _NotACallError(f"no tool is called {text}")
            self.name = name
