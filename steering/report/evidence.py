"""What the figures need and a profile's tensors do not hold: collected once, by the trainer, into `evidence.json`."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steering.profile import EVIDENCE_FILE
from steering.training.fit_cast import CastFit
from steering.training.fit_experts import ExpertFit
from steering.training.fit_gate import GateFit
from steering.training.trainer import Training

MAX_POINTS = 2000
MAX_SCORES = 10_000  # more: what a threshold does is decided by the few in the tails
NUM_EXAMPLES, NUM_KINDS = 3, 6
DIGITS = 4
SCORE_DIGITS = 6  # a threshold lies between two of them


def collect(training: Training, examples: bool = True) -> dict[str, Any]:
    """Out-of-sample scores of the gate (energy ratios or similarities), the shifts in two dimensions, each expert's labels and nearest queries, routing entropies.

    Args:
        examples: whether training queries may be quoted; without, no text of theirs is in the result.
    Returns:
        Plain JSON: rounded numbers, at most `MAX_POINTS` rows of a kind, `MAX_SCORES` of scores (evenly spaced ones).
    """
    found: dict[str, Any] = {"examples": examples}
    if training.gate is not None:
        found["gate"] = _gate(training.gate)
    if training.experts is not None:
        found["experts"] = _experts(training, training.experts, examples)
    return found


def save(evidence: dict[str, Any], folder: Path) -> None:
    """Write it beside the profile; no part of the profile's version."""
    (folder / EVIDENCE_FILE).write_text(
        json.dumps(evidence, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def _gate(fit: GateFit | CastFit) -> dict[str, list[float]]:
    if isinstance(fit, CastFit):
        ir, general = fit.ir_similarities, fit.general_similarities
    else:
        ir, general = fit.ir_ratios, fit.general_ratios
    return {
        side: _rounded(_some(scores.sort().values, MAX_SCORES), SCORE_DIGITS)
        for side, scores in (("ir", ir), ("general", general))
    }


def _experts(training: Training, fit: ExpertFit, examples: bool) -> dict[str, Any]:
    """The shifts, length 1, and the prototypes along the shifts' first two principal directions, and who is near whom."""
    unit = torch.nn.functional.normalize(training.pair_shifts, dim=-1)
    centre = unit.mean(0)
    directions = np.linalg.svd((unit - centre).numpy(), full_matrices=False)[2][:2].T
    points = (unit - centre).numpy() @ directions
    prototypes = fit.experts.prototypes
    routing = fit.experts.routing(training.pair_states).detach()
    entropy = -(routing * routing.clamp_min(1e-12).log()).sum(-1) / math.log(max(len(prototypes), 2))
    labels = {name: training.pairs.labels(name) for name in ("side", "kind")}
    rows = _some(torch.arange(len(points))).tolist()
    described = []
    for k in range(len(prototypes)):
        mine = np.flatnonzero(fit.clusters == k)
        distance = (unit[mine] - prototypes[k]).norm(dim=-1)
        nearest = mine[distance.argsort().numpy()[:NUM_EXAMPLES]]
        sides, kinds = (Counter(filter(None, (found[i] for i in mine))) for found in labels.values())
        described.append(
            {
                "size": len(mine),
                "labels": [*sides.most_common(), *kinds.most_common(NUM_KINDS)],
                "nearest": [training.pairs[i].query.chat[-1]["content"] for i in nearest] if examples else [],
            }
        )
    return {
        "points": [[*_rounded(points[i]), int(fit.clusters[i])] for i in rows],
        "prototypes": [_rounded(p) for p in (prototypes - centre).numpy() @ directions],
        "experts": described,
        "entropy": _rounded(_some(entropy.sort().values)),
        "curve": [_rounded(epoch) for epoch in fit.curve],
    }


def _some(rows: torch.Tensor, most: int = MAX_POINTS) -> torch.Tensor:
    """At most so many of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, dtype=torch.float64).long()]


def _rounded(numbers, digits: int = DIGITS) -> list[float]:
    return [round(float(x), digits) for x in numbers]
