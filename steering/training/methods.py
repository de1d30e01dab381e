"""Each method's gate and experts from states and shifts, with their manifests and measures."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from steering.errors import TrainingDataError
from steering.experts import ConstantVector, Experts, MixtureOfSteeringExperts
from steering.gate import Gate, energy_ratio
from steering.manifest import ExpertsManifest, GateManifest
from steering.training.data import LabelledQuery
from steering.training.fit_experts import ExpertFit, fit_experts
from steering.training.fit_gate import MIN_AUC, GateFit, fit_gate, missed_out_of_sample
from steering.training.options import TrainingOptions
from steering.training.statistics import share


def make_gate(
    states: dict[str, Tensor], ir: list[LabelledQuery], calibration: list[LabelledQuery], options: TrainingOptions
) -> tuple[GateFit, Gate, GateManifest, dict[str, Any]]:
    """Fit SCS and measure it: on general queries, and per source of IR queries."""
    fit = fit_gate(
        states["IR"],
        states["general"],
        calibration_states=states.get("calibration"),
        tail=options.tail,
        decay=options.decay,
        floor=options.floor,
        centre=options.centre,
        rank=options.rank,
        seed=options.seed,
        force=options.force,
    )
    if fit.chosen.auc < MIN_AUC:
        warnings.warn(
            f"the gate separates IR from general queries poorly: AUC {fit.chosen.auc:.2f} is under {MIN_AUC}. "
            "Try another layer, or look at whether the two files really differ.",
            stacklevel=2,
        )
    gate = fit.gate
    manifest = GateManifest(
        kind="quantile",
        centre=fit.centre,
        rank=fit.rank,
        tail=gate.tail,
        decay=gate.decay,
        floor=gate.floor,
        threshold=float(gate.threshold),
        num_calibration=len(gate.calibration),
    )
    general_gates = gate.soft_gate(fit.general_ratios)
    judged = calibration or ir
    ratios = energy_ratio(states["calibration"], gate.mean, gate.basis) if calibration else fit.ir_ratios
    missed = missed_out_of_sample(ratios, gate.tail, options.seed)
    sources = sorted({q.source for q in judged})
    by_source = {
        source: share(int(missed[[q.source == source for q in judged]].sum()), sum(q.source == source for q in judged))
        for source in sources
    }
    metrics = {
        "auc": round(fit.chosen.auc, 4),
        "held_out": fit.held_out,
        "general_fired": share(int((general_gates > 0).sum()), len(general_gates)),
        "general_fully_open": share(int((general_gates == 1).sum()), len(general_gates)),
        "missed_by_source": by_source,
        "comparison": [
            {"centre": c.centre, "rank": c.rank, "auc": round(c.auc, 4), "fire_rate": round(c.fire_rate, 4)}
            for c in fit.candidates
        ],
    }
    return fit, gate, manifest, metrics


def make_experts(
    harmful: Tensor, states: Tensor, deltas: Tensor, options: TrainingOptions, progress: bool
) -> tuple[ExpertFit | None, Experts, ExpertsManifest]:
    """The mixture, or for the baselines the mean shift of all pairs (`caa`) or of the harmful ones (`refusal_vector`)."""
    if options.method == "finesteer":
        fit = fit_experts(states, deltas, options.experts, seed=options.seed, progress=progress)
        experts: MixtureOfSteeringExperts = fit.experts
        return fit, experts, ExpertsManifest(
            kind="mose",
            num_prototypes=experts.prototypes.shape[0],
            residual_rank=experts.residual_basis.shape[1],
            key_size=experts.key_projection.shape[0],
            shift_scale=experts.shift_scale,
        )  # fmt: skip
    chosen = torch.ones_like(harmful)
    if options.method == "refusal_vector":
        chosen = harmful
        if not chosen.any():
            raise TrainingDataError('refusal_vector needs pairs with "side": "harmful"; the files have none.')
    return None, ConstantVector(deltas[chosen].mean(0)), ExpertsManifest("constant")


def expert_metrics(fit: ExpertFit | None, deltas: Tensor) -> dict[str, Any]:
    if fit is None:
        return {}
    sizes = [int((fit.clusters == k).sum()) for k in range(fit.experts.prototypes.shape[0])]
    return {
        "validation_error": round(fit.validation_error, 5),
        "validation_error_mean_vector": round(fit.mean_vector_error, 5),
        "validation_error_zero": round(fit.zero_error, 5),
        "unit": "mean squared distance to the shift, over the mean squared shift",
        "cluster_sizes": sizes,
        "calinski_harabasz": {str(k): round(v, 2) for k, v in fit.cluster_scores.items()},
        "epochs": len(fit.curve),
    }
