"""`/v1/responses`, through ASGI, against transformers' own answers and the openai package's own types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseItemList

from server.conversation import TextFormat
from server.engine.base import GenerationError
from server.wire.parsing import parse_fields
from server.wire.responses import ResponsesRequest
from tests.api.test_lifecycle import Connection, until
from tests.checkpoint import CALM, FIRING
from tests.openai_types import valid, valid_event
from tests.serving import Served, serving

GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
# What OpenAI's answers always hold; the types give these a default, so only this list finds one missing.
NULLABLE = {
    *("error", "incomplete_details", "instructions", "metadata", "temperature", "top_p", "background", "completed_at"),
    *("max_output_tokens", "previous_response_id", "prompt_cache_key", "prompt_cache_retention"),
    *(
        "reasoning",
        "safety_identifier",
        "service_tier",
        "status",
        "text",
        "top_logprobs",
        "truncation",
    ),
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


async def respond(served: Served, input_: Any = CALM[0], **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", None)
    body = GREEDY | {"input": input_} | fields
    return await served.client.post("/v1/responses", json=body, headers=headers)


async def created(served: Served, input_: Any = CALM[0], **fields: Any) -> dict:
    """A whole response, valid and complete."""
    answer = await respond(served, input_, **fields)
    assert answer.status_code == 200, answer.text
    return whole(answer.json())


def whole(answer: dict) -> dict:
    valid(Response, answer)
    assert set(answer) >= NULLABLE
    return answer


async def streamed(served: Served, input_: Any = CALM[0], **fields: Any) -> list[dict]:
    """A stream's events, each of them valid, under its own name."""
    answer = await respond(served, input_, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


def events_of(text: str) -> list[dict]:
    events = []
    for number, block in enumerate(block for block in text.replace("\r\n", "\n").split("\n\n") if block):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        valid_event(event)
        if "response" in event:
            whole(event["response"])
        events.append(event)
    return events


def text_of(response: dict) -> str:
    [message] = response["output"]
    [part] = message["content"]
    return part["text"]


def like(response: dict) -> dict:
    """What two runs of one request have in common."""
    response = json.loads(json.dumps(response))
    for item in response["output"]:
        item["id"] = item["id"].partition("_")[0]
    response["usage"].pop("input_tokens_details")  # the first run is what the second one finds in the cache
    return {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}


def error_of(answer) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
async def test_the_answer_is_the_models_and_tells_of_steering(served, oracle, text):
    answer = await respond(served, text)
    response = whole(answer.json())
    fired = text in FIRING
    assert text_of(response) == (oracle.steered(text) if fired else oracle.plain(text))
    assert (response["steering"]["applied"], response["steering"]["profiles"][0]["fired"]) == (fired, fired)
    assert answer.headers["x-finesteer-applied"] == str(fired).lower()
    assert response["usage"]["input_tokens"] == len(oracle.prompt(text))
    assert response["usage"]["output_tokens"] == 12
    assert response["usage"]["total_tokens"] == len(oracle.prompt(text)) + 12
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["id"].startswith("resp_") and response["output"][0]["id"].startswith("msg_")


async def test_an_answer_that_ends_by_itself_is_completed(served, oracle):
    plain = oracle.plain(CALM[1], 20)
    response = await created(served, CALM[1], stop=plain[5:8], max_output_tokens=20)
    assert (response["status"], response["incomplete_details"]) == ("completed", None)
    assert response["output"][0]["status"] == "completed"
    assert response["completed_at"] >= response["created_at"]
    eos = {str(oracle.tokenizer.eos_token_id): 100}
    silent = await created(served, logit_bias=eos)
    assert (silent["status"], text_of(silent)) == ("completed", "")


@pytest.mark.parametrize("text", [FIRING[1], CALM[1]])
@pytest.mark.parametrize("fields", [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}])
async def test_streamed_is_whole(served, text, fields):
    response = await created(served, text, **fields)
    events = await streamed(served, text, **fields)
    assert like(events[-1]["response"]) == like(response)
    assert [event["type"] for event in events if not event["type"].endswith("text.delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "".join(event["delta"] for event in deltas) == text_of(response)
    entries = [entry for event in deltas for entry in event["logprobs"]]
    full = response["output"][0]["content"][0]["logprobs"]
    assert [(e["token"], e["logprob"]) for e in entries] == [(e["token"], e["logprob"]) for e in full]
    assert events[0]["response"]["steering"] == events[-1]["response"]["steering"] == response["steering"]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


async def test_a_stream_that_completes(served, oracle):
    stop = oracle.plain(CALM[1], 20)[5:8]
    events = await streamed(served, CALM[1], stop=stop, max_output_tokens=20)
    assert events[-1]["type"] == "response.completed"
    assert text_of(events[-1]["response"]) == text_of(await created(served, CALM[1], stop=stop, max_output_tokens=20))


async def test_logprobs_are_chats(served):
    fields = {"logprobs": True, "top_logprobs": 3}
    expected = (await served.chat(CALM[0], **fields)).json()["choices"][0]["logprobs"]["content"]
    response = await created(served, include=["message.output_text.logprobs"], top_logprobs=3)
    assert response["output"][0]["content"][0]["logprobs"] == expected
    assert response["top_logprobs"] == 3
    alone = await created(served, include=["message.output_text.logprobs"])
    assert [e["top_logprobs"] for e in alone["output"][0]["content"][0]["logprobs"]] == [[]] * 12
    assert (await created(served, include=[]))["output"][0]["content"][0]["logprobs"] == []


async def test_what_was_asked_is_shown_again(served):
    asked = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "top_p": 0.25,
        "parallel_tool_calls": False,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "user": "u",
        "text": {"format": {"type": "text"}},
    }
    neutral = {
        "truncation": "disabled",
        "service_tier": "auto",
        "background": False,
        "reasoning": {"effort": None, "summary": None},
        "conversation": None,
        "stream_options": None,
        "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content"],
    }
    response = await created(served, **asked, **neutral)
    assert {key: response[key] for key in asked} == asked
    assert (response["service_tier"], response["truncation"]) == ("default", "disabled")
    defaults = await created(served, temperature=None)
    assert (defaults["temperature"], defaults["top_p"], defaults["top_logprobs"]) == (1, 1, 0)
    assert (defaults["tools"], defaults["tool_choice"], defaults["parallel_tool_calls"]) == ([], "auto", True)
    assert (defaults["metadata"], defaults["instructions"]) == ({}, None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"steer_profiles": []}, "opted_out"),
        ({"model": "tiny:unsteered"}, "opted_out"),
        ({"steer_strength": 0}, "strength_zero"),
        ({"headers": {"X-FineSteer-Profiles": ""}}, "opted_out"),
        ({"extra_body": {"steer_gate": "closed"}}, "forced_closed"),
    ],
)
async def test_ways_to_switch_steering_off(served, oracle, fields, reason):
    response = await created(served, FIRING[0], **fields)
    assert text_of(response) == oracle.plain(FIRING[0])
    assert response["steering"]["reason"] == reason


