"""One-pass mode: the workers decide and steer amid the prompt's only pass, which is not cut, and shares its beginning with none."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import torch

from server.engine.base import GenerationError, GenerationRequest
from server.engine.vllm.model import ProfileDecider
from steering.decision import ProfileActivation, SteeringOptions
from steering.profile import SteeringProfile
from tests.parity.oracle import gate_and_vector
from tests.running_vllm import vllm_model
from tests.tiny import tiny_profile
from tests.vllm.exact import (
    ASK,
    COMPILED,
    NAMES,
    NOTHING,
    OWN,
    OWN_LAST,
    SAME,
    SHADOW,
    SHUT,
    answers,
    assert_exact,
    full_blocks,
    mixed,
    num_cached,
    request,
    running,
)
from tests.vllm.test_exactness import SETS, check_prompt_logprobs

pytestmark = pytest.mark.asyncio(loop_scope="session")
CONFIGURATIONS = {
    "eager": {},
    "compiled": {"flags": COMPILED},
    "two ranks": {"tensor_parallel_size": 2},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=CONFIGURATIONS)
async def engine(request):
    async with running(*NAMES, one_pass=True, max_batched_tokens=256, **CONFIGURATIONS[request.param]) as engine:
        yield engine


async def test_a_mixed_batch_twice(engine, prompts):
    """More prompts than a step takes whole; the second time each finds itself."""
    requests = mixed(prompts)
    assert_exact(await answers(engine, requests), requests)
    found = await answers(engine, requests)
    assert_exact(found, requests)
    for r in requests:
        assert num_cached(found[r.request_id]) == full_blocks(r), r.request_id


async def test_the_same_prompt_asked_otherwise(engine, prompts):
    """Whatever was kept of it is of another vector, even where only its beginning is the same."""
    asks = [(OWN,), (OWN_LAST,), (), (ASK,), (SHUT,), (replace(OWN, strength=-2.0),), (SAME,), (OWN, SAME), (OWN,)]
    for asked in asks:
        for length in (110, 97):
            requests = [request("r", prompts(110, 1)[:length], *asked)]
            assert_exact(await answers(engine, requests), requests)


@pytest.mark.parametrize("names", SETS, ids=" ".join)
async def test_every_kind_of_profile_and_several_at_one_and_at_more_layers(engine, prompts, names):
    asked = {
        positions: [ProfileActivation(n, 3.0, gate="open", positions=positions) for n in names]
        for positions in ("all", "last")
    }
    requests = [
        request("all", prompts(110, 1), *asked["all"]),
        request("last", prompts(97, 2), *asked["last"]),
        request("own gates, three times", prompts(60, 3), *(ProfileActivation(n, 3.0) for n in names), n=3),
        request("plain", prompts(96, 4)),
    ]
    assert_exact(await answers(engine, requests), requests)


async def test_only_one_pass_is_run(engine, prompts, monkeypatch):
    submit, runs = engine._submit, []

    async def noted(*args, **options):
        runs.append(args)
        return await submit(*args, **options)

    monkeypatch.setattr(engine, "_submit", noted)
    requests = mixed(prompts)
    await answers(engine, requests)
    assert len(runs) == len(requests)


async def test_a_request_alone_that_is_not_steered_is_the_plain_one_bit_for_bit(engine, prompts):
    shut = prompts.whose_gate(False, 101)
    asks = {"plain": (), "gate shut": (ASK,), "closed": (SHUT,), "strength 0": (NOTHING,), "shadow": (SHADOW,)}
    requests = [replace(request(name, shut, *a, max_tokens=8), cache_owner=name) for name, a in asks.items()]
    found = [(await answers(engine, [r]))[r.request_id].numbers for r in requests]
    assert all(numbers == found[0] for numbers in found)


async def test_a_score_is_the_decision_that_an_answer_begins_with(engine, prompts):
    requests = mixed(prompts)
    found = await answers(engine, requests)
    for r in requests:
        scored, told = await engine.score(r), found[r.request_id].decision
        assert (scored.applied, scored.reason) == (told.applied, told.reason)
        assert [p.gate for p in scored.profiles] == pytest.approx([p.gate for p in told.profiles], rel=1e-4)


async def test_log_probabilities_of_prompts_are_the_steered_models(engine, prompts):
    options = {"prompt_logprobs": 4, "max_tokens": 2}
    requests = [
        request("all", prompts(110, 1), OWN, **options),
        request("last, three times", prompts(97, 2), OWN_LAST, n=3, **options),
        request("gate shut", prompts.whose_gate(False, 80), ASK, **options),
    ]
    for _ in ("cold", "warm"):
        found = await answers(engine, requests)
        assert_exact(found, requests)
        for r in requests:
            check_prompt_logprobs(found[r.request_id], r)


@pytest.mark.parametrize("first", [True, False], ids=["the first is", "the first is not"])
async def test_completions_of_one_prompt_that_are_not_steered_alike_end_the_request(prompts, monkeypatch, first):
    """Each is decided by itself: where a gate is all but shut, rounding may tell them apart."""
    read = ProfileDecider.read
    asked = itertools.count()

    def every_second(self, layer, states, options):
        found = read(self, layer, states, options)
        shut = read(self, layer, states, [_shut(o) for o in options])
        marked = [options[i].activations[0].strength == 2.5 for i in range(len(found))]
        return [s if m and next(asked) % 2 == first else f for f, s, m in zip(found, shut, marked, strict=True)]

    def _shut(options):
        return replace(options, activations=tuple(replace(a, gate="closed") for a in options.activations))

    monkeypatch.setattr(ProfileDecider, "read", every_second)
    async with running("own", one_pass=True) as engine:
        with pytest.raises(GenerationError) as failure:
            await answers(engine, [request("r", prompts(50, 1), replace(OWN, strength=2.5), n=3)])
        assert failure.value.code == "steering_lost"
        requests = [request("alike", prompts(50, 2), OWN, n=3)]
        assert_exact(await answers(engine, requests), requests)


def brittle_profile() -> SteeringProfile:
    """It overflows for about half of all prompts, of which the engine's own test of itself is none."""
    profile = tiny_profile(vllm_model(), name="brittle", strength=3.0)
    experts = profile.experts
    with torch.no_grad():
        states = vllm_model()(torch.tensor([range(1, 6)]), output_hidden_states=True).hidden_states[2][0, -1]
    away = -(states - experts.input_mean) / experts.input_std
    experts.hidden_weight[:], experts.hidden_bias[:] = 0.0, 0.0
    experts.hidden_weight[0] = 1e38 * away / away.norm()
    experts.output_weight[:, 0] = 1e3
    return profile


