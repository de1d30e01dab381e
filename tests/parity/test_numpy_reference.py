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
from steering.training import fit_experts as fitting
from steering.training.fit_experts import ExpertOptions, fit_experts, training_loss
from steering.training.principal import principal_directions
from tests.parity import numpy_reference as reference
from tests.tiny import orthogonal_profile, tiny_model, tiny_profile

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


@pytest.fixture(params=["standard", "orthogonal_residual"])
def either(request, experts):
    """The experts of either variant."""
    return experts if request.param == "standard" else orthogonal_profile(tiny_model()).experts


def as_wide(experts, seed, count, spread=1.0):
    """States as the experts' standardisation has them."""
    return experts.input_mean + spread * experts.input_std * drawn(seed, count, len(experts.input_mean))


@pytest.mark.parametrize("seed", range(5))
def test_the_forward_of_both_variants_to_five_digits(either, seed):
    states = as_wide(either, seed, 7)
    found = numbers(either(states).vector)
    wanted = np.array([reference.steering_vector(s, arrays(either), either.shift_scale) for s in numbers(states)])
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_the_reference_would_see_a_value_projection_left_out_or_put_on_the_residual_too():
    experts = orthogonal_profile(tiny_model()).experts
    states, e = numbers(as_wide(experts, 1, 4)), arrays(experts)
    matrix = reference.value_matrix(e["prototypes"], e["value_projection"])
    np.testing.assert_allclose(e["prototypes"] @ matrix.T, e["prototypes"] + e["value_projection"], atol=1e-12)
    wanted = np.array([reference.steering_vector(s, e, experts.shift_scale) for s in states])
    without = {k: v for k, v in e.items() if k != "value_projection"}
    left_out = np.array([reference.steering_vector(s, without, experts.shift_scale) for s in states])
    for wrong in (left_out, left_out @ matrix.T @ matrix.T):
        assert np.abs(wrong - wanted).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("regularisation", [0.0, 0.01])
def test_the_training_loss_and_its_gradients_by_finite_differences(either, regularisation):
    """Central differences of the reference in float64, at the largest and at some other entries of each parameter."""
    states, shifts = as_wide(either, 1, 12), either.shift_scale * drawn(2, 12, 64)
    e, scale = arrays(either), either.shift_scale
    leaves = {name: getattr(either, name).clone().requires_grad_() for name in sorted(e.keys() - reference.FROZEN)}
    loss, fit = training_loss(replace(either, **leaves), states, shifts, regularisation)
    loss.backward()
    slow = (numbers(states), numbers(shifts))
    assert float(loss.detach()) == pytest.approx(reference.training_loss(*slow, e, scale, regularisation), rel=1e-5)
    assert float(fit.detach()) == pytest.approx(reference.fitting_error(*slow, e, scale), rel=1e-5)
    for name, leaf in leaves.items():
        gradient = numbers(leaf.grad)
        entries = {int(np.abs(gradient).argmax()), *np.random.default_rng(0).integers(gradient.size, size=3).tolist()}
        for entry in entries:
            sides = []
            for step in (1e-5, -1e-5):
                moved = e[name].copy()
                moved.flat[entry] += step
                sides.append(reference.training_loss(*slow, e | {name: moved}, scale, regularisation))
            difference = (sides[0] - sides[1]) / 2e-5
            assert gradient.flat[entry] == pytest.approx(difference, rel=1e-3, abs=1e-4 * np.abs(gradient).max()), name


def test_the_reference_would_see_a_loss_without_its_regularisation_or_of_another_strength(either):
    states, shifts = as_wide(either, 1, 12), either.shift_scale * drawn(2, 12, 64)
    slow = (numbers(states), numbers(shifts), arrays(either), either.shift_scale)
    loss, fit = (float(x) for x in training_loss(either, states, shifts, 0.01))
    assert fit != pytest.approx(reference.training_loss(*slow, 0.01), rel=1e-2)
    assert loss != pytest.approx(reference.training_loss(*slow, 0.02), rel=1e-2)


def test_what_is_trained_by_is_the_loss_with_its_regularisation():
    states, shifts = drawn(3, 60, D), drawn(4, 60, D) + 2 * drawn(5, D)
    lengths = []
    for regularisation in (0.0, 1.0):
        options = ExpertOptions(epochs=20, patience=20, learning_rate=5e-3, regularisation=regularisation)
        lengths.append(float(fit_experts(states, shifts, options).experts.hidden_weight.norm()))
    assert lengths[1] < 0.7 * lengths[0]


@pytest.mark.parametrize("clusters", [4, 9])  # where the criteria do not agree
def test_the_second_variants_number_of_prototypes_prototypes_and_residual_basis(monkeypatch, clusters):
    """Clusters are k-means' own, of which there are many; all that is made of them is computed again, by the definitions."""
    labels, kmeans = {}, fitting.KMeans.fit

    def recorded(self, *args, **kwargs):
        found = kmeans(self, *args, **kwargs)
        labels[self.n_clusters] = found.labels_
        return found

    monkeypatch.setattr(fitting.KMeans, "fit", recorded)
    centres = 3 * torch.nn.functional.normalize(drawn(clusters, clusters, D), dim=-1)
    shifts = centres[torch.arange(90) % clusters] * (1 + drawn(6, 90, 1).abs()) + 0.7 * drawn(7, 90, D)
    fit = fit_experts(drawn(8, 90, D), shifts, ExpertOptions(variant="orthogonal_residual", epochs=1, residual_rank=5))

    rows = numbers(shifts)
    scale = np.sqrt(np.mean(np.sum(rows**2, axis=1)))
    scaled, counts = rows / scale, range(4, 11)
    assert sorted(labels) == list(counts) and fit.experts.shift_scale == pytest.approx(scale, rel=1e-6)
    wanted = {
        "elbow": reference.elbow({k: reference.inertia(scaled, labels[k]) for k in counts}),
        "silhouette": {k: reference.silhouette(scaled, labels[k]) for k in counts},
        "calinski_harabasz": {k: reference.calinski_harabasz(scaled, labels[k]) for k in counts},
    }
    for name, scores in wanted.items():
        assert fit.criteria[name] == pytest.approx(scores, rel=1e-5, abs=1e-6), name
    best = reference.median_choice(wanted)
    assert len(set(fit.choices.values())) == 2 and len(fit.experts.prototypes) == best == clusters
    prototypes = reference.centroids(scaled, labels[best])
    np.testing.assert_allclose(numbers(fit.experts.prototypes), prototypes, atol=1e-5)
    outside = reference.outside_span(rows, prototypes)
    basis = reference.principal_subspace(outside, np.zeros(D), 5)
    found = numbers(fit.experts.residual_basis)
    assert np.linalg.svd(found.T @ basis)[1].min() > 1 - 1e-6
    assert np.abs(found.T @ prototypes.T).max() < 1e-5
    inside_too = reference.principal_subspace(rows, np.zeros(D), 5)  # the first variant's
    assert np.linalg.svd(found.T @ inside_too)[1].min() < 0.9
