"""LiteLLM's SDK: chat, streams, schemas, tools, text completions, Responses; steering by extra_body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.asked import HARMFUL, HARMLESS, WEATHER, Pick, get_weather, said
from tests.clients.servers import Server

litellm = pytest.importorskip("litellm", reason="litellm is not installed")


def at(server: Server, provider: str = "openai") -> dict[str, Any]:
    """How LiteLLM is told of a server."""
    return {"model": f"{provider}/{server.model}", "api_base": server.url, "api_key": "unused", "num_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat_whole_and_streamed(demo: Server, provider: str) -> None:
    fields = at(demo, provider) | {"messages": said(HARMFUL), "max_tokens": 16, "temperature": 0}
    whole = litellm.completion(**fields)
    assert whole.usage.completion_tokens <= 16
    text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **fields))
    assert text == whole.choices[0].message.content


def test_steering_goes_and_comes_back(demo: Server) -> None:
    fields = at(demo) | {"messages": said(HARMFUL), "max_tokens": 16, "temperature": 0}
    assert litellm.completion(**fields).model_extra["steering"]["reason"] == "gate_open"
    plain = litellm.completion(extra_body={"steer_strength": 0}, **fields)
    assert plain.model_extra["steering"]["reason"] == "strength_zero"


def test_a_schema_holds_for_any_model(demo: Server) -> None:
    answer = litellm.completion(messages=said(HARMLESS), max_tokens=200, response_format=Pick, **at(demo))
    assert Pick.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tools_loop(scripted: Server, stream: bool) -> None:
    fields = at(scripted) | {"tools": [WEATHER], "stream": stream}
    messages = said("What is the weather in Paris and Oslo?")
    message = _message(litellm.completion(messages=messages, **fields), messages)
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Paris", "Oslo"]
    messages.append(message.model_dump())
    for call in message.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": result})
    message = _message(litellm.completion(messages=messages, **fields), messages)
    assert message.content == "The tools say: 12 degrees in Paris; 12 degrees in Oslo"


def _message(answer: Any, messages: list[dict]) -> Any:
    if isinstance(answer, litellm.CustomStreamWrapper):
        answer = litellm.stream_chunk_builder(list(answer), messages=messages)
    return answer.choices[0].message


def test_text_completions(demo: Server) -> None:
    answer = litellm.text_completion(
        prompt="The cat", max_tokens=5, temperature=0, **at(demo, "text-completion-openai")
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 5


def test_responses_whole_and_streamed(demo: Server) -> None:
    fields = at(demo) | {"input": HARMFUL, "max_output_tokens": 16, "temperature": 0}
    whole = litellm.responses(**fields)
    events = list(litellm.responses(stream=True, **fields))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output[0].content[0].text


async def test_async(demo: Server) -> None:
    answer = await litellm.acompletion(messages=said(HARMLESS), max_tokens=8, temperature=0, **at(demo))
    assert answer.choices[0].message.content


def test_errors_are_the_clients_own(demo: Server) -> None:
    with pytest.raises(litellm.BadRequestError, match="steer_strenght"):
        litellm.completion(messages=said("hi"), extra_body={"steer_strenght": 1}, **at(demo))
