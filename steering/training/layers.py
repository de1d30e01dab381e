"""Choosing the layer: every layer's gate and experts from one extraction, compared on what was held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steering.errors import TrainingDataError


@dataclass(frozen=True)
class LayerScore:
    """One layer, judged by held-out separation (`auc`, and the `fire_rate` on general queries at the threshold; None without
    a gate) and by `validation_error`: mean ‖v − δ‖² over the mean ‖δ‖² (None for methods without experts to validate)."""

    layer: int
    auc: float | None
    fire_rate: float | None
    validation_error: float | None


AUC_TOLERANCE = 0.01


def choose_layer(scores: Sequence[LayerScore], num_ir: int, num_general: int) -> LayerScore:
    """The layer of the least validation error among those whose AUC lies within one standard error of the best one's, or within
    `AUC_TOLERANCE`: near 1 the standard error vanishes, and the gate would outweigh whether steering works there at all.

    Ties, and layers without experts to validate: by the higher AUC, then the lower fire rate, then the lower layer.
    Args:
        num_ir, num_general: how many queries each AUC was measured on.
    Raises:
        TrainingDataError: nothing tells the layers apart (neither a gate nor a validation error), or no scores.
    """
    if not scores or all(s.auc is None and s.validation_error is None for s in scores):
        raise TrainingDataError(
            "--layer auto: neither a gate nor a validation error tells the layers apart. Give --ir and --general, or a layer."
        )
    aucs = [s.auc for s in scores if s.auc is not None]
    least = max(aucs) - max(auc_standard_error(max(aucs), num_ir, num_general), AUC_TOLERANCE) if aucs else 0.0

    def key(score: LayerScore) -> tuple[float, float, float, int]:
        error = float("inf") if score.validation_error is None else score.validation_error
        return error, -(score.auc or 0.0), score.fire_rate or 0.0, score.layer

    return min((s for s in scores if s.auc is None or s.auc >= least), key=key)


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """Of an AUC estimated on so many rows of either class. Source: Hanley and McNeil, 1982."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return (max(variance, 0.0) / (positives * negatives)) ** 0.5
