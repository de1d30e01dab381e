"""Tools for a chat template that knows of none: told in the system message, called and answered in the Hermes way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.tools.base import Tool

INSTRUCTIONS = """You may call functions to assist with the user's request. Their signatures are:
<tools>
{tools}
</tools>
For each call, answer with a JSON object with the function's name and arguments:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


def told_in_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages with roles system, user and assistant alone, all with text content; tools are told in the first."""
    told = [_plain(message) for message in messages]
    if tools:
        text = INSTRUCTIONS.format(tools="\n".join(json.dumps(tool.as_json(), ensure_ascii=False) for tool in tools))
        if told and told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{text}"
        else:
            told.insert(0, {"role": "system", "content": text})
    return _merged(told)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>", "was_tool": True}
    if calls := message.get("tool_calls"):
        written = [
            "<tool_call>\n" + json.dumps(call["function"], ensure_ascii=False) + "\n</tool_call>" for call in calls
        ]
        return {"role": message["role"], "content": "\n".join(filter(None, [content, *written]))}
    return {key: value for key, value in message.items() if key in ("role", "content", "name")}


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool answers in a row make one turn: many templates insist that user and assistant alternate."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        was_tool = message.pop("was_tool", False)
        if (
            was_tool
            and merged
            and merged[-1].get("role") == "user"
            and merged[-1]["content"].endswith("</tool_response>")
        ):
            merged[-1]["content"] += "\n" + message["content"]
        else:
            merged.append(message)
    return merged
