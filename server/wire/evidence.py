"""`/v1/steering/profiles/{name}/evidence`: what a profile's training saw, as little of it as a picture needs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

from server.wire.base import ResponseModel
from steering.manifest import ProfileManifest

BINS = 40
MAX_EXAMPLES = 5
MAX_LABELS = 3


class GateEvidence(ResponseModel):
    """Two histograms of the gate's scores, out of sample: energy ratios of a `quantile` gate, similarities of a `cosine` one.

    `edges`: 41 rising numbers. `ir` and `general`: how many queries that need steering, and that do not, lie between an edge
    and the next (the last bin holds its upper edge). `direction`: the side of the threshold where a `cosine` gate is open.
    """

    kind: Literal["quantile", "cosine"]
    edges: list[float]
    ir: list[int]
    general: list[int]
    threshold: float
    direction: Literal["above", "below"] | None


class ExpertEvidence(ResponseModel):
    """One expert: how many training queries it was made of, their commonest labels, and those nearest to it.

    `label` is null where the training data had none; `examples` is empty where the profile's maker quotes none.
    """

    index: int
    size: int
    label: str | None
    examples: list[str]


class ProfileEvidence(ResponseModel):
    """What training kept for pictures; null where the profile has no such part."""

    object: Literal["steering.evidence"]
    id: str
    gate: GateEvidence | None
    experts: list[ExpertEvidence] | None


def profile_evidence(name: str, manifest: ProfileManifest, found: dict[str, Any]) -> ProfileEvidence:
    """A profile's evidence as clients see it.

    Args:
        name: what requests call the profile.
        found: what `load_evidence` gave.
    Raises:
        ValueError, TypeError, KeyError: `found` does not hold what the trainer writes.
    """
    gate, experts = found.get("gate"), found.get("experts")
    return ProfileEvidence(
        object="steering.evidence",
        id=name,
        gate=None if gate is None or manifest.gate.kind == "always" else _gate(manifest, gate["ir"], gate["general"]),
        experts=None
        if experts is None
        else [
            ExpertEvidence(
                index=index,
                size=expert["size"],
                label=", ".join([label for label, _ in expert["labels"]][:MAX_LABELS]) or None,
                examples=expert["nearest"][:MAX_EXAMPLES],
            )
            for index, expert in enumerate(experts["experts"])
        ],
    )


def _gate(manifest: ProfileManifest, ir: Sequence[float], general: Sequence[float]) -> GateEvidence:
    """Ratios are drawn from 0 to 1; similarities as far as they and the threshold go."""
    kind, threshold = manifest.gate.kind, manifest.gate.threshold
    if not all(math.isfinite(score) for score in (*ir, *general)):
        raise ValueError("a score is not finite")
    low, high = 0.0, 1.0
    if kind == "cosine":
        low, high = min(*ir, *general, threshold), max(*ir, *general, threshold)
        if low == high:
            low, high = low - 0.5, high + 0.5
    edges = [low + (high - low) * i / BINS for i in range(BINS)] + [high]
    return GateEvidence(
        kind=kind,
        edges=edges,
        ir=_counts(ir, edges),
        general=_counts(general, edges),
        threshold=threshold,
        direction=manifest.gate.direction,
    )


def _counts(scores: Sequence[float], edges: list[float]) -> list[int]:
    """How many lie in each bin; what rounding put beyond the outer edges belongs to the outer bins."""
    counts = [0] * (len(edges) - 1)
    for score in scores:
        counts[min(max(bisect_right(edges, score) - 1, 0), len(counts) - 1)] += 1
    return counts
