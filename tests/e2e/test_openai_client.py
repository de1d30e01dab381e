"""The official client, synchronous and asynchronous, and curl, against the real process."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request

import openai
import pytest

from tests.checkpoint import CALM, FIRING

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def expected(oracle):
    """The answer to a text with both profiles at their defaults."""
    return lambda text: oracle.steered_by_all(text) if text in FIRING else oracle.plain(text)


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
def test_sync(client, expected, text):
    answer = client.chat.completions.create(messages=turn(text), **GREEDY)
    assert answer.choices[0].message.content == expected(text)
    assert answer.steering["applied"] is (text in FIRING)
    assert [report["fired"] for report in answer.steering["profiles"]] == [text in FIRING] * 2


async def test_async(address, expected):
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        answer = await client.chat.completions.create(messages=turn(FIRING[1]), **GREEDY)
        assert answer.choices[0].message.content == expected(FIRING[1])
        stream = await client.chat.completions.create(messages=turn(FIRING[1]), stream=True, **GREEDY)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == expected(FIRING[1])


def test_strength_zero_is_plain_and_still_reports_the_gate(client, oracle):
    answer = client.chat.completions.create(messages=turn(FIRING[0]), extra_body={"steer_strength": 0}, **GREEDY)
    assert answer.choices[0].message.content == oracle.plain(FIRING[0])
    assert (answer.steering["applied"], answer.steering["reason"]) == (False, "strength_zero")
    assert all(report["gate"] > 0 for report in answer.steering["profiles"])


@pytest.mark.parametrize("model", ["tiny:unsteered", "tiny:safety", "tiny:tone"])
def test_aliases(client, oracle, model):
    answer = client.chat.completions.create(messages=turn(FIRING[0]), **(GREEDY | {"model": model}))
    name = model.partition(":")[2]
    plain = name == "unsteered"
    assert answer.choices[0].message.content == (
        oracle.plain(FIRING[0]) if plain else oracle.steered(FIRING[0], name=name)
    )
    assert answer.steering["reason"] == ("opted_out" if plain else "gate_open")


def test_raw_stream_and_headers(client, expected):
    raw = client.chat.completions.with_raw_response.create(
        messages=turn(FIRING[2]), extra_headers={"X-Request-Id": "e2e-1"}, **GREEDY
    )
    assert (raw.headers["x-request-id"], raw.headers["x-finesteer-applied"]) == ("e2e-1", "true")
    assert raw.headers["x-finesteer-profiles"] == "safety,tone"
    assert raw.parse().choices[0].message.content == expected(FIRING[2])


def test_chunks(client, expected):
    stream = client.chat.completions.create(
        messages=turn(FIRING[0]), stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected(FIRING[0])
    assert chunks[0].steering == chunks[-1].steering
    assert chunks[0].steering["applied"] is True
    assert (chunks[-1].usage.completion_tokens, chunks[-1].choices) == (12, [])


def test_stream_helper(client, expected):
    """`.stream()` accumulates chunks: the steering object must come through whole."""
    whole = expected(FIRING[3])
    stop = whole[4:6]
    with client.chat.completions.stream(messages=turn(FIRING[3]), stop=stop, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text == whole[: whole.index(stop)]
    assert final.choices[0].finish_reason == "stop"
    assert final.steering["reason"] == "gate_open"
    assert [report["layer"] for report in final.steering["profiles"]] == [1, 1]


def test_text_completions(client, oracle):
    answer = client.completions.create(prompt=[oracle.prompt(FIRING[0]), oracle.prompt(CALM[0])], logprobs=1, **GREEDY)
    assert [choice.text for choice in answer.choices] == [oracle.steered_by_all(FIRING[0]), oracle.plain(CALM[0])]
    assert [report["applied"] for report in answer.steering] == [True, False]
    assert len(answer.choices[0].logprobs.tokens) == 12


def test_logprobs_and_n(client):
    answer = client.chat.completions.create(messages=turn(CALM[0]), n=2, logprobs=True, top_logprobs=2, **GREEDY)
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 12
        assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in choice.logprobs.content)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:unsteered", "tiny:safety", "tiny:tone"]
    assert client.models.retrieve("tiny:safety").owned_by == "finesteer"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=turn("x"), extra_body={"steer_strenght": 1}, **GREEDY)
    assert (caught.value.param, caught.value.code) == ("steer_strenght", "unknown_parameter")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=turn("x"), model="gpt-9")
    with pytest.raises(openai.BadRequestError, match="send tools and tool_choice"):
        client.chat.completions.create(messages=turn("x"), functions=[{"name": "f"}], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="suffix: not supported"):
        client.completions.create(prompt="x", suffix="y", **GREEDY)
    with pytest.raises(openai.BadRequestError, match="Answers are text"):
        client.chat.completions.create(messages=turn("x"), modalities=["text", "audio"], **GREEDY)
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_the_curl_that_the_terminal_shows(log, address):
    [command] = re.findall(r"^curl .*?\n.*?'$", log.read_text(), re.M | re.S)
    result = subprocess.run(
        ["bash", "-c", command.replace("curl", "curl -sS --fail", 1)], capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert len(answer["steering"]["profiles"]) == 2


def test_curl_in_stream(address):
    body = json.dumps(GREEDY | {"messages": turn(CALM[0]), "stream": True, "extra_body": {"steer_strength": 4}})
    result = subprocess.run(
        ["curl", "-sSN", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        timeout=60,
    )
    events = [line for line in result.stdout.decode().split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["steering"]["profiles"][0]["strength"] == 4


def test_documentation_is_served(address):
    with urllib.request.urlopen(f"{address}/openapi.json", timeout=10) as response:
        description = json.load(response)
    paths = description["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert "steer_strength" in description["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"/v1/completions", "/v1/models", "/v1/steering/score", "/metrics", "/health"} <= set(paths)


def test_curl_without_the_media_type_is_told_what_to_add(address):
    result = subprocess.run(
        ["curl", "-sS", f"{address}/v1/chat/completions", "-d", "{}"], capture_output=True, timeout=60
    )
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "unsupported_content_type"
    assert "-H 'Content-Type: application/json'" in error["message"]


def test_head_and_compression_over_the_wire(address):
    """uvicorn's part in it: no body after HEAD, so that the connection can be used again; gzip with its length."""
    urls = [f"{address}{path}" for path in ("/metrics", "/health")]
    head = subprocess.run(["curl", "-sSI", *urls], capture_output=True, timeout=60, text=True)
    assert (head.returncode, head.stdout.count("200 OK")) == (0, 2)
    result = subprocess.run(["curl", "-sSi", "--compressed", urls[0]], capture_output=True, timeout=60, text=True)
    assert "content-encoding: gzip" in result.stdout
    assert "finesteer:num_requests_running" in result.stdout
