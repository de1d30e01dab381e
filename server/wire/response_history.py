"""From the items of a Responses conversation to the messages that a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import InvalidRequestError
from server.wire.parsing import shown
from server.wire.response_items import KeptItem

Message = dict[str, Any]


def template_messages(instructions: str | None, items: Sequence[KeptItem]) -> tuple[Message, ...]:
    """`Conversation.messages`. Instructions and the system messages at the beginning make one system message.

    An assistant's text and the calls that follow it are one message, as templates have it. Every call must have its output and
    every output its call, as at OpenAI.

    Raises:
        InvalidRequestError: a call or an output lacks the other, or a call's arguments are no JSON object.
    """
    messages: list[Message] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    waiting: dict[str, str] = {}  # call id → name
    for item in items:
        match item["type"]:
            case "message":
                _add_message(messages, item)
            case "function_call":
                waiting[item["call_id"]] = item["name"]
                _add_call(messages, item)
            case "function_call_output":
                name = waiting.pop(item["call_id"], None)
                if name is None:
                    raise _fault(f"No tool call found for function call output with call_id {item['call_id']}.")
                messages.append(
                    {"role": "tool", "content": item["output"], "tool_call_id": item["call_id"], "name": name}
                )
    for call_id in waiting:
        raise _fault(f"No tool output found for function call {call_id}.")
    return tuple(messages)


def _add_message(messages: list[Message], item: KeptItem) -> None:
    text = "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in item["content"])
    role = "system" if item["role"] == "developer" else item["role"]
    if role == "system" and [message["role"] for message in messages] == ["system"]:
        messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.append({"role": role, "content": text})


def _add_call(messages: list[Message], item: KeptItem) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": item["name"], "arguments": _arguments(item)}
    call = {"id": item["call_id"], "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _arguments(item: KeptItem) -> Mapping[str, Any]:
    try:
        arguments = json.loads(item["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise _fault(
            f"The arguments of function call {item['call_id']} are not a JSON object: {shown(item['arguments'])}."
        )
    return arguments


def _fault(sentence: str) -> InvalidRequestError:
    return InvalidRequestError(sentence, param="input")
