"""SCS: the energy ratio, the quantile gate and its fitter, against theorems and slow exact versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.errors import ShapeError, TrainingDataError
from steering.gate import CosineGate, QuantileGate, condition_similarity, energy_ratio
from steering.training.fit_gate import fit_gate, missed_out_of_sample
from steering.training.statistics import auc, clopper_pearson

D = 12


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed, rank, d=D):
    return torch.linalg.qr(drawn(seed, d, rank)).Q


def gate_of(calibration, tail=0.1, decay=2.0, floor=1e-3):
    ratios = torch.as_tensor(calibration, dtype=torch.float32).sort().values
    return QuantileGate(torch.zeros(D), orthonormal(0, 3), ratios, tail, decay, floor)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, D))
def test_energy_ratio_is_a_share_and_equals_float64_numpy(seed, rank):
    states, mean, basis = drawn(seed, 7, D) * 20, drawn(seed + 1, D), orthonormal(seed + 2, rank)
    centred = states.double().numpy() - mean.double().numpy()
    wanted = ((centred @ basis.double().numpy()) ** 2).sum(1) / (centred**2).sum(1)
    found = energy_ratio(states, mean, basis)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, D - 1), st.floats(0.01, 100))
def test_energy_ratio_is_left_alone_by_what_it_should_be(seed, rank, factor):
    """Another basis of the subspace, one rotation of everything, one of the state within the subspace or within what is
    orthogonal to it, and a scale about the centre."""
    states, mean, basis = 3 * drawn(seed, 5, D), drawn(seed + 1, D), orthonormal(seed + 2, rank)
    ratio = energy_ratio(states, mean, basis)
    inner, turn, outer = (
        orthonormal(seed + 3, rank, rank),
        orthonormal(seed + 4, D),
        orthonormal(seed + 5, D - rank, D - rank),
    )
    complement = torch.linalg.svd(basis).U[:, rank:]
    centred = states - mean
    within = centred @ basis @ inner @ basis.T + centred @ complement @ outer @ complement.T
    for same in (
        energy_ratio(states, mean, basis @ inner),
        energy_ratio(states @ turn.T, turn @ mean, turn @ basis),
        energy_ratio(mean + within, mean, basis),
        energy_ratio(mean + factor * centred, mean, basis),
        energy_ratio(mean - centred, mean, basis),
    ):
        torch.testing.assert_close(same, ratio, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 4, D - 1])
def test_energy_ratio_is_changed_by_what_should_change_it(rank):
    """The same moves, each with a part left out."""
    states, mean, basis = 3 * drawn(1, 5, D), drawn(2, D), orthonormal(3, rank)
    ratio, turn = energy_ratio(states, mean, basis), orthonormal(4, D)
    for other in (
        energy_ratio(states @ turn.T, mean, basis),  # the state alone turned, out of the subspace and into it
        energy_ratio(states @ turn.T, turn @ mean, basis),
        energy_ratio(states @ turn.T, mean, turn @ basis),
        energy_ratio(states, mean, turn @ basis),
        energy_ratio(7 * states, mean, basis),  # scale about the origin
        energy_ratio(states + 1, mean, basis),
        energy_ratio(states, mean + 1, basis),
        energy_ratio(states, mean, 0.5 * basis),
    ):
        assert (other - ratio).abs().max() > 1e-2


def test_energy_ratio_is_one_inside_zero_outside_and_zero_at_the_centre():
    full = orthonormal(0, D)
    inside, outside = drawn(1, 4, 3) @ full[:, :3].T, drawn(2, 4, D - 3) @ full[:, 3:].T
    torch.testing.assert_close(energy_ratio(inside, torch.zeros(D), full[:, :3]), torch.ones(4))
    torch.testing.assert_close(energy_ratio(outside, torch.zeros(D), full[:, :3]), torch.zeros(4))
    assert energy_ratio(torch.zeros(1, D), torch.zeros(D), full[:, :3]) == 0
    twice = full[:, [0, 1, 2, 0, 1, 2]]  # of columns that are not orthonormal it would be no share
    torch.testing.assert_close((inside @ twice).square().sum(-1) / inside.square().sum(-1), torch.full((4,), 2.0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=60),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
    st.floats(0.02, 0.9),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
def test_soft_gate_equals_the_slow_definition(calibration, ratios, tail, decay):
    gate = gate_of(calibration, tail, decay)
    ordered = sorted(np.float32(c) for c in calibration)
    threshold = ordered[max(int(tail * (len(ordered) + 1)), 1) - 1]
    assert gate.threshold == threshold
    for ratio, found in zip(ratios, gate.soft_gate(torch.tensor(ratios)).tolist(), strict=True):
        share = sum(c <= np.float32(ratio) for c in ordered) / len(ordered)
        wanted = 1.0 if np.float32(ratio) >= threshold else min(share / tail, 1.0) ** decay
        assert found == pytest.approx(0.0 if wanted < 1e-3 else wanted, rel=1e-4, abs=1e-6)


def test_gate_rises_with_the_ratio_is_exactly_zero_under_the_floor_and_lets_nan_through():
    gate = gate_of(torch.linspace(0.2, 1, 200), tail=0.5, decay=2.0, floor=0.01)
    values = gate.soft_gate(torch.linspace(0, 1, 500))
    assert (values.diff() >= 0).all() and (values == 0).any() and values[-1] == 1
    assert ((values == 0) | (values >= 0.01)).all() and ((values > 0) & (values < 1)).any()
    assert gate.soft_gate(torch.tensor([float("nan")])).isnan().all()
    assert gate(torch.full((1, D), float("nan"))).gate.isnan().all()


def test_a_state_of_another_width_is_refused():
    with pytest.raises(ShapeError, match="13 wide, the gate 12"):
        gate_of([0.1, 0.9])(torch.zeros(1, 13))


def test_condition_similarity_equals_numpy_knows_no_sign_of_the_condition_and_is_no_plain_cosine():
    states, condition = 5 * drawn(1, 9, D), orthonormal(2, 1)[:, 0]
    c = condition.double().numpy()
    wanted = []
    for h in states.double().numpy():
        projected = np.tanh(np.outer(c, c) @ h)
        wanted.append(h @ projected / (np.linalg.norm(h) * np.linalg.norm(projected)))
    found = condition_similarity(states, condition)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(condition_similarity(states, -condition), found)
    plain = torch.nn.functional.cosine_similarity(states, condition[None]).abs()
    assert (plain - found).abs().max() > 1e-2
    torch.testing.assert_close(condition_similarity(1e-3 * states, condition), plain, atol=1e-4, rtol=0)  # tanh x ≈ x
    assert condition_similarity(torch.zeros(1, D), condition) == 0


def test_cosine_gate_is_open_on_its_side_of_the_threshold_and_lets_nan_through():
    condition = orthonormal(2, 1)[:, 0]
    states = torch.cat([drawn(1, 40, D), torch.full((1, D), torch.nan)])
    similarity = condition_similarity(states, condition)
    threshold = float(similarity[3])  # itself open, both ways
    above, below = (CosineGate(condition, threshold, side)(states) for side in ("above", "below"))
    assert above.energy_ratio is None and above.gate[-1].isnan() and below.gate[-1].isnan()
    assert torch.equal(above.gate[:-1], (similarity[:-1] >= threshold).float())
    assert torch.equal(below.gate[:-1], (similarity[:-1] <= threshold).float())
    assert above.gate[3] == below.gate[3] == 1 and 0 < above.gate[:-1].mean() < 1
    with pytest.raises(ShapeError, match="13 wide, the gate 12"):
        CosineGate(condition, 0.5, "above")(torch.zeros(1, 13))


def test_of_exchangeable_queries_at_most_epsilon_miss_and_of_shifted_ones_more():
    """Split conformal coverage, over 400 draws of the calibration; the negative control is a shift of the traffic."""
    rng, missed, shifted = np.random.default_rng(0), [], []
    for _ in range(400):
        gate = gate_of(rng.beta(5, 2, 60), tail=0.1)
        threshold = float(gate.threshold)
        missed.append((rng.beta(5, 2, 200) < threshold).mean())
        shifted.append((rng.beta(4, 3, 200) < threshold).mean())
    assert np.mean(missed) <= 0.1 + 3 * np.std(missed) / 20
    assert np.mean(missed) > 0.07  # and it is not vacuous
    assert np.mean(shifted) > 0.15


def planted(seed, count, direction_scale):
    """IR states vary in 3 of D directions; general ones in all of them."""
    basis = orthonormal(9, 3)
    return 0.3 * drawn(seed, count, D) + direction_scale * drawn(seed + 1, count, 3) @ basis.T


def test_fitter_finds_the_planted_subspace_and_separates_unseen_queries():
    fit = fit_gate(planted(1, 300, 3.0), drawn(3, 300, D), tail=0.05)
    torch.testing.assert_close(fit.gate.basis.T @ fit.gate.basis, torch.eye(fit.rank), atol=1e-5, rtol=0)
    inside = fit.gate.basis[:, :3].T @ orthonormal(9, 3)  # principal angles with the planted directions: all near 0
    assert fit.chosen.auc > 0.95 and fit.rank >= 3 and torch.linalg.svdvals(inside).min() > 0.98
    unseen_ir, unseen_general = planted(5, 400, 3.0), drawn(7, 400, D)
    assert (fit.gate(unseen_ir).gate == 1).float().mean() > 0.9
    assert (fit.gate(unseen_general).gate == 1).float().mean() < 0.1


def test_of_gates_that_are_as_good_the_one_with_fewest_directions_is_chosen():
    """As good: within one standard error of the lowest fire rate, which alone would here choose more directions."""
    ir = planted(10, 300, 2.0) + 0.6 * drawn(19, 300, 2) @ orthonormal(4, 2).T  # two weak directions more
    general = drawn(13, 300, D)
    fit = fit_gate(ir, general, centre="none")
    lowest = min(fit.candidates, key=lambda c: c.fire_rate)
    limit = lowest.fire_rate + np.sqrt(lowest.fire_rate * (1 - lowest.fire_rate) / len(general))
    assert fit.chosen.fire_rate <= limit and fit.rank < lowest.rank
    assert all(c.fire_rate > limit for c in fit.candidates if c.rank < fit.rank)


def test_held_out_ratios_show_no_separation_where_there_is_none():
    """Same distribution on both sides, as many directions as samples allow: in-sample ratios would separate well."""
    ir, general = drawn(1, 60, 40), drawn(2, 60, 40)
    fit = fit_gate(ir, general, centre="none", rank=16, force=True)
    assert abs(fit.chosen.auc - 0.5) < 0.12
    in_sample = auc(
        energy_ratio(ir, fit.gate.mean, fit.gate.basis), energy_ratio(general, fit.gate.mean, fit.gate.basis)
    )
    assert in_sample > 0.8


def test_an_inverted_gate_is_refused_unless_forced():
    ir, general = drawn(3, 200, D), drawn(1, 200, D)
    ir[:, 0] *= 3
    general[:, 0] *= 10  # general queries have yet more energy where IR ones have most
    with pytest.raises(TrainingDataError, match="inverted"):
        fit_gate(ir, general, centre="none", rank=1)
    assert fit_gate(ir, general, centre="none", rank=1, force=True).chosen.auc < 0.5


def test_too_little_data_is_refused_with_the_number_needed():
    with pytest.raises(TrainingDataError, match="at least 10 IR"):
        fit_gate(drawn(1, 9, D), drawn(2, 50, D))
    with pytest.raises(TrainingDataError, match="rank 20 needs"):
        fit_gate(drawn(1, 50, D), drawn(2, 50, D), rank=20)
    with pytest.raises(TrainingDataError, match="at least 19 calibration"):
        fit_gate(drawn(1, 50, D), drawn(2, 50, D), calibration_states=drawn(3, 10, D))


def test_fitting_twice_gives_the_same_bits():
    first, second = (fit_gate(planted(1, 100, 2.0), drawn(3, 100, D)) for _ in range(2))
    assert torch.equal(first.gate.basis, second.gate.basis)
    assert torch.equal(first.gate.calibration, second.gate.calibration)


def test_misses_are_counted_against_a_threshold_set_without_them():
    """By its own threshold, here the minimum, no ratio can miss; by the other half's, the least of all must."""
    few = torch.rand(20, generator=torch.Generator().manual_seed(1))
    assert missed_out_of_sample(few, 0.05)[few.argmin()]
    assert not (few < few.min()).any()
    many = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert float(missed_out_of_sample(many, 0.1).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_auc_and_interval_against_their_definitions():
    positive, negative = [0.9, 0.5, 0.5, 0.1], [0.5, 0.2, 0.0]
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(pairs))
    low, high = clopper_pearson(0, 20)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 20))
    low, high = clopper_pearson(20, 20)
    assert high == 1 and low == pytest.approx(0.025 ** (1 / 20))
