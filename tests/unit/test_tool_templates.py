"""Which way of writing calls a template teaches, and how the others are told of tools."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.conversation import Conversation
from server.tools.base import Tool, ToolUse
from server.tools.formats import FORMATS
from server.tools.grammar import needs_grammar
from server.tools.template import TemplateTools

QWEN = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '</tools>\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}{%- endif %}"""
LLAMA = """{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}{%- if tools is not none %}
{{- '{"name": function name, "parameters": dictionary of argument name and its value}' }}{%- endif %}
{%- if builtin_tools is defined %}{{- "<|python_tag|>" }}{{- "Environment: ipython" }}{%- endif %}"""
MISTRAL = """{%- if tools is not none %}{{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}{%- endif %}
{{- "[TOOL_CALLS] [" }}"""
MISTRAL_ARGS = """{%- if tools is defined %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) }}{%- endif %}
{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"""
QWEN_CODER = (
    """{%- if tools %}{{ tools | tojson }}{%- endif %}{{ '<tool_call>\\n<function=example>\\n<parameter=a>' }}"""
)
PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
WITH_GENERATION = PLAIN + "{% generation %}{{ x }}{% endgeneration %}"

WEATHER = Tool("weather", "Tells the weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
USE = ToolUse((WEATHER,), "auto", frozenset({"weather"}))
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


@pytest.mark.parametrize(
    ("template", "native", "name"),
    [
        (QWEN, True, "hermes"),
        (LLAMA, True, "llama3"),
        (MISTRAL, True, "mistral"),
        (MISTRAL_ARGS, True, "mistral-args"),
        (QWEN_CODER, True, None),
        (PLAIN, False, "hermes"),
        (WITH_GENERATION, False, "hermes"),
        ("", False, "hermes"),
    ],
)
def test_the_template_shows_the_format(template, native, name):
    found = TemplateTools(template)
    assert (found.native, found.format and found.format.name) == (native, name)
    assert all(TemplateTools(template, wanted).format is form for wanted, form in FORMATS.items())


def test_a_native_template_gets_tools_and_messages_as_they_are():
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]})
    told, options = TemplateTools(QWEN).told(Conversation(messages, USE))
    assert told == list(messages)
    assert options == {"tools": [WEATHER.as_json()]}
    assert TemplateTools(QWEN).told(Conversation(messages))[1] == {}


def test_another_template_is_told_in_text():
    messages = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "tool", "content": "rainy", "tool_call_id": "call_2"},
        {"role": "user", "content": "Thanks."},
    )
    told, options = TemplateTools(PLAIN).told(Conversation(messages, USE))
    assert options == {}
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user", "user"]
    assert told[0]["content"].startswith("Be kind.\n\n") and '"name": "weather"' in told[0]["content"]
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    assert told[2] == {"role": "assistant", "content": f"{written}\n{written}"}
    assert told[3]["content"] == ("<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>")
    assert told[4] == {"role": "user", "content": "Thanks."}


def test_a_conversation_without_tools_is_left_alone():
    messages = ({"role": "user", "content": "<tool_call>", "name": "eve"},)
    assert TemplateTools(PLAIN).told(Conversation(messages)) == (list(messages), {})


@pytest.mark.parametrize(
    ("changed", "free_text", "wanted"),
    [
        ({}, True, False),
        ({"choice": "required"}, True, True),
        ({"parallel": False}, True, True),
        ({"tools": (replace(WEATHER, strict=True),)}, True, True),
        ({"tools": (replace(WEATHER, strict=True),), "callable": frozenset()}, True, False),
        ({}, False, True),
    ],
)
def test_a_grammar_is_needed_where_a_model_could_break_a_promise(changed, free_text, wanted):
    assert needs_grammar(replace(USE, **changed), free_text=free_text) is wanted
