"""From examples to a profile: read, extract, fit the gate, fit the experts, write. Each stage is a function of its own elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering.architecture import config_sha256, decoder_layers, text_config, weight_probe
from steering.errors import TrainingDataError
from steering.manifest import ModelReference, ProfileManifest
from steering.profile import SteeringProfile
from steering.training.cache import StateCache
from steering.training.data import LabelledQuery, Pair, Query, file_record, read_pairs, read_queries, refuse_overlap
from steering.training.extraction import query_states, shifts
from steering.training.fit_experts import ExpertFit
from steering.training.fit_gate import GateFit
from steering.training.held_out import HeldOut, hold_out
from steering.training.layers import LayerScore, choose_layer
from steering.training.methods import make_experts, make_gate
from steering.training.options import TrainingOptions
from steering.training.progress import progress_bar
from steering.training.refusals import refuse_constant, refuse_senseless, refuse_too_few


@dataclass(frozen=True)
class Training:
    """A trained profile, and what its report shows. `held_out`: what was set aside for choosing the strength, where that is
    "auto"; the profile's is 1 until then. `pair_states`, `pair_shifts`: (N, d), a row for each distinct query
    of the pairs (`pair_queries`). `options.layer` is the chosen one; `layers`: the candidates' scores, if there were several.
    """

    profile: SteeringProfile
    options: TrainingOptions
    pairs: list[Pair]
    pair_queries: list[Query]
    pair_states: Tensor
    pair_shifts: Tensor
    gate: GateFit | None
    experts: ExpertFit | None
    layers: list[LayerScore] = field(default_factory=list)
    held_out: HeldOut | None = None


QUICK_EPOCHS = 10  # of the experts that only compare layers


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
    layers = candidates(options.layer, num_layers)
    pairs, bare_rows, held_out = read_examples(options, text_config(model).hidden_size)
    ir, general, calibration = bare_rows.values()
    bare = {name: [q.query for q in rows] for name, rows in bare_rows.items()}

    common: dict[str, Any] = {"batch_tokens": options.batch_tokens, "progress": progress}
    common["cache"] = StateCache(options.cache, model) if options.cache else None
    pair_queries = list(dict.fromkeys(p.query for p in pairs))
    wanted = list(dict.fromkeys([q for group in bare.values() for q in group] + pair_queries))
    row = {query: i for i, query in enumerate(wanted)}  # IR queries are often the pairs' own: each is read once
    read = query_states(model, tokenizer, wanted, layers, **common)  # (L, N, d)
    pair_rows = [row[q] for q in pair_queries]
    deltas = [_mean_by_query(d, pairs, pair_queries) for d in shifts(model, tokenizer, pairs, layers, **common)]
    harmful = {p.query for p in pairs if p.side == "harmful"}
    harmful_rows = torch.tensor([q in harmful for q in pair_queries])

    def gate_states(index: int) -> dict[str, Tensor]:
        found = {name: read[index, [row[q] for q in queries]] for name, queries in bare.items() if queries}
        refuse_constant(found)
        return found

    scores: list[LayerScore] = []
    if len(layers) > 1:
        quick = replace(
            options, force=True, experts=replace(options.experts, epochs=min(QUICK_EPOCHS, options.experts.epochs))
        )
        with progress_bar("layers", len(layers), progress) as advance, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the chosen layer's are given below
            for i, layer in enumerate(layers):
                gate = make_gate(gate_states(i), ir, calibration, quick)
                experts = make_experts(gate_states(i), harmful_rows, read[i, pair_rows], deltas[i], quick, False)
                scores.append(LayerScore(layer, gate.auc, gate.fire_rate, experts.validation_error))
                advance()
        options = replace(options, layer=choose_layer(scores, len(ir), len(general)).layer)
    else:
        options = replace(options, layer=layers[0])
    index = layers.index(options.layer)

    states = gate_states(index)
    gate = make_gate(states, ir, calibration, options)
    pair_states, pair_shifts = read[index, pair_rows], deltas[index]
    experts = make_experts(states, harmful_rows, pair_states, pair_shifts, options, progress)

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
        strength=1.0 if options.strength == "auto" else options.strength,
        gate=gate.manifest,
        experts=experts.manifest,
        tensors_sha256="",
        description=options.description,
        training=_record(options, pairs, bare, command),
        metrics={"gate": gate.metrics, "experts": experts.metrics}
        | ({"layers": [asdict(score) for score in scores]} if scores else {}),
    )
    profile = SteeringProfile(manifest, gate.gate, experts.experts, weight_probe(model))
    return Training(
        profile, options, pairs, pair_queries, pair_states, pair_shifts, gate.fit, experts.fit, scores, held_out
    )


def read_examples(
    options: TrainingOptions, width: int
) -> tuple[list[Pair], dict[str, list[LabelledQuery]], HeldOut | None]:
    """The pairs and the queries, as "IR", "general" and "calibration", that train, and what is set aside for the strength.

    Raises TrainingDataError, also for all that is too few; `width`: d.
    """
    refuse_senseless(options)
    pairs = read_pairs(options.pairs)
    names = {"IR": options.ir, "general": options.general, "calibration": options.calibration}
    rows = {name: read_queries(paths) for name, paths in names.items()}
    bare = {name: [q.query for q in found] for name, found in rows.items()}
    refuse_overlap(bare)
    refuse_overlap({"pair": [p.query for p in pairs], "calibration": bare["calibration"]})
    held_out = None
    if options.strength == "auto":
        pairs, rows, held_out = hold_out(pairs, rows, options.seed)
    counts = {name: len(found) for name, found in rows.items()}
    refuse_too_few(options, {p.side for p in pairs}, counts, len({p.query for p in pairs}), width)
    return pairs, rows, held_out


def candidates(layer: int | tuple[int, ...] | str, num_layers: int) -> list[int]:
    """The layers to compare, ascending. Raises TrainingDataError for one that the model does not have."""
    layers = list(range(num_layers)) if layer == "auto" else [layer] if isinstance(layer, int) else sorted(set(layer))
    for number in layers:
        if not 0 <= number < num_layers:
            raise TrainingDataError(f"--layer {number}: the model has layers 0 to {num_layers - 1}.")
    return layers


def _mean_by_query(deltas: Tensor, pairs: list[Pair], queries: list[Query]) -> Tensor:
    """One shift for each query, the mean over its paraphrased answers: (P, d) → (N, d).

    Otherwise paraphrases of one query would lie on both sides of the validation split, and its error be no evidence.
    """
    number = {query: i for i, query in enumerate(queries)}
    index = torch.tensor([number[pair.query] for pair in pairs])
    total = torch.zeros(len(queries), deltas.shape[1]).index_add_(0, index, deltas)
    return total / index.bincount(minlength=len(queries))[:, None]


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
