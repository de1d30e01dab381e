"""From examples to a profile: read, extract, fit the gate, fit the experts, write. Each stage is a function of its own elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering.architecture import config_sha256, decoder_layers, text_config, weight_probe
from steering.decision import Positions
from steering.errors import TrainingDataError
from steering.experts import ConstantVector, Experts, MixtureOfSteeringExperts
from steering.gate import AlwaysOpenGate, Gate, energy_ratio
from steering.manifest import ExpertsManifest, GateManifest, Method, ModelReference, ProfileManifest
from steering.profile import SteeringProfile
from steering.training.data import (
    LabelledQuery,
    Pair,
    Query,
    file_record,
    read_pairs,
    read_queries,
    refuse_overlap,
)
from steering.training.extraction import query_states, shifts
from steering.training.fit_experts import ExpertFit, ExpertOptions, fit_experts
from steering.training.fit_gate import MIN_AUC, Centre, GateFit, fit_gate, missed_out_of_sample
from steering.training.statistics import share


@dataclass(frozen=True)
class TrainingOptions:
    """All that a profile is made of, but the model. Paths are JSONL files; see `data` for their rows.

    Without `ir` files the profile has no gate (method `caa` or `refusal_vector` only make sense so as baselines).
    """

    name: str
    layer: int
    pairs: list[Path]
    ir: list[Path] = field(default_factory=list)
    general: list[Path] = field(default_factory=list)
    calibration: list[Path] = field(default_factory=list)
    method: Method = "finesteer"
    description: str = ""
    strength: float = 1.0
    positions: Positions = "all"
    tail: float = 0.05
    decay: float = 2.0
    floor: float = 1e-3
    centre: Centre | Literal["auto"] = "auto"
    rank: int | Literal["auto"] = "auto"
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    seed: int = 0
    batch_tokens: int = 8192
    force: bool = False


@dataclass(frozen=True)
class Training:
    """A trained profile, and what its report shows. `pair_states`, `pair_shifts`: (N, d), a row for each distinct query
    of the pairs (`pair_queries`)."""

    profile: SteeringProfile
    options: TrainingOptions
    pairs: list[Pair]
    pair_queries: list[Query]
    pair_states: Tensor
    pair_shifts: Tensor
    gate: GateFit | None
    experts: ExpertFit | None


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainingOptions,
    *,
    model_id: str,
    command: str = "",
    progress: bool = False,
) -> Training:
    """Make a profile. The same inputs give the same numbers on the same machine.

    Args:
        model: a decoder, on any device and in any dtype; its attention must be one of transformers' own.
        model_id: how the manifest names the model; never an absolute path.
    Raises:
        TrainingDataError, ModelError.
    """
    num_layers = len(decoder_layers(model))
    if not 0 <= options.layer < num_layers:
        raise TrainingDataError(f"--layer {options.layer}: the model has layers 0 to {num_layers - 1}.")
    if options.ir and not options.general:
        raise TrainingDataError("--ir needs --general: a gate is chosen by how well it tells the two apart.")
    pairs = read_pairs(options.pairs)
    ir, general, calibration = (read_queries(getattr(options, k)) for k in ("ir", "general", "calibration"))
    bare = {k: [q.query for q in v] for k, v in (("IR", ir), ("general", general), ("calibration", calibration))}
    refuse_overlap(bare)
    refuse_overlap({"pair": [p.query for p in pairs], "calibration": bare["calibration"]})

    common: dict[str, Any] = {"batch_tokens": options.batch_tokens, "progress": progress}
    pair_queries = list(dict.fromkeys(p.query for p in pairs))
    wanted = list(dict.fromkeys([q for group in bare.values() for q in group] + pair_queries))
    row = {query: i for i, query in enumerate(wanted)}  # IR queries are often the pairs' own: each is read once
    read = query_states(model, tokenizer, wanted, options.layer, **common)
    gate_fit, gate, gate_manifest, gate_metrics = None, AlwaysOpenGate(), GateManifest("always"), {}
    if ir:
        states = {name: read[[row[q] for q in queries]] for name, queries in bare.items() if queries}
        gate_fit, gate, gate_manifest, gate_metrics = _gate(states, ir, calibration, options)

    pair_states = read[[row[q] for q in pair_queries]]
    pair_shifts = _mean_by_query(shifts(model, tokenizer, pairs, options.layer, **common), pairs, pair_queries)
    harmful = {p.query for p in pairs if p.side == "harmful"}
    harmful_rows = torch.tensor([q in harmful for q in pair_queries])
    expert_fit, experts, experts_manifest = _experts(harmful_rows, pair_states, pair_shifts, options, progress)

    manifest = ProfileManifest(
        name=options.name,
        method=options.method,
        model=ModelReference(
            id=model_id,
            config_sha256=config_sha256(model),
            hidden_size=text_config(model).hidden_size,
            num_layers=num_layers,
            dtype=str(model.dtype).removeprefix("torch."),
        ),
        layer=options.layer,
        positions=options.positions,
        strength=options.strength,
        gate=gate_manifest,
        experts=experts_manifest,
        tensors_sha256="",
        description=options.description,
        training=_record(options, pairs, bare, command),
        metrics={"gate": gate_metrics, "experts": _expert_metrics(expert_fit, pair_shifts)},
    )
    profile = SteeringProfile(manifest, gate, experts, weight_probe(model))
    return Training(profile, options, pairs, pair_queries, pair_states, pair_shifts, gate_fit, expert_fit)


def _mean_by_query(deltas: Tensor, pairs: list[Pair], queries: list[Query]) -> Tensor:
    """One shift for each query, the mean over its paraphrased answers: (P, d) → (N, d).

    Otherwise paraphrases of one query would lie on both sides of the validation split, and its error be no evidence.
    """
    number = {query: i for i, query in enumerate(queries)}
    index = torch.tensor([number[pair.query] for pair in pairs])
    total = torch.zeros(len(queries), deltas.shape[1]).index_add_(0, index, deltas)
    return total / index.bincount(minlength=len(queries))[:, None]


def _gate(
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


def _experts(
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


def _expert_metrics(fit: ExpertFit | None, deltas: Tensor) -> dict[str, Any]:
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


def _record(options: TrainingOptions, pairs: list[Pair], bare: dict[str, list], command: str) -> dict[str, Any]:
    """What it takes to make the profile again."""
    return {
        "command": command,
        "seed": options.seed,
        "versions": {"torch": torch.__version__},
        "data": {
            "pairs": file_record(options.pairs, len(pairs)),
            **{
                name: file_record(getattr(options, name.lower()), len(rows))
                for name, rows in bare.items()
                if getattr(options, name.lower())
            },
        },
        "choices": {
            "site": "output of the layer, for reading, shifts and writing",
            "inputs": "standardised over the pairs' queries; vectors in units of shift_scale",
            "shifts": "averaged over the pairs of one query",
            "residual_basis": "uncentred principal directions of the shifts",
            "experts": asdict(options.experts),
        },
    }
