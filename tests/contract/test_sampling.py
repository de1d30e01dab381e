"""What every engine promises of the tokens it chooses (`SamplingOptions`) and of what it says about them."""

from __future__ import annotations

import asyncio
import functools

import pytest
import torch

from tests.contract.asking import PLAIN, answer, collect, request, tokens
from tests.contract.harness import model

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = (5, 6, 7)


@functools.cache
def logprobs_after(sequence: tuple[int, ...]) -> torch.Tensor:
    """By transformers alone: (len(sequence), V), the plain model's log-probabilities of each next token."""
    with torch.no_grad():
        return torch.log_softmax(model()(torch.tensor([sequence])).logits[0].double(), -1)


async def test_greedy_is_the_likeliest_token(engine):
    found = await answer(engine, request("a", steering=PLAIN, max_tokens=12))
    table = logprobs_after((*PROMPT, *found))
    assert found == table[len(PROMPT) - 1 : -1].argmax(-1).tolist()


async def test_sampling_options_act(engine):
    greedy = await answer(engine, request("a"))
    assert greedy[0] not in await answer(engine, request("b", logit_bias={greedy[0]: -100.0}))
    assert await answer(engine, request("c", temperature=1.0, top_k=1)) == greedy
    assert await answer(engine, request("c", temperature=1.0, top_p=1e-6)) == greedy
    assert await answer(engine, request("c", temperature=1.0, min_p=1.0)) == greedy
    plain = await answer(engine, request("e", max_tokens=20))
    repeated = await answer(engine, request("d", max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0))
    assert len(set(repeated)) > len(set(plain))
    [first] = await answer(engine, request("f", max_tokens=1, steering=PLAIN))
    again = await answer(engine, request("g", (*PROMPT, first), max_tokens=1, steering=PLAIN, repetition_penalty=1e4))
    assert again[0] not in (*PROMPT, first), "the prompt counts as repeated"


async def test_logprobs_are_the_models_own(engine):
    scored = await collect(engine, request("f", steering=PLAIN, logprobs=3))
    table = logprobs_after((*PROMPT, *tokens(scored)))
    for position, event in enumerate(scored, len(PROMPT) - 1):
        values, ids = table[position].topk(3)
        assert event.logprobs.logprob == pytest.approx(float(table[position, event.token_id]), abs=1e-4)
        assert [token for token, _ in event.logprobs.top] == ids.tolist()
        assert [logprob for _, logprob in event.logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert event.logprobs.top[0] == (event.token_id, event.logprobs.logprob)
    alone = await collect(engine, request("g", steering=PLAIN, logprobs=0))
    assert [e.logprobs.top for e in alone] == [()] * 6
    assert [e.logprobs.logprob for e in alone] == pytest.approx([e.logprobs.logprob for e in scored], abs=1e-4)
    assert all(e.logprobs is None for e in await collect(engine, request("h")))


async def test_logprobs_are_those_before_temperature_and_truncation(engine):
    options = {"steering": PLAIN, "temperature": 2.0, "top_k": 5, "seed": 3, "max_tokens": 12}
    scored = await collect(engine, request("f", logprobs=2, **options))
    table = logprobs_after((*PROMPT, *tokens(scored)))
    wanted = [float(table[i, e.token_id]) for i, e in enumerate(scored, len(PROMPT) - 1)]
    assert [e.logprobs.logprob for e in scored] == pytest.approx(wanted, abs=1e-4)
    assert any(e.logprobs.top[0][0] != e.token_id for e in scored), "a sample that is not always the likeliest"


async def test_the_prompts_logprobs_come_with_the_first_event(engine):
    prompt = tuple(range(60, 108))
    table = logprobs_after(prompt)
    for name in ("new", "from the cache, if an engine dares"):
        events = await collect(engine, request(name, prompt, steering=PLAIN, prompt_logprobs=2, n=2, owner="scores"))
        assert [e.prompt_logprobs is not None for e in events] == [True] + [False] * 11
        first, *others = events[0].prompt_logprobs
        assert first is None and len(others) == len(prompt) - 1
        for position, (token, found) in enumerate(zip(prompt[1:], others, strict=True)):
            values, ids = table[position].topk(2)
            assert found.logprob == pytest.approx(float(table[position, token]), abs=1e-4)
            assert found.rank == 1 + int((table[position] > table[position, token]).sum())
            assert [t for t, _ in found.top] == ids.tolist()
            assert [logprob for _, logprob in found.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert (await collect(engine, request("none")))[0].prompt_logprobs is None


async def test_a_seed_fixes_the_answer_whatever_shares_the_batch(engine):
    async def sampled(seed):
        events = await collect(engine, request("a", n=2, temperature=1.0, seed=seed, max_tokens=12))
        return [tokens(events, index) for index in range(2)]

    alone = await sampled(11)
    crowd = [asyncio.create_task(collect(engine, request(str(i), (i + 1, 2), temperature=1.3))) for i in range(2)]
    assert await sampled(11) == alone
    await asyncio.gather(*crowd)
    assert await sampled(12) != alone
    assert alone[0] != alone[1], "completions of one request are not copies"


async def test_without_a_seed_answers_differ(engine):
    options = {"temperature": 1.5, "max_tokens": 20}
    assert await answer(engine, request("a", **options)) != await answer(engine, request("a", **options))
