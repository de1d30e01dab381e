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
    """v(h) = σ(W_V Σ α_k c_k + U_res β): `e` names the experts' arrays as a profile does; W_V is I where it has none."""
    z = standardise(state, e["input_mean"], e["input_std"])
    weights = routing(z, e["prototypes"], e["query_projection"], e["key_projection"])
    beta = residual_coefficients(z, e["hidden_weight"], e["hidden_bias"], e["output_weight"], e["output_bias"])
    mixed = sum(weight * prototype for weight, prototype in zip(weights, e["prototypes"], strict=True))
    if "value_projection" in e:
        mixed = value_matrix(e["prototypes"], e["value_projection"]) @ mixed
    return scale * (mixed + e["residual_basis"] @ beta)


def value_matrix(prototypes: Array, offsets: Array) -> Array:
    """The (d, d) matrix W_V that a profile's `value_projection` stands for: W_V c_k = c_k + its k-th row, and the identity on all
    that is orthogonal to the prototypes."""
    return np.eye(prototypes.shape[1]) + (np.linalg.pinv(prototypes) @ offsets).T


def intervene(hidden_states: Array, strength: float, gate_value: float, vector: Array) -> Array:
    """H ← H + λ·g·v at each position: (T, d)."""
    return np.array([row + strength * gate_value * vector for row in hidden_states])


def fitting_error(states: Array, shifts: Array, e: dict[str, Array], scale: float) -> float:
    """mean ‖v(h) − δ‖² in units of σ²: the training loss without its regularisation."""
    errors = [
        float(np.sum((steering_vector(h, e, scale) - delta) ** 2)) for h, delta in zip(states, shifts, strict=True)
    ]
    return sum(errors) / len(errors) / scale**2


FROZEN = {"prototypes", "residual_basis", "input_mean", "input_std"}


def training_loss(states: Array, shifts: Array, e: dict[str, Array], scale: float, regularisation: float) -> float:
    """mean ‖v(h) − δ‖²/σ² + λ_reg ‖Θ‖², Θ being all of the experts' arrays but the frozen ones."""
    squares = sum(float(number) ** 2 for name in e.keys() - FROZEN for number in e[name].flat)
    return fitting_error(states, shifts, e, scale) + regularisation * squares


def inertia(rows: Array, labels: Array) -> float:
    """Σ ‖x − its cluster's mean‖²."""
    return sum(float(np.sum((rows[labels == k] - rows[labels == k].mean(0)) ** 2)) for k in set(labels.tolist()))


def calinski_harabasz(rows: Array, labels: Array) -> float:
    """Scatter between the clusters over that within, each by its degrees of freedom."""
    count, within = len(set(labels.tolist())), inertia(rows, labels)
    between = inertia(rows, np.zeros(len(rows))) - within
    return (between / (count - 1)) / (within / (len(rows) - count))


def silhouette(rows: Array, labels: Array) -> float:
    """The mean of (b − a)/max(a, b): a, a row's mean distance to the others of its cluster; b, to the nearest other one's."""
    found = []
    for i, row in enumerate(rows):
        distances = np.sqrt(np.sum((rows - row) ** 2, axis=1))
        means = {
            k: distances[(labels == k) & (np.arange(len(rows)) != i)].mean()
            for k in set(labels.tolist())
            if k != labels[i] or np.sum(labels == k) > 1
        }
        own = means.pop(labels[i], None)
        nearest = min(means.values())
        found.append(0.0 if own is None else (nearest - own) / max(nearest, own))
    return sum(found) / len(found)


def elbow(inertias: dict[int, float]) -> dict[int, float]:
    """How far each point of the curve, brought into the unit square, lies under the line between its first and last."""
    x = (np.array(list(inertias)) - min(inertias)) / (max(inertias) - min(inertias))
    y = np.array(list(inertias.values()))
    y = (y - y[-1]) / (y[0] - y[-1])
    return dict(zip(inertias, (1 - x) - y, strict=True))


def median_choice(scores: dict[str, dict[int, float]]) -> int:
    """The median over the criteria of the K where each is highest: of three."""
    [_, middle, _] = sorted(max(of_k, key=of_k.__getitem__) for of_k in scores.values())
    return middle


def centroids(rows: Array, labels: Array) -> Array:
    return np.array([rows[labels == k].mean(0) for k in sorted(set(labels.tolist()))])


def outside_span(rows: Array, prototypes: Array) -> Array:
    """What least squares over the prototypes leaves of each row."""
    return rows - np.linalg.lstsq(prototypes.T, rows.T, rcond=None)[0].T @ prototypes
