"""Decisions pass by pass, with transformers in the workers' place; and what the prefix cache is told.

Expected: gates and vectors by `tests.parity.oracle`, from the lowest layer up.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.engine.base import GenerationError, GenerationRequest, SamplingOptions
from server.engine.refusals import unsafe
from server.engine.vllm import steering as module
from server.engine.vllm.doses import addition_of, salt_of
from server.engine.vllm.orders import Addition, Order, Report
from server.engine.vllm.steering import Steering, check_report, salt
from steering.architecture import decoder_layers
from steering.decision import ProfileActivation, SteeringOptions
from steering.intervention import Dose
from tests.engine import reference_model
from tests.parity.oracle import gate_and_vector, two_pass
from tests.tiny import PROFILES, constant_profile, tiny_profile

PROMPT = (5, 6, 7, 8, 9, 10)


@functools.cache
def profile_of(name: str):
    """A kind of profile, or `own` or `same`, with its layer at the end."""
    make = {"own": tiny_profile, "same": constant_profile, **PROFILES}[name.rstrip("0123456789")]
    layer = int(name[-1])
    return make(reference_model(), layer, name=name, strength=3.0, seed=layer)


def asked(*activations: ProfileActivation, prompt=PROMPT, owner="", opted_out=False) -> GenerationRequest:
    """With the versions pinned, as the engine does."""
    pinned = tuple(a if a.version else replace(a, version=profile_of(a.profile).version) for a in activations)
    return GenerationRequest("r", prompt, SamplingOptions(4), SteeringOptions(pinned, opted_out), cache_owner=owner)


def forced(name: str, **options) -> ProfileActivation:
    return ProfileActivation(name, **{"strength": 3.0, "gate": "open"} | options)


def steering_of(*names: str) -> Steering:
    return Steering([profile_of(name) for name in names], 64, torch.float32)


def vector(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


@torch.no_grad()
def work(order: Order, prompt=PROMPT) -> Report:
    """What sound workers report of a pass."""
    states, layers = {}, decoder_layers(reference_model())

    def hook_for(layer, additions):
        def hook(module, args, output):
            changed = output.clone()
            if layer in order.read:
                states[layer] = output[0, -1].numpy().tobytes()
            for addition in additions:
                if addition.prompt is not None:
                    changed[:, :-1] += vector(addition.prompt)
                changed[:, -1] += vector(addition.answer)
            return changed

        return hook

    handles = [
        layers[i].register_forward_hook(hook_for(i, [a for a in order.add if a.layer == i])) for i in range(len(layers))
    ]
    try:
        reference_model()(torch.tensor([prompt]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Report(states, tuple(a.layer for a in order.add))


def decide(steering: Steering, request: GenerationRequest):
    """The decision, and the orders of its passes."""
    passes, orders = steering.passes(request), []
    while True:
        orders.append(passes.order)
        assert len(orders) < 9, "no end"
        if passes.read(work(passes.order, request.prompt_token_ids)):
            return passes.decided(), orders


@functools.cache
def prompt_whose_gate(name: str, opens: bool) -> tuple[int, ...]:
    for i in range(200):
        prompt = (i + 1, 2 * i + 3, 7, i % 11 + 20)
        [gate] = two_pass(reference_model(), list(prompt), 0, [(profile_of(name), ProfileActivation(name, 3.0))])[2]
        if gate > 0.5 if opens else gate == 0:
            return prompt
    raise AssertionError


def check(steering: Steering, request: GenerationRequest, num_passes: int):
    """Passes, gates and vectors are the oracle's."""
    decided, orders = decide(steering, request)
    assert len(orders) == num_passes
    activations = request.steering.activations
    pairs = [(profile_of(a.profile), a) for a in activations]
    gates = two_pass(reference_model(), list(request.prompt_token_ids), 0, pairs)[2]
    by_layer = sorted(decided.decision.profiles, key=lambda d: d.layer)
    assert [d.gate for d in by_layer] == pytest.approx(gates, abs=1e-4)
    assert decided.additions == orders[-1].add, "the pass that stands added what was decided"
    assert decided.decision.applied == bool(decided.additions)
    return decided, orders