async def test_metadata_none_says_nothing(served):
    answer = await respond(served, FIRING[0], steer_metadata="none")
    assert "steering" not in answer.json()
    assert not [name for name in answer.headers if name.startswith("x-finesteer")]
    events = await streamed(served, FIRING[0], steer_metadata="none")
    assert not any("steering" in event.get("response", {}) for event in events)


TURNS = [
    {"role": "developer", "content": "Be kind."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("One.", "Two.")]},
    {
        "type": "message",
        "id": "msg_from_elsewhere",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Three.", "annotations": [], "logprobs": []}],
    },
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "user", "content": "naïve 日本語 🙂"},
]


async def test_messages_of_all_shapes_reach_the_template(served, oracle):
    response = await created(served, TURNS, instructions="Be brief.", max_output_tokens=1)
    expected = (
        "<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\nOne.\nTwo.<|im_end|>\n"
        "<|im_start|>assistant\nThree.<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nnaïve 日本語 🙂<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = oracle.tokenizer.encode(expected, add_special_tokens=False)
    assert response["usage"]["input_tokens"] == len(ids)


async def test_tool_results_reach_the_template_as_chats_do(served):
    items = [
        {"role": "user", "content": "Q"},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"x": 1}', "id": None},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "42"}]},
    ]
    response = await created(served, items, max_output_tokens=1)
    made = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        items[0],
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1", "name": "f"},
    ]
    chat = await served.client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1}
    )
    assert response["usage"]["input_tokens"] == chat.json()["usage"]["prompt_tokens"]
    page = (await served.client.get(f"/v1/responses/{response['id']}/input_items?order=asc")).json()
    valid(ResponseItemList, page)
    assert [item["type"] for item in page["data"]] == ["message", "function_call", "function_call_output"]


