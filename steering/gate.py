"""SCS, the gate: decides per query whether to steer, from the energy of its state inside the IR queries' subspace. And the
baselines' gates: CAST's hard threshold on a cosine, and none at all.

Fitting is `steering.training`'s work; what is here is frozen and only applied. Everything is float32, batched, and free
of host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steering.operator import Operator, check_width

Direction = Literal["above", "below"]


class GateReading(NamedTuple):
    """`gate`: (N,) float32 in [0, 1]. `energy_ratio`: (N,) float32 in [0, 1], or None for a gate that has none."""

    gate: Tensor
    energy_ratio: Tensor | None


def energy_ratio(states: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """s(h) = ‖Vᵀ(h − μ)‖² / ‖h − μ‖², the subspace energy ratio (FineSteer, SCS).

    Args:
        states: (N, d), any float dtype; not modified.
        mean: (d,) float32, μ.
        basis: (d, r) float32, V, orthonormal columns.
    Returns:
        (N,) float32 in [0, 1]; 0 where h = μ.
    """
    centred = states.float() - mean
    inside = (centred @ basis).square().sum(-1)
    total = centred.square().sum(-1)
    return (inside / total.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1.0)


def lower_quantile(ordered: Tensor, tail: float) -> Tensor:
    """The ⌊ε(M+1)⌋-th smallest of (M,) ascending ratios, a scalar: split conformal's quantile for a tail ε.

    Where ε(M+1) < 1 it is the smallest, whose guarantee is 1/(M+1).
    """
    return ordered[max(int(tail * (len(ordered) + 1)), 1) - 1]


@dataclass(frozen=True)
class QuantileGate(Operator):
    """g = 1 where s ≥ τ, else (F(s)/ε)^γ, exactly 0 under `floor` (FineSteer, SCS; the floor is ours).

    F is the empirical CDF of the energy ratios of IR queries that did not shape V (`calibration`, sorted), τ their
    lower ε-quantile in the split-conformal sense: of exchangeable IR queries at most a share ε falls below it.

    Attributes:
        mean: (d,) float32, the centre μ.
        basis: (d, r) float32, V.
        calibration: (M,) float32, ascending.
        tail: ε in (0, 1).
        decay: γ > 0.
        floor: gates below this are exactly 0.
    """

    mean: Tensor
    basis: Tensor
    calibration: Tensor
    tail: float
    decay: float
    floor: float = 1e-3

    @property
    def threshold(self) -> Tensor:
        """τ, a float32 scalar on the gate's device: the calibration's `lower_quantile`."""
        return lower_quantile(self.calibration, self.tail)

    def __call__(self, states: Tensor) -> GateReading:
        """Read the gate for (N, d) states. Raises ShapeError if d is not the gate's."""
        check_width(states, self.mean.shape[0], "gate")
        ratio = energy_ratio(states, self.mean, self.basis)
        return GateReading(self.soft_gate(ratio), ratio)

    def soft_gate(self, ratio: Tensor) -> Tensor:
        """The gate as a function of the energy ratio alone: (N,) → (N,). NaN stays NaN, so that it is seen."""
        below = torch.searchsorted(self.calibration, ratio.contiguous(), right=True) / len(self.calibration)
        soft = (below / self.tail).clamp(max=1.0).pow(self.decay)
        gate = torch.where(ratio >= self.threshold, 1.0, soft)
        gate = torch.where(gate < self.floor, 0.0, gate)
        return torch.where(ratio.isnan(), ratio, gate)


def condition_similarity(states: Tensor, condition: Tensor) -> Tensor:
    """sim(h, tanh(proj_c h)): the cosine between a state and its projection on the condition vector (CAST, arXiv 2409.05907).

    proj_c h = (c·h) c for a c of length 1; tanh by element, as the paper has it "in practice". Without the tanh this would
    be |cos(h, c)|: the sign of c does not matter, and with it it does not either.

    Args:
        states: (N, d), any float dtype; not modified.
        condition: (d,) float32, c, of length 1.
    Returns:
        (N,) float32 in [0, 1]; 0 where h or its projection is 0.
    """
    states = states.float()
    projected = torch.tanh((states @ condition)[:, None] * condition)  # (N, d)
    norms = torch.linalg.vector_norm(states, dim=-1) * torch.linalg.vector_norm(projected, dim=-1)
    return ((states * projected).sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1.0)


@dataclass(frozen=True)
class CosineGate(Operator):
    """g = 1 where sim(h, tanh(proj_c h)) is at least θ (or, direction "below", at most θ), else 0 (CAST).

    Deviations (ours): h is the query's state at the profile's one site, where CAST averages the prompt's states at layers
    of its own; ≥ and ≤ instead of > and <.

    Attributes:
        condition: (d,) float32, c, of length 1.
        threshold: θ.
        direction: on which side of θ the gate is open.
    """

    condition: Tensor
    threshold: float
    direction: Direction

    def __call__(self, states: Tensor) -> GateReading:
        """Read the gate for (N, d) states. Raises ShapeError if d is not the gate's."""
        check_width(states, self.condition.shape[0], "gate")
        return GateReading(self.hard_gate(condition_similarity(states, self.condition)), None)

    def hard_gate(self, similarity: Tensor) -> Tensor:
        """The gate as a function of the similarity alone: (N,) → (N,) of 0 and 1. NaN stays NaN, so that it is seen."""
        opens = similarity >= self.threshold if self.direction == "above" else similarity <= self.threshold
        return torch.where(similarity.isnan(), similarity, opens.float())


@dataclass(frozen=True)
class AlwaysOpenGate(Operator):
    """g = 1 for every query: the ungated baselines."""

    def __call__(self, states: Tensor) -> GateReading:
        """Ones for (N, d) states."""
        return GateReading(torch.ones(states.shape[0], device=states.device), None)


Gate = QuantileGate | CosineGate | AlwaysOpenGate
