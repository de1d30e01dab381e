"""`response_format`: a model of random weights, hot or cold, streamed or not, steered hard, answers after the schema."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.checkpoint import CALM, FIRING
from tests.serving import chunks

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["calm", "glad", "sad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
CHOICE = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"enum": ["bake", "knead", "wait"]}, "minItems": 1, "maxItems": 3},
        "of": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/loaf"}]},
    },
    "required": ["steps", "of"],
    "additionalProperties": False,
    "$defs": {
        "loaf": {
            "type": "object",
            "properties": {"salt": {"type": "boolean"}},
            "required": ["salt"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {"person": PERSON, "choice": CHOICE}


def after(schema, name="it", **fields):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True} | fields}


def streamed_text(response, index=0):
    """A streamed completion's text and its finish reason."""
    choices = [choice for chunk in chunks(response.text) for choice in chunk["choices"] if choice["index"] == index]
    return "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]


def whole_text(response, index=0):
    choice = response.json()["choices"][index]
    return choice["message"]["content"], choice["finish_reason"]


def check(found, schema):
    text, reason = found
    assert reason == "stop"
    jsonschema.validate(json.loads(text), schema)
    return text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1, 2])
@pytest.mark.parametrize("name", SCHEMAS)
async def test_every_answer_validates(served, name, temperature, stream):
    read = streamed_text if stream else whole_text
    asks = [
        served.chat(
            (FIRING + CALM)[seed % 8],
            seed=seed,
            temperature=temperature,
            stream=stream,
            max_tokens=150,
            response_format=after(SCHEMAS[name]),
        )
        for seed in range(16)
    ]
    texts = {check(read(response), SCHEMAS[name]) for response in await asyncio.gather(*asks)}
    assert len(texts) > (8 if temperature else 1)


async def test_streamed_is_whole_and_n_completions_each_hold(served):
    fields = {"n": 3, "temperature": 1, "seed": 3, "max_tokens": 150, "response_format": after(PERSON)}
    whole = await served.chat(CALM[0], **fields)
    streamed = await served.chat(CALM[0], stream=True, **fields)
    texts = [check(whole_text(whole, index), PERSON) for index in range(3)]
    assert len(set(texts)) == 3
    assert texts == [streamed_text(streamed, index)[0] for index in range(3)]


@pytest.mark.parametrize("strength", [2, 20, -20])
async def test_steering_forced_open_leaves_it_valid(served, strength):
    plain = await served.chat(CALM[0], max_tokens=150, response_format=after(PERSON))
    steered = await served.chat(
        CALM[0], max_tokens=150, response_format=after(PERSON), steer_gate="open", steer_strength=strength
    )
    assert steered.json()["steering"]["applied"] is True
    assert check(whole_text(steered), PERSON) != check(whole_text(plain), PERSON)


async def test_cut_short_it_says_length(served):
    whole = await served.chat(CALM[0], max_tokens=150, response_format=after(PERSON))
    text = check(whole_text(whole), PERSON)
    cut, reason = whole_text(await served.chat(CALM[0], max_tokens=7, response_format=after(PERSON)))
    assert reason == "length" and text.startswith(cut.rstrip("\ufffd")) and cut != text


async def test_nothing_in_the_request_breaks_the_promise(served, oracle):
    eos = oracle.tokenizer.eos_token_id
    biases = {str(i): -100 for i in range(0, len(oracle.tokenizer), 2)} | {str(eos): 100}
    against = [
        {"ignore_eos": True},
        {"min_tokens": 140},
        {"logit_bias": biases},
        {"top_k": 1, "temperature": 2},
        {"top_p": 0.01, "temperature": 2},
        {"repetition_penalty": 10, "frequency_penalty": 2, "presence_penalty": 2},
        {"logprobs": True, "top_logprobs": 5},
    ]
    for fields in against:
        response = await served.chat(CALM[1], max_tokens=150, response_format=after(PERSON), **fields)
        check(whole_text(response), PERSON)


async def test_log_probabilities_are_of_what_is_allowed(served):
    response = await served.chat(CALM[1], max_tokens=150, response_format=after(PERSON), logprobs=True, top_logprobs=3)
    entries = response.json()["choices"][0]["logprobs"]["content"]
    assert "".join(map(chr, entries[0]["bytes"])).startswith("{")
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == whole_text(response)[0]
    assert all(-9999 <= top["logprob"] <= 0 for entry in entries for top in entry["top_logprobs"])


@pytest.mark.parametrize("temperature", [0, 1])
async def test_any_object(served, oracle, temperature):
    """Left alone, a random model finds no end of its strings."""
    ends = {str(oracle.tokenizer.convert_tokens_to_ids(token)): 12 for token in '"}'}
    for seed in range(6):
        fields = {"temperature": temperature, "seed": seed, "max_tokens": 200, "logit_bias": ends}
        answer = await served.chat(FIRING[seed % 4], response_format={"type": "json_object"}, **fields)
        check(whole_text(answer), {"type": "object"})


async def test_white_space_is_bounded(served, oracle):
    white = {str(i): 100 for i in range(len(oracle.tokenizer)) if not oracle.tokenizer.decode([i]).strip()}
    assert len(white) > 2
    text, _ = whole_text(
        await served.chat(CALM[0], max_tokens=150, response_format=after(CHOICE), logit_bias=white, temperature=1)
    )
    assert not re.search(r"[ \t\r\n]{10}", text) and len(re.findall(r"[ \n]{2,9}", text)) > 3
    jsonschema.validate(json.loads(text), CHOICE)


async def test_plain_requests_beside_it_get_their_plain_answers(served, oracle):
    asks = [served.chat(text, **({"response_format": after(PERSON)} if i % 2 else {})) for i, text in enumerate(CALM)]
    answers = await asyncio.gather(*asks)
    assert [whole_text(a)[0] for a in answers[::2]] == [oracle.plain(text) for text in CALM[::2]]
    [plain] = [whole_text(await served.chat(CALM[0], response_format={"type": "text"}))[0]]
    assert plain == oracle.plain(CALM[0])


async def test_not_strict_is_as_strict_as_can_be(served):
    loose = PERSON | {
        "properties": PERSON["properties"]
        | {"age": {"type": "integer", "not": {"const": 1}, "maximum": 9, "minimum": 0}}
    }
    refused = await served.chat(CALM[0], response_format=after(loose))
    assert refused.status_code == 400
    for strict in (False, None):
        found = await served.chat(CALM[0], max_tokens=150, response_format=after(loose, strict=strict))
        answer = json.loads(whole_text(found)[0])
        assert set(answer) == set(PERSON["properties"]) and answer["age"] <= 9


async def test_through_the_official_client(served):
    class Loaf(BaseModel):
        flour: str = Field(max_length=5)
        grams: int = Field(ge=0, le=900)

    client = openai.AsyncOpenAI(api_key="any", base_url="http://test/v1", http_client=served.client)
    messages = [{"role": "user", "content": CALM[0]}]
    answer = await client.chat.completions.parse(
        model="tiny", messages=messages, response_format=Loaf, max_tokens=150, temperature=1, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Loaf)
    async with client.chat.completions.stream(
        model="tiny", messages=messages, response_format=Loaf, max_tokens=150
    ) as stream:
        final = await stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Loaf)
