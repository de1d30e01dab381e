"""Fitting AlphaSteer: a matrix that makes the refusal vector of states that need intervention, and nothing of general ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import TrainingDataError
from steering.experts import LinearMap
from steering.training.principal import Moments
from steering.training.statistics import auc

NULL_ENERGIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
HELD_OUT = 0.2
MIN_QUERIES = 10
CONSTANT_ERROR = 0.5  # of r/2


@dataclass(frozen=True)
class Candidate:
    """One null space and ridge, judged on queries that shaped neither map nor null space.

    Attributes:
        null_energy: the most of the general states' energy that may lie in the null space, as a share.
        null_size: the null space's dimension.
        ridge: α, in units of the mean eigenvalue of P H Hᵀ P on the null space.
        error: (mean ‖W h − r‖² over IR queries + mean ‖W h‖² over general ones) / ‖r‖²; no map at all has 1, and
            `CONSTANT_ERROR` is the least that one multiple of r for everybody has.
        ir_dose, general_dose: mean of (W h)·r / ‖r‖²: 1 and 0 are wanted.
        auc: of the dose, IR against general queries.
    """

    null_energy: float
    null_size: int
    ridge: float
    error: float
    ir_dose: float
    general_dose: float
    auc: float


@dataclass(frozen=True)
class AlphaSteerFit:
    """The map, fitted on all queries with what was best on the held-out fifth, and all that was compared."""

    map: LinearMap
    chosen: Candidate
    candidates: list[Candidate]


def fit_alphasteer(ir_states: Tensor, general_states: Tensor, target: Tensor, *, seed: int = 0) -> AlphaSteerFit:
    """W = Δ P with P the projector on the general states' (near-)null space and Δ the ridge solution of Δ P h ≈ r.

    Source: AlphaSteer (arXiv 2506.07022): Δ = R Hᵀ P (P H Hᵀ P + α P Pᵀ)⁺, where each column of R is the refusal vector r;
    so W = r uᵀ, which is how it is kept, exactly. Deviations (ours): the authors set the null space's size and α by hand,
    by model and layer; here both are chosen by what a fifth of the queries, held out, say. At the profile's one site,
    where they steer several layers.

    Args:
        ir_states: (M, d) states of queries that need intervention; general_states: (N, d) of queries that do not.
        target: (d,), r.
    Raises:
        TrainingDataError: too few queries, a target of zero, or general states that leave no null space.
    """
    refuse_too_few(len(ir_states), len(general_states))
    if not target.norm() > 0:
        raise TrainingDataError("alphasteer: the pairs' mean shift is zero: nothing to steer towards. Check the pairs.")
    generator = torch.Generator().manual_seed(seed)
    (ir, ir_held), (general, general_held) = (
        _split(s, generator) for s in (ir_states.double(), general_states.double())
    )
    candidates = []
    energies, directions = principal_energies(general)
    for null_energy in NULL_ENERGIES:
        kept = directions[:, : num_kept(energies, null_energy)]
        if kept.shape[1] >= ir.shape[1]:
            continue
        for ridge in RIDGES:
            reader = ridge_reader(ir, kept, ridge)
            doses, general_doses = ir_held @ reader, general_held @ reader
            candidates.append(
                Candidate(
                    null_energy,
                    ir.shape[1] - kept.shape[1],
                    ridge,
                    error=float((doses - 1).square().mean() + general_doses.square().mean()),
                    ir_dose=float(doses.mean()),
                    general_dose=float(general_doses.mean()),
                    auc=auc(doses, general_doses),
                )
            )
    if not candidates:
        raise TrainingDataError(
            "alphasteer: the general queries' states fill the whole space, so that no null space is left. Choose another layer."
        )
    best = min(candidates, key=lambda c: c.error)
    energies, directions = principal_energies(general_states)
    kept = directions[:, : min(num_kept(energies, best.null_energy), directions.shape[0] - 1)]
    reader = ridge_reader(ir_states, kept, best.ridge)
    return AlphaSteerFit(LinearMap(target.float()[:, None].contiguous(), reader.float()[None]), best, candidates)


def refuse_too_few(num_ir: int, num_general: int) -> None:
    """Raise TrainingDataError where there are too few queries for a map. `num_ir`: or of the pairs' own, without IR queries."""
    if min(num_ir, num_general) < MIN_QUERIES:
        raise TrainingDataError(
            f"alphasteer needs at least {MIN_QUERIES} IR and {MIN_QUERIES} general queries; there are {num_ir} and "
            f"{num_general}. Add queries."
        )


def principal_energies(states: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of HᵀH for (N, d) states, largest first, and their eigenvectors: (r,), (d, r) float64, r ≤ min(N, d)."""
    if len(states) < states.shape[1]:
        _, values, directions = torch.linalg.svd(states.double(), full_matrices=False)
        return values.square(), directions.T
    values, vectors = torch.linalg.eigh(Moments.of(states, torch.zeros(states.shape[1])).gram)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def num_kept(energies: Tensor, null_energy: float) -> int:
    """How many leading directions lie outside the null space: the fewest that leave it at most a share `null_energy`."""
    outside = energies.cumsum(0) / energies.sum()
    return min(int((outside < 1 - null_energy).sum()) + 1, len(energies))


def ridge_reader(ir_states: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """u of W = r uᵀ: the ridge solution of uᵀ h ≈ 1 over (M, d) IR states, inside the null space: (d,) float64.

    u = P H (Hᵀ P H + αI)⁻¹ 1 with the states as H's columns, or the same through (d, d) where there are more states than
    dimensions.

    Args:
        kept: (d, R), orthonormal: P = I − kept keptᵀ.
    """

    def project(rows: Tensor) -> Tensor:
        return rows - (rows @ kept) @ kept.T

    inside = project(ir_states.double())  # (M, d)
    count, d = inside.shape
    alpha = ridge * inside.square().sum() / (d - kept.shape[1])
    ones = torch.ones(count, dtype=torch.double)
    if count <= d:
        gram = inside @ inside.T
        reader = inside.T @ torch.linalg.solve(gram + alpha * torch.eye(count, dtype=torch.double), ones)
    else:
        gram = inside.T @ inside
        reader = torch.linalg.solve(gram + alpha * torch.eye(d, dtype=torch.double), inside.T @ ones)
    return project(reader)


def _split(states: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(states), generator=generator)
    held = max(1, int(HELD_OUT * len(states)))
    return states[order[held:]], states[order[:held]]
