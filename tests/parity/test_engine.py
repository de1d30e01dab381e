"""The native engine against transformers: same tokens, same numbers, whatever shares the batch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from server.engine.base import GenerationError
from server.engine.native.sequence import SequenceGroup
from steering.decision import ProfileActivation, SteeringDecision
from tests.engine import DECODERS, answers, asked, reference_model, tiny_core, tiny_decoder
from tests.parity.oracle import two_pass
from tests.tiny import FAMILIES, PROFILES, tiny_model, tiny_profile

PROMPTS = [[5, 9, 2, 14, 33, 7, 21], [40, 41, 42], [8, 3, 77, 12, 90, 61, 4, 55, 23, 19, 11, 2], [100, 7], [1]]
OPEN = ProfileActivation("p", 3.0, gate="open")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_decoder = pytest.mark.parametrize("kind", DECODERS)
every_profile = pytest.mark.parametrize("made", PROFILES)
rows_and_pages = pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])


@functools.cache
def profile_of(family="llama", layer=1, name="p", **options):
    return tiny_profile(reference_model(family), layer, name=name, **{"strength": 3.0} | options)


def run(profiles, requests, family="llama", kind="fused", **options):
    """All requests through a new core, arriving together."""
    return answers(tiny_core(profiles, family, tiny_decoder(family, kind), **options), requests)


@functools.cache
def generated(family):
    """What transformers' own `generate` answers, greedily."""
    return [
        reference_model(family).generate(
            torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(p) :].tolist()
        for p in PROMPTS
    ]  # fmt: skip


@functools.cache
def steered_in_two_passes(family, activation):
    return [two_pass(reference_model(family), p, 8, [(profile_of(family), activation)])[:2] for p in PROMPTS]


@rows_and_pages
@every_decoder
@every_family
def test_greedy_equals_transformers_generate(family, kind, paged):
    requests = [asked(str(i), p, max_tokens=12) for i, p in enumerate(PROMPTS)]
    found = run([], requests, family, kind, paged=paged)
    assert [found[str(i)].tokens() for i in range(len(PROMPTS))] == generated(family)


@rows_and_pages
@every_decoder
@pytest.mark.parametrize("positions", ["all", "last"])
@every_family
def test_one_pass_equals_two_passes(family, positions, kind, paged):
    profile = profile_of(family)
    activation = replace(OPEN, positions=positions)
    plain = run([profile], [asked(str(i), p) for i, p in enumerate(PROMPTS)], family, kind, paged=paged)
    found = run([profile], [asked(str(i), p, activation) for i, p in enumerate(PROMPTS)], family, kind, paged=paged)
    for i, (wanted_tokens, wanted_logprobs) in enumerate(steered_in_two_passes(family, activation)):
        assert found[str(i)].tokens() == wanted_tokens
        assert found[str(i)].logprobs() == pytest.approx(wanted_logprobs, abs=2e-4)
        assert plain[str(i)].logprobs() != pytest.approx(wanted_logprobs, abs=2e-4)  # the vector does something


@rows_and_pages
@pytest.mark.parametrize("positions", ["all", "last"])
@every_profile
def test_one_pass_equals_two_passes_for_every_kind_of_profile(made, positions, paged):
    profile = PROFILES[made](reference_model(), 1, name="p", strength=3.0)
    activation = replace(OPEN, positions=positions)
    plain = run([profile], [asked(str(i), p) for i, p in enumerate(PROMPTS)], paged=paged)
    found = run([profile], [asked(str(i), p, activation) for i, p in enumerate(PROMPTS)], paged=paged)
    for i, p in enumerate(PROMPTS):
        wanted_tokens, wanted_logprobs, _ = two_pass(reference_model(), p, 8, [(profile, activation)])
        assert found[str(i)].tokens() == wanted_tokens
        assert found[str(i)].logprobs() == pytest.approx(wanted_logprobs, abs=2e-4)
        assert plain[str(i)].logprobs() != pytest.approx(wanted_logprobs, abs=2e-4)  # the vector does something


@pytest.mark.parametrize("made", ["standard", "cast"])
def test_the_gate_decides_as_the_oracle_says(made):
    profile = PROFILES[made](reference_model(), 1, name="p", strength=3.0)
    activation = ProfileActivation("p", 3.0)
    prompts = [[i, (7 * i) % 90 + 1, (3 * i) % 50 + 1] for i in range(1, 25)]
    found = run([profile], [asked(str(i), p, activation) for i, p in enumerate(prompts)])
    gates = []
    for i, prompt in enumerate(prompts):
        wanted_tokens, _, [gate] = two_pass(reference_model(), prompt, 8, [(profile, activation)])
        gates.append(gate)
        [decision] = found[str(i)].decision.profiles
        assert decision.gate == pytest.approx(gate, abs=1e-3)
        assert (decision.reason, decision.fired) == (("gate_open", True) if gate else ("gate_closed", False))
        assert found[str(i)].tokens() == wanted_tokens
    assert 0 in gates and any(gates), "the profile must open for some of the prompts and not for others"


