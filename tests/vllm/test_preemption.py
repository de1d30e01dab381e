"""A cache too small for all to grow: vLLM itself preempts in mid answer, and the answer goes on under the vector that it began with."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.vllm.exact import (
    ASK,
    OWN,
    OWN_LAST,
    SAME,
    SAME_LAST,
    SHUT,
    answers,
    assert_exact,
    block_bytes,
    num_cached,
    request,
    running,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")
CONFIGURATIONS = {
    "cached": {"max_batched_tokens": 64},
    "uncached": {"max_batched_tokens": 64, "prefix_cache": False},
    "one pass": {"one_pass": True},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=CONFIGURATIONS)
async def small(request):
    """One with 11 blocks for 352 tokens."""
    async with running("own", "same", kv_cache_bytes=12 * block_bytes(), **CONFIGURATIONS[request.param]) as engine:
        yield engine


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
async def test_answers_that_are_preempted(small, prompts, known):
    """Twice: of what is known, all runs begin at once."""
    kinds = [(OWN,), (OWN_LAST,), (), (ASK,), (SHUT,), (SAME,), (OWN, SAME_LAST)]
    requests = [request(str(i), prompts(80, i, common=0), *kind, max_tokens=40) for i, kind in enumerate(kinds)]
    if known:
        await answers(small, requests)
    before = small.stats().num_preemptions
    assert_exact(await answers(small, requests), requests)
    assert small.stats().num_preemptions > before


async def test_completions_of_one_prompt_that_are_preempted(small, prompts):
    requests = [
        request("steered", prompts(60, 1, common=0), OWN, max_tokens=60, n=4),
        request("plain", prompts(60, 2, common=0), max_tokens=60, n=4),
    ]
    before = small.stats().num_preemptions
    assert_exact(await answers(small, requests), requests)
    assert small.stats().num_preemptions > before


async def test_a_prompt_that_ends_in_a_block_of_an_answer_that_was_preempted(small, prompts):
    """The same tokens and the same vector, but another place where the answer begins."""
    first = request("first", prompts(80, 1, common=0), SAME_LAST, max_tokens=30)
    others = [request(str(i), prompts(80, i, common=0), max_tokens=40) for i in range(2, 5)]
    found = await answers(small, [*others, first])
    assert_exact(found, [first, *others])
    whole = *first.prompt_token_ids, *found["first"].tokens()
    for length in (110, 97, 96, 81):
        requests = [request("then", whole[:length], SAME_LAST)]
        found = await answers(small, requests)
        assert_exact(found, requests)
        assert num_cached(found["then"]) == 0