def parsed(**fields: Any) -> ResponsesRequest:
    return parse_fields(ResponsesRequest, {"model": "tiny", "input": "x"} | fields)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", {"get_weather", "f"})),
        ("auto", ("auto", {"get_weather", "f"})),
        ("required", ("required", {"get_weather", "f"})),
        ({"type": "function", "name": "f"}, ("required", {"f"})),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}, ("auto", {"f"})),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            ("required", {"f"}),
        ),
    ],
)
def test_tool_choices(choice, expected):
    body = parsed(tools=[WEATHER, {"type": "function", "name": "f"}], tool_choice=choice, parallel_tool_calls=False)
    use = body.tool_use()
    assert (use.choice, use.callable, use.parallel) == (*expected, False)
    assert use.schema_param.format(1) == "tools[1].parameters"
    weather, f = use.tools
    assert (weather.name, weather.description, weather.strict) == ("get_weather", "The weather in a city.", True)
    assert weather.parameters == WEATHER["parameters"]
    assert (f.description, f.strict, f.parameters) == (None, False, {"type": "object", "properties": {}})


def test_no_tools_for_a_model_that_must_not_call():
    assert parsed(tools=[WEATHER], tool_choice="none").tool_use() is None
    assert parsed(tools=[]).tool_use() is None
    assert parsed().tool_use() is None


def test_text_formats():
    schema = {"type": "object", "properties": {}}
    named = {"type": "json_schema", "name": "n", "schema": schema, "strict": True, "description": "d"}
    for format_, expected in (
        ({"type": "json_object"}, ("json_object", None, None, False)),
        (named, ("json_schema", "n", schema, True)),
        (named | {"strict": None}, ("json_schema", "n", schema, False)),
        (None, ("text", None, None, False)),
    ):
        made = parsed(text={"format": format_, "verbosity": "medium"}).text_format
        assert (made.type, made.name, made.schema, made.strict) == expected
    assert parsed(text={"format": named}).text_format.param == "text.format.schema"
    assert parsed().text_format == TextFormat()
    assert parsed(text={"format": named}).text.shown_format() == named


IMAGE = {"type": "input_image", "image_url": "data:,", "detail": "auto"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", None),
        ({"input": []}, "input", None),
        ({"input": 3}, "input", None),
        ({"input": ["x"]}, "input[0]", None),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0].content", None),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", None),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content", None),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content", "unsupported_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            *("input[0].content", "unsupported_parameter"),
        ),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, "input[0].content", None),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]},
            *("input[0].content", None),
        ),
        ({"input": [{"role": "user", "content": "x", "nmae": "y"}]}, "input[0].nmae", "unknown_parameter"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": 3}]}, "input[0].type", None),
        ({"input": [{"content": "x"}]}, "input[0].type", None),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", None),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]},
            *("input[0].output", "unsupported_parameter"),
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input", None),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [WEATHER, {"type": "custom", "name": "x"}]}, "tools[1].type", "unsupported_parameter"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function", "name": "not a name"}]}, "tools[0].name", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", None),
        ({"tools": [WEATHER, WEATHER]}, "tools", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tool_choice": "sometimes"}, "tool_choice", None),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice.name", None),
        ({"tool_choice": {"type": "function", "name": "f"}, "tools": [WEATHER]}, "tool_choice", None),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type", "unsupported_parameter"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "none", "tools": []}}, "tool_choice.mode", None),
        ({"tool_choice": {"name": "f"}}, "tool_choice", None),
        ({"tool_choice": 3}, "tool_choice", None),
        ({"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}}, "tool_choice.tools", None),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            *("tool_choice.tools[0].type", "unsupported_parameter"),
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format", None),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", None),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"include": ["everything"]}, "include[0]", None),
        ({"n": 2}, "n", None),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"max_tokens": 3}, "max_tokens", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"top_logprobs": 21}, "top_logprobs", None),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", None),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", None),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"service_tier": "flex"}, "service_tier", None),
        ({"moderation": {"model": "x"}}, "moderation", "unsupported_parameter"),
        ({"steer_strenght": 1}, "steer_strenght", "unknown_parameter"),
    ],
)
async def test_refusals_name_the_field(served, fields, param, code):
    answer = await respond(served, **({"input": CALM[0]} | fields))
    assert error_of(answer) == (400, param, code)
    assert answer.json()["error"]["message"]


