"""Choosing a profile's strength λ: generated answers at each of several strengths, read by a judge."""

from __future__ import annotations

from dataclasses import dataclass

from steering.training.statistics import Share


@dataclass(frozen=True)
class StrengthPoint:
    """What one strength did to held-out queries.

    `success`: IR queries whose answer the judge takes for the preferred kind, in whole sentences. `over_refusal`: general
    queries whose answer is a refusal. `degenerate`: answers, of both, that are empty, repeat themselves or never end.
    `dose`: mean relative norm, λ·g·‖v‖/‖h‖, over the queries on which the gate fired.
    """

    strength: float
    success: Share
    over_refusal: Share
    degenerate: Share
    dose: float


@dataclass(frozen=True)
class StrengthSweep:
    """The points in ascending order (0 is the plain model), the strength chosen, and the judge's name."""

    points: tuple[StrengthPoint, ...]
    chosen: float
    judge: str
