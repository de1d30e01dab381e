"""What every engine promises of steering: that it acts or does not as the decision says, and that the decision is always told."""

from __future__ import annotations

import asyncio

import pytest
import torch

from server.engine.base import GenerationError
from steering.decision import SteeringOptions
from tests.contract.asking import PLAIN, STEERED, Observer, activation, answer, collect, request
from tests.contract.harness import model, profile
from tests.tiny import tiny_profile

pytestmark = pytest.mark.asyncio(loop_scope="session")
IDLE = {
    "no_profile": PLAIN,
    "opted_out": SteeringOptions(opted_out=True),
    "strength_zero": SteeringOptions((activation(strength=0.0),)),
    "forced_closed": SteeringOptions((activation(gate="closed"),)),
    "shadow": SteeringOptions((activation(shadow=True),)),
}


@pytest.mark.parametrize("reason", IDLE)
async def test_what_is_not_applied_changes_no_token(engine, reason):
    plain = await answer(engine, request("plain", steering=PLAIN, max_tokens=20))
    events = await collect(engine, request("a", steering=IDLE[reason], max_tokens=20))
    decision = events[0].decision
    assert (decision.applied, decision.reason) == (False, reason)
    assert [p.name for p in decision.profiles] == [a.profile for a in IDLE[reason].activations]
    assert [e.token_id for e in events] == plain


async def test_what_is_applied_changes_tokens_and_is_told_in_full(engine):
    plain = await answer(engine, request("plain", steering=PLAIN, max_tokens=20))
    events = await collect(engine, request("a", max_tokens=20))
    assert [e.token_id for e in events] != plain
    decision = events[0].decision
    assert (decision.applied, decision.reason) == (True, "forced_open")
    [told] = decision.profiles
    assert (told.name, told.version, told.layer, told.strength) == ("p", profile().version, 1, 3.0)
    assert told.relative_norm > 0 and told.vector_norm > 0 and 0 <= told.energy_ratio <= 1
    assert sum(told.routing) == pytest.approx(1, abs=1e-5)


async def test_a_gate_decides_for_each_prompt_by_itself(engine):
    """All at once, as each alone; about half of random prompts open it."""
    steering = SteeringOptions((activation(gate="auto"),))
    asks = [request(str(i), (3 * i + 1, i + 2, 7), steering=steering) for i in range(24)]
    alone = [await collect(engine, ask) for ask in asks]
    fired = [events[0].decision.profiles[0].fired for events in alone]
    assert 2 < sum(fired) < 22
    together = await asyncio.gather(*(collect(engine, ask) for ask in asks))
    for one, other in zip(alone, together, strict=True):
        assert [e.token_id for e in one] == [e.token_id for e in other]
        [a], [b] = one[0].decision.profiles, other[0].decision.profiles
        assert (a.fired, a.reason) == (b.fired, b.reason)
        assert (a.gate, a.energy_ratio) == pytest.approx((b.gate, b.energy_ratio), abs=1e-4)


@pytest.mark.parametrize("gate", ["auto", "open", "closed"])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_score_is_the_decision_that_the_request_would_get(engine, gate, n):
    for prompt in ((5, 6, 7), (40, 2, 90), (11, 12, 13)):
        asked = request("a", prompt, steering=SteeringOptions((activation(gate=gate),)), n=n)
        scored = await engine.score(asked)
        decided = (await collect(engine, asked))[0].decision
        assert (scored.applied, scored.reason) == (decided.applied, decided.reason)
        [a], [b] = scored.profiles, decided.profiles
        assert (a.version, a.fired, a.strength) == (b.version, b.fired, b.strength)
        numbers = [(p.gate, p.energy_ratio, p.vector_norm, p.relative_norm, *p.routing) for p in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


async def test_several_profiles_act_together(harness):
    async with harness.running([profile(), profile("q", 2, seed=4)]) as engine:
        assert list(engine.profiles) == ["p", "q"]
        both = SteeringOptions((activation("p"), activation("q")))
        events = await collect(engine, request("both", steering=both, max_tokens=20))
        assert [(p.name, p.layer, p.applied) for p in events[0].decision.profiles] == [("p", 1, True), ("q", 2, True)]
        only = [
            await answer(engine, request(x, steering=SteeringOptions((activation(x),)), max_tokens=20)) for x in "pq"
        ]
        answers = {tuple(e.token_id for e in events), *map(tuple, only)}
        assert len(answers) == 3


def broken_at(prompt):
    """A profile whose vector is beyond all numbers at one prompt, for one hidden unit sees nothing else."""
    broken = tiny_profile(model(), 1, name="broken", strength=3.0)
    with torch.no_grad():
        state = model()(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, -1]
    experts = broken.experts
    seen = (state - experts.input_mean) / experts.input_std
    experts.hidden_weight[0] = seen
    experts.hidden_bias[0] = -0.9 * seen @ seen
    experts.output_weight[:, 0] = 3e38
    return broken


async def test_a_vector_that_is_not_finite_fails_its_request_alone(harness):
    prompt = (40, 41, 42)
    broken = broken_at(prompt)
    observer = Observer()
    async with harness.running([profile(), broken], observer=observer) as engine:
        wanted = await answer(engine, request("wanted", max_tokens=20))
        good = asyncio.create_task(answer(engine, request("good", max_tokens=20)))
        with pytest.raises(GenerationError, match="broken") as failure:
            await collect(engine, request("bad", prompt, steering=SteeringOptions((activation("broken"),))))
        assert failure.value.code == "steering_non_finite"
        assert (failure.value.decision.reason, failure.value.decision.applied) == ("non_finite", False)
        assert await good == wanted
        watched = await collect(
            engine, request("watched", prompt, steering=SteeringOptions((activation("broken", 0.0),)))
        )
        assert watched[0].decision.reason == "non_finite" and len(watched) == 6
        assert [d.reason for d in observer.decisions].count("non_finite") == 2
        scored = await engine.score(request("scored", prompt, steering=SteeringOptions((activation("broken"),))))
        assert scored.reason == "non_finite"
        other = await collect(engine, request("other", steering=SteeringOptions((activation("broken"),))))
        assert other[0].decision.reason == "forced_open" and len(other) == 6


async def test_a_dose_that_overflows_fails_its_request_alone_and_tells_what_was_decided(harness):
    observer = Observer()
    overflowing = SteeringOptions((activation(strength=3e38),))
    async with harness.running(observer=observer) as engine:
        wanted = await answer(engine, request("wanted", max_tokens=20))
        for n in (1, 2):
            good = asyncio.create_task(answer(engine, request("good", max_tokens=20)))
            with pytest.raises(GenerationError) as failure:
                await collect(engine, request("bad", steering=overflowing, n=n))
            assert failure.value.code == "non_finite_logits"
            assert failure.value.decision.applied and failure.value.decision.profiles[0].strength == 3e38
            assert await good == wanted
            assert sorted(d.profiles[0].strength for d in observer.decisions) == [3.0] * (n + 1) + [3e38] * n
        assert (await engine.score(request("scored", steering=overflowing))).profiles[0].strength == 3e38
        assert await answer(engine, request("after", max_tokens=20)) == wanted


async def test_the_observer_is_told_what_the_first_event_says(harness):
    observer = Observer()
    async with harness.running(observer=observer) as engine:
        for steering in (STEERED, *IDLE.values(), SteeringOptions((activation(gate="auto"),))):
            events = await collect(engine, request("a", steering=steering, n=2))
            assert observer.decisions.pop() == events[0].decision
            assert not observer.decisions