async def test_the_templates_refusal_names_the_input(served):
    answer = await respond(served, [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    assert error_of(answer) == (400, "input", "chat_template_refused")
    assert "a system message must come first" in answer.json()["error"]["message"]


async def test_an_unknown_model_and_a_prompt_that_is_too_long(served):
    assert error_of(await respond(served, model="gpt-9")) == (404, "model", "model_not_found")
    assert error_of(await respond(served, ["role"], stream=True)) == (400, "input[0]", None)
    assert error_of(await respond(served, "x " * 300, stream=True)) == (400, "input", "context_length_exceeded")


async def test_retrieve_and_delete(served):
    response = await created(served)
    path = f"/v1/responses/{response['id']}"
    assert whole((await served.client.get(path)).json()) == response
    include = {"include[]": ["message.output_text.logprobs", "reasoning.encrypted_content"]}
    assert (await served.client.get(path, params=include)).json() == response
    events = await streamed(served)
    kept = (await served.client.get(f"/v1/responses/{events[-1]['response']['id']}")).json()
    assert kept == events[-1]["response"]
    gone = await served.client.delete(path)
    assert (gone.status_code, gone.json()) == (200, {"id": response["id"], "object": "response", "deleted": True})
    for request in (served.client.get(path), served.client.delete(path), served.client.get(f"{path}/input_items")):
        answer = await request
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"Response with id '{response['id']}' not found."


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("?stream=true", "stream", "unsupported_parameter"),
        ("?starting_after=3", "starting_after", "unsupported_parameter"),
        ("?include=nothing", "include[0]", None),
        ("?inclued=nothing", "inclued", "unknown_parameter"),
        ("/input_items?limit=0", "limit", None),
        ("/input_items?limit=101", "limit", None),
        ("/input_items?limit=many", "limit", None),
        ("/input_items?order=up", "order", None),
        ("/input_items?after=msg_x", "after", None),
    ],
)
async def test_queries_that_are_wrong(served, query, param, code):
    response = await created(served)
    assert error_of(await served.client.get(f"/v1/responses/{response['id']}{query}")) == (400, param, code)


async def test_nothing_is_kept_where_store_is_false(served):
    response = await created(served, store=False)
    assert (await served.client.get(f"/v1/responses/{response['id']}")).status_code == 404
    assert error_of(await respond(served, previous_response_id=response["id"]))[0] == 400
    events = await streamed(served, store=False)
    assert (await served.client.get(f"/v1/responses/{events[-1]['response']['id']}")).status_code == 404
    assert len(served.app.state.service.responses) == 0


async def test_the_operator_may_bound_the_store(artifacts):
    async with serving(artifacts, responses_memory=0) as served:
        response = await created(served)
        assert (await served.client.get(f"/v1/responses/{response['id']}")).status_code == 404


async def test_only_background_responses_can_be_cancelled(served):
    response = await created(served)
    answer = await served.client.post(f"/v1/responses/{response['id']}/cancel")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Cannot cancel a synchronous response."
    assert (await served.client.post("/v1/responses/resp_x/cancel")).status_code == 404


async def test_a_conversation_goes_on(served, oracle):
    """The second turn is answered as one request with all of it would be, and decides on steering anew."""
    first = await created(served, CALM[0], instructions="Be brief.")
    second = await created(served, FIRING[0], previous_response_id=first["id"], store=True)
    turns = [
        {"role": "user", "content": CALM[0]},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": FIRING[0]},
    ]
    alone = await created(served, turns)  # the first turn's instructions are its own
    assert text_of(second) == text_of(alone)
    assert like(second)["usage"] == like(alone)["usage"]
    assert alone["usage"]["input_tokens_details"]["cached_tokens"] > 0, "it is what the second had computed"
    assert second["previous_response_id"] == first["id"]
    assert (first["instructions"], second["instructions"]) == ("Be brief.", None)
    streamed_second = await streamed(served, FIRING[0], previous_response_id=first["id"])
    assert like(streamed_second[-1]["response"]) == like(second)
    third = await created(served, "And?", previous_response_id=second["id"], max_output_tokens=1)
    await served.client.delete(f"/v1/responses/{first['id']}")
    again = await created(served, "And?", previous_response_id=second["id"], max_output_tokens=1)
    assert text_of(again) == text_of(third)
    assert again["usage"]["input_tokens"] == third["usage"]["input_tokens"] > alone["usage"]["total_tokens"]


