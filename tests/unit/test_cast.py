"""CAST: its condition vector and its threshold, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.errors import TrainingDataError
from steering.gate import CosineGate, condition_similarity
from steering.training.fit_cast import best_threshold, condition_vector, fit_cast

D = 12


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def f1_of(ir, general, theta, direction):
    """Of opening for IR queries, by counting."""
    opens = [[s >= theta if direction == "above" else s <= theta for s in group] for group in (ir, general)]
    hits, false = map(sum, opens)
    return 2 * hits / (2 * hits + false + len(ir) - hits)


similarities = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None)
@given(similarities, similarities)
def test_the_threshold_is_the_best_of_a_brute_force_grid_and_its_f1_is_what_the_gate_gets(ir, general):
    theta, direction, f1 = best_threshold(torch.tensor(ir), torch.tensor(general))
    gate = CosineGate(torch.ones(1), theta, direction)
    hits, false = (int(gate.hard_gate(torch.tensor(s)).sum()) for s in (ir, general))
    assert f1 == pytest.approx(2 * hits / (hits + false + len(ir)))
    grid = [*np.linspace(-0.1, 1.1, 121), *ir, *general]
    best = max(f1_of(ir, general, t, side) for t in grid for side in ("above", "below"))
    assert f1 == pytest.approx(best) or f1 > best  # a gap may be narrower than the grid
    assert theta == float(np.float32(theta))  # it is compared in float32


def test_the_threshold_lies_midway_and_on_the_side_that_separates():
    high, low = torch.tensor([0.75, 0.875]), torch.tensor([0.25, 0.5])
    assert best_threshold(high, low) == (0.625, "above", 1.0)
    assert best_threshold(low, high) == (0.625, "below", 1.0)
    assert best_threshold(high, low.repeat(5))[0] == 0.625  # whatever their numbers


def test_the_condition_is_the_first_principal_component_of_the_balanced_and_centred_states():
    ir, general = drawn(1, 40, D), drawn(2, 90, D)
    ir[:, 0] *= 6  # a set of few rows that vary much, and one of many that vary less
    general[:, 1] *= 5
    middle = (ir.double().mean(0) + general.double().mean(0)) / 2
    rows = [(s.double() - middle).numpy() for s in (ir, general)]
    moment = sum(r.T @ r / len(r) for r in rows)
    wanted = np.linalg.eigh(moment)[1][:, -1]
    found = condition_vector(ir, general)
    assert abs(found.double().numpy() @ wanted) == pytest.approx(1, abs=1e-6)
    assert found.norm() == pytest.approx(1, abs=1e-6)
    # Each set counts as a whole: twice the same general queries are the same set; to pooled rows they would be more.
    torch.testing.assert_close(condition_vector(ir, general.repeat(4, 1)), found, atol=1e-5, rtol=0)
    pooled = np.linalg.svd(np.concatenate([rows[0], *[rows[1]] * 4]))[2][0]
    assert abs(pooled @ wanted) < 0.99


def planted(seed, count, ir: bool):
    """Small states; IR ones lie along one direction, on either side of the origin."""
    states = 0.3 * drawn(seed, count, D)
    if ir:
        states[:, 0] += 1.5 * torch.sign(drawn(seed + 1, count))
    return states


def test_the_fitted_gate_separates_unseen_queries():
    fit = fit_cast(planted(1, 100, True), planted(3, 100, False))
    assert fit.gate.direction == "above" and fit.auc > 0.95 and fit.f1 > 0.9
    fired = [float(fit.gate(planted(seed, 300, ir)).gate.mean()) for seed, ir in ((5, True), (7, False))]
    assert fired[0] > 0.85 and fired[1] < 0.15
    assert fit.ir_fired.float().mean() == pytest.approx(fired[0], abs=0.1)
    assert fit.general_fired.float().mean() == pytest.approx(fired[1], abs=0.1)


def test_held_out_similarities_show_no_separation_where_there_is_none():
    """The threshold's own F1 is at least that of firing always; the other half's threshold says what it is worth."""
    fit = fit_cast(drawn(1, 60, 40), drawn(2, 60, 40))
    assert abs(fit.auc - 0.5) < 0.15 and fit.f1 >= 2 / 3 - 1e-9
    assert abs(float(fit.ir_fired.float().mean() - fit.general_fired.float().mean())) < 0.25


def test_calibration_queries_set_the_threshold_in_place_of_the_ir_queries():
    ir, general, calibration = planted(1, 100, True), planted(3, 100, False), 0.5 * planted(9, 50, True)
    fit = fit_cast(ir, general, calibration_states=calibration)
    torch.testing.assert_close(fit.ir_similarities, condition_similarity(calibration, fit.gate.condition))
    assert fit.gate.threshold != fit_cast(ir, general).gate.threshold


def test_fitting_twice_gives_the_same_bits_and_too_little_is_refused():
    first, second = (fit_cast(planted(1, 50, True), planted(3, 50, False)).gate for _ in range(2))
    assert torch.equal(first.condition, second.condition) and first.threshold == second.threshold
    with pytest.raises(TrainingDataError, match="at least 10 IR and 10 general"):
        fit_cast(drawn(1, 9, D), drawn(2, 50, D))
    with pytest.raises(TrainingDataError, match="the same state"):
        fit_cast(torch.ones(20, D), torch.ones(20, D))
