"""`/v1/completions`, through ASGI."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint import CALM, FIRING
from tests.serving import chunks


def conversation(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


async def complete(served, prompt, **fields):
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12} | fields
    return await served.client.post("/v1/completions", json=body)


async def test_text_and_token_ids_are_one(served, oracle):
    for prompt in (conversation(FIRING[0]), oracle.prompt(FIRING[0])):
        answer = (await complete(served, prompt)).json()
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == oracle.steered(FIRING[0])
        assert answer["steering"]["reason"] == "gate_open"


async def test_default_is_sixteen_tokens(served):
    body = {"model": "tiny", "prompt": "hello", "ignore_eos": True}
    answer = (await served.client.post("/v1/completions", json=body)).json()
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("as_ids", [False, True])
async def test_each_prompt_has_its_own_decision(served, oracle, as_ids):
    texts = [FIRING[0], CALM[0], FIRING[1]]
    prompts = [oracle.prompt(t) if as_ids else conversation(t) for t in texts]
    response = await complete(served, prompts, n=2)
    answer = response.json()
    expected = [oracle.steered(texts[0]), oracle.plain(texts[1]), oracle.steered(texts[2])]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [text for text in expected for _ in range(2)]
    assert [report["applied"] for report in answer["steering"]] == [True, False, True]
    assert response.headers["x-finesteer-applied"] == "true"
    assert answer["usage"]["prompt_tokens"] == sum(len(oracle.prompt(t)) for t in texts)
    assert answer["usage"]["completion_tokens"] == 6 * 12


@pytest.mark.parametrize("usage", [False, True])
async def test_streamed_is_whole(served, usage):
    prompts = [conversation(t) for t in (FIRING[0], CALM[0])]
    whole = (await complete(served, prompts)).json()
    events = chunks((await complete(served, prompts, stream=True, stream_options={"include_usage": usage})).text)
    texts = ["", ""]
    for chunk in events:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert events[0]["steering"] == events[-1]["steering"] == whole["steering"]
    assert ["steering" in chunk for chunk in events] == [True, *[False] * (len(events) - 2), True]
    assert (events[-1].get("usage") == whole["usage"]) is usage


async def test_logprobs_in_the_old_form(served, oracle):
    answer = (await complete(served, conversation(CALM[0]), logprobs=2)).json()
    logprobs = answer["choices"][0]["logprobs"]
    ids = oracle.plain_ids(CALM[0], 12)
    with torch.no_grad():
        logits = oracle.model(torch.tensor([oracle.prompt(CALM[0]) + ids])).logits[0]
    table = torch.log_softmax(logits[len(oracle.prompt(CALM[0])) - 1 : -1], -1)
    expected = table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    assert logprobs["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    bare = (await complete(served, conversation(CALM[0]), logprobs=0)).json()["choices"][0]["logprobs"]
    assert bare["token_logprobs"] == logprobs["token_logprobs"]
    chosen = [dict([pair]) for pair in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
    assert bare["top_logprobs"] == chosen, "the token itself is always there"


async def test_a_token_that_is_not_among_the_likeliest_is_given_with_them(served):
    found = (await complete(served, "hello", logprobs=1, temperature=2, seed=3)).json()["choices"][0]["logprobs"]
    sizes = set()
    for name, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[name] == logprob <= max(top.values())
        sizes.add(len(top))
    assert sizes == {1, 2}


async def test_the_token_that_ends_a_completion_has_its_place_in_the_lists(served, oracle):
    ids = oracle.plain_ids(CALM[0], 12)
    stop = ids[ids.index(ids[5])]
    body = {"stop_token_ids": [stop], "logprobs": 0, "return_token_ids": True}
    answer = (await complete(served, conversation(CALM[0]), **body)).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == ids[: ids.index(stop) + 1]
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    assert choice["text"] == oracle.decode(ids[: ids.index(stop)])
