"""Answers against OpenAI's published types, over the features that change their shape; and that the check can fail.

Every other test of the application in process has its answers checked in the same way (`tests/openai_schema.py`).
"""

from __future__ import annotations

import copy
import json

import pytest

from server.access.keys import Access
from tests import openai_schema
from tests.checkpoint import CALM, FIRING
from tests.serving import chunks, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHAPES = {
    "plain": {},
    "two": {"n": 2, "temperature": 1, "seed": 1},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "chosen logprobs only": {"logprobs": True},
    "stop": {"stop": ["e", "a", "o", " "], "max_tokens": 200},
    "one token": {"max_tokens": 1},
    "many": {"n": 3, "temperature": 1, "logprobs": True, "top_logprobs": 1, "seed": 4},
    "nothing told": {"steer_metadata": "none"},
    "all told": {"steer_metadata": "full"},
    "no-ops": {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s", "prompt_cache_key": "k"},
    "tier": {"service_tier": "auto"},
}
STREAMS = [
    {},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
]


@pytest.mark.parametrize("stream", STREAMS, ids=["whole", "stream", "usage"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_chat(served, shape, stream):
    for text in (FIRING[0], CALM[0]):
        response = await served.chat(text, **SHAPES[shape] | stream)
        assert response.status_code == 200, response.text
        parts = chunks(response.text) if stream else [response.json()]
        assert all(part.get("service_tier") == ("default" if shape == "tier" else None) for part in parts)


@pytest.mark.parametrize("stream", STREAMS, ids=["whole", "stream", "usage"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ["a", "b"], "n": 2},
        {"logprobs": 0},
        {"logprobs": 2, "prompt": [1, 2]},
        {"stop": ["e", "a"], "user": "u"},
    ],
)
async def test_text(served, fields, stream):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "temperature": 1, "seed": 3}
    response = await served.client.post(TEXT, json=body | fields | stream)
    assert response.status_code == 200, response.text


async def test_models_and_errors(artifacts):
    async with serving(artifacts, ("safety", "tone"), access=Access.of("k")) as served:
        key = {"Authorization": "Bearer k"}
        for card in (await served.client.get("/v1/models", headers=key)).json()["data"]:
            assert (await served.client.get(f"/v1/models/{card['id']}", headers=key)).json() == card
        for headers in ({}, key):
            for method, path in (("GET", "/v1/models/nope"), ("GET", "/v1/files"), ("DELETE", CHAT), ("POST", CHAT)):
                assert (await served.client.request(method, path, headers=headers)).status_code >= 400


@pytest.mark.parametrize("tier", ["flex", "priority", 1])
async def test_other_tiers_are_refused(served, tier):
    response = await served.chat(CALM[0], service_tier=tier)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "service_tier")


async def test_padding_against_eavesdroppers_is_refused_rather_than_left_out(served):
    response = await served.chat(CALM[0], stream=True, stream_options={"include_obfuscation": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options.include_obfuscation")


def spoilt(answer: dict, path: str, value) -> dict:
    """A copy with one thing changed; `...` deletes."""
    spoilt = copy.deepcopy(answer)
    *way, last = path.split(".")
    place = spoilt
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return spoilt


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("choices.0.logprobs", ...),
        ("choices.0.finish_reason", None),
        ("choices.0.finish_reason", "eos"),
        ("choices.0.message.refusal", ...),
        ("choices.0.message.tool_calls", None),
        ("choices.0.mood", 1),
        ("choices.0.steering", {}),
        ("usage", None),
        ("usage.total_tokens", "3"),
        ("system_fingerprint", None),
        ("object", "chat.completions"),
        ("extra", 1),
        ("prompt_logprobs", []),
    ],
)
async def test_the_check_sees_what_is_wrong_with_a_whole_answer(served, path, value):
    answer = (await served.chat(CALM[0])).json()
    openai_schema.conforms("ChatCompletion", answer)
    with pytest.raises(AssertionError, match="ChatCompletion"):
        openai_schema.conforms("ChatCompletion", spoilt(answer, path, value))


async def test_what_was_asked_for_may_be_there(served):
    answer = (await served.chat(CALM[0])).json() | {"prompt_logprobs": []}
    openai_schema.conforms("ChatCompletion", answer, {"prompt_logprobs": 1})
    with pytest.raises(AssertionError, match="prompt_logprobs"):
        openai_schema.conforms("ChatCompletion", answer, {"prompt_logprobs": None})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda events: events[:-1],  # no [DONE]
        lambda events: [events[-1], *events],
        lambda events: [events[1], *events[2:]],  # no role
        lambda events: [*events[:2], events[0], *events[2:]],  # two of them
        lambda events: [*events[:-3], *events[-2:]],  # no finish reason
        lambda events: [*events[:-2], events[-1]],  # no usage
        lambda events: [events[0].replace('"created":', '"created":1'), *events[1:]],
        lambda events: [event.replace('"finish_reason":null', '"finish_reason":"none"') for event in events],
        lambda events: [*events[:1], '{"error": "no"}'],
    ],
)
async def test_the_check_sees_what_is_wrong_with_a_stream(served, spoil):
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    events = [line[6:] for line in (await served.chat(CALM[0], **asked)).text.splitlines() if line]
    written = [json.dumps(json.loads(event), separators=(",", ":")) if event != "[DONE]" else event for event in events]

    def check(events):
        openai_schema.stream_conforms("ChatCompletionChunk", "".join(f"data: {e}\n\n" for e in events), asked)

    check(written)
    with pytest.raises(AssertionError):
        check(spoil(written))


async def test_every_answer_of_the_application_in_process_is_checked(served, monkeypatch):
    """The transport itself fails: here because errors are told in another shape."""
    monkeypatch.setattr("server.errors.ApiError.body", lambda self: {"detail": self.message})
    with pytest.raises(AssertionError, match="Error"):
        await served.client.get("/v1/nothing")
