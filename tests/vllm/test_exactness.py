"""vLLM cuts prompts into chunks, caches, batches, compiles and spreads over ranks: none of it changes a steered or an unsteered
answer. Each test runs in every one of `exact.CONFIGURATIONS`."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

import pytest

from server.engine.base import GenerationError, GenerationRequest
from steering.decision import ProfileActivation
from tests.engine import Answer
from tests.parity.oracle import prompt_table
from tests.running_vllm import vllm_model
from tests.vllm.exact import (
    ASK,
    KINDS,
    NOTHING,
    OWN,
    OWN_LAST,
    SAME,
    SAME_LAST,
    SHADOW,
    SHARED,
    SHUT,
    TOLERANCE,
    answers,
    arriving_together,
    assert_exact,
    forget,
    full_blocks,
    mixed,
    num_cached,
    profile_of,
    request,
    running,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")
CACHES = ("cold", "warm", "warm, decisions forgotten", "after a steered request", "after an unsteered request")
SETS = [
    *[(kind,) for kind in KINDS],
    ("own2",),
    ("own3",),
    ("own", "same"),
    ("own", "own2"),
    ("same", "own3"),
    ("own", "equal2", "own3"),
    ("layered", "own2"),
]


@pytest.mark.parametrize("cache", CACHES)
async def test_a_mixed_batch(engine, prompts, cache):
    requests = mixed(prompts)
    if cache.startswith("warm"):
        assert_exact(await answers(engine, requests), requests)
        if cache.endswith("forgotten"):
            forget(engine)
    elif cache != "cold":
        steered = (ProfileActivation("same", 2.0, gate="open"),) if cache == "after a steered request" else ()
        await answers(engine, [request("earlier", prompts(75, "earlier"), *steered, max_tokens=1)])
    found = await answers(engine, requests)
    assert_exact(found, requests)
    for r in requests:
        answer = found[r.request_id]
        if cache == "warm":
            assert num_cached(answer) == full_blocks(r), r.request_id
        if cache == "after an unsteered request" and not answer.decision.applied:
            assert num_cached(answer) >= min(SHARED, full_blocks(r)), r.request_id


async def test_who_comes_and_who_goes_while_others_are_answered(engine, prompts):
    """Three times the engine's rows, most of them steered, come at any time; a third of them is given up amid its answer."""
    luck = random.Random(0)
    kinds = [(OWN,), (OWN_LAST,), (SAME,), (ASK,), (), (OWN, SAME_LAST)]
    requests = [request(f"{i}", prompts(40 + i, i), *kinds[i % 6], max_tokens=8) for i in range(42)]
    found = {}

    async def come(r: GenerationRequest, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if int(r.request_id) % 3:
            found.update(await answers(engine, [r]))
            return
        events = engine.generate(r)
        async for _ in events:
            break
        await events.aclose()

    await asyncio.gather(*(come(r, luck.random() / 2) for r in requests))
    assert_exact(found, [r for r in requests if r.request_id in found])
    requests = mixed(prompts)
    assert_exact(await answers(engine, requests), requests)


async def test_prompts_that_come_one_token_at_a_time(prompts):
    """Three that answer leave a step of four tokens one for a prompt."""
    answering = [
        request(f"answering {i}", prompts(4, i), *kind, max_tokens=90) for i, kind in enumerate([(), (OWN,), (ASK,)])
    ]
    reading = [
        request(f"reading {i}", prompts(12, i), *kind) for i, kind in enumerate([(OWN_LAST,), (SAME,), (OWN,), ()])
    ]
    async with running("own", "same", max_num_seqs=4, max_batched_tokens=4) as engine:
        assert_exact(await answers(engine, [*answering, *reading]), [*answering, *reading])


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("names", SETS, ids=" ".join)
async def test_every_kind_of_profile_and_several_at_one_and_at_more_layers(engine, prompts, names, positions):
    """Twice, so that the second time all is warm."""
    forced = [ProfileActivation(name, 3.0, gate="open", positions=positions) for name in names]
    other = [ProfileActivation(n, 2.0, gate="open", positions=("all", "last")[i % 2]) for i, n in enumerate(names)]
    requests = [
        request("forced", prompts(110, 1), *forced),
        request("in other ways", prompts(97, 2), *other[::-1]),
        request("own gates", prompts(101, 3), *(ProfileActivation(n, 3.0, positions=positions) for n in names)),
        request("plain", prompts(96, 4)),
    ]
    for _ in ("cold", "warm"):
        assert_exact(await answers(engine, requests), requests)


async def test_together_as_alone(engine, prompts):
    requests = mixed(prompts)
    together = await answers(engine, requests)
    for r in requests:
        forget(engine)
        alone = (await answers(engine, [replace(r, cache_owner="alone")]))[r.request_id]
        for index in range(r.n):
            assert alone.tokens(index) == together[r.request_id].tokens(index)
            assert alone.logprobs(index) == pytest.approx(together[r.request_id].logprobs(index), abs=TOLERANCE)


# -- who is not steered ------------------------------------------------------------------------------------------------------


async def test_a_request_alone_that_is_not_steered_is_the_plain_one_bit_for_bit(engine, prompts):
    """Each finds a cache of its own, so all are cut and computed alike."""
    shut = prompts.whose_gate(False, 101)
    asks = {
        "plain": (),
        "again": (),
        "gate shut": (ASK,),
        "closed": (SHUT,),
        "strength 0": (NOTHING,),
        "shadow": (SHADOW,),
    }

    async def numbers(name, *activations):
        r = replace(request(name, shut, *activations, max_tokens=8), cache_owner=name)
        return (await answers(engine, [r]))[name].numbers

    found = {name: await numbers(name, *activations) for name, activations in asks.items()}
    assert all(answer == found["plain"] for answer in found.values()), [n for n in found if found[n] != found["plain"]]
    assert await numbers("hardly steered", replace(OWN, strength=1e-3)) != found["plain"]


async def test_in_a_batch_who_is_not_steered_is_the_plain_one_bit_for_bit(engine, prompts):
    """The same schedule twice, once with steering off for all who are not steered."""
    steered = [
        request("all", prompts(110, 1, common=0), OWN),
        request("last", prompts(97, 2, common=0), OWN_LAST),
        request("two", prompts(60, 3, common=0), OWN, SAME_LAST),
    ]
    shut = [
        request("gate shut", prompts.whose_gate(False, 101), ASK),
        request("closed", prompts(120, 4, common=0), SHUT),
        request("shadow", prompts(64, 5, common=0), SHADOW),
        request("strength 0", prompts(33, 6, common=0), NOTHING),
    ]

    async def numbers(owner, others):
        await answers(engine, [replace(r, cache_owner=owner) for r in steered])  # what is known needs one pass
        requests = [replace(r, cache_owner=owner) for r in [*steered[:2], *others, *steered[2:]]]
        async with arriving_together(engine, len(requests)):
            return {name: answer.numbers for name, answer in (await answers(engine, requests)).items()}

    with_steering = await numbers("with", shut)
    without = await numbers("without", [request(r.request_id, r.prompt_token_ids) for r in shut])
    assert with_steering == without
    hardly = [replace(shut[0], steering=request("", (1,), replace(OWN, strength=1e-3)).steering), *shut[1:]]
    forced = await numbers("hardly", hardly)
    assert [name for name in forced if forced[name] != without[name]] == ["gate shut"]


# -- decisions ---------------------------------------------------------------------------------------------------------------


async def test_a_score_is_the_decision_that_an_answer_begins_with(engine, prompts):
    requests = mixed(prompts)
    found = await answers(engine, requests)
    for r in requests:
        forget(engine)
        scored, told = await engine.score(r), found[r.request_id].decision
        assert (scored.applied, scored.reason) == (told.applied, told.reason)
        for a, b in zip(scored.profiles, told.profiles, strict=True):
            assert (a.name, a.fired, a.reason) == (b.name, b.fired, b.reason)
            assert (a.gate, a.vector_norm, a.relative_norm) == pytest.approx(
                (b.gate, b.vector_norm, b.relative_norm), rel=1e-4
            )


async def test_a_decision_is_remembered_and_then_costs_no_pass(engine, prompts, monkeypatch):
    requests = [r for r in mixed(prompts) if r.steering.activations]
    first = await answers(engine, requests)
    submit, orders = engine._submit, []

    async def noted(request, order, *args, **options):
        orders.append(order)
        return await submit(request, order, *args, **options)

    monkeypatch.setattr(engine, "_submit", noted)
    again = await answers(engine, requests)
    assert len(orders) == len(requests) and not any(order.read for order in orders if order is not None)
    assert_exact(again, requests)
    for r in requests:
        assert again[r.request_id].decision == replace(first[r.request_id].decision, compute_ms=0.0)


async def test_a_vector_that_is_not_finite_fails_its_request_alone(engine, prompts):
    bad = request("bad", prompts(50, 1), ProfileActivation("own2", 3.0, gate="open"))
    watched = request("watched", prompts(50, 2), ProfileActivation("own2", 0.0, gate="open"))
    good = mixed(prompts)
    bias = profile_of("own2").experts.output_bias
    kept = bias.clone()
    try:
        bias.fill_(3e38)
        found, seen, failure = await asyncio.gather(
            answers(engine, good), answers(engine, [watched]), answers(engine, [bad]), return_exceptions=True
        )
    finally:
        bias.copy_(kept)
        forget(engine)
    assert isinstance(failure, GenerationError) and failure.code == "steering_non_finite"
    assert failure.decision.reason == seen["watched"].decision.reason == "non_finite"
    assert_exact(found, good)


# -- prompts' log-probabilities ----------------------------------------------------------------------------------------------

TOP = 4


@pytest.mark.parametrize("cache", ["cold", "warm"])
async def test_log_probabilities_of_prompts_are_the_steered_models(engine, prompts, cache):
    options = {"prompt_logprobs": TOP, "max_tokens": 2}
    requests = [
        request("all", prompts(110, 1), OWN, **options),
        request("last", prompts(97, 2), OWN_LAST, **options),
        request("plain, three times", prompts(96, 3), n=3, **options),
        request("all, three times", prompts(65, 4), SAME, n=3, **options),
        request("gate opens", prompts.whose_gate(True, 81), ASK, **options),
        request("gate shut", prompts.whose_gate(False, 80), ASK, **options),
        request("one token", prompts(1, 5), OWN, **options),
        request("not asked", prompts(70, 6), OWN),
    ]
    if cache == "warm":
        await answers(engine, requests)
    found = await answers(engine, requests)
    assert_exact(found, requests)
    for r in requests[:-1]:
        check_prompt_logprobs(found[r.request_id], r)
    assert prompt_logprobs_of(found["not asked"]) == []


def prompt_logprobs_of(answer: Answer) -> list:
    return [e.prompt_logprobs for c in answer.completions for e in c if e.prompt_logprobs is not None]


def check_prompt_logprobs(answer: Answer, r: GenerationRequest) -> None:
    """Own log-probability, rank and the likeliest tokens at each position, against the oracle's (P, V) table; told once."""
    steering = [(profile_of(a.profile), a) for a in r.steering.activations]
    table = prompt_table(vllm_model(), list(r.prompt_token_ids), steering)
    [entries] = prompt_logprobs_of(answer)
    assert len(entries) == len(r.prompt_token_ids) and entries[0] is None
    for token, row, entry in zip(r.prompt_token_ids[1:], table, entries[1:], strict=False):
        own = float(row[token])
        assert entry.logprob == pytest.approx(own, abs=TOLERANCE)
        assert int((row > own + TOLERANCE).sum()) < entry.rank <= 1 + int((row > own - TOLERANCE).sum())
        ids, values = zip(*entry.top, strict=True)
        assert values == pytest.approx(row.topk(TOP).values.tolist(), abs=TOLERANCE)
        assert values == pytest.approx(row[list(ids)].tolist(), abs=TOLERANCE)


# -- what the salt must tell apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param((SAME,), (SAME_LAST,), id="all, then last"),
        pytest.param((SAME_LAST,), (SAME,), id="last, then all"),
        pytest.param((OWN, SAME_LAST), (OWN_LAST, SAME), id="the other one at the prompt"),
        pytest.param((SAME,), (ProfileActivation("same", 2.0, gate="open"),), id="another strength"),
        pytest.param((SAME,), (ProfileActivation("same", -3.0, gate="open"),), id="the other way"),
    ],
)
async def test_the_same_prompt_steered_otherwise(engine, prompts, first, then):
    for activations in (first, then, first):
        requests = [request("r", prompts(110, 1), *activations)]
        assert_exact(await answers(engine, requests), requests)