@rows_and_pages
@pytest.mark.parametrize("layers", [(1, 1), (0, 2)])
def test_two_profiles_act_on_one_request(layers, paged):
    profiles = [profile_of(layer=layer, name=f"p{i}", strength=2.0, seed=i) for i, layer in enumerate(layers)]
    activations = [
        ProfileActivation("p0", 2.0, gate="open", positions="all"),
        ProfileActivation("p1", -1.5, gate="open", positions="last"),
    ]
    found = run(profiles, [asked(str(i), p, *activations) for i, p in enumerate(PROMPTS)], paged=paged)
    for i, prompt in enumerate(PROMPTS):
        steering = list(zip(profiles, activations, strict=True))
        wanted, wanted_logprobs, _ = two_pass(reference_model(), prompt, 8, steering)
        assert found[str(i)].tokens() == wanted
        assert found[str(i)].logprobs() == pytest.approx(wanted_logprobs, abs=2e-4)
        assert [p.name for p in found[str(i)].decision.profiles] == ["p0", "p1"]


@rows_and_pages
@every_profile
def test_batched_equals_alone(made, paged):
    profile = PROFILES[made](reference_model(), 1, name="p", strength=3.0)
    kinds = [(OPEN,), (), (ProfileActivation("p", 1.0, gate="open", positions="last"),)]
    requests = [asked(str(i), p, *kinds[i % 3], max_tokens=5 + 3 * i) for i, p in enumerate(PROMPTS)]
    together = run([profile], requests, paged=paged)
    squeezed = run([profile], requests, paged=paged, max_num_seqs=2)  # they join and leave between steps
    for r in requests:
        alone = run([profile], [r], paged=paged)[r.request_id]
        for other in (together[r.request_id], squeezed[r.request_id]):
            assert other.tokens() == alone.tokens()
            assert other.logprobs() == pytest.approx(alone.logprobs(), abs=1e-4)


@rows_and_pages
@pytest.mark.parametrize(
    "shut",
    [
        ProfileActivation("p", 3.0, gate="closed"),
        ProfileActivation("p", 0.0, gate="open"),
        ProfileActivation("p", 3.0, gate="open", shadow=True),
    ],
    ids=["gate closed", "strength zero", "shadow"],
)
@every_decoder
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_row_that_is_not_steered_is_unsteered_bit_for_bit_in_a_mixed_batch(family, kind, shut, paged):
    profile = profile_of(family)
    mixed = [asked(str(i), p, shut if i % 2 else OPEN) for i, p in enumerate(PROMPTS)]
    plain = [asked(str(i), p) for i, p in enumerate(PROMPTS)]
    with_steering, without = (run([profile], asks, family, kind, paged=paged) for asks in (mixed, plain))
    for i in range(len(PROMPTS)):
        same = with_steering[str(i)].numbers == without[str(i)].numbers
        assert same if i % 2 else not same
    assert not with_steering["1"].decision.applied and with_steering["0"].decision.applied


@rows_and_pages
@every_profile
def test_strength_zero_and_a_closed_gate_are_unsteered_bit_for_bit_for_every_kind_of_profile(made, paged):
    profile = PROFILES[made](reference_model(), 1, name="p", strength=3.0)
    zero, closed = (ProfileActivation("p", 0.0, gate="open"), ProfileActivation("p", 3.0, gate="closed"))
    mixed = [asked(str(i), p, (zero, OPEN, closed)[i % 3]) for i, p in enumerate(PROMPTS)]
    plain = [asked(str(i), p) for i, p in enumerate(PROMPTS)]
    with_steering, without = (run([profile], asks, paged=paged) for asks in (mixed, plain))
    for i in range(len(PROMPTS)):
        same = with_steering[str(i)].numbers == without[str(i)].numbers
        assert same == (i % 3 != 1)


