"""openai for Python: tools in chat completions, forced on the demo, used in earnest by the scripted model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.asked import HARMFUL, WEATHER, Person, get_weather, said

NAMED = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
FORCED = {"model": "demo", "temperature": 0, "max_tokens": 200, "messages": said(HARMFUL), "tools": [WEATHER]}
ASKED = {"model": "scripted", "tools": [WEATHER]}


@pytest.mark.parametrize(
    ("choice", "finish"),
    [("required", {"tool_calls"}), (ALLOWED, {"tool_calls"}), (NAMED, {"tool_calls", "stop"})],
    ids=["required", "allowed", "named"],
)
def test_forced_calls_hold_for_any_model(client: openai.OpenAI, choice: Any, finish: set[str]) -> None:
    """OpenAI ends a named call with `stop`; clients take either."""
    answer = client.chat.completions.create(tool_choice=choice, parallel_tool_calls=False, **FORCED)
    [call] = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather") and call.id
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    assert answer.choices[0].finish_reason in finish
    assert answer.choices[0].message.content is None
    assert answer.steering["applied"] is True


def test_forced_calls_in_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(tool_choice="required", parallel_tool_calls=False, **FORCED)
    chunks = list(
        client.chat.completions.create(tool_choice="required", parallel_tool_calls=False, stream=True, **FORCED)
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    head, *rest = deltas
    assert (head.index, head.type, head.function.name) == (0, "function", "get_weather") and head.id
    assert all((call.index, call.id, call.type, call.function.name) == (0, None, None, None) for call in rest)
    arguments = "".join(call.function.arguments for call in deltas)
    assert arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_none_keeps_a_model_from_calling(clever: openai.OpenAI) -> None:
    answer = clever.chat.completions.create(messages=said("weather in Paris?"), tool_choice="none", **ASKED)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


def test_one_call_at_a_time(clever: openai.OpenAI) -> None:
    """The model wants to call twice; the grammar lets it call once."""
    question = said("What is the weather in Paris and Oslo?")
    answer = clever.chat.completions.create(messages=question, parallel_tool_calls=False, **ASKED)
    [call] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_calls_of_several_answers_in_one_stream(clever: openai.OpenAI) -> None:
    question = said("What is the weather in Paris and Oslo?")
    found: dict[tuple[int, int], str] = {}
    for chunk in clever.chat.completions.create(messages=question, n=2, stream=True, **ASKED):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                key = choice.index, call.index
                found[key] = found.get(key, "") + call.function.arguments
    cities = {key: json.loads(arguments)["city"] for key, arguments in found.items()}
    assert cities == {(i, call): city for i in (0, 1) for call, city in enumerate(("Paris", "Oslo"))}


def test_the_stream_helper_parses_arguments(client: openai.OpenAI) -> None:
    class Choose(BaseModel):
        yes: bool

    tools = [openai.pydantic_function_tool(Choose)]
    fields = FORCED | {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Choose)


def test_parse_reads_a_tools_arguments(clever: openai.OpenAI) -> None:
    answer = clever.chat.completions.parse(
        model="scripted",
        messages=said("Who is Ada?"),
        tools=[openai.pydantic_function_tool(Person)],
        tool_choice="required",
    )
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Person(name="Ada", age=36)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tools_loop(clever: openai.OpenAI, stream: bool) -> None:
    """Auto mode: the model calls twice, is told both results, and answers from them."""
    messages = said("What is the weather in Paris and Oslo?")
    message = _answer(clever, messages, stream)
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Paris", "Oslo"]
    messages.append(message)  # as the SDK holds it, which sends parsed arguments and places in the stream along
    for call in message.tool_calls:
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": get_weather(city)})
    message = _answer(clever, messages, stream)
    assert message.content == "The tools say: 12 degrees in Paris; 12 degrees in Oslo"
    assert not message.tool_calls


def _answer(client: openai.OpenAI, messages: list[dict], stream: bool) -> Any:
    if not stream:
        return client.chat.completions.create(messages=messages, **ASKED).choices[0].message
    with client.chat.completions.stream(messages=messages, **ASKED) as running:
        return running.get_final_completion().choices[0].message


def test_refusals_name_the_field(client: openai.OpenAI) -> None:
    for fields, param in (
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**(FORCED | fields))
        assert caught.value.param.startswith(param)
