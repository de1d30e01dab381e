"""How template families write tool calls: which markers, which grammar, which parser."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass

from server.tools.parsers import HermesParser, LlamaParser, MistralParser, Parser

ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolFormat:
    """One family's way.

    Attributes:
        markers: texts that a tokenizer may hold as special tokens, and that must be seen nevertheless.
        parser: made with the callable names, for each completion.
        opening, closing: what stands around a call in the grammar; `{name}` is the tool's name as JSON text.
        first, between, end: what stands before the first call, between two, and after the last.
        trigger: text that, in a free answer, begins the calls; "" where only a whole answer can be a call.
        new_id: makes a call's id.
    """

    name: str
    markers: tuple[str, ...]
    parser: Callable[[Collection[str]], Parser]
    opening: str
    closing: str
    first: str = ""
    between: str = ""
    end: str = ""
    trigger: str = ""
    new_id: Callable[[], str] = lambda: "call_" + _random(24)

    def opened(self, name: str) -> str:
        """What the model writes before the arguments of a call of `name`."""
        return self.opening.replace("{name}", json.dumps(name) if '"name"' in self.opening else name)


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


HERMES = ToolFormat(
    "hermes",
    ("<tool_call>", "</tool_call>"),
    HermesParser,
    '<tool_call>\n{"name": {name}, "arguments": ',
    "}\n</tool_call>",
    between="\n",
    trigger="<tool_call>",
)
LLAMA3 = ToolFormat("llama3", ("<|python_tag|>",), LlamaParser, '{"name": {name}, "parameters": ', "}", between="; ")
_MISTRAL_ID = lambda: _random(9)  # noqa: E731 – its templates take no other length
MISTRAL = ToolFormat(
    "mistral",
    ("[TOOL_CALLS]",),
    MistralParser,
    '{"name": {name}, "arguments": ',
    "}",
    first="[TOOL_CALLS][",
    between=", ",
    end="]",
    trigger="[TOOL_CALLS]",
    new_id=_MISTRAL_ID,
)
MISTRAL_ARGS = ToolFormat(
    "mistral-args",
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    MistralParser,
    "[TOOL_CALLS]{name}[ARGS]",
    "",
    trigger="[TOOL_CALLS]",
    new_id=_MISTRAL_ID,
)
FORMATS = {form.name: form for form in (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)}


def detect(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it teaches none that is known."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
        return LLAMA3
    return None
