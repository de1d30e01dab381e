"""What a conversation's tools and text format mean for the answer: a grammar that it must follow, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from server.conversation import Conversation
from server.engine.base import Grammar
from server.errors import InvalidRequestError
from server.grammar.compiler import GrammarCompiler
from server.tools.formats import ToolFormat
from server.tools.grammar import needs_grammar, tool_grammar
from server.tools.parsers import Parser


@dataclass(frozen=True)
class AnswerPlan:
    """How an answer is made and read.

    Attributes:
        markers: special tokens whose text must be seen.
        new_call_id: makes a call's id.
        called: the finish reason of an answer that calls; of one that calls the function that the client named, "stop".
    """

    grammar: Grammar | None = None
    new_parser: Callable[[], Parser] | None = None
    markers: tuple[str, ...] = ()
    new_call_id: Callable[[], str] = str
    called: Literal["stop", "tool_calls"] = "tool_calls"


async def plan_answer(conversation: Conversation, form: ToolFormat | None, compiler: GrammarCompiler) -> AnswerPlan:
    """The plan for a conversation's answer.

    Args:
        form: how the model writes calls; None where that is not known.
    Raises:
        InvalidRequestError: a schema that cannot be enforced; tools, and no known form.
    """
    use, wanted = conversation.tool_use, conversation.text_format
    if use is None:
        return AnswerPlan(await compiler.text_format(wanted))
    if form is None:
        raise InvalidRequestError(
            "tools: this model's chat template writes tool calls in a way that this server does not read. Start it with "
            "--tool-format, or send no tools.",
            param="tools",
            code="unsupported_parameter",
        )
    names = use.callable
    called: Literal["stop", "tool_calls"] = "stop" if use.named else "tool_calls"
    plan = AnswerPlan(None, lambda: form.parser(names), form.markers, form.new_id, called)
    if not needs_grammar(use, free_text=wanted.type == "text"):
        return plan
    arguments = {
        tool.name: await compiler.embeddable(
            tool.parameters,
            strict=tool.strict,
            what=f"the schema of {tool.name!r}",
            param=use.schema_param.format(number),
        )
        for number, tool in enumerate(use.tools)
        if tool.name in names
    }
    answer = None if wanted.type == "text" else await compiler.embeddable_format(wanted)
    text = tool_grammar(form, use, arguments, answer)
    grammar = await compiler.lark(text, what="the grammar of these tools", param="tools")
    return replace(plan, grammar=grammar)
