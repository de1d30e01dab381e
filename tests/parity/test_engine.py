"""The native engine against transformers: same tokens, same numbers, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch

from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native.core import EngineCore
from server.engine.native.runner import Runner
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import SequenceGroup
from steering.decision import ProfileActivation, SteeringDecision, SteeringOptions
from tests.parity.oracle import two_pass
from tests.tiny import FAMILIES, tiny_model, tiny_profile

PROMPTS = [[5, 9, 2, 14, 33, 7, 21], [40, 41, 42], [8, 3, 77, 12, 90, 61, 4, 55, 23, 19, 11, 2], [100, 7], [1]]


def run(model, profiles, requests, *, max_num_seqs=8):
    """All requests through the core, arriving together: {request id: ([(token, logprobs)] per completion, decision)}."""
    core = EngineCore(Runner(model, profiles, max_num_seqs, 64), Scheduler(max_num_seqs, 256, 64), 64)
    found = {}
    for request in requests:
        found[request.request_id] = ([[] for _ in range(request.n)], [])
        core.add(SequenceGroup.of(request, lambda _: None))
    with core.runner.attached():
        while core.has_work:
            for group, event in core.step():
                assert not isinstance(event, Exception), event
                completions, decisions = found[group.request.request_id]
                completions[event.index].append((event.token_id, event.logprobs))
                if event.decision is not None:
                    decisions.append(event.decision)
    assert core.stats().num_running == 0
    assert all(len(decisions) == 1 for _, decisions in found.values())
    return {key: (completions, decisions[0]) for key, (completions, decisions) in found.items()}


def request(name, prompt, *activations, max_tokens=8, n=1, **sampling):
    options = SamplingOptions(max_tokens=max_tokens, **{"temperature": 0.0, "logprobs": 5} | sampling)
    return GenerationRequest(name, tuple(prompt), options, SteeringOptions(tuple(activations)), n)


def tokens(result):
    return [token for token, _ in result[0][0]]


def logprobs(result):
    return [logprob.logprob for _, logprob in result[0][0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family):
    model = tiny_model(family)
    wanted = [
        model.generate(
            torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(p) :].tolist()
        for p in PROMPTS
    ]  # fmt: skip
    found = run(model, [], [request(str(i), p, max_tokens=12) for i, p in enumerate(PROMPTS)])
    assert [tokens(found[str(i)]) for i in range(len(PROMPTS))] == wanted


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_two_passes(family, positions):
    model = tiny_model(family)
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    activation = ProfileActivation("p", 3.0, gate="open", positions=positions)
    plain = run(model, [profile], [request(str(i), p) for i, p in enumerate(PROMPTS)])
    found = run(model, [profile], [request(str(i), p, activation) for i, p in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        wanted_tokens, wanted_logprobs, _ = two_pass(model, prompt, 8, [(profile, activation)])
        assert tokens(found[str(i)]) == wanted_tokens
        assert logprobs(found[str(i)]) == pytest.approx(wanted_logprobs, abs=2e-4)
        assert logprobs(plain[str(i)]) != pytest.approx(wanted_logprobs, abs=2e-4)  # the vector does something


def test_the_gate_decides_as_the_oracle_says():
    model = tiny_model("llama")
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    activation = ProfileActivation("p", 3.0)
    prompts = [[i, (7 * i) % 90 + 1, (3 * i) % 50 + 1] for i in range(1, 25)]
    found = run(model, [profile], [request(str(i), p, activation) for i, p in enumerate(prompts)])
    gates = []
    for i, prompt in enumerate(prompts):
        wanted_tokens, _, [gate] = two_pass(model, prompt, 8, [(profile, activation)])
        gates.append(gate)
        [decision] = found[str(i)][1].profiles
        assert decision.gate == pytest.approx(gate, abs=1e-3)
        assert (decision.reason, decision.fired) == (("gate_open", True) if gate else ("gate_closed", False))
        assert tokens(found[str(i)]) == wanted_tokens
    assert 0 in gates and any(gates), "the profile must open for some of the prompts and not for others"


@pytest.mark.parametrize("layers", [(1, 1), (0, 2)])
def test_two_profiles_act_on_one_request(layers):
    model = tiny_model("llama")
    profiles = [tiny_profile(model, layer, name=f"p{i}", strength=2.0, seed=i) for i, layer in enumerate(layers)]
    activations = [
        ProfileActivation("p0", 2.0, gate="open", positions="all"),
        ProfileActivation("p1", -1.5, gate="open", positions="last"),
    ]
    found = run(model, profiles, [request(str(i), p, *activations) for i, p in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        wanted, wanted_logprobs, _ = two_pass(model, prompt, 8, list(zip(profiles, activations, strict=True)))
        assert tokens(found[str(i)]) == wanted
        assert logprobs(found[str(i)]) == pytest.approx(wanted_logprobs, abs=2e-4)
        assert [p.name for p in found[str(i)][1].profiles] == ["p0", "p1"]


def test_batched_equals_alone():
    model = tiny_model("llama")
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    kinds = [
        (ProfileActivation("p", 3.0, gate="open"),),
        (),
        (ProfileActivation("p", 1.0, gate="open", positions="last"),),
    ]
    requests = [request(str(i), p, *kinds[i % 3], max_tokens=5 + 3 * i) for i, p in enumerate(PROMPTS)]
    together = run(model, [profile], requests)
    squeezed = run(model, [profile], requests, max_num_seqs=2)  # they join and leave between steps
    for r in requests:
        alone = run(model, [profile], [r])[r.request_id]
        for other in (together[r.request_id], squeezed[r.request_id]):
            assert tokens(other) == tokens(alone)
            assert logprobs(other) == pytest.approx(logprobs(alone), abs=1e-4)


@pytest.mark.parametrize(
    "shut",
    [
        ProfileActivation("p", 3.0, gate="closed"),
        ProfileActivation("p", 0.0, gate="open"),
        ProfileActivation("p", 3.0, gate="open", shadow=True),
    ],
    ids=["gate closed", "strength zero", "shadow"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_row_that_is_not_steered_is_unsteered_bit_for_bit_in_a_mixed_batch(family, shut):
    model = tiny_model(family)
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    steered = ProfileActivation("p", 3.0, gate="open")
    mixed = [request(str(i), p, shut if i % 2 else steered) for i, p in enumerate(PROMPTS)]
    plain = [request(str(i), p) for i, p in enumerate(PROMPTS)]
    with_steering, without = run(model, [profile], mixed), run(model, [profile], plain)
    for i in range(len(PROMPTS)):
        same = with_steering[str(i)][0] == without[str(i)][0]  # tokens and five log-probabilities each, exactly
        assert same if i % 2 else not same
    assert not with_steering["1"][1].applied and with_steering["0"][1].applied


def test_shadow_and_strength_zero_still_report_the_gate():
    model = tiny_model("llama")
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    activations = {
        "gate_open": ProfileActivation("p", 3.0, gate="auto"),
        "strength_zero": ProfileActivation("p", 0.0),
        "shadow": ProfileActivation("p", 3.0, shadow=True),
        "forced_closed": ProfileActivation("p", 3.0, gate="closed"),
        "forced_open": ProfileActivation("p", 3.0, gate="open"),
    }
    prompt = next(
        p for p in ([i, i + 1, i + 2] for i in range(1, 200))
        if two_pass(model, p, 1, [(profile, activations["gate_open"])])[2][0] == 1.0
    )  # fmt: skip
    found = run(model, [profile], [request(reason, prompt, a) for reason, a in activations.items()])
    for reason, (_, decision) in found.items():
        assert decision.reason == reason
        assert decision.applied == (reason in ("gate_open", "forced_open"))
        assert decision.profiles[0].fired == (reason != "forced_closed")
        assert decision.profiles[0].energy_ratio is not None
        assert decision.profiles[0].energy_ratio == pytest.approx(
            found["gate_open"][1].profiles[0].energy_ratio, abs=1e-5
        )
    assert found["gate_open"][1].profiles[0].relative_norm > 0


def test_n_completions_share_one_prefill_and_one_decision():
    model = tiny_model("llama")
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    activation = ProfileActivation("p", 3.0, gate="open")
    found = run(model, [profile], [request("n", PROMPTS[0], activation, n=3), request("1", PROMPTS[0], activation)])
    for completion in found["n"][0]:
        assert [t for t, _ in completion] == tokens(found["1"])


def test_a_seed_fixes_the_answer_whatever_shares_the_batch():
    model = tiny_model("llama")
    sampled = {"temperature": 1.0, "seed": 11}
    alone = run(model, [], [request("a", PROMPTS[0], n=2, **sampled)])["a"][0]
    crowd = [request(str(i), p, temperature=1.3) for i, p in enumerate(PROMPTS)]
    amid = run(model, [], [*crowd, request("a", PROMPTS[0], n=2, **sampled)])["a"][0]
    assert [[t for t, _ in c] for c in alone] == [[t for t, _ in c] for c in amid]
    other = run(model, [], [request("a", PROMPTS[0], n=2, temperature=1.0, seed=12)])["a"][0]
    assert [[t for t, _ in c] for c in alone] != [[t for t, _ in c] for c in other]


def test_a_vector_that_is_not_finite_fails_its_request_alone():
    model = tiny_model("llama")
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    broken = tiny_profile(model, 1, name="broken", strength=3.0)
    broken.experts.output_bias.fill_(3e38)
    core = EngineCore(Runner(model, [profile, broken], 4, 64), Scheduler(4, 256, 64), 64)
    good = request("good", PROMPTS[0], ProfileActivation("p", 3.0, gate="open"))
    bad = request("bad", PROMPTS[1], ProfileActivation("broken", 3.0, gate="open"))
    watched = request("watched", PROMPTS[1], ProfileActivation("broken", 0.0, gate="open"))
    results = {"good": [], "bad": [], "watched": []}
    for r in (good, bad, watched):
        core.add(SequenceGroup.of(r, lambda _: None))
    with core.runner.attached():
        while core.has_work:
            for group, event in core.step():
                results[group.request.request_id].append(event)
    [failure] = results["bad"]
    assert failure.code == "steering_non_finite"
    assert [e.token_id for e in results["good"]] == tokens(run(model, [profile], [good])["good"])
    assert results["watched"][0].decision.reason == "non_finite" and len(results["watched"]) == 8


def test_score_decides_as_generation_does_and_generates_nothing():
    model = tiny_model("llama")
    profile = tiny_profile(model, 1, name="p", strength=3.0)
    asked = request("r", PROMPTS[0], ProfileActivation("p", 3.0))
    core = EngineCore(Runner(model, [profile], 4, 64), Scheduler(4, 256, 64), 64)
    core.add(SequenceGroup.of(asked, lambda _: None, score_only=True))
    with core.runner.attached():
        [(_, scored)] = core.step()
    assert isinstance(scored, SteeringDecision) and not core.has_work
    assert scored.profiles[0].gate == pytest.approx(run(model, [profile], [asked])["r"][1].profiles[0].gate, abs=1e-5)
