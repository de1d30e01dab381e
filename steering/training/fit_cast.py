"""Fitting CAST's condition: a vector along which IR and general queries differ, and the threshold of the best F1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from steering.errors import TrainingDataError
from steering.gate import CosineGate, Direction, condition_similarity
from steering.training.cross_fitting import FOLDS, Rule, fold_numbers, judged_by_other_half
from steering.training.statistics import auc


@dataclass(frozen=True)
class CastFit:
    """The fitted gate, and the out-of-sample similarities behind its threshold: (M,), (N,) float32.

    `f1`: at the threshold, on those. `auc`: of the similarity in the gate's direction. `ir_fired`, `general_fired`: (M,),
    (N,) bool, whether each query opens a gate whose threshold the other half of the queries set.
    """

    gate: CosineGate
    f1: float
    auc: float
    ir_similarities: Tensor
    general_similarities: Tensor
    ir_fired: Tensor
    general_fired: Tensor
    held_out: str


def fit_cast(
    ir_states: Tensor, general_states: Tensor, *, calibration_states: Tensor | None = None, seed: int = 0
) -> CastFit:
    """Fit the condition vector on all queries, its threshold and direction on similarities that did not shape it.

    Source: CAST (arXiv 2409.05907). Deviations (ours): threshold and direction are searched for on held-out similarities, by
    5-fold cross-fitting or, for IR queries, from `calibration_states`, where the authors search on the training set; and
    they are searched for exactly, where the authors try a grid. The layer is the profile's.

    Raises:
        TrainingDataError: too few queries, or no difference between the two kinds.
    """
    refuse_too_few(len(ir_states), len(general_states))
    ir_states, general_states = ir_states.float(), general_states.float()
    condition = condition_vector(ir_states, general_states)
    ir, general = _cross_fitted(ir_states, general_states, seed)
    held_out = f"{FOLDS}-fold cross-fitting"
    if calibration_states is not None:
        ir, held_out = condition_similarity(calibration_states, condition), "calibration queries and cross-fitting"
    threshold, direction, f1 = best_threshold(ir, general)
    separation = auc(ir, general)
    ir_fired, general_fired = judged_by_other_half(_opens, ir, general, seed=seed)
    return CastFit(
        CosineGate(condition, threshold, direction),
        f1,
        separation if direction == "above" else 1 - separation,
        ir,
        general,
        ir_fired,
        general_fired,
        held_out,
    )


def refuse_too_few(num_ir: int, num_general: int) -> None:
    """Raise TrainingDataError where there are too few queries for a condition."""
    if min(num_ir, num_general) < 2 * FOLDS:
        raise TrainingDataError(
            f"cast needs at least {2 * FOLDS} IR and {2 * FOLDS} general queries; there are {num_ir} and {num_general}. "
            "Add queries."
        )


def condition_vector(ir_states: Tensor, general_states: Tensor) -> Tensor:
    """The first principal component of (M, d) and (N, d) states about the middle of the two means: (d,) float32, length 1.

    Source: CAST, whose contrast sets are of one size; here each set counts as a whole, whatever its size.
    Raises TrainingDataError where all states are alike.
    """
    middle = (ir_states.double().mean(0) + general_states.double().mean(0)) / 2
    rows = torch.cat([(s.double() - middle) / len(s) ** 0.5 for s in (ir_states, general_states)])
    if not rows.square().sum() > 0:
        raise TrainingDataError("cast: all queries have the same state. Choose another layer.")
    start = np.random.default_rng(0).standard_normal(min(rows.shape))
    first = torch.from_numpy(svds(rows.numpy(), k=1, v0=start, return_singular_vectors="vh")[2][0].copy())
    return (first / first.norm() * first[first.abs().argmax()].sign()).float()


def best_threshold(ir: Tensor, general: Tensor) -> tuple[float, Direction, float]:
    """θ and direction with the highest F1 for IR queries, of all that there are: (θ, direction, F1).

    θ lies midway between the two neighbouring similarities that it separates. Of thresholds of equal F1 the one that fires
    on fewer general queries is taken.
    """
    best: tuple[float, int, float, Direction] | None = None
    for direction in ("above", "below"):
        sign = 1 if direction == "above" else -1
        ours, theirs = np.sort(sign * ir.numpy()), np.sort(sign * general.numpy())
        values = np.unique(np.concatenate([ours, theirs]))  # open from values[i] on
        hits = len(ours) - np.searchsorted(ours, values)
        fired = len(theirs) - np.searchsorted(theirs, values)
        f1 = 2 * hits / (hits + fired + len(ours))
        order = np.lexsort((fired, -f1))
        i = int(order[0])
        below = values[i - 1] if i else values[0]
        middle = np.float32((np.float64(below) + np.float64(values[i])) / 2)
        theta = middle if middle > below else values[i]  # neighbours may have no float between them
        found = (float(f1[i]), -int(fired[i]), float(sign * theta), direction)
        if best is None or found[:2] > best[:2]:
            best = found
    return best[2], best[3], best[0]


def _cross_fitted(ir: Tensor, general: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Each state's similarity under a condition vector fitted without its fold: (M,), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    folds = [fold_numbers(len(s), FOLDS, generator) for s in (ir, general)]
    found = torch.empty(len(ir)), torch.empty(len(general))
    for fold in range(FOLDS):
        condition = condition_vector(*(s[f != fold] for s, f in zip((ir, general), folds, strict=True)))
        for side, states in enumerate((ir, general)):
            found[side][folds[side] == fold] = condition_similarity(states[folds[side] == fold], condition)
    return found


def _opens(ir: Tensor, general: Tensor) -> Rule:
    """Whether similarities open a gate with these queries' best threshold."""
    theta, direction, _ = best_threshold(ir, general)
    return lambda mine: mine >= theta if direction == "above" else mine <= theta
