"""Choosing the layer: every layer's gate and experts from one extraction, compared on what was held out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerScore:
    """One layer, judged by held-out separation (`auc`, and the `fire_rate` on general queries at the threshold; None without
    a gate) and by `validation_error`: mean ‖v − δ‖² over the mean ‖δ‖² (None for methods without experts to validate)."""

    layer: int
    auc: float | None
    fire_rate: float | None
    validation_error: float | None
