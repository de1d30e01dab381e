"""The gate and the experts against the float64 reference, on random states and on those that are likeliest to go wrong."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.gate import QuantileGate, energy_ratio
from steering.training.fit_experts import ExpertOptions, fit_experts
from steering.training.principal import principal_directions
from tests.parity import numpy_reference as reference
from tests.tiny import tiny_model, tiny_profile

D = 24
many = settings(max_examples=80, deadline=None)
tails = st.fractions(Fraction(1, 64), Fraction(63, 64), max_denominator=64).filter(
    lambda f: (64 % f.denominator) == 0  # a float holds it exactly, so that both floors see the same number
)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(tensor):
    return tensor.detach().double().numpy()


def arrays(experts):
    return {k: numbers(v) for k, v in vars(experts).items() if isinstance(v, torch.Tensor)}


@many
@given(st.integers(0, 10_000), st.integers(1, D), st.sampled_from([1e-6, 1.0, 1e4, 1e12]), st.floats(0, 100))
def test_energy_ratio(seed, rank, norm, offset):
    mean, basis = offset * drawn(seed, D), torch.linalg.qr(drawn(seed + 1, D, rank)).Q
    states = norm * drawn(seed + 2, 6, D) + mean  # as they are once added in float32
    found = energy_ratio(states, mean, basis)
    for state, s in zip(states, found.tolist(), strict=True):
        assert s == pytest.approx(reference.energy_ratio(numbers(state), numbers(mean), numbers(basis)), abs=1e-5)
    assert energy_ratio(mean[None], mean, basis) == reference.energy_ratio(numbers(mean), numbers(mean), numbers(basis))


@many
@given(
    st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=1, max_size=40),  # many ties, and on both edges
    tails,
    st.sampled_from([0.5, 1.0, 2.0, 30.0]),
    st.sampled_from([0.0, 1e-3, 0.5]),
)
def test_gate_with_tied_ratios_and_tails_on_the_edge_of_a_place(calibration, tail, decay, floor):
    ordered = torch.tensor(calibration).sort().values
    gate = QuantileGate(torch.zeros(D), torch.eye(D)[:, :2], ordered, float(tail), decay, floor)
    assert float(gate.threshold) == reference.threshold(calibration, tail)
    ratios = [i / 16 for i in range(17)]
    for s, found in zip(ratios, gate.soft_gate(torch.tensor(ratios)).tolist(), strict=True):
        wanted = reference.gate(s, calibration, tail, decay, floor)
        on_the_floor = floor and abs(wanted / floor - 1) < 1e-5
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7) or on_the_floor


def test_the_reference_would_see_a_gate_that_counts_otherwise():
    """A CDF of ratios below s, in place of at most s, differs where ratios tie; a quantile of M in place of M + 1 places, or one
    that interpolates, where a place is nearly reached."""
    calibration, s, tail = [0.25] * 4 + [0.5] * 16, 0.25, Fraction(1, 2)
    below = Fraction(sum(c < s for c in calibration), len(calibration))
    assert reference.share_at_most(calibration, s) != below
    gate = QuantileGate(torch.zeros(D), torch.eye(D)[:, :2], torch.tensor(calibration), 0.5, 1.0)
    assert float(gate.soft_gate(torch.tensor([s]))) == pytest.approx(reference.gate(s, calibration, tail, 1.0, 1e-3))
    assert float(gate.soft_gate(torch.tensor([s]))) != pytest.approx(float(below / tail))
    places = [i / 64 for i in range(1, 40)]
    gate = replace(gate, calibration=torch.tensor(places), tail=0.25)
    assert float(gate.threshold) == reference.threshold(places, Fraction(1, 4)) == 10 / 64
    assert places[int(0.25 * len(places)) - 1] == 9 / 64 and np.quantile(places, 0.25) == 10.5 / 64


@pytest.fixture(scope="module")
def experts():
    return tiny_profile(tiny_model()).experts


@many
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 1e3]))
def test_steering_vector_routing_residual_and_what_is_added(experts, seed, spread):
    """`spread` 0: h = the mean of the standardisation; 1,000: routing saturates to one prototype."""
    states = experts.input_mean + spread * experts.input_std * drawn(seed, 5, 64)
    found, e = experts(states), arrays(experts)
    scale = float(found.vector.norm(dim=-1).max())
    for i, state in enumerate(numbers(states)):
        wanted = reference.steering_vector(state, e, experts.shift_scale)
        np.testing.assert_allclose(numbers(found.vector[i]), wanted, atol=2e-3 * scale, rtol=0)
        z = reference.standardise(state, e["input_mean"], e["input_std"])
        weights = reference.routing(z, e["prototypes"], e["query_projection"], e["key_projection"])
        np.testing.assert_allclose(numbers(found.routing[i]), weights, atol=2e-3)
        hidden_states = drawn(seed + i, 3, 64)
        added = hidden_states + 2.0 * 0.5 * found.vector[i]
        np.testing.assert_allclose(
            numbers(added), reference.intervene(numbers(hidden_states), 2.0, 0.5, wanted), atol=2e-3 * scale, rtol=0
        )
    assert found.routing.sum(-1).numpy() == pytest.approx(1, abs=1e-5)


def test_the_reference_would_see_a_scale_left_out(experts):
    states = experts.input_mean + experts.input_std * drawn(1, 3, 64)
    wrong = replace(experts, shift_scale=1.0)(states).vector
    wanted = np.array([reference.steering_vector(s, arrays(experts), experts.shift_scale) for s in numbers(states)])
    assert np.abs(numbers(wrong) - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("count", [12, 200])
def test_subspace(count):
    rows = drawn(2, count, D) * torch.arange(1, D + 1).rsqrt()
    found = numbers(principal_directions(rows, 5))
    wanted = reference.principal_subspace(numbers(rows), np.zeros(D), 5)
    assert np.linalg.svd(found.T @ wanted)[1].min() > 1 - 1e-6
    centred = reference.principal_subspace(numbers(rows) + 3, numbers(rows).mean(0), 5)
    assert np.linalg.svd(found.T @ centred)[1].min() < 0.99


def test_errors_that_training_reports_are_the_loss_and_the_mean_vectors_is_the_variance_formula(
    monkeypatch,
):
    """E‖δ̄ − δ‖² over held-out shifts = their variance about their own mean + ‖δ̄ − that mean‖²."""
    states, shifts = drawn(3, 60, D), drawn(4, 60, D) + 2 * drawn(5, D)
    orders, shuffle = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kw: orders.append(shuffle(*args, **kw)) or orders[-1])
    fit = fit_experts(states, shifts, ExpertOptions(epochs=3))
    scale, order = fit.experts.shift_scale, orders[0].numpy()  # the first shuffle is the split's: a tenth is held out
    held, rest = order[:6], order[6:]
    assert fit.validation_error == pytest.approx(
        reference.fitting_error(numbers(states)[held], numbers(shifts)[held], arrays(fit.experts), scale), rel=1e-4
    )
    mean, own = numbers(shifts)[rest].mean(0), numbers(shifts)[held]
    variance = np.sum((own - own.mean(0)) ** 2) / len(own)
    assert fit.mean_vector_error == pytest.approx((variance + np.sum((own.mean(0) - mean) ** 2)) / scale**2, rel=1e-4)
    assert fit.zero_error == pytest.approx((variance + np.sum(own.mean(0) ** 2)) / scale**2, rel=1e-4)
    assert abs(fit.mean_vector_error - variance / scale**2) > 1e-3 * fit.mean_vector_error