def test_where_nothing_is_asked_nothing_is_ordered():
    for request, reason in ((asked(), "no_profile"), (asked(opted_out=True), "opted_out")):
        passes = steering_of("own1").passes(request)
        assert passes.order is None and passes.read(None)
        assert passes.decided().decision.reason == reason and passes.decided().order is None


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (forced("own1", gate="closed"), "forced_closed"),
        (forced("own1", strength=0.0), "strength_zero"),
        (forced("own1", shadow=True), "shadow"),
        (forced("own1", gate="auto"), "gate_closed"),
    ],
)
def test_who_is_not_steered_needs_one_pass_that_adds_nothing(activation, reason):
    request = asked(activation, prompt=prompt_whose_gate("own1", False))
    decided, orders = check(steering_of("own1", "own2"), request, 1)
    assert orders == [Order(read=(1,))], "and reads where the request's own profiles are"
    assert decided.decision.reason == reason and decided.order is None


@pytest.mark.parametrize("gate", ["open", "auto"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_who_fires_needs_a_second_pass(gate, positions):
    prompt = prompt_whose_gate("own1", True)
    request = asked(forced("own1", gate=gate, positions=positions), prompt=prompt)
    decided, orders = check(steering_of("own1"), request, 2)
    assert orders[0].add == () and orders[0].read == (1,) and decided.decision.applied
    [addition] = orders[1].add
    with torch.no_grad():
        state = reference_model()(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, -1]
    g, v = gate_and_vector(profile_of("own1"), state)
    wanted = 3.0 * (1.0 if gate == "open" else g) * v
    np.testing.assert_allclose(vector(addition.answer).numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert addition.layer == 1 and addition.prompt == (addition.answer if positions == "all" else None)


def test_each_layer_that_fires_sees_those_below_it_act():
    request = asked(forced("own2"), forced("own0"), forced("own3", gate="auto"))
    decided, orders = check(
        steering_of("own0", "own2", "own3"),
        request,
        3 + (decide(steering_of("own0", "own2", "own3"), request)[0].decision.profiles[2].applied),
    )
    assert [[a.layer for a in order.add] for order in orders][:3] == [[], [0], [0, 2]]
    assert [order.read for order in orders][:3] == [(0, 2, 3), (2, 3), (3,)]
    assert [p.name for p in decided.decision.profiles] == ["own0", "own2", "own3"]


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_vector_that_no_query_changes_acts_from_the_first_pass(positions):
    request = asked(forced("same1", positions=positions))
    decided, [order] = check(steering_of("same1"), request, 1)
    assert [a.layer for a in order.add] == [1] and order.read == (1,), "its state is read for the account of it"
    assert decided.decision.profiles[0].relative_norm > 0


def test_fixed_vectors_below_and_above_one_that_a_query_makes():
    request = asked(forced("same0"), forced("own1"), forced("layered2"))
    _, orders = check(steering_of("same0", "own1", "layered2"), request, 2)
    assert [[a.layer for a in order.add] for order in orders] == [[0, 2, 3], [0, 1, 2, 3]]


def test_a_fixed_vector_beside_one_that_a_query_makes_waits_for_it():
    _, orders = check(steering_of("same1", "own1"), asked(forced("own1"), forced("same1")), 2)
    assert [[a.layer for a in order.add] for order in orders] == [[], [1]]


@pytest.mark.parametrize("kind", PROFILES)
def test_every_kind_of_profile(kind):
    name = f"{kind}1"
    open_at_once = kind in ("constant", "cast", "layered")
    check(steering_of(name), asked(forced(name)), 1 if open_at_once else 2)
    decided, _ = decide(steering_of(name), asked(forced(name)))
    assert [a.layer for a in decided.additions] == ([1, 2, 3] if kind == "layered" else [1])


@pytest.mark.parametrize("report", [None, Report({}, ()), Report({}, (2,)), Report({}, (1, 2))], ids=str)
def test_a_report_that_does_not_say_what_was_ordered_ends_the_request(report):
    passes = steering_of("same1").passes(asked(forced("same1")))
    with pytest.raises(GenerationError, match="not answered") as failure:
        passes.read(report)
    assert failure.value.code == "steering_lost"


def test_workers_that_add_unasked_end_the_request():
    passes = steering_of("own1").passes(asked(forced("own1", gate="closed")))
    told = work(passes.order)
    with pytest.raises(GenerationError, match=r"steer at layers \[\]"):
        passes.read(replace(told, added=(1,)))
    assert passes.read(told)


@pytest.mark.parametrize("strength", [3e38, -3e38])
@pytest.mark.parametrize("name", ["own1", "same1"])
def test_a_dose_that_no_dtype_holds_reaches_no_worker(name, strength):
    passes = steering_of(name).passes(asked(forced(name, strength=strength)))
    assert passes.order.add == (), "not at first either, where no query changes it"
    with pytest.raises(GenerationError, match="lower steer_strength") as failure:
        passes.read(work(passes.order))
    assert failure.value.code == "non_finite_logits"
    [told] = failure.value.decision.profiles
    assert (told.strength, told.reason, failure.value.decision.applied) == (strength, "forced_open", True)


def test_reports_may_name_layers_in_any_order():
    check_report(Report({}, (3, 1)), [Addition(1, None, b""), Addition(3, None, b"")])


def test_versions_are_told_apart():
    old = profile_of("own1")
    new = replace(old, manifest=replace(old.manifest, strength=99.0))
    assert new.version != old.version
    steering = Steering([old, new], 64, torch.float32)
    for version in (old.version, new.version):
        decided, _ = decide(steering, asked(forced("own1", version=version)))
        assert [p.version for p in decided.decision.profiles] == [version]
    steering.set_profiles([new])
    assert steering.passes(asked(forced("own1", version=old.version))).order is None


def test_passes_under_way_keep_the_profiles_that_they_began_with():
    steering = steering_of("own1")
    passes = steering.passes(asked(forced("own1")))
    steering.set_profiles([])
    assert not passes.read(work(passes.order)) and passes.read(work(passes.order))
    assert passes.decided().decision.applied


# -- what is remembered ------------------------------------------------------------------------------------------------------


def test_what_was_decided_is_recalled_for_the_same_question_alone():
    steering, request = steering_of("own1"), asked(forced("own1"))
    decided, _ = decide(steering, request)
    assert steering.recall(request) is None
    steering.remember(request, decided)
    found = steering.recall(replace(request, request_id="another"))
    assert found.additions == decided.additions and found.order == Order(add=decided.additions)
    assert found.decision == replace(decided.decision, compute_ms=0.0)
    for other in (
        replace(request, cache_owner="another"),  # that somebody asked it is his own affair
        asked(forced("own1"), prompt=PROMPT[:-1]),
        asked(forced("own1"), prompt=(*PROMPT[:-1], 11)),
        asked(forced("own1", strength=2.0)),
        asked(forced("own1", positions="last")),
        asked(forced("own1", shadow=True)),
        asked(forced("own1", gate="auto")),
        asked(forced("own1", version="another")),
        asked(),
    ):
        assert steering.recall(other) is None


def test_what_was_not_asked_for_the_longest_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    steering = steering_of("own1")
    decided, _ = decide(steering, asked(forced("own1")))
    requests = [asked(forced("own1"), prompt=(i,)) for i in range(4)]
    for request in requests[:3]:
        steering.remember(request, decided)
    assert steering.recall(requests[0]) is not None
    steering.remember(requests[3], decided)
    assert [steering.recall(r) is not None for r in requests] == [True, False, True, True]


# -- a vector that is not finite ---------------------------------------------------------------------------------------------


def test_who_should_have_been_steered_and_could_not_is_refused():
    profile = tiny_profile(reference_model(), 1, name="own1", strength=3.0)
    profile.experts.output_bias.fill_(3e38)
    steering = Steering([profile], 64, torch.float32)

    def refusal(**options):
        request = asked(forced("own1", version=profile.version, **options))
        decided, orders = decide(steering, request)
        assert decided.decision.reason == "non_finite" and decided.additions == () and len(orders) == 1
        return unsafe(request.steering, decided.decision.profiles)

    assert refusal().code == "steering_non_finite" and "'own1'" in str(refusal())
    assert refusal(strength=0.0) is None and refusal(shadow=True) is None
    sound = asked(forced("own1"))
    assert unsafe(sound.steering, decide(steering_of("own1"), sound)[0].decision.profiles) is None


# -- what the prefix cache is told -------------------------------------------------------------------------------------------


def dose(prompt, answer) -> Dose:
    return Dose.of(prompt, answer)


def test_a_dose_crosses_the_wire_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one, two = torch.randn(2, 8).to(dtype)
        found = addition_of(3, dose(one, one))
        assert found.layer == 3 and found.prompt == found.answer
        assert torch.equal(torch.frombuffer(bytearray(found.answer), dtype=dtype), one)
        found = addition_of(3, dose(one, two))
        assert torch.equal(torch.frombuffer(bytearray(found.prompt), dtype=dtype), one)
        assert torch.equal(torch.frombuffer(bytearray(found.answer), dtype=dtype), two)
        assert addition_of(3, dose(None, two)).prompt is None
    assert addition_of(3, None) is None


BOTH = Addition(1, b"vector", b"vector")
LAST = Addition(1, None, b"vector")


def salts(*asks: tuple[GenerationRequest, tuple[Addition, ...]]) -> list[str | None]:
    return [salt(request, additions) for request, additions in asks]


def test_who_is_not_steered_shares_one_cache():
    found = salts((asked(), ()), (asked(forced("own1")), ()), (asked(forced("own2", shadow=True), prompt=(1,)), ()))
    assert found == [None, None, None]


def test_a_salt_is_the_same_for_the_same_vectors_whatever_else_is_asked():
    base = asked(forced("own1"))
    longer = replace(base, prompt_token_ids=(*PROMPT, 1), request_id="other", n=3, priority=2)
    assert len(set(salts((base, (BOTH,)), (longer, (BOTH,)), (asked(forced("own1", strength=1.0)), (BOTH,))))) == 1
    both = asked(forced("own1"), forced("own2")), asked(forced("own2"), forced("own1"))
    assert len(set(salts(*((request, (BOTH,)) for request in both)))) == 1, "in whatever order"


def test_a_salt_tells_apart_all_that_shapes_a_steered_prompt():
    base = asked(forced("own1"))
    different = [
        (base, ()),
        (base, (BOTH,)),
        (base, (LAST,)),
        (base, (replace(LAST, answer=b"VECTOR"),)),
        (base, (Addition(1, b"", b"vector"),)),
        (base, (Addition(1, b"", b"VECTOR"),)),
        (base, (Addition(1, b"vector", b"VECTOR"),)),
        (base, (Addition(1, b"VECTOR", b"vector"),)),
        (base, (Addition(1, b"VECTOR", b"VECTOR"),)),
        (base, (Addition(2, b"vector", b"vector"),)),
        (base, (Addition(2, None, b"vector"),)),
        (base, (BOTH, replace(BOTH, layer=2))),
        (base, (replace(BOTH, layer=12),)),
        (base, (LAST, replace(BOTH, layer=2))),
        (base, (BOTH, replace(LAST, layer=2))),
        (asked(forced("own1", version="another")), (BOTH,)),
        (asked(forced("own2")), (BOTH,)),
        (asked(forced("own1"), forced("own2")), (BOTH,)),
        (replace(base, cache_owner="a"), ()),
        (replace(base, cache_owner="b"), ()),
        (replace(base, cache_owner="a"), (BOTH,)),
        (replace(base, cache_owner="b"), (BOTH,)),
    ]
    found = salts(*different)
    assert len(set(found)) == len(different), found


def test_where_the_answer_has_another_vector_its_place_belongs_to_the_salt():
    """The blocks of an answer are cached as well: sent back as a prompt, they are shaped by the answer's vector."""
    short, long = asked(forced("own1")), asked(forced("own1"), prompt=(*PROMPT, 1))
    assert len(set(salts((short, (LAST,)), (long, (LAST,))))) == 2
    assert len(set(salts((short, (BOTH, replace(LAST, layer=2))), (long, (BOTH, replace(LAST, layer=2)))))) == 2
    assert len(set(salts((short, (BOTH,)), (long, (BOTH,))))) == 1


def test_parts_of_a_salt_cannot_pass_for_one_another():
    one = Addition(1, b"ab", b"c")
    assert salt_of("", ["xy"], [one]) != salt_of("", ["x", "y"], [one])
    assert salt_of("x", [], [one]) != salt_of("", ["x"], [one])
    assert salt_of("", ["v"], [one]) != salt_of("", ["v"], [Addition(1, b"a", b"bc")])
    assert salt_of("", ["v"], [one, replace(one, layer=2)]) != salt_of("", ["v"], [replace(one, layer=2), one])
    assert salt_of("owner", ["v"], []) == salt_of("owner", [], []), "versions shape nothing where nothing is added"
