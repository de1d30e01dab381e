"""FineSteer in numpy and float64, one query at a time, written from the method's description alone.

It shares no code with `steering`: what both compute is what the description says, or one of them is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def principal_subspace(states: Array, centre: Array, rank: int) -> Array:
    """V: the top right singular vectors of the centred states, as columns."""
    return np.linalg.svd(states - centre, full_matrices=False)[2][:rank].T


def energy_ratio(state: Array, centre: Array, basis: Array) -> float:
    """s(h) = ‖Vᵀ(h − μ)‖²/‖h − μ‖²; nothing lies in the subspace where h = μ."""
    centred = state - centre
    total = float(centred @ centred)
    inside = sum(float(column @ centred) ** 2 for column in basis.T)
    return inside / total if total else 0.0


def threshold(calibration: Sequence[float], tail: Fraction) -> float:
    """The ⌊ε(M+1)⌋-th smallest calibration ratio, or the smallest where that is none."""
    place = (tail * (len(calibration) + 1)).__floor__()
    return sorted(calibration)[max(place, 1) - 1]


def share_at_most(calibration: Sequence[float], ratio: float) -> Fraction:
    """F(s), the empirical CDF: the share of calibration ratios ≤ s."""
    return Fraction(sum(c <= ratio for c in calibration), len(calibration))


def gate(ratio: float, calibration: Sequence[float], tail: Fraction, decay: float, floor: float) -> float:
    """1 from the threshold on, else (F(s)/ε)^γ, and 0 under the floor."""
    if ratio >= threshold(calibration, tail):
        return 1.0
    soft = float(min(share_at_most(calibration, ratio) / tail, Fraction(1))) ** decay
    return soft if soft >= floor else 0.0


def standardise(state: Array, mean: Array, std: Array) -> Array:
    return (state - mean) / std


def routing(standardised: Array, prototypes: Array, query: Array, key: Array) -> Array:
    """α = softmax((W_K C)ᵀ(W_Q z)/√d_k)."""
    asked = query @ standardised
    scores = np.array([float((key @ prototype) @ asked) for prototype in prototypes]) / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def residual_coefficients(
    standardised: Array, hidden_weight: Array, hidden_bias: Array, output_weight: Array, output_bias: Array
) -> Array:
    """β = the two-layer ReLU network."""
    hidden = [max(float(row @ standardised + bias), 0.0) for row, bias in zip(hidden_weight, hidden_bias, strict=True)]
    return output_weight @ np.array(hidden) + output_bias


def steering_vector(state: Array, e: dict[str, Array], scale: float) -> Array:
    """v(h) = σ(Σ α_k c_k + U_res β): `e` names the experts' arrays as a profile does."""
    z = standardise(state, e["input_mean"], e["input_std"])
    weights = routing(z, e["prototypes"], e["query_projection"], e["key_projection"])
    beta = residual_coefficients(z, e["hidden_weight"], e["hidden_bias"], e["output_weight"], e["output_bias"])
    mixed = sum(weight * prototype for weight, prototype in zip(weights, e["prototypes"], strict=True))
    return scale * (mixed + e["residual_basis"] @ beta)


def intervene(hidden_states: Array, strength: float, gate_value: float, vector: Array) -> Array:
    """H ← H + λ·g·v at each position: (T, d)."""
    return np.array([row + strength * gate_value * vector for row in hidden_states])


def fitting_error(states: Array, shifts: Array, e: dict[str, Array], scale: float) -> float:
    """mean ‖v(h) − δ‖² in units of σ²: the training loss without its regularisation."""
    errors = [
        float(np.sum((steering_vector(h, e, scale) - delta) ** 2)) for h, delta in zip(states, shifts, strict=True)
    ]
    return sum(errors) / len(errors) / scale**2
