"""A profile with a vector for each of several layers: added at every one of them, decided and reported once."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from server.engine.native.sequence import SteeringState
from steering.architecture import decoder_layers
from steering.decision import ProfileActivation
from steering.experts import LayeredVectors
from tests.engine import answers, asked, reference_model, tiny_core, tiny_decoder
from tests.tiny import FAMILIES, layered_profile, tiny_profile

LAYERS = {"all": (0, (1, 2, 3)), "with a gap, to the last": (1, (3,)), "with gaps": (0, (2,))}
PROMPT = [5, 9, 2, 14, 33, 7, 21]
NUM_TOKENS = 6


def profile_of(layers="all", family="llama", name="p"):
    first, further = LAYERS[layers]
    return layered_profile(reference_model(family), first, further, name=name, strength=2.0)


@contextlib.contextmanager
def hooked(model, vectors):
    """The model with a vector added to the output of each of some layers, at every position, by hooks of its own."""

    def adding(vector):
        def hook(module, args, output):
            return output + vector if isinstance(output, torch.Tensor) else (output[0] + vector, *output[1:])

        return hook

    handles = [decoder_layers(model)[layer].register_forward_hook(adding(v)) for layer, v in vectors.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def generated(family, vectors):
    """Greedy tokens and log-probabilities of the hooked model, whole at each step."""
    tokens, logprobs = list(PROMPT), []
    with hooked(reference_model(family), vectors) as model:
        for _ in range(NUM_TOKENS):
            table = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().log_softmax(-1)
            tokens.append(int(table.argmax()))
            logprobs.append(float(table.max()))
    return tokens[len(PROMPT) :], logprobs


def run(profiles, *activations, family="llama", **options):
    request = asked("r", PROMPT, *activations, max_tokens=NUM_TOKENS)
    return answers(tiny_core(profiles, family, tiny_decoder(family), **options), [request])["r"]


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("strength", [2.0, -0.5])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_gets_its_vector(family, layers, strength, paged):
    profile = profile_of(layers, family)
    wanted = dict(zip(profile.manifest.layers, strength * profile.experts.vectors, strict=True))
    found = run([profile], ProfileActivation("p", strength), family=family, paged=paged)
    tokens, logprobs = generated(family, wanted)
    assert found.tokens() == tokens and found.logprobs() == pytest.approx(logprobs, abs=2e-4)
    for left_out in wanted:
        fewer = generated(family, {layer: v for layer, v in wanted.items() if layer != left_out})
        assert found.logprobs() != pytest.approx(fewer[1], abs=2e-4), f"layer {left_out}'s vector does something"


def test_a_profile_is_decided_once_and_reported_by_its_first_site():
    profile, activation = profile_of("with gaps"), ProfileActivation("p", 2.0)
    found = run([profile, tiny_profile(reference_model(), 2, name="q")], activation, ProfileActivation("q", 1.0))
    decision, _ = found.decision.profiles
    assert (decision.name, decision.layer, decision.gate, decision.fired) == ("p", 0, 1.0, True)
    first = profile.experts.vectors[0].norm()
    with torch.no_grad():
        state = reference_model()(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[1][0, -1]
    assert decision.vector_norm == pytest.approx(float(first), rel=1e-5)
    assert decision.relative_norm == pytest.approx(float(2 * first / state.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (ProfileActivation("p", 2.0, gate="closed"), "forced_closed"),
        (ProfileActivation("p", 0.0), "strength_zero"),
        (ProfileActivation("p", 2.0, shadow=True), "shadow"),
    ],
)
def test_no_layer_adds_anything_where_the_first_does_not(activation, reason):
    found, plain = run([profile_of()], activation), run([profile_of()])
    assert found.decision.reason == reason and found.numbers == plain.numbers


def test_a_further_layers_vector_that_is_not_finite_fails_the_request():
    """It is not answered with some of its layers steered."""
    profile = profile_of()
    profile.experts.vectors[2] = 1e30  # finite, its length in float32 is not
    request = asked("r", PROMPT, ProfileActivation("p", 2.0))
    watched = asked("watched", PROMPT, ProfileActivation("p", 0.0))
    results = tiny_core([profile]).run([request, watched])
    [failure] = results["r"]
    assert failure.code == "steering_non_finite"
    [decision] = results["watched"][0].decision.profiles
    assert decision.reason == "non_finite"


def check_the_cache_tells_further_layers_apart() -> None:
    """Two profiles that are alike at their first layer, and not at their second."""
    one = profile_of("with gaps", name="p")
    vectors = torch.stack([one.experts.vectors[0], -one.experts.vectors[1]])
    other = replace(one, manifest=replace(one.manifest, name="other"), experts=LayeredVectors(vectors))
    prompt = [5 + i % 200 for i in range(110)]
    core = tiny_core([one, other], max_model_len=128, max_batched_tokens=32)
    asks = {name: asked(name, prompt, ProfileActivation(name, 2.0)) for name in ("p", "other")}
    fresh = {
        name: answers(tiny_core([one, other], max_model_len=128), [ask])[name].logprobs() for name, ask in asks.items()
    }
    assert fresh["p"] != pytest.approx(fresh["other"], abs=1e-3)
    for name in ("p", "other", "p"):
        found = answers(core, [asks[name]])[name]
        assert found.logprobs() == pytest.approx(fresh[name], abs=2e-4), "poisoned"
    lower, upper = core.stats().prefix_cache_hits
    assert lower == 2 * 96 and upper >= 3 * 96, "the second time above the first site, the third above both"


def test_the_prefix_cache_tells_profiles_apart_that_differ_at_a_further_layer():
    check_the_cache_tells_further_layers_apart()


def test_the_prefix_cache_tells_profiles_apart_that_differ_at_a_further_layer__can_fail(monkeypatch):
    salt = SteeringState.salt
    monkeypatch.setattr(SteeringState, "salt", lambda self, segment: salt(self, min(segment, 1)))
    with pytest.raises(AssertionError, match="poisoned"):
        check_the_cache_tells_further_layers_apart()
