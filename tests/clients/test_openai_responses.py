"""openai for Python: the Responses API, whole and streamed, stored, parsed, with tools; steering on the response."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.clients.asked import ADA, HARMFUL, HARMLESS, WEATHER_IN_RESPONSES, Person, Pick, get_weather

GREEDY = {"model": "demo", "temperature": 0, "max_output_tokens": 24}
ROOMY = GREEDY | {"max_output_tokens": 200}
FORCED = {"model": "demo", "input": HARMFUL, "tools": [WEATHER_IN_RESPONSES], "tool_choice": "required"}


def test_a_response_says_what_steering_did(client: openai.OpenAI) -> None:
    response = client.responses.create(input=HARMFUL, **GREEDY)
    assert response.output_text and response.usage.total_tokens > response.usage.input_tokens
    assert response.steering["reason"] == "gate_open"
    chat = client.chat.completions.create(
        model="demo", temperature=0, max_tokens=24, messages=[{"role": "user", "content": HARMFUL}]
    )
    assert response.output_text == chat.choices[0].message.content
    plain = client.responses.create(input=HARMFUL, extra_body={"steer_strength": 0}, **GREEDY)
    assert plain.steering["reason"] == "strength_zero"
    assert plain.output_text != response.output_text


def test_the_events_of_a_text(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=HARMFUL, **GREEDY)
    events = list(client.responses.create(input=HARMFUL, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    done = "incomplete" if whole.status == "incomplete" else "completed"
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{done}",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text
    assert events[0].response.steering["reason"] == events[-1].response.steering["reason"] == "gate_open"
    assert events[-1].response.usage == whole.usage


def test_the_stream_helper(client: openai.OpenAI) -> None:
    """It insists on `response.completed`, so the answer must come to its own end."""
    with client.responses.stream(input=HARMFUL, **ROOMY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


def test_a_response_that_is_cut_says_so(client: openai.OpenAI) -> None:
    response = client.responses.create(input=HARMLESS, **(GREEDY | {"max_output_tokens": 16}))
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("question", [HARMFUL, HARMLESS])
def test_parse_holds_for_any_model(client: openai.OpenAI, question: str) -> None:
    response = client.responses.parse(input=question, text_format=Pick, **ROOMY)
    assert isinstance(response.output_parsed, Pick)
    assert response.steering["applied"] is (question == HARMFUL)


def test_parse_in_stream(clever: openai.OpenAI) -> None:
    with clever.responses.stream(model="scripted", input="Who is Ada?", text_format=Person) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == ADA


def test_forced_calls_hold_for_any_model(client: openai.OpenAI) -> None:
    response = client.responses.create(parallel_tool_calls=False, **FORCED)
    [call] = response.output
    assert (call.type, call.name) == ("function_call", "get_weather") and call.call_id
    assert json.loads(call.arguments)["city"] in ("Paris", "Oslo")


def test_the_events_of_a_call(client: openai.OpenAI) -> None:
    events = list(client.responses.create(parallel_tool_calls=False, stream=True, **FORCED))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert arguments == events[-1].response.output[0].arguments


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_tools_loop(clever: openai.OpenAI, stored: bool, stream: bool) -> None:
    """Results go back by `previous_response_id`, or with the whole conversation and nothing stored."""
    question = [{"role": "user", "content": "What is the weather in Paris and Oslo?"}]
    response = _response(clever, stream, input=question, store=stored)
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Paris", "Oslo"]
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": get_weather(**json.loads(call.arguments))}
        for call in calls
    ]
    if stored:
        response = _response(clever, stream, input=results, previous_response_id=response.id)
    else:
        sent_back = [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]
        response = _response(clever, stream, input=[*question, *sent_back, *results], store=False)
    assert response.output_text == "The tools say: 12 degrees in Paris; 12 degrees in Oslo"


def _response(client: openai.OpenAI, stream: bool, **fields: Any) -> Any:
    fields |= {"model": "scripted", "tools": [WEATHER_IN_RESPONSES]}
    if not stream:
        return client.responses.create(**fields)
    with client.responses.stream(**fields) as running:
        for _ in running:
            pass
        return running.get_final_response()


def test_a_conversation_is_remembered(clever: openai.OpenAI) -> None:
    first = clever.responses.create(model="scripted", input="Hello, I am Ada.", instructions="Be brief.")
    second = clever.responses.create(
        model="scripted", input="What did I say first?", previous_response_id=first.id, instructions="Be long."
    )
    assert second.output_text == "You said: Hello, I am Ada."
    assert second.previous_response_id == first.id
    told = clever.responses.create(model="scripted", input="What were you told?", previous_response_id=second.id)
    assert "Be" not in told.output_text, "instructions are one response's own"


def test_what_is_stored_can_be_read_and_deleted(client: openai.OpenAI) -> None:
    response = client.responses.create(input=HARMLESS, **GREEDY)
    again = client.responses.retrieve(response.id)
    assert (again.id, again.output_text) == (response.id, response.output_text)
    [item] = client.responses.input_items.list(response.id)
    assert item.content[0].text == HARMLESS
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    forgotten = client.responses.create(input=HARMLESS, store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(forgotten.id)


def test_refusals_name_the_field(client: openai.OpenAI) -> None:
    for fields, param in (
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input=HARMLESS, **(GREEDY | fields))
        assert caught.value.param.startswith(param)
