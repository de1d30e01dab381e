"""The vLLM engine's start-up proofs: each thing that an engine may do wrong ends them, and one that does all right passes."""

from __future__ import annotations

import pytest

from server.engine.base import EngineDeadError, EngineInfo, GenerationError, TokenEvent, TokenLogprobs
from server.engine.vllm.selftest import check_steering
from steering.errors import ModelError, ProfileError
from tests.engine import reference_model
from tests.tiny import layered_profile, tiny_profile

INFO = EngineInfo("vllm", "m", 64, 4, 320, 64, 4, "float32", "cpu")
LOST = GenerationError("vLLM's workers report nothing", "steering_lost")


def engine_that(shift):
    """One whose log-probability moves by `shift(activation)`, or that raises what it gives; and the activations it was asked for."""
    seen = []

    async def generate(request):
        moved = 0.0
        for activation in request.steering.activations:
            seen.append(activation)
            moved = shift(activation)
            if isinstance(moved, Exception):
                raise moved
        for _ in range(request.sampling.max_tokens):
            yield TokenEvent(0, 5, None, TokenLogprobs(-1.0 + moved))

    return generate, seen


async def test_an_engine_that_steers_passes_and_every_layer_is_tried():
    profile = layered_profile(reference_model(), name="p", strength=2.0)
    parts = profile.layers_alone()
    generate, seen = engine_that(lambda activation: activation.strength / 100)
    await check_steering(generate, INFO, [profile, *parts])
    assert [part.name for part in parts] == ["p, layer 1", "p, layer 2", "p, layer 3"]
    assert [(a.profile, a.strength) for a in seen] == [(p.name, s) for p in (profile, *parts) for s in (0.0, 8.0)]
    assert all(a.gate == "open" and a.version for a in seen)


async def test_a_vector_that_shows_at_another_strength_only_passes():
    profile = tiny_profile(reference_model(), name="p", strength=2.0)
    overflow = GenerationError("overflows", "non_finite_logits")
    weak, _ = engine_that(lambda a: 0.1 if a.strength > 1000 else 0.0)
    coarse, _ = engine_that(lambda a: overflow if a.strength > 2 else a.strength)
    for generate in (weak, coarse):
        await check_steering(generate, INFO, [profile])


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (lambda a: 0.0, "it changes nothing"),
        (lambda a: 0.1, "at strength 0 it changes answers"),
        (lambda a: LOST, "report nothing.*pip show finesteer-server"),
        (lambda a: LOST if a.strength else 0.0, "report nothing"),
        (lambda a: a.strength if a.profile != "p, layer 2" else 0.0, "'p, layer 2'.*it changes nothing"),
    ],
)
async def test_what_an_engine_does_wrong_is_said(shift, said):
    profile = layered_profile(reference_model(), name="p", strength=2.0)
    generate, _ = engine_that(shift)
    with pytest.raises(ProfileError, match=said):
        await check_steering(generate, INFO, [profile, *profile.layers_alone()])


async def test_an_engine_that_does_not_answer_at_all_is_not_the_profiles_fault():
    async def generate(request):
        raise EngineDeadError("vLLM failed")
        yield

    with pytest.raises(ModelError, match="the first request failed: vLLM failed"):
        await check_steering(generate, INFO, [])
