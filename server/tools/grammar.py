"""The grammar of an answer that must, or may, call tools: in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping

from server.tools.base import ToolUse
from server.tools.formats import ToolFormat

ANYTHING = r"/(.|\n)*/"
NO_OBJECT = r"/([^{\s](.|\n)*)?/"


def needs_grammar(use: ToolUse, *, free_text: bool) -> bool:
    """Whether anything must hold that a model could break. `free_text`: what is no call may be anything."""
    strict = any(tool.strict for tool in use.tools if tool.name in use.callable)
    return use.choice == "required" or strict or not use.parallel or not free_text


def tool_grammar(form: ToolFormat, use: ToolUse, arguments: Mapping[str, str], answer: str | None) -> str:
    """A grammar with the rule `start`.

    Args:
        arguments: callable name → its arguments' schema, as may stand behind `%json`.
        answer: such a schema for what is said instead of a call; None: any text.
    """
    rules = [f"args_{i}: %json {schema}" for i, schema in enumerate(arguments.values())]
    rules += [
        f"call_{i}: {_quoted(form.opened(name))} args_{i} {_quoted(form.closing)}" for i, name in enumerate(arguments)
    ]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(arguments))))
    more = f" ({_quoted(form.between)} call)*" if use.parallel else ""
    rules.append(f"calls: {_quoted(form.first)} call{more} {_quoted(form.end)}")
    if use.choice == "required":
        start = "calls"
    elif answer is not None:
        rules.append(f"answer: %json {answer}")
        start = "calls | answer"
    elif form.trigger:
        # Text ends where the trigger comes first, and then a call must follow.
        rules += [f"text: {ANYTHING}", f"opened[lazy]: {ANYTHING} {_quoted(form.trigger)}"]
        rules += [
            f"after_{i}: {_quoted(_after(form, name))} args_{i} {_quoted(form.closing)}"
            for i, name in enumerate(arguments)
        ]
        rules.append("after: " + " | ".join(f"after_{i}" for i in range(len(arguments))))
        start = "text | opened after" + more + f" {_quoted(form.end)}"
    else:
        rules.append(f"text: {NO_OBJECT}")
        start = "text | calls"
    return "\n".join(["%llguidance {}", f"start: {start}", *rules])


def _after(form: ToolFormat, name: str) -> str:
    """What follows the trigger up to the arguments of the first call."""
    return (form.first + form.opened(name)).removeprefix(form.trigger)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
