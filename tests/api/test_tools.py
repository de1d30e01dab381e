"""Tools through the API, with a model that knows nothing: what must hold for any model, holds for random weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema
import pytest

from tests.checkpoint import build_model, build_tokenizer
from tests.serving import chunks, serving

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Basel"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TIME = {
    "type": "object",
    "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}},
    "required": ["zone"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "time": TIME}


@pytest.fixture
async def served(artifacts):
    async with serving(artifacts, max_model_len=2048) as served:
        yield served


def tool(name, strict=True):
    return {"type": "function", "function": {"name": name, "parameters": SCHEMAS[name], "strict": strict}}


TOOLS = [tool("weather"), tool("time")]
NAMED = {"type": "function", "function": {"name": "time"}}
ONLY_TIME = {"mode": "required", "tools": [NAMED]}


def valid(calls, names=("weather", "time")):
    for call in calls:
        assert set(call) == {"id", "type", "function"}
        assert call["type"] == "function" and re.fullmatch(r"call_[A-Za-z0-9]{24}", call["id"])
        assert call["function"]["name"] in names
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    assert len({call["id"] for call in calls}) == len(calls)
    return bool(calls)


async def ask(served, **fields):
    response = await served.chat("What is it like?", **{"max_tokens": 400} | fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ("weather", "time")),
        (NAMED, ("time",)),
        ({"type": "allowed_tools", "allowed_tools": ONLY_TIME}, ("time",)),
    ],
)
async def test_a_call_that_is_required_is_made(served, choice, names, strict):
    tools = [tool("weather", strict), tool("time", strict)]
    for seed in range(4):
        fields = {"tools": tools, "tool_choice": choice, "temperature": 1, "seed": seed, "parallel_tool_calls": False}
        [choice_made] = (await ask(served, **fields))["choices"]
        message = choice_made["message"]
        assert choice_made["finish_reason"] == ("stop" if choice is NAMED else "tool_calls")
        assert message["content"] is None
        assert len(message["tool_calls"]) == 1 and valid(message["tool_calls"], names)


async def test_several_calls_in_parallel(served):
    seen = []
    for seed in range(6):
        fields = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.5, "seed": seed, "max_tokens": 500}
        [choice] = (await ask(served, **fields))["choices"]
        calls = choice["message"]["tool_calls"]
        if choice["finish_reason"] == "length":
            calls = calls[:-1]
        assert not calls or valid(calls)
        seen.append(len(calls))
    assert max(seen) > 1


@pytest.mark.parametrize("steering", [{}, {"steer_gate": "open", "steer_strength": 8}])
async def test_the_stream_tells_the_same(served, steering):
    fields = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
        "temperature": 1,
        "seed": 3,
    }
    whole = await ask(served, **fields, **steering)
    response = await served.chat("What is it like?", max_tokens=400, stream=True, **fields, **steering)
    events = chunks(response.text)
    for i, choice in enumerate(whole["choices"]):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == i]
        deltas = [delta for part in mine for delta in part["delta"].get("tool_calls", [])]
        begin, *rest = deltas
        assert set(begin) == {"index", "id", "type", "function"} and begin["function"]["arguments"] == ""
        assert all(set(delta) == {"index", "function"} and set(delta["function"]) == {"arguments"} for delta in rest)
        assert len(rest) > 3, "arguments come as they are made"
        call = choice["message"]["tool_calls"][0]["function"]
        assert (begin["function"]["name"], "".join(d["function"]["arguments"] for d in rest)) == (
            call["name"],
            call["arguments"],
        )
        assert [part["finish_reason"] for part in mine][-1] == choice["finish_reason"] == "tool_calls"
        assert valid(choice["message"]["tool_calls"])
    assert whole["steering"]["applied"] is bool(steering) is events[0]["steering"]["applied"]


async def test_auto_without_a_call_is_text(served):
    [plain] = (await ask(served, tools=TOOLS, parallel_tool_calls=False, max_tokens=20))["choices"]
    assert plain["finish_reason"] in ("length", "stop")
    assert plain["message"]["content"] and "tool_calls" not in plain["message"]


async def test_a_final_answer_may_have_a_schema_while_tools_are_at_hand(served):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    kinds = set()
    for seed in range(12):
        found = await ask(
            served, tools=TOOLS, response_format=wanted, temperature=1, seed=seed, parallel_tool_calls=False
        )
        [choice] = found["choices"]
        if choice["finish_reason"] == "tool_calls":
            kinds.add(valid(choice["message"]["tool_calls"]))
        else:
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
            kinds.add("answer")
    assert kinds == {True, "answer"}


async def test_none_means_that_the_model_hears_of_no_tools(served):
    plain, none, told = [
        (await ask(served, max_tokens=3, **fields))["usage"]["prompt_tokens"]
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    ]
    assert plain == none < told


async def test_a_conversation_goes_on_after_the_tool_answered(served):
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    ]
    body = {"model": "tiny", "messages": messages, "tools": TOOLS, "max_tokens": 4, "temperature": 0}
    response = await served.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    # The official client's own message objects, which its helpers return, hold more when they are sent back.
    messages[1] |= {"parsed": None, "tool_calls": [call | {"index": 0}]}
    messages[1]["tool_calls"][0]["function"] = call["function"] | {"parsed_arguments": {"zone": "UTC"}}
    again = await served.client.post("/v1/chat/completions", json=body)
    assert again.status_code == 200, again.text
    assert again.json()["choices"] == response.json()["choices"]


async def test_log_probabilities_are_of_the_text_only(served):
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "logprobs": True}
    [choice] = (await ask(served, **fields))["choices"]
    assert choice["logprobs"]["content"] == []
    assert valid(choice["message"]["tool_calls"])


async def test_an_unknown_way_of_writing_calls_is_refused_unless_it_is_named(artifacts, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    async with serving(artifacts, max_model_len=2048, chat_template=template) as served:
        response = await served.chat("Time?", **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert "--tool-format" in response.json()["error"]["message"]
    async with serving(artifacts, max_model_len=2048, chat_template=template, tool_format="mistral") as served:
        [choice] = (await served.chat("Time?", **fields)).json()["choices"]
        [call] = choice["message"]["tool_calls"]
        assert re.fullmatch(r"[A-Za-z0-9]{9}", call["id"])
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


async def test_a_schema_that_cannot_be_enforced_is_named(served):
    bad = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}}
    response = await served.chat("x", tools=[tool("time"), bad])
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools[1].function.parameters")
    assert "'f'" in error["message"]


async def test_markers_that_are_special_tokens_are_seen(artifacts, tmp_path):
    """Mistral's and Hermes' tokenizers hold them as special ones, whose text is hidden elsewhere."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.save_pretrained(tmp_path)
    build_model(tokenizer).save_pretrained(tmp_path)
    marker = tokenizer.convert_tokens_to_ids("<tool_call>")
    async with serving(replace(artifacts, model=tmp_path), (), max_model_len=2048) as served:
        [choice] = (await ask(served, tools=TOOLS, tool_choice="required", return_token_ids=True))["choices"]
        assert marker in choice["token_ids"], "it was written as one token"
        assert valid(choice["message"]["tool_calls"]) and choice["message"]["content"] is None
        [plain] = (await ask(served, max_tokens=4, logit_bias={str(marker): 100}))["choices"]
        assert plain["message"]["content"] == "", "without tools it is a special token like others"