@rows_and_pages
def test_where_a_cosine_gate_stays_shut_by_itself_the_row_is_unsteered_bit_for_bit(paged):
    """And where it opens by itself it is not; the decision has a threshold, and no energy ratio."""
    profile = PROFILES["cast"](reference_model(), 1, name="p", strength=3.0)
    prompts = [[i, (7 * i) % 90 + 1, (3 * i) % 50 + 1] for i in range(1, 9)]
    steered = [asked(str(i), p, ProfileActivation("p", 3.0)) for i, p in enumerate(prompts)]
    plain = [asked(str(i), p) for i, p in enumerate(prompts)]
    with_steering, without = (run([profile], asks, paged=paged) for asks in (steered, plain))
    gates = []
    for i in range(len(prompts)):
        [decision] = with_steering[str(i)].decision.profiles
        gates.append(decision.gate)
        assert (with_steering[str(i)].numbers == without[str(i)].numbers) == (decision.gate == 0)
        assert (decision.energy_ratio, decision.threshold) == (None, profile.gate.threshold)
    assert set(gates) == {0.0, 1.0}


def test_shadow_and_strength_zero_still_report_the_gate():
    profile = profile_of()
    activations = {
        "gate_open": ProfileActivation("p", 3.0, gate="auto"),
        "strength_zero": ProfileActivation("p", 0.0),
        "shadow": ProfileActivation("p", 3.0, shadow=True),
        "forced_closed": ProfileActivation("p", 3.0, gate="closed"),
        "forced_open": ProfileActivation("p", 3.0, gate="open"),
    }
    prompt = next(
        p for p in ([i, i + 1, i + 2] for i in range(1, 200))
        if two_pass(reference_model(), p, 1, [(profile, activations["gate_open"])])[2][0] == 1.0
    )  # fmt: skip
    found = run([profile], [asked(reason, prompt, a) for reason, a in activations.items()])
    for reason, answer in found.items():
        decision = answer.decision
        assert decision.reason == reason
        assert decision.applied == (reason in ("gate_open", "forced_open"))
        assert decision.profiles[0].fired == (reason != "forced_closed")
        assert decision.profiles[0].energy_ratio is not None
        assert decision.profiles[0].energy_ratio == pytest.approx(
            found["gate_open"].decision.profiles[0].energy_ratio, abs=1e-5
        )
    assert found["gate_open"].decision.profiles[0].relative_norm > 0


@rows_and_pages
@pytest.mark.parametrize("length", [7, 45], ids=["within a block", "over a block"])
def test_n_completions_share_one_prefill_and_one_decision(length, paged):
    profile = profile_of()
    prompt = range(5, 5 + length)
    found = run([profile], [asked("n", prompt, OPEN, n=3), asked("1", prompt, OPEN)], paged=paged)
    for index in range(3):
        assert found["n"].tokens(index) == found["1"].tokens()
        assert found["n"].logprobs(index) == pytest.approx(found["1"].logprobs(), abs=1e-4)


def test_a_seed_fixes_the_answer_whatever_shares_the_batch():
    def tokens(answer):
        return [answer.tokens(index) for index in range(2)]

    sampled = {"temperature": 1.0, "n": 2}
    alone = run([], [asked("a", PROMPTS[0], seed=11, **sampled)])["a"]
    crowd = [asked(str(i), p, temperature=1.3) for i, p in enumerate(PROMPTS)]
    amid = run([], [*crowd, asked("a", PROMPTS[0], seed=11, **sampled)])["a"]
    assert tokens(alone) == tokens(amid)
    other = run([], [asked("a", PROMPTS[0], seed=12, **sampled)])["a"]
    assert tokens(alone) != tokens(other)


def test_a_vector_that_is_not_finite_fails_its_request_alone():
    profile, broken = profile_of(), tiny_profile(reference_model(), 1, name="broken", strength=3.0)
    broken.experts.output_bias.fill_(3e38)
    core = tiny_core([profile, broken])
    good = asked("good", PROMPTS[0], OPEN)
    bad = asked("bad", PROMPTS[1], ProfileActivation("broken", 3.0, gate="open"))
    watched = asked("watched", PROMPTS[1], ProfileActivation("broken", 0.0, gate="open"))
    results = core.run([good, bad, watched])
    [failure] = results["bad"]
    assert failure.code == "steering_non_finite"
    assert [e.token_id for e in results["good"]] == run([profile], [good])["good"].tokens()
    assert results["watched"][0].decision.reason == "non_finite" and len(results["watched"]) == 8
    assert core.stats().kv_cache_usage == 0


