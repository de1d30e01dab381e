"""Each method's gate and experts from states and shifts, with their manifests and measures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from steering.experts import ConstantVector, Experts, MixtureOfSteeringExperts
from steering.gate import AlwaysOpenGate, Gate
from steering.manifest import ExpertsManifest, GateManifest
from steering.training.fit_alphasteer import CONSTANT_ERROR, fit_alphasteer
from steering.training.fit_cast import CastFit, fit_cast
from steering.training.fit_experts import ExpertFit, fit_experts
from steering.training.fit_gate import MIN_AUC, GateFit, energy_ratios, fit_gate, missed_out_of_sample
from steering.training.options import TrainingOptions
from steering.training.refusals import refuse_cancelling
from steering.training.statistics import share


@dataclass(frozen=True)
class GatePart:
    """A fitted gate. `auc` and `fire_rate` (on general queries) are held out, None without a gate."""

    gate: Gate
    manifest: GateManifest
    metrics: dict[str, Any]
    auc: float | None = None
    fire_rate: float | None = None
    fit: GateFit | CastFit | None = None


@dataclass(frozen=True)
class ExpertsPart:
    """Fitted experts. `validation_error`: see `LayerScore`; `fit` is the mixture's only."""

    experts: Experts
    manifest: ExpertsManifest
    metrics: dict[str, Any]
    validation_error: float | None = None
    fit: ExpertFit | None = None


def make_gate(states: Mapping[str, Tensor], sources: Mapping[str, Sequence[str]], options: TrainingOptions) -> GatePart:
    """The method's gate: none without IR queries and for AlphaSteer, CAST's for `cast`, SCS for all others.

    Args:
        states: of the queries, by "IR", "general" and "calibration", (n, d) each; a group without queries is missing.
        sources: each query's, in the same groups.
    """
    if "IR" not in states or options.method == "alphasteer":
        return GatePart(AlwaysOpenGate(), GateManifest("always"), {})
    judged = sources["calibration"] if "calibration" in states else sources["IR"]
    return (_cast_gate if options.method == "cast" else _scs_gate)(states, judged, options)


def _scs_gate(states: Mapping[str, Tensor], judged: Sequence[str], options: TrainingOptions) -> GatePart:
    """Fit SCS and measure it: on general queries, and per source of the IR queries that are `judged`."""
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
    _warn_of_poor_separation(fit.chosen.auc)
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
    ratios = energy_ratios(states["calibration"], gate.mean, gate.basis) if "calibration" in states else fit.ir_ratios
    missed = missed_out_of_sample(ratios, gate.tail, options.seed)
    metrics = {
        "auc": round(fit.chosen.auc, 4),
        "held_out": fit.held_out,
        "general_fired": share(int((general_gates > 0).sum()), len(general_gates)),
        "general_fully_open": share(int((general_gates == 1).sum()), len(general_gates)),
        "missed_by_source": _by_source(missed, judged),
        "comparison": [
            {"centre": c.centre, "rank": c.rank, "auc": round(c.auc, 4), "fire_rate": round(c.fire_rate, 4)}
            for c in fit.candidates
        ],
    }
    return GatePart(gate, manifest, metrics, fit.chosen.auc, fit.chosen.fire_rate, fit)


def _cast_gate(states: Mapping[str, Tensor], judged: Sequence[str], options: TrainingOptions) -> GatePart:
    """Fit CAST's condition and measure it likewise."""
    fit = fit_cast(states["IR"], states["general"], calibration_states=states.get("calibration"), seed=options.seed)
    _warn_of_poor_separation(fit.auc)
    fired = share(int(fit.general_fired.sum()), len(fit.general_fired))
    manifest = GateManifest(
        kind="cosine",
        threshold=fit.gate.threshold,
        num_calibration=len(fit.ir_similarities) + len(fit.general_similarities),
        direction=fit.gate.direction,
    )
    metrics = {
        "auc": round(fit.auc, 4),
        "f1": round(fit.f1, 4),
        "held_out": fit.held_out,
        "general_fired": fired,
        "general_fully_open": fired,
        "missed_by_source": _by_source(~fit.ir_fired, judged),
        "comparison": [],
    }
    return GatePart(fit.gate, manifest, metrics, fit.auc, fired["share"], fit)


