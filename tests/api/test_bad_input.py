"""What cannot be served: status, field and message of each case, and the server goes on."""

from __future__ import annotations

import json
import time

import pytest

from tests.checkpoint import CALM

OK = {"model": "tiny", "messages": [{"role": "user", "content": CALM[0]}], "max_tokens": 2}


def chat(**fields):
    return "/v1/chat/completions", OK | fields


def messages(*turns):
    return chat(messages=list(turns))


def text(**fields):
    return "/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 2} | fields


def schema(**fields):
    json_schema = {"name": "x", "strict": True, "schema": {"type": "object"}} | fields
    return chat(response_format={"type": "json_schema", "json_schema": json_schema})


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CASES = {
    # name: (path and body, status, param, what the message says)
    "misspelt steer field": (chat(steer_strenght=1), 400, "steer_strenght", "did you mean 'steer_strength'?"),
    "unknown steer field": (chat(steering_vector=[1]), 400, "steering_vector", "did you mean 'steer_"),
    "bare steer": (chat(steer=1), 400, "steer", "steer_strength, steer_profiles, steer_gate"),
    "misspelt inside extra_body": (chat(extra_body={"Steer_gate": "open"}), 400, "Steer_gate", "did you mean 'steer_gate'?"),
    "misspelt field": (chat(temprature=1), 400, "temprature", "did you mean 'temperature'?"),
    "unknown field": (chat(zzz=1), 400, "zzz", "unknown field"),
    "strength a string": (chat(steer_strength="4"), 400, "steer_strength", "must be a number or an object"),
    "strength true": (chat(steer_strength=True), 400, "steer_strength", "must be a number or an object"),
    "strength a list": (chat(steer_strength=[4]), 400, "steer_strength", "must be a number or an object"),
    "strength NaN": (chat(steer_strength=float("nan")), 400, "steer_strength", "finite number, not NaN"),
    "strength infinite": (chat(steer_strength=float("inf")), 400, "steer_strength", "finite number, not Infinity"),
    "strength huge": (chat(steer_strength=10**400), 400, "steer_strength", "finite number"),
    "strength by profile NaN": (chat(steer_strength={"safety": float("nan")}), 400, "steer_strength", "finite number"),
    "strength by profile a string": (chat(steer_strength={"safety": "x"}), 400, "steer_strength", "['safety']"),
    "strength over the limit": (chat(steer_strength=21), 400, "steer_strength", "over this server's limit of 20"),
    "strength under the limit": (chat(steer_strength=-21), 400, "steer_strength", "over this server's limit of 20"),
    "strength of unknown profile": (chat(steer_strength={"safty": 1}), 400, "steer_strength", "no profile 'safty' is loaded"),
    "strength with nothing active": (chat(steer_strength=1, steer_profiles=[]), 400, "steer_strength", "no profile is active"),
    "strength of an inactive profile": (
        chat(steer_strength={"safety": 1}, steer_profiles=[]),
        *(400, "steer_strength", "'safety' is not active in this request"),
    ),
    "unknown profile": (chat(steer_profiles=["nope"]), 400, "steer_profiles", "no profile 'nope' is loaded. Loaded: safety."),
    "profile path": (chat(steer_profiles=["../../etc"]), 400, "steer_profiles", "no profile '../../etc' is loaded"),
    "profile twice": (chat(steer_profiles=["safety", "safety"]), 400, "steer_profiles", "twice"),
    "profiles a string": (chat(steer_profiles="safety"), 400, "steer_profiles", "must be a list"),
    "gate": (chat(steer_gate="ajar"), 400, "steer_gate", "must be 'auto', 'open' or 'closed', not \"ajar\""),
    "gate with nothing active": (chat(steer_gate="open", steer_profiles=[]), 400, "steer_gate", "no gate to open"),
    "positions": (chat(steer_positions="first"), 400, "steer_positions", "must be 'all' or 'last'"),
    "metadata": (chat(steer_metadata="most"), 400, "steer_metadata", "must be 'none', 'summary' or 'full'"),
    "extra_body no object": (chat(extra_body=3), 400, "extra_body", "must be an object"),
    "extra_body contradicts": (chat(steer_strength=1, extra_body={"steer_strength": 2}), 400, "steer_strength", "different values"),
    "no model": (("/v1/chat/completions", {"messages": OK["messages"]}), 400, "model", "model: is required"),
    "unknown model": (chat(model="gpt-9"), 404, "model", "'gpt-9' is not served here; this server has 'tiny'"),
    "unknown alias": (chat(model="tiny:nope"), 404, "model", "'tiny:nope' is not served here"),
    "no messages": (("/v1/chat/completions", {"model": "tiny"}), 400, "messages", "messages: is required"),
    "empty messages": (messages(), 400, "messages", "at least 1 item"),
    "messages a string": (chat(messages="hi"), 400, "messages", "must be a list"),
    "message a string": (messages("hi"), 400, "messages[0]", "must be an object"),
    "bad role": (messages({"role": "wizard", "content": "x"}), 400, "messages[0].role", "or 'tool', not \"wizard\""),
    "tool message without its call": (messages({"role": "tool", "content": "x"}), 400, "messages[0].tool_call_id", "is required"),
    "call id elsewhere": (messages({"role": "user", "content": "x", "tool_call_id": "1"}), 400, "messages[0].tool_call_id", "belongs"),
    "calls by a user": (messages({"role": "user", "content": "x", "tool_calls": [CALL]}), 400, "messages[0].tool_calls", "assistant"),
    "call with a list": (
        messages({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}),
        400, "messages[0].tool_calls[0].function.arguments", "must hold a JSON object",
    ),
    "call with no JSON": (
        messages({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}),
        400, "messages[0].tool_calls[0].function.arguments", "must hold a JSON object",
    ),
    "no role": (messages({"content": "x"}), 400, "messages[0].role", "is required"),
    "no content": (messages({"role": "user"}), 400, "messages[0].content", "is required"),
    "content a number": (messages({"role": "user", "content": 3}), 400, "messages[0].content", "must be a string"),
    "image": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        *(400, "messages[0].content", 'part 0 has type "image_url"; this server reads text parts only'),
    ),
    "message with unknown field": (messages({"role": "user", "content": "x", "mood": 1}), 400, "messages[0].mood", "unknown field"),
    "template refuses": (
        messages({"role": "user", "content": "x"}, {"role": "system", "content": "y"}),
        *(400, "messages", "chat template refuses them: a system message must come first"),
    ),
    "long prompt": (messages({"role": "user", "content": "a b " * 400}), 400, "messages", "Shorten the prompt to at most 255"),
    "negative max_tokens": (chat(max_tokens=-1), 400, "max_tokens", "must be at least 1, not -1"),
    "no max_tokens": (chat(max_tokens=0), 400, "max_tokens", "must be at least 1, not 0"),
    "fractional max_tokens": (chat(max_tokens=1.5), 400, "max_tokens", "must be an integer, not 1.5"),
    "two limits": (chat(max_completion_tokens=9), 400, "max_completion_tokens", "differs from max_tokens"),
    "hot": (chat(temperature=3), 400, "temperature", "must be at most 2, not 3"),
    "temperature NaN": (chat(temperature=float("nan")), 400, "temperature", "finite number"),
    "temperature a string": (chat(temperature="1"), 400, "temperature", "must be a number, not \"1\""),
    "top_p": (chat(top_p=0), 400, "top_p", "must be greater than 0"),
    "top_k": (chat(top_k=-2), 400, "top_k", "must be at least -1"),
    "n": (chat(n=0), 400, "n", "must be at least 1"),
    "n over capacity": (chat(n=64), 400, "n", "at most 32 completions at once"),
    "seed": (chat(seed=2**64), 400, "seed", "must be at most"),
    "five stops": (chat(stop=list("abcde")), 400, "stop", "at most 4 strings, not 5"),
    "empty stop": (chat(stop=""), 400, "stop", "must not hold an empty string"),
    "stop a number": (chat(stop=3), 400, "stop", "must be a string or a list of strings"),
    "bias of no token": (chat(logit_bias={"x": 1}), 400, "logit_bias", "is not a token id"),
    "bias out of range": (chat(logit_bias={"1": 101}), 400, "logit_bias", "from -100 to 100"),
    "bias beyond vocabulary": (chat(logit_bias={"99999": 1}), 400, "logit_bias", "outside the model's vocabulary"),
    "stop id beyond vocabulary": (chat(stop_token_ids=[99999]), 400, "stop_token_ids", "outside the model's vocabulary"),
    "min over max": (chat(min_tokens=3), 400, "min_tokens", "at most max_tokens, which is 2"),
    "top_logprobs alone": (chat(top_logprobs=2), 400, "top_logprobs", "needs logprobs to be true"),
    "stream a string": (chat(stream="yes"), 400, "stream", "must be true or false"),
    "stream_options alone": (chat(stream_options={"include_usage": True}), 400, "stream_options", "read only with stream true"),
    "custom tool": (chat(tools=[{"type": "custom", "custom": {"name": "x"}}]), 400, "tools[0].type", "must be 'function'"),
    "tool name": (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools[0].function.name", "match"),
    "two of a name": (chat(tools=[TOOL, TOOL]), 400, "tools", 'the name "f" is given to two'),
    "choice without tools": (chat(tool_choice="required"), 400, "tool_choice", "needs tools"),
    "no such tool": (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), 400, "tool_choice", 'no tool is called "g"',
    ),
    "functions": (chat(functions=[{"name": "f"}]), 400, "functions", "send tools and tool_choice"),
    "response_format a string": (chat(response_format="json"), 400, "response_format", "must be an object"),
    "response_format of no type": (chat(response_format={}), 400, "response_format.type", "is required"),
    "response_format of another type": (chat(response_format={"type": "xml"}), 400, "response_format.type", "'json_schema', not \"xml\""),
    "schema missing": (chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema", "is required"),
    "schema out of place": (
        chat(response_format={"type": "json_object", "json_schema": {"name": "x"}}),
        *(400, "response_format.json_schema", 'read only with type "json_schema"'),
    ),
    "schema without a name": (schema(name=None), 400, "response_format.json_schema.name", "must be a string"),
    "schema with a bad name": (schema(name="a b"), 400, "response_format.json_schema.name", "^[a-zA-Z0-9_-]{1,64}$"),
    "schema no object": (schema(schema=[]), 400, "response_format.json_schema.schema", "must be an object"),
    "schema with unknown field": (schema(strcit=True), 400, "response_format.json_schema.strcit", "unknown field"),
    "strict a string": (schema(strict="yes"), 400, "response_format.json_schema.strict", "must be true or false"),
    "schema that cannot be enforced": (
        schema(schema={"not": {}}),
        *(400, "response_format.json_schema.schema", "the schema 'x' cannot be enforced: Unimplemented keys: [\"not\"]"),
    ),
    "schema too large": (
        schema(schema={"enum": list(range(2000))}),
        *(400, "response_format.json_schema.schema", "an enum has 2000 values; the limit is 1000"),
    ),
    "audio": (chat(modalities=["text", "audio"]), 400, "modalities", "not supported"),
    "store": (chat(store=True), 400, "store", "not supported"),
    "no prompt": (("/v1/completions", {"model": "tiny"}), 400, "prompt", "is required"),
    "prompt null": (text(prompt=None), 400, "prompt", "must be a string, a list of strings or token ids"),
    "prompt empty": (text(prompt=""), 400, "prompt", "has no tokens"),
    "prompts empty": (text(prompt=[]), 400, "prompt", "must not be empty"),
    "prompts mixed": (text(prompt=["a", 3]), 400, "prompt", "item 1 must be a string or a list of token ids, not 3"),
    "second prompt too long": (text(prompt=["a", "b " * 400]), 400, "prompt[1]", "Shorten the prompt"),
    "prompt ids beyond vocabulary": (text(prompt=[99999]), 400, "prompt", "token id 99999 is outside"),
    "echo a string": (text(echo="yes"), 400, "echo", "must be true or false"),
    "no max_tokens and no echo": (text(max_tokens=0), 400, "max_tokens", "must be at least 1, not 0; with echo it may be 0"),
    "min over no max_tokens": (text(max_tokens=0, echo=True, min_tokens=1), 400, "min_tokens", "at most max_tokens, which is 0"),
    "21 logprobs": (text(logprobs=21), 400, "logprobs", "must be at most 20"),
    "logprobs true": (text(logprobs=True), 400, "logprobs", "must be an integer"),
    "suffix": (text(suffix="x"), 400, "suffix", "not supported"),
    "best_of under n": (text(best_of=2, n=3), 400, "best_of", "must be at least n, which is 3"),
    "best_of streamed": (text(best_of=3, stream=True), 400, "best_of", "must equal n, which is 1, in streams"),
    "best_of over capacity": (text(best_of=64), 400, "best_of", "at most 32 completions at once"),
    "add_special_tokens": (text(add_special_tokens=1), 400, "add_special_tokens", "must be true or false"),
    "prompt_logprobs under": (text(prompt_logprobs=-1), 400, "prompt_logprobs", "must be at least 0"),
    "prompt_logprobs over": (chat(prompt_logprobs=21), 400, "prompt_logprobs", "must be at most 20"),
    "prompt_logprobs streamed": (chat(prompt_logprobs=1, stream=True), 400, "prompt_logprobs", "is not given in streams"),
    "return_token_ids": (chat(return_token_ids="yes"), 400, "return_token_ids", "must be true or false"),
    "priority": (chat(priority=1.5), 400, "priority", "must be an integer"),
    "priority huge": (chat(priority=2**40), 400, "priority", "must be at most"),
    "stop strings in the output": (text(include_stop_str_in_output=True), 400, "include_stop_str_in_output", "not supported"),
    "begins and continues": (
        chat(add_generation_prompt=True, continue_final_message=True),
        *(400, "continue_final_message", "cannot go with add_generation_prompt true"),
    ),
    "continues the user": (chat(continue_final_message=True), 400, "continue_final_message", "the last message to be the assistant's"),
    "template options a list": (chat(chat_template_kwargs=[1]), 400, "chat_template_kwargs", "must be an object"),
    "template options take the messages' place": (
        chat(chat_template_kwargs={"messages": []}),
        *(400, "chat_template_kwargs", "must not hold 'messages', which the server sets itself"),
    ),
    "template options tokenize": (chat(chat_template_kwargs={"tokenize": True}), 400, "chat_template_kwargs", "must not hold 'tokenize'"),
    "tokenize nothing": (("/tokenize", {}), 400, "prompt", "send either prompt or messages"),
    "tokenize both": (("/tokenize", {"prompt": "x", "messages": OK["messages"]}), 400, "prompt", "send either"),
    "tokenize a list": (("/tokenize", {"prompt": ["x"]}), 400, "prompt", "must be a string"),
    "tokenize for another model": (("/tokenize", {"prompt": "x", "model": "gpt-9"}), 404, "model", "is not served here"),
    "tokenize with a template": (("/tokenize", {"prompt": "x", "chat_template": "y"}), 400, "chat_template", "not supported"),
    "tokenize a prompt and continue it": (
        ("/tokenize", {"prompt": "x", "continue_final_message": True}),
        *(400, "continue_final_message", "goes with messages only"),
    ),
    "tokenize messages with special tokens": (
        ("/tokenize", {"messages": OK["messages"], "add_special_tokens": True}),
        *(400, "add_special_tokens", "goes with prompt only"),
    ),
    "tokenize a prompt with tools": (("/tokenize", {"prompt": "x", "tools": [TOOL]}), 400, "tools", "goes with messages only"),
    "detokenize nothing": (("/detokenize", {}), 400, "tokens", "is required"),
    "detokenize text": (("/detokenize", {"tokens": "x"}), 400, "tokens", "must be a list"),
    "detokenize a negative": (("/detokenize", {"tokens": [-1]}), 400, "tokens[0]", "must be at least 0"),
    "detokenize beyond vocabulary": (("/detokenize", {"tokens": [99999]}), 400, "tokens", "outside the tokenizer's vocabulary"),
    "chat's field": (text(top_logprobs=3), 400, "top_logprobs", "unknown field"),
    "score of nothing": (("/v1/steering/score", {}), 400, "messages", "either messages or prompt"),
    "score with sampling": (("/v1/steering/score", {"prompt": "x", "temperature": 1}), 400, "temperature", "unknown field"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_refusals(served, case):
    (path, body), status, param, said = CASES[case]
    response = await served.client.post(path, content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert said in error["message"]
    assert error["message"].endswith((".", "?"))
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"model": "tiny",', "line 1, column"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "number is too long"),
    ],
    ids=["empty", "broken", "list", "bytes", "surrogate", "deep", "long number"],
)
async def test_bodies_that_are_no_json_object(served, raw, said):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/steering/score", "/tokenize", "/detokenize"):
        response = await served.client.post(path, content=raw)
        assert response.status_code == 400
        assert said in response.json()["error"]["message"]


async def test_several_problems_are_told_at_once(served):
    body = OK | {"temperature": 3, "top_p": 0, "steer_gat": 1, "functions": [TOOL]}
    error = (await served.client.post("/v1/chat/completions", json=body)).json()["error"]
    for name in ("steer_gat", "functions", "temperature", "top_p"):
        assert name in error["message"]
    assert error["param"] == "steer_gat"


@pytest.mark.parametrize(
    ("headers", "param", "said"),
    [
        ({"X-FineSteer-Strength": "much"}, "X-FineSteer-Strength", "must be a finite number"),
        ({"X-FineSteer-Strength": "nan"}, "X-FineSteer-Strength", "must be a finite number"),
        ({"X-FineSteer-Strength": "21"}, "X-FineSteer-Strength", "over this server's limit"),
        ({"X-FineSteer-Strength": "nope=1"}, "X-FineSteer-Strength", "no profile 'nope' is loaded"),
        ({"X-FineSteer-Profiles": "nope"}, "X-FineSteer-Profiles", "no profile 'nope' is loaded"),
    ],
)
async def test_bad_headers(served, headers, param, said):
    response = await served.chat(CALM[0], headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert said in error["message"]


async def test_streams_are_refused_with_a_status_too(served):
    response = await served.chat("a b " * 400, stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_what_is_refused_as_unsupported_has_a_code(served):
    path, body = CASES["image"][0]
    error = (await served.client.post(path, json=body)).json()["error"]
    assert error["code"] == "unsupported_parameter"


async def test_absurd_bodies_are_refused_quickly(served):
    """Each would take minutes, or gigabytes, if every fault were looked into."""
    for body in (
        OK | {f"steer{i:06}": 1 for i in range(200_000)},
        OK | {"steer" + "x" * 3_000_000: 1},
        OK | {"messages": [1] * 1_000_000},
        OK | {"stop": ["a"] * 500_000},
        OK | {"logit_bias": {str(i): "x" for i in range(200_000)}},
    ):
        begun = time.process_time()  # of the server, whatever else runs here
        response = await served.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert len(response.text) < 4000
        assert time.process_time() - begun < 5


async def test_too_large_a_body(served):
    response = await served.client.post("/v1/completions", content=b" " * (5 << 20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nope/nope", 404),
        ("GET", "/v1/steering/profiles/nope", 404),
    ],
)
async def test_paths_and_methods(served, method, path, status):
    response = await served.client.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert error["message"]
    if status == 405:
        assert response.headers["allow"] in error["message"]


async def test_the_server_goes_on(served, oracle):
    for (path, body), *_ in CASES.values():
        await served.client.post(path, content=json.dumps(body))
    answer = (await served.chat(CALM[0])).json()
    assert answer["choices"][0]["message"]["content"] == oracle.plain(CALM[0])
    assert served.engine.stats().num_running == 0
