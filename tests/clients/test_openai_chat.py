"""openai for Python: chat completions, plain, streamed and parsed; steering fields sent and read."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.clients.asked import ADA, HARMFUL, HARMLESS, Person, Pick, said

GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 24}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
ROOMY = GREEDY | {"max_tokens": 200}


def test_an_answer_says_what_steering_did(client: openai.OpenAI) -> None:
    steered = client.chat.completions.create(messages=said(HARMFUL), **GREEDY)
    assert steered.object == "chat.completion" and steered.choices[0].message.role == "assistant"
    assert steered.usage.total_tokens == steered.usage.prompt_tokens + steered.usage.completion_tokens
    assert (steered.steering["applied"], steered.steering["reason"]) == (True, "gate_open")
    calm = client.chat.completions.create(messages=said(HARMLESS), **GREEDY)
    assert (calm.steering["applied"], calm.steering["reason"]) == (False, "gate_closed")


def test_steering_fields_go_in_extra_body(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(messages=said(HARMFUL), **(GREEDY | {"model": "demo:unsteered"}))
    off = client.chat.completions.create(messages=said(HARMFUL), extra_body={"steer_profiles": []}, **GREEDY)
    zero = client.chat.completions.create(messages=said(HARMFUL), extra_body={"steer_strength": 0}, **GREEDY)
    steered = client.chat.completions.create(messages=said(HARMFUL), **GREEDY)
    texts = [answer.choices[0].message.content for answer in (plain, off, zero, steered)]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    reasons = [answer.steering["reason"] for answer in (plain, off, zero, steered)]
    assert reasons == ["opted_out", "opted_out", "strength_zero", "gate_open"]


def test_chunks_join_to_the_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=said(HARMFUL), **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=said(HARMFUL), stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and not any(delta.role for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert chunks[0].steering["reason"] == chunks[-1].steering["reason"] == "gate_open"
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_the_stream_helper_holds_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=said(HARMFUL), **ROOMY)
    with client.chat.completions.stream(messages=said(HARMFUL), **ROOMY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.steering["reason"] == "gate_open"


async def test_many_at_once(client: openai.OpenAI) -> None:
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key="unused", max_retries=0) as many:
        asked = [many.chat.completions.create(messages=said(q), **GREEDY) for q in (HARMFUL, HARMLESS) * 4]
        answers = await asyncio.gather(*asked)
    assert [answer.steering["applied"] for answer in answers] == [True, False] * 4
    assert len({answer.choices[0].message.content for answer in answers}) == 2


@pytest.mark.parametrize("question", [HARMFUL, HARMLESS])
def test_parse_holds_for_any_model(client: openai.OpenAI, question: str) -> None:
    """The demo knows no JSON; the grammar does, steered or not."""
    answer = client.chat.completions.parse(messages=said(question), response_format=Pick, **ROOMY)
    assert isinstance(answer.choices[0].message.parsed, Pick)
    assert answer.steering["applied"] is (question == HARMFUL)


def test_parse_in_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=said(HARMLESS), response_format=Pick, **ROOMY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Pick)


def test_parse_with_text_of_the_models_own(clever: openai.OpenAI) -> None:
    answer = clever.chat.completions.parse(model="scripted", messages=said("Who is Ada?"), response_format=Person)
    assert answer.choices[0].message.parsed == ADA
    assert answer.choices[0].finish_reason == "stop"


def test_a_parse_that_is_cut_is_the_clients_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            messages=said(HARMLESS), response_format=Pick, **(GREEDY | {"max_completion_tokens": 3, "max_tokens": None})
        )


def test_json_object(clever: openai.OpenAI) -> None:
    answer = clever.chat.completions.create(
        model="scripted", messages=said("Tell me a joke about cats."), response_format={"type": "json_object"}
    )
    assert json.loads(answer.choices[0].message.content).keys() == {"setup", "punchline"}


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=said(HARMLESS), logprobs=True, top_logprobs=2, n=2, **(GREEDY | {"max_tokens": 4})
    )
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 4
        for entry in choice.logprobs.content:
            assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
            assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_what_changes_nothing_is_accepted(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(messages=said(HARMLESS), **GREEDY)
    same = client.chat.completions.create(
        messages=said(HARMLESS), user="u", metadata={"a": "b"}, service_tier="auto", store=False, seed=1, **GREEDY
    )
    assert same.choices[0].message.content == plain.choices[0].message.content


def test_vllms_fields_are_known(client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "priority": 1, "return_token_ids": True}
    extra |= {"chat_template_kwargs": {"a": 1}, "prompt_logprobs": 1, "ignore_eos": True}
    answer = client.chat.completions.create(messages=said(HARMLESS), extra_body=extra, **GREEDY)
    assert answer.usage.completion_tokens == GREEDY["max_tokens"]
    begun = [*said(HARMLESS), {"role": "assistant", "content": "I am"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    assert client.chat.completions.create(messages=begun, extra_body=extra, **GREEDY).choices[0].message.content


def test_roles_and_parts(clever: openai.OpenAI) -> None:
    """Instructions reach the model, as system or developer, as text or in parts."""
    for role, content in (("system", "Be brief."), ("developer", [{"type": "text", "text": "Be brief."}])):
        messages = [
            {"role": role, "content": content},
            {"role": "user", "content": [{"type": "text", "text": "What were you told?"}]},
        ]
        answer = clever.chat.completions.create(model="scripted", messages=messages)
        assert answer.choices[0].message.content == "I was told: Be brief."


def test_text_that_tokens_split(clever: openai.OpenAI) -> None:
    chunks = clever.chat.completions.create(model="scripted", messages=said("Say something in Japanese"), stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == "こんにちは 👩‍🚀 世界"
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("fields", "param", "codes"),
    [
        ({"extra_body": {"steer_strenght": 1}}, "steer_strenght", {"unknown_parameter"}),
        ({"modalities": ["audio"]}, "modalities", {"unsupported_parameter"}),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", {"unsupported_parameter"}),
    ],
    ids=["unknown", "unsupported", "image"],
)
def test_refusals_name_the_field(client: openai.OpenAI, fields: dict, param: str, codes: set[str]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(GREEDY | {"messages": said("hi")} | fields))
    assert caught.value.param.startswith(param)
    assert caught.value.code in codes


def test_other_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**(GREEDY | {"messages": said("hi"), "model": "gpt-9"}))
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="demo", input="x")
    assert caught.value.body["message"]


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["demo", "demo:unsteered"]
    assert [client.models.retrieve(name).id for name in names] == names