def _warn_of_poor_separation(auc: float) -> None:
    if auc < MIN_AUC:
        warnings.warn(
            f"the gate separates IR from general queries poorly: AUC {auc:.2f} is under {MIN_AUC}. "
            "Try another layer, or look at whether the two files really differ.",
            stacklevel=2,
        )


def _by_source(missed: Tensor, sources: Sequence[str]) -> dict[str, dict[str, float | int]]:
    """The share missed of each source's queries."""
    rows = {source: [other == source for other in sources] for source in sorted(set(sources))}
    return {source: share(int(missed[mine].sum()), sum(mine)) for source, mine in rows.items()}


def make_experts(
    states: Mapping[str, Tensor],
    harmful: Tensor,
    pair_states: Tensor,
    deltas: Tensor,
    options: TrainingOptions,
    progress: bool,
) -> ExpertsPart:
    """The method's experts: the mixture, AlphaSteer's matrix, or one mean shift (of all pairs for `caa`, of the harmful ones
    for `refusal_vector` and, where any pair has a side, for `cast` and as AlphaSteer's target).

    Args:
        states: as for `make_gate`.
        harmful: (N,) bool, pair_states, deltas: (N, d), a row for each distinct query of the pairs.
    """
    if options.method == "finesteer":
        return _mixture(pair_states, deltas, options, progress)
    chosen = harmful if options.method != "caa" and harmful.any() else torch.ones_like(harmful)
    refuse_cancelling(options.method, deltas[chosen])
    vector = deltas[chosen].mean(0)
    if options.method != "alphasteer":
        return ExpertsPart(ConstantVector(vector), ExpertsManifest("constant"), {})
    return _alphasteer(states.get("IR", pair_states[chosen]), states["general"], vector, options)


def _alphasteer(ir: Tensor, general: Tensor, target: Tensor, options: TrainingOptions) -> ExpertsPart:
    fit = fit_alphasteer(ir, general, target, seed=options.seed)
    if fit.chosen.error >= CONSTANT_ERROR:
        warnings.warn(
            "alphasteer, which has no gate, finds no map that does better on held-out queries than one vector for all: error "
            f"{fit.chosen.error:.2f}, that has {CONSTANT_ERROR:g}. Try another layer, or look at whether the two files really differ.",
            stacklevel=2,
        )
    metrics = {
        "validation_error": round(fit.chosen.error, 5),
        "validation_error_mean_vector": CONSTANT_ERROR,
        "validation_error_zero": 1.0,
        "unit": "mean squared distance to the refusal vector on IR queries and to zero on general ones, over its square",
        "chosen": asdict(fit.chosen),
        "comparison": [asdict(candidate) for candidate in fit.candidates],
    }
    manifest = ExpertsManifest("linear", map_rank=fit.map.left.shape[1])
    return ExpertsPart(fit.map, manifest, metrics, fit.chosen.error)


def _mixture(states: Tensor, deltas: Tensor, options: TrainingOptions, progress: bool) -> ExpertsPart:
    fit = fit_experts(states, deltas, options.experts, seed=options.seed, progress=progress)
    experts: MixtureOfSteeringExperts = fit.experts
    manifest = ExpertsManifest(
        kind="mose",
        num_prototypes=experts.prototypes.shape[0],
        residual_rank=experts.residual_basis.shape[1],
        key_size=experts.key_projection.shape[0],
        shift_scale=experts.shift_scale,
        variant=options.experts.variant,
    )
    metrics = {
        "validation_error": round(fit.validation_error, 5),
        "validation_error_mean_vector": round(fit.mean_vector_error, 5),
        "validation_error_zero": round(fit.zero_error, 5),
        "unit": "mean squared distance to the shift, over the mean squared shift",
        "cluster_sizes": [int((fit.clusters == k).sum()) for k in range(experts.prototypes.shape[0])],
        **{name: {str(k): round(v, 4) for k, v in scores.items()} for name, scores in fit.criteria.items()},
        "chosen_by": fit.choices,
        "epochs": len(fit.curve),
    }
    return ExpertsPart(experts, manifest, metrics, fit.validation_error, fit)
