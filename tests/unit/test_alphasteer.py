"""AlphaSteer: its null space, its ridge solution and its choices, against theorems and slow float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.errors import TrainingDataError
from steering.training.fit_alphasteer import (
    NULL_ENERGIES,
    RIDGES,
    fit_alphasteer,
    num_kept,
    principal_energies,
    ridge_reader,
)

D = 24


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed, rank, d=D):
    return torch.linalg.qr(drawn(seed, d, rank)).Q


def general_states(seed, count=200, rank=6, noise=0.0):
    """Within `rank` directions, about a mean in them, but for noise."""
    return (3 + 2 * drawn(seed, count, rank)) @ orthonormal(0, rank).T + noise * drawn(seed + 100, count, D)


def ir_states(seed, count=120, noise=0.0):
    """As general ones, and shifted along a direction of their own besides."""
    return general_states(seed, count, noise=noise) + 2 * orthonormal(0, 8)[:, 7] + 0.3 * drawn(seed + 50, count, D)


TARGET = drawn(9, D)


def slow_map(ir, kept, target, alpha):
    """Δ P by the paper's formula with whole matrices: R Hᵀ P (P H Hᵀ P + α P Pᵀ)⁺ P, states as columns, float64 numpy."""
    h, v = ir.double().numpy().T, kept.double().numpy()
    p = np.eye(len(h)) - v @ v.T
    r = np.repeat(target.double().numpy()[:, None], h.shape[1], axis=1)
    return r @ h.T @ p @ np.linalg.pinv(p @ h @ h.T @ p + alpha * p @ p.T, rcond=1e-10) @ p


@pytest.mark.parametrize("count", [10, 120], ids=["fewer states than dimensions", "more"])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_the_ridge_solution_is_the_papers_formula_in_slow_float64(count, ridge):
    ir = ir_states(1, count)
    energies, directions = principal_energies(general_states(2, noise=0.1))
    kept = directions[:, : num_kept(energies, 0.01)]
    projector = np.eye(D) - (kept @ kept.T).numpy()
    alpha = ridge * np.sum((ir.double().numpy() @ projector) ** 2) / (D - kept.shape[1])
    found = torch.outer(TARGET.double(), ridge_reader(ir, kept, ridge)).numpy()
    np.testing.assert_allclose(found, slow_map(ir, kept, TARGET, alpha), atol=1e-8)
    assert not np.allclose(found, slow_map(ir, kept, TARGET, 2 * alpha), atol=1e-3)
    assert not np.allclose(found, slow_map(ir, kept[:, :-1], TARGET, alpha), atol=1e-3)


def test_the_null_space_annihilates_general_states_and_without_it_the_same_ridge_does_not():
    """‖W h_b‖ over ‖W h_m‖, on general queries that were not seen: exact where they span few directions."""
    general, unseen, ir = general_states(2), general_states(3), ir_states(1)
    energies, directions = principal_energies(general)
    kept = directions[:, : num_kept(energies, 1e-9)]
    assert kept.shape[1] == 6
    for constrained, limits in ((kept, (0, 1e-6)), (kept[:, :0], (0.2, 10))):
        reader = ridge_reader(ir, constrained, 1e-2)
        low, high = limits
        leak = (unseen.double() @ reader).norm() / len(unseen) ** 0.5
        assert low <= leak / (ir_states(4).double() @ reader).abs().mean() <= high


def test_the_fitted_map_steers_unseen_ir_queries_to_the_target_and_leaves_unseen_general_ones():
    fit = fit_alphasteer(ir_states(1, noise=0.05), general_states(2, noise=0.05), TARGET)
    vectors = fit.map(ir_states(4, noise=0.05)).vector
    assert ((vectors.mean(0) - TARGET).norm() / TARGET.norm()) < 0.15
    assert fit.map(general_states(5, noise=0.05)).vector.norm(dim=-1).mean() / TARGET.norm() < 0.15
    assert fit.chosen.error < 0.2 and fit.chosen.auc > 0.99
    assert fit.chosen.error == min(c.error for c in fit.candidates)
    assert {c.ridge for c in fit.candidates} == set(RIDGES)


def test_where_the_two_kinds_do_not_differ_no_map_does_better_than_half_the_target_for_everybody():
    fit = fit_alphasteer(general_states(1, noise=1.0), general_states(2, noise=1.0), TARGET)
    assert fit.chosen.error > 0.48 and abs(fit.chosen.auc - 0.5) < 0.2


@pytest.mark.parametrize("count", [15, 200], ids=["fewer states than dimensions", "more"])
def test_the_null_space_leaves_at_most_the_share_of_energy_that_it_is_named_for_and_no_less_than_it_may(count):
    general = general_states(2, count, noise=0.5)
    energies, directions = principal_energies(general)
    total = general.double().square().sum()
    torch.testing.assert_close(directions.T @ directions, torch.eye(len(energies), dtype=torch.double))
    for share in NULL_ENERGIES:
        rank = num_kept(energies, share)
        left = [total - (general.double() @ directions[:, :r]).square().sum() for r in (rank - 1, rank)]
        assert left[1] <= share * total * (1 + 1e-9) and (rank == 1 or left[0] > share * total)


def test_fitting_twice_gives_the_same_bits():
    first, second = (fit_alphasteer(ir_states(1), general_states(2), TARGET).map for _ in range(2))
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(TrainingDataError, match="at least 10 IR and 10 general"):
        fit_alphasteer(ir_states(1, 9), general_states(2), TARGET)
    with pytest.raises(TrainingDataError, match="nothing to steer towards"):
        fit_alphasteer(ir_states(1), general_states(2), torch.zeros(D))
    with pytest.raises(TrainingDataError, match="no null space is left"):  # one dimension, all of it general
        fit_alphasteer(drawn(1, 20, 1), drawn(2, 20, 1), torch.ones(1))