async def test_input_items_are_the_conversation_in_pages(served):
    first = await created(served, TURNS)
    second = await created(served, "And?", previous_response_id=first["id"], max_output_tokens=1)
    path = f"/v1/responses/{second['id']}/input_items"
    page = (await served.client.get(path)).json()
    valid(ResponseItemList, page)
    newest_first = [item["id"] for item in page["data"]]
    assert (len(newest_first), page["has_more"]) == (len(TURNS) + 2, False)
    assert (page["first_id"], page["last_id"]) == (newest_first[0], newest_first[-1])
    texts = [item["content"][0].get("text", "No.") for item in page["data"]]
    assert texts == ["And?", text_of(first), "naïve 日本語 🙂", "No.", "Three.", "One.", "Be kind."]
    assert newest_first[4] == "msg_from_elsewhere"
    oldest_first: list[str] = []
    query: dict[str, Any] = {"order": "asc", "limit": 3}
    while True:
        page = (await served.client.get(path, params=query)).json()
        oldest_first += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 3
        query["after"] = page["last_id"]
    assert oldest_first == newest_first[::-1]
    beyond = (await served.client.get(path, params={"order": "asc", "after": oldest_first[-1]})).json()
    assert (beyond["data"], beyond["has_more"]) == ([], False)


async def test_items_can_be_referred_to(served):
    first = await created(served, CALM[0])
    answered = first["output"][0]["id"]
    reference = [
        {"role": "user", "content": CALM[0]},
        {"type": "item_reference", "id": answered},
        {"role": "user", "content": "And?"},
    ]
    spelt = [reference[0], {"role": "assistant", "content": text_of(first)}, reference[2]]
    assert text_of(await created(served, reference)) == text_of(await created(served, spelt))
    short = [reference[0], {"id": answered}, reference[2]]
    assert text_of(await created(served, short)) == text_of(await created(served, spelt))
    missing = await respond(served, [{"type": "item_reference", "id": "msg_x"}])
    assert error_of(missing) == (404, "input", "not_found")
    assert "Item with id 'msg_x' not found." in missing.json()["error"]["message"]


async def test_output_can_be_sent_back_as_it_came(served):
    first = await created(served, CALM[0], include=["message.output_text.logprobs"])
    turns = [{"role": "user", "content": CALM[0]}, *first["output"], {"role": "user", "content": "And?"}]
    continued = await created(served, "And?", previous_response_id=first["id"])
    assert text_of(await created(served, turns)) == text_of(continued)


LONG = {"model": "tiny", "temperature": 0, "ignore_eos": True, "input": FIRING[0]}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_frees_its_row_and_leaves_nothing_stored(served, stream):
    connection = Connection(served.app, "/v1/responses", LONG | {"stream": stream})
    running = asyncio.create_task(connection.run())
    await until(lambda: served.engine.stats().num_running == 1)
    if stream:
        await connection.first_event.wait()
    connection.cut()
    await asyncio.wait_for(running, 5)
    await until(lambda: served.engine.stats().num_running == 0)
    assert len(served.app.state.service.responses) == 0
    assert b"response.completed" not in connection.received and b"response.incomplete" not in connection.received


def breaking(served: Served, monkeypatch, after: int) -> None:
    """Have the engine fail a generation after so many events."""
    generate = served.engine.generate

    async def broken(request):
        number = 0
        async for event in generate(request):
            if number == after:
                raise GenerationError("it broke", code="non_finite")
            number += 1
            yield event

    monkeypatch.setattr(served.engine, "generate", broken)


async def test_a_failure_in_mid_stream_is_an_event(served, monkeypatch):
    breaking(served, monkeypatch, 3)
    events = await streamed(served, CALM[0])
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert (events[-2]["code"], events[-2]["message"]) == ("non_finite", "It broke.")
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"], "usage" in failed) == ("failed", "server_error", False)
    assert failed["output"][0]["status"] == "incomplete"
    assert (await served.client.get(f"/v1/responses/{failed['id']}")).json() == failed


@pytest.mark.parametrize(("stream", "after"), [(False, 3), (False, 0), (True, 0)])
async def test_a_failure_before_the_answer_has_its_own_status(served, monkeypatch, stream, after):
    breaking(served, monkeypatch, after)
    assert error_of(await respond(served, CALM[0], stream=stream)) == (500, None, "non_finite")
    assert len(served.app.state.service.responses) == 0


async def test_the_request_is_documented(served):
    description = (await served.client.get("/openapi.json")).json()
    paths, schema = description["paths"], description["components"]["schemas"]["ResponsesRequest"]
    assert {"input", "previous_response_id", "steer_strength", "text", "tools"} <= set(schema["properties"])
    assert {"get", "delete"} <= set(paths["/v1/responses/{response_id}"])
    parameters = paths["/v1/responses/{response_id}/input_items"]["get"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == {"response_id", "limit", "order", "after", "include"}