@functools.cache
def overflowing(kind):
    """The tiny model, but token 300 makes NaN of whatever comes after it."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = torch.inf
    return DECODERS[kind](model)


@rows_and_pages
@every_decoder
def test_a_model_that_overflows_fails_its_request_and_leaves_nothing_behind(kind, paged):
    """Whoever gets the memory next has positions masked there, and 0 · NaN is NaN."""
    core = tiny_core(decoder=overflowing(kind), paged=paged, max_model_len=128, prefix_cache_bytes=0)
    [failure] = core.run([asked("bad", [5, 300, *range(60)])])["bad"]
    assert isinstance(failure, GenerationError) and failure.code == "non_finite_logits"
    asks = [asked("short", range(5, 45)), asked("long", range(5, 95))]
    found = answers(core, asks)
    wanted = run([], asks, max_model_len=128)
    assert {r: a.tokens() for r, a in found.items()} == {r: a.tokens() for r, a in wanted.items()}


@rows_and_pages
@every_decoder
def test_a_prompt_that_overflows_spoils_nobody_while_it_is_prefilled(kind, paged):
    """In chunks of 16 beside two that decode, in pages that were the short one's slot's before."""
    core = tiny_core(decoder=overflowing(kind), paged=paged, max_model_len=192, max_batched_tokens=16)
    results = []

    def add(*requests):
        for request in requests:
            core.add(SequenceGroup.of(request, lambda _: None))

    add(asked("before", range(5, 155), max_tokens=1), asked("long", range(5, 115), max_tokens=40))
    for _ in range(20):
        results += core.step()
    add(asked("short", range(5, 25), max_tokens=20), asked("bad", [5, 300, *[7] * 130]))
    while core.has_work:
        results += core.step()
    failed = [group.request.request_id for group, result in results if isinstance(result, Exception)]
    assert failed == ["bad"]


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("how", ["aborted", "preempted"])
def test_a_prompt_that_overflows_and_leaves_before_its_end_leaves_nothing_behind(how, paged):
    core = tiny_core(decoder=overflowing("fused"), paged=paged, max_model_len=192, max_batched_tokens=16)
    bad = SequenceGroup.of(asked("bad", [5, 300, *[7] * 130]), lambda _: None)
    core.add(bad)
    core.step()
    core.step()
    if how == "preempted":
        core.scheduler._preempt(bad.sequences[0])
    core.abort(bad)
    answers(
        core, [asked("short", range(5, 25), max_tokens=12), asked("long", range(5, 115))]
    )  # asserts that they do not fail


def test_a_completion_that_fails_after_its_preemption_ends_its_request_alone(monkeypatch):
    core = tiny_core()
    pair, other = (SequenceGroup.of(asked(r, PROMPTS[0], n=n), lambda _: None) for r, n in (("pair", 2), ("other", 1)))
    core.add(pair)
    core.add(other)
    core.step()
    core.scheduler._preempt(pair.sequences[1])
    first_tokens = core.runner._first_tokens

    def broken(*args):
        return [(sequence, replace(sampled, finite=False)) for sequence, sampled in first_tokens(*args)]

    monkeypatch.setattr(core.runner, "_first_tokens", broken)
    results = core.step()
    assert [type(r) for g, r in results if g is pair] == [GenerationError]
    assert len([r for g, r in results if g is other]) == 1
    assert core.scheduler.groups == [other] and core.stats().num_running == 1


@pytest.mark.parametrize("layers", [(1,), (0, 2), (3,)])
def test_score_decides_as_generation_does_and_generates_nothing(layers):
    profiles = [profile_of(layer=layer, name=f"p{i}") for i, layer in enumerate(layers)]
    request = asked("r", PROMPTS[0], *(ProfileActivation(p.name, 3.0) for p in profiles))
    core = tiny_core(profiles)
    core.add(SequenceGroup.of(request, lambda _: None, score_only=True))
    [(_, scored)] = core.step()
    assert isinstance(scored, SteeringDecision) and not core.has_work
    assert core.stats().num_running == 0 and core.stats().kv_cache_usage == 0
    generated = run(profiles, [request])["r"].decision
    assert [p.gate for p in scored.profiles] == pytest.approx([p.gate for p in generated.profiles], abs=1e-5)


def test_a_reading_from_memory_is_the_same_and_took_no_time():
    profile = tiny_profile(reference_model(), 1, name="p", strength=3.0)
    core = tiny_core([profile])
    first, again = (
        answers(core, [asked("r", PROMPTS[0], ProfileActivation("p", 3.0))])["r"].decision for _ in range(2)
    )
    assert first.compute_ms > 0 and again.compute_ms == 0
    assert first.profiles == again.profiles
    other = answers(core, [asked("r", PROMPTS[0], ProfileActivation("p", 2.0))])["r"].decision
    assert other.compute_ms > 0, "other options are another reading"
