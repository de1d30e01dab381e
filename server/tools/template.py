"""How a model's chat template deals with tools."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, TemplateError, meta

from server.conversation import Conversation
from server.tools.formats import FORMATS, HERMES, ToolFormat, detect
from server.tools.plain_template import told_in_text


class TemplateTools:
    """Attributes:
    format: how calls are written; None where the template reads tools, but in a form that is not known.
    native: whether the template itself tells the model of tools.
    """

    def __init__(self, template: str, wanted: str | None = None) -> None:
        """`wanted`: one of `FORMATS`, in place of what the template shows."""
        self.native = _reads_tools(template)
        self.format: ToolFormat | None = FORMATS[wanted] if wanted else detect(template) if self.native else HERMES

    def told(self, conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages for the template, and what else it is given. Other templates than native ones are told in text."""
        use = conversation.tool_use
        if self.native:
            return list(conversation.messages), {"tools": [tool.as_json() for tool in use.tools]} if use else {}
        if use is None and not any(m["role"] == "tool" or "tool_calls" in m for m in conversation.messages):
            return list(conversation.messages), {}
        return told_in_text(conversation.messages, use.tools if use else ()), {}


def _reads_tools(template: str) -> bool:
    """Whether `tools` is one of the variables that a template asks for."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return "tools" in meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # tags that only transformers' environment knows, such as generation
        return "tools" in template