async def test_a_vector_that_is_not_finite_fails_its_request_alone(prompts):
    profile = brittle_profile()
    open_ = ProfileActivation("brittle", 3.0, gate="open")
    asks = [request(str(i), prompts(3, i, common=0), open_) for i in range(10)]
    finite = [bool(np.isfinite(vector_of(profile, r)).all()) for r in asks]
    watched = replace(asks[finite.index(False)], steering=SteeringOptions((replace(open_, strength=0.0),)))
    async with running(profile, "own", one_pass=True) as engine:
        good = [request("own", prompts(60, "own"), OWN), request("plain", prompts(70, "plain"))]
        found = await asyncio.gather(
            answers(engine, good),
            answers(engine, [watched]),
            *(answers(engine, [r]) for r in asks),
            return_exceptions=True,
        )
    assert_exact(found[0], good)
    assert found[1][watched.request_id].decision.reason == "non_finite"
    assert 0 < sum(finite) < len(finite)
    for outcome, sound in zip(found[2:], finite, strict=True):
        if sound:
            assert not isinstance(outcome, Exception)
        else:
            assert isinstance(outcome, GenerationError) and outcome.code == "steering_non_finite"
            assert outcome.decision.reason == "non_finite"


def vector_of(profile: SteeringProfile, r: GenerationRequest) -> np.ndarray:
    """By the formulas, in float64, as it is in float32."""
    with torch.no_grad():
        states = vllm_model()(torch.tensor([r.prompt_token_ids]), output_hidden_states=True).hidden_states
    with np.errstate(over="ignore"):
        return gate_and_vector(profile, states[profile.layer + 1][0, -1])[1].astype(np.float32)
