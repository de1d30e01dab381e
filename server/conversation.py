"""A conversation as both chat APIs bring it: messages for the template, tools, and the form that the answer must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from server.tools.base import ToolUse


@dataclass(frozen=True)
class TextFormat:
    """What the answer's text must be: anything, any JSON object, or JSON after a schema.

    Attributes:
        name: the schema's, for messages.
        strict: refuse a schema that cannot be enforced whole; otherwise do as much of it as can be done.
        param: the request's field that holds the schema, for messages.
    """

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: Mapping[str, Any] | None = None
    strict: bool = False
    param: str = "response_format.json_schema.schema"


@dataclass(frozen=True)
class Conversation:
    """What the model is to answer.

    Attributes:
        messages: as chat templates read them: `role` (system, user, assistant, tool), `content`, and where they belong `name`,
            `tool_calls` (`[{"id", "type": "function", "function": {"name", "arguments": object}}]`), `tool_call_id`.
        tool_use: None where the model is told of no tools.
        continue_final_message: the last message is the assistant's and goes on, instead of a new one's beginning.
        add_generation_prompt: whether the template opens the assistant's turn.
        template_options: further variables for the template.
        param: the request's field that holds the messages, for messages.
    """

    messages: tuple[dict[str, Any], ...]
    tool_use: ToolUse | None = None
    text_format: TextFormat = TextFormat()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    param: str = "messages"
