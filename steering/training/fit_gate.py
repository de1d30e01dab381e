"""Fitting SCS: which centre, which rank, which threshold, all judged on states that did not shape the subspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from steering.errors import TrainingDataError
from steering.gate import QuantileGate, energy_ratio, lower_quantile
from steering.training.cross_fitting import FOLDS, Rule, fold_numbers, judged_by_other_half
from steering.training.principal import CHUNK, Moments
from steering.training.statistics import auc

Centre = Literal["none", "general", "ir"]
CENTRES: tuple[Centre, ...] = ("none", "general", "ir")
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MIN_AUC = 0.8


@dataclass(frozen=True)
class Candidate:
    """One centre and rank, judged by cross-fitting: `auc` of IR against general ratios, and the share of general queries
    at or above the ε-quantile of the IR ones (`fire_rate`)."""

    centre: Centre
    rank: int
    auc: float
    fire_rate: float


@dataclass(frozen=True)
class GateFit:
    """The fitted gate, what was compared, and the out-of-sample ratios behind the choice, (M,) and (N,) float32."""

    gate: QuantileGate
    centre: Centre
    rank: int
    candidates: list[Candidate]
    ir_ratios: Tensor
    general_ratios: Tensor
    held_out: str

    @property
    def chosen(self) -> Candidate:
        return next(c for c in self.candidates if (c.centre, c.rank) == (self.centre, self.rank))


def fit_gate(
    ir_states: Tensor,
    general_states: Tensor,
    *,
    calibration_states: Tensor | None = None,
    tail: float = 0.05,
    decay: float = 2.0,
    floor: float = 1e-3,
    centre: Centre | Literal["auto"] = "auto",
    rank: int | Literal["auto"] = "auto",
    seed: int = 0,
    force: bool = False,
) -> GateFit:
    """Fit the subspace on IR states, choose centre and rank by held-out separation, calibrate the threshold.

    Source: FineSteer, SCS. Deviations (ours): the centre is a choice; all ratios compared and calibrated on are
    out of sample, by 5-fold cross-fitting of both the subspace (IR) and the centre (general), or from
    `calibration_states`. Of the candidates whose fire rate on general queries at the threshold is within one standard
    error of the lowest, the smallest rank is taken, then the lowest fire rate, then the highest AUC.

    Args:
        ir_states: (M, d) states of queries that need intervention; general_states: (N, d) of queries that do not.
        calibration_states: (C, d) of further IR queries, for F and τ; default: the cross-fitted IR ratios.
    Raises:
        TrainingDataError: too few states, or a gate that cannot separate (AUC < 0.5) without `force`.
    """
    num_calibration = None if calibration_states is None else len(calibration_states)
    refuse_too_few(len(ir_states), len(general_states), num_calibration, ir_states.shape[1], rank, tail)
    highest = _highest_rank(len(ir_states), ir_states.shape[1])
    ranks = [r for r in RANKS if r <= highest] if rank == "auto" else [rank]
    centres = CENTRES if centre == "auto" else (centre,)

    ir_states, general_states = ir_states.float(), general_states.float()
    moments = Moments.of(ir_states, ir_states.mean(0))
    candidates, ratios = [], _cross_fitted(ir_states, general_states, moments, centres, ranks, seed)
    for c in centres:
        for r in ranks:
            ir, general = ratios[c, r]
            threshold = lower_quantile(ir.sort().values, tail)
            fire_rate = float((general >= threshold).float().mean())
            candidates.append(Candidate(c, r, auc(ir, general), fire_rate))
    lowest = min(c.fire_rate for c in candidates)
    good = lowest + (lowest * (1 - lowest) / len(general_states)) ** 0.5
    best = min(
        (c for c in candidates if c.fire_rate <= good), key=lambda c: (c.rank, round(c.fire_rate, 4), -round(c.auc, 4))
    )
    if best.auc < 0.5 and not force:
        raise TrainingDataError(
            f"the best gate is inverted: general queries score higher than IR ones (AUC {best.auc:.2f}). Choose another layer, "
            "check that the IR and general files are not swapped, or pass --force to save it all the same."
        )
    mean = _centre(best.centre, ir_states, general_states)
    basis = moments.directions(mean, best.rank)
    ir_ratios, general_ratios = ratios[best.centre, best.rank]
    calibration = ir_ratios if calibration_states is None else energy_ratios(calibration_states, mean, basis)
    gate = QuantileGate(mean, basis, calibration.sort().values.contiguous(), tail, decay, floor)
    held_out = f"{FOLDS}-fold cross-fitting"
    return GateFit(gate, best.centre, best.rank, candidates, ir_ratios, general_ratios, held_out)


def refuse_too_few(
    num_ir: int, num_general: int, num_calibration: int | None, width: int, rank: int | Literal["auto"], tail: float
) -> None:
    """Raise TrainingDataError where there are too few queries for a gate, for its rank or for its threshold.

    Args:
        num_calibration: None where the threshold is set by the IR queries. width: d.
    """
    if min(num_ir, num_general) < 2 * FOLDS:
        raise TrainingDataError(
            f"a gate needs at least {2 * FOLDS} IR and {2 * FOLDS} general queries; there are {num_ir} and "
            f"{num_general}. Add queries."
        )
    highest = _highest_rank(num_ir, width)
    if rank != "auto" and rank > highest:
        raise TrainingDataError(f"rank {rank} needs more than {num_ir} IR queries or a wider model: at most {highest}.")
    if num_calibration is not None and int(tail * (num_calibration + 1)) < 1:
        needed = int(np.ceil(1 / tail)) - 1
        raise TrainingDataError(
            f"a tail of {tail} needs at least {needed} calibration queries; there are {num_calibration}. Add queries."
        )


def _highest_rank(num_ir: int, width: int) -> int:
    return min(num_ir * (FOLDS - 1) // FOLDS - 1, width - 1)


def missed_out_of_sample(ratios: Tensor, tail: float, seed: int = 0) -> Tensor:
    """Whether each IR ratio falls under a threshold set without it: each half is judged by the other's ε-quantile.

    Judged by the threshold that they set themselves, a share of just ε would fall under it, whatever the gate is worth.
    Args and returns: (M,) float32 → (M,) bool.
    """

    def under(others: Tensor) -> Rule:
        threshold = lower_quantile(others.sort().values, tail)
        return lambda mine: mine < threshold

    return judged_by_other_half(under, ratios, seed=seed)[0]


def _cross_fitted(
    ir: Tensor, general: Tensor, moments: Moments, centres: Sequence[Centre], ranks: list[int], seed: int
) -> dict[tuple[Centre, int], tuple[Tensor, Tensor]]:
    """Each state's energy ratio under a subspace and centre fitted without its fold: {(centre, rank): ((M,), (N,))}.

    `moments`: all IR states'. Without a fold they are the difference, so that no product over all states is made twice; and
    no more of the states than a thousand rows is ever copied.
    """
    generator = torch.Generator().manual_seed(seed)
    ir_folds, general_folds = (fold_numbers(len(s), FOLDS, generator) for s in (ir, general))
    ratios = {(c, r): (torch.empty(len(ir)), torch.empty(len(general))) for c in centres for r in ranks}
    means = {"none": torch.zeros(FOLDS, ir.shape[1]), "ir": _means_without(ir, ir_folds)}
    means["general"] = _means_without(general, general_folds)
    for fold in range(FOLDS):
        mine = [(folds == fold).nonzero()[:, 0] for folds in (ir_folds, general_folds)]
        others = moments - Moments.of(ir, moments.reference, mine[0])
        for c in centres:
            mean = means[c][fold]
            basis = others.directions(mean, max(ranks))
            for side, states in enumerate((ir, general)):
                for some in mine[side].split(CHUNK):
                    by_rank = _energy_ratios(states[some], mean, basis, ranks)
                    for r in ranks:
                        ratios[c, r][side][some] = by_rank[r]
    return ratios


def _means_without(states: Tensor, folds: Tensor) -> Tensor:
    """The mean of the (n, d) states outside of each fold: (FOLDS, d) float32, by sums in float64."""
    sums = torch.zeros(FOLDS, states.shape[1], dtype=torch.double)
    for some, fold in zip(states.split(CHUNK), folds.split(CHUNK), strict=True):
        sums.index_add_(0, fold, some.double())
    return ((sums.sum(0) - sums) / (len(states) - folds.bincount(minlength=FOLDS))[:, None]).float()


def _energy_ratios(states: Tensor, mean: Tensor, basis: Tensor, ranks: list[int]) -> dict[int, Tensor]:
    """`energy_ratio` under the first r columns of the basis, for each r of `ranks`, by one product: {r: (N,)}."""
    centred = states - mean
    inside = (centred @ basis).square().cumsum(-1)  # (N, R)
    total = centred.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {r: (inside[:, r - 1] / total).clamp(max=1.0) for r in ranks}


def energy_ratios(states: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """`energy_ratio` of many (N, d) states, a thousand at a time: (N,)."""
    return torch.cat([energy_ratio(some, mean, basis) for some in states.split(CHUNK)])


def _centre(centre: Centre, ir: Tensor, general: Tensor) -> Tensor:
    """μ for each choice of centre: (d,)."""
    return {"none": torch.zeros(ir.shape[1]), "general": general.mean(0), "ir": ir.mean(0)}[centre]