@pytest.mark.parametrize(
    ("first", "then"), list(itertools.permutations([(), ("same",), ("equal2",), ("same", "equal2")], 2))
)
async def test_the_same_vector_at_another_layer(engine, prompts, first, then):
    for names, length in ((first, 75), (then, 110), (first, 97)):
        requests = [request("r", prompts(length, 1), *(ProfileActivation(n, 3.0, gate="open") for n in names))]
        assert_exact(await answers(engine, requests), requests)


@pytest.mark.parametrize("activation", [SAME, SAME_LAST, OWN_LAST], ids=["same", "same, last", "own, last"])
async def test_prompts_that_end_at_every_side_of_a_block(engine, prompts, activation):
    longest = prompts(129, 1)
    for length in (129, 97, 110, 129, 95, 96, 64, 65, 66):
        requests = [request("r", longest[:length], activation)]
        assert_exact(await answers(engine, requests), requests)


@pytest.mark.parametrize(
    ("activations", "cached"),
    [((), 96), ((SAME,), 96), ((SAME_LAST,), 0), ((OWN, SAME_LAST), 0)],
    ids=["plain", "one vector", "one vector, last", "two vectors"],
)
async def test_an_answer_that_is_sent_back_as_a_prompt(engine, prompts, activations, cached):
    """A conversation: of the second prompt, which is the first with its answer, the cache holds what it may, and no more."""
    first = request("first", prompts(80, 1), *activations, max_tokens=30)
    found = await answers(engine, [first])
    assert_exact(found, [first])
    whole = *first.prompt_token_ids, *found["first"].tokens()
    for then in ((*whole, 7, 8, 9), whole[:97]):
        requests = [request("then", then, *activations)]
        found = await answers(engine, requests)
        assert_exact(found, requests)
        assert num_cached(found["then"]) == cached
