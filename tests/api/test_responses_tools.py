"""Tools and structured output through `/v1/responses`, with a model that knows nothing: the grammar alone makes them hold."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from tests.api.test_responses import created, error_of, like, respond, streamed
from tests.checkpoint import FIRING
from tests.serving import serving

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Basel"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ZONE = {
    "type": "object",
    "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}},
    "required": ["zone"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": CITY, "time": ZONE}
TOOLS = [
    {"type": "function", "name": name, "description": None, "parameters": schema, "strict": True}
    for name, schema in SCHEMAS.items()
]
TIME = {"type": "function", "name": "time"}
SAMPLED = {"temperature": 1, "max_output_tokens": 400}


@pytest_asyncio.fixture
async def served(artifacts):
    async with serving(artifacts, max_model_len=2048) as running:
        yield running


def called(response: dict, names: tuple[str, ...] = ("weather", "time")) -> list[dict]:
    """The calls of a response that holds nothing else, each valid."""
    for item in response["output"]:
        assert (item["type"], item["status"]) == ("function_call", "completed")
        assert re.fullmatch(r"fc_[0-9a-f]{32}", item["id"]) and item["call_id"].startswith("call_")
        assert item["name"] in names
        jsonschema.validate(json.loads(item["arguments"]), SCHEMAS[item["name"]])
    assert response["status"] == "completed"
    return response["output"]


def without_ids(response: dict) -> dict:
    response = like(response)
    for item in response["output"]:
        item.pop("call_id", None)
    return response


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ("weather", "time")),
        (TIME, ("time",)),
        ({"type": "allowed_tools", "mode": "required", "tools": [TIME]}, ("time",)),
    ],
)
async def test_a_call_that_is_required_is_made(served, choice, names):
    for seed in range(3):
        fields = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "parallel_tool_calls": False} | SAMPLED
        response = await created(served, FIRING[0], steer_gate="open", **fields)
        assert len(called(response, names)) == 1
        assert (response["tools"], response["tool_choice"]) == (TOOLS, choice)
        assert response["steering"]["applied"] is True


async def test_streamed_calls_are_the_whole_ones(served):
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "seed": 1} | SAMPLED
    whole = await created(served, **fields)
    events = await streamed(served, **fields)
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    calls = called(events[-1]["response"])
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == list(range(len(calls)))
    for number, call in enumerate(calls):
        own = [event for event in events if event.get("output_index") == number]
        deltas = [event["delta"] for event in own if event["type"] == "response.function_call_arguments.delta"]
        assert len(deltas) > 1
        assert "".join(deltas) == call["arguments"]
        assert own[-2]["type"] == "response.function_call_arguments.done"
        assert own[-2]["arguments"] == call["arguments"]
        assert own[-1]["item"] == call


async def test_a_call_that_is_cut_is_incomplete(served):
    response = await created(served, tools=TOOLS, tool_choice="required", max_output_tokens=8)
    assert response["status"] == "incomplete"
    assert {item["status"] for item in response["output"]} <= {"incomplete"}


async def test_the_loop_of_calls_and_outputs(served):
    """An answer's calls are answered in the next request, by previous_response_id or spelt out; both mean the same."""
    user = {"role": "user", "content": "What is the time?"}
    fields = {"tools": TOOLS, "parallel_tool_calls": False}
    first = await created(served, [user], tool_choice="required", **fields, **SAMPLED, seed=2)
    [call] = called(first)
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "12:00"}
    final = {"temperature": 0, "max_output_tokens": 8, "tool_choice": "none"} | fields
    second = await created(served, [output], previous_response_id=first["id"], **final)
    spelt = await created(served, [user, *first["output"], output], **final)
    assert second["output"][0]["content"] == spelt["output"][0]["content"]
    assert second["usage"]["total_tokens"] == spelt["usage"]["total_tokens"]
    unanswered = await respond(served, "And?", previous_response_id=first["id"])
    assert error_of(unanswered) == (400, "input", None)
    assert f"No tool output found for function call {call['call_id']}." in unanswered.json()["error"]["message"]


async def test_text_follows_its_schema(served):
    format_ = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    fields = {"text": {"format": format_ | {"description": None}}, "seed": 3} | SAMPLED
    response = await created(served, FIRING[0], **fields)
    [message] = response["output"]
    jsonschema.validate(json.loads(message["content"][0]["text"]), CITY)
    assert (response["status"], response["text"]["format"]) == ("completed", format_)
    events = await streamed(served, FIRING[0], **fields)
    assert like(events[-1]["response"]) == like(response)


async def test_any_json_object(served):
    response = await created(served, text={"format": {"type": "json_object"}}, seed=4, **SAMPLED)
    assert response["output"][0]["content"][0]["text"].startswith("{")


async def test_schemas_that_cannot_be_enforced_are_named(served):
    bad = {"type": "object", "properties": {}, "not": {}}
    format_ = {"type": "json_schema", "name": "x", "schema": bad, "strict": True}
    answer = await respond(served, text={"format": format_})
    assert error_of(answer) == (400, "text.format.schema", "invalid_json_schema")
    tool = {"type": "function", "name": "f", "parameters": bad, "strict": True}
    answer = await respond(served, tools=[TOOLS[0], tool], tool_choice="required")
    assert error_of(answer) == (400, "tools[1].parameters", "invalid_json_schema")
