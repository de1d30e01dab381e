"""From examples to a profile: read, extract, fit the gate, fit the experts, write. Each stage is a function of its own elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering.architecture import config_sha256, decoder_layers, text_config, weight_probe
from steering.errors import TrainingDataError
from steering.manifest import ModelReference, ProfileManifest
from steering.profile import SteeringProfile
from steering.training.cache import StateCache
from steering.training.data import Pair, file_record
from steering.training.examples import Examples, read_examples
from steering.training.extraction import query_states, shifts
from steering.training.fit_cast import CastFit
from steering.training.fit_experts import ExpertFit
from steering.training.fit_gate import GateFit
from steering.training.held_out import HeldOut
from steering.training.layers import LayerScore, choose_layer
from steering.training.methods import ExpertsPart, GatePart, make_experts, make_gate
from steering.training.on_disk import Rows
from steering.training.options import TrainingOptions
from steering.training.progress import progress_bar
from steering.training.refusals import refuse_constant


@dataclass(frozen=True)
class Training:
    """A trained profile, and what its report shows. `held_out`: what was set aside for choosing the strength, where that is
    "auto"; the profile's is 1 until then. `pairs`, `pair_states`, `pair_shifts`, (N, d): one for each distinct query of the
    pairs, and of its pairs the last. `options.layer` is the chosen one; `layers`: the candidates' scores, if there were several.
    """

    profile: SteeringProfile
    options: TrainingOptions
    pairs: Rows[Pair]
    pair_states: Tensor
    pair_shifts: Tensor
    gate: GateFit | CastFit | None
    experts: ExpertFit | None
    layers: list[LayerScore] = field(default_factory=list)
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class _Fit:
    """One layer's parts, and the (P, d) states and shifts of the pairs' queries that the experts were fitted to."""

    gate: GatePart
    experts: ExpertsPart
    pair_states: Tensor
    pair_shifts: Tensor


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

    The queries' texts stay in their files. Of the states one layer's are held: those of several pass through the cache's
    folder, or a temporary one.
    Args:
        model: a decoder, on any device or devices and in any dtype; its attention must be one of transformers' own.
        model_id: how the manifest names the model; never an absolute path.
    Raises:
        TrainingDataError, ModelError.
    """
    num_layers = len(decoder_layers(model))
    layers = candidates(options.layer, num_layers)
    examples = read_examples(options, text_config(model).hidden_size)
    common: dict[str, Any] = {"batch_tokens": options.batch_tokens, "progress": progress}
    with _cache(options, model, len(layers)) as common["cache"]:
        site = layers if len(layers) > 1 else layers[0]
        states = query_states(model, tokenizer, examples.queries, site, **common)
        deltas = shifts(model, tokenizer, examples.pairs, site, number=examples.pair_number, **common)
        scores: list[LayerScore] = []
        if len(layers) > 1:
            scores = _compare(layers, states, deltas, examples, options, progress)
            counts = (len(examples.groups[name]) for name in ("IR", "general"))
            options = replace(options, layer=choose_layer(scores, *counts).layer)
            index = layers.index(options.layer)
            states, deltas = states[index], deltas[index]
        else:
            options = replace(options, layer=layers[0])
    fit = _fit(states, deltas, examples, options, progress)
    gate, experts = fit.gate, fit.experts
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
        training=_record(options, examples, command),
        metrics={"gate": gate.metrics, "experts": experts.metrics}
        | ({"layers": [asdict(score) for score in scores]} if scores else {}),
    )
    profile = SteeringProfile(manifest, gate.gate, experts.experts, weight_probe(model))
    return Training(
        profile,
        options,
        examples.last_pairs,
        fit.pair_states,
        fit.pair_shifts,
        gate.fit,
        experts.fit,
        scores,
        examples.held_out,
    )


@contextmanager
def _cache(options: TrainingOptions, model: PreTrainedModel, num_layers: int) -> Iterator[StateCache | None]:
    """The options' cache; for several layers there must be one, if only for the while."""
    if options.cache is not None or num_layers == 1:
        yield StateCache(options.cache, model) if options.cache else None
        return
    with TemporaryDirectory(prefix="finesteer-") as folder:
        yield StateCache(Path(folder), model)


def _fit(states: Tensor, deltas: Tensor, examples: Examples, options: TrainingOptions, progress: bool) -> _Fit:
    """One layer's gate and experts from (N, d) states of the queries and (P, d) shifts."""
    groups, pair_states = examples.states_of_groups(states), examples.states_of_pairs(states)
    refuse_constant(groups)
    gate = make_gate(groups, examples.sources, options)
    experts = make_experts(groups, examples.harmful, pair_states, deltas, options, progress)
    return _Fit(gate, experts, pair_states, deltas)


def _compare(
    layers: list[int],
    states: Sequence[Tensor],
    deltas: Sequence[Tensor],
    examples: Examples,
    options: TrainingOptions,
    progress: bool,
) -> list[LayerScore]:
    """Each layer's score, from a quick fit."""
    epochs = min(QUICK_EPOCHS, options.experts.epochs)
    quick = replace(options, force=True, experts=replace(options.experts, epochs=epochs))
    scores = []
    with progress_bar("layers", len(layers), progress) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the chosen layer's are given when it is fitted
        for i, layer in enumerate(layers):
            fit = _fit(states[i], deltas[i], examples, quick, False)
            scores.append(LayerScore(layer, fit.gate.auc, fit.gate.fire_rate, fit.experts.validation_error))
            del fit  # before the next layer's states are read
            advance()
    return scores


def candidates(layer: int | tuple[int, ...] | str, num_layers: int) -> list[int]:
    """The layers to compare, ascending. Raises TrainingDataError for one that the model does not have."""
    layers = list(range(num_layers)) if layer == "auto" else [layer] if isinstance(layer, int) else sorted(set(layer))
    for number in layers:
        if not 0 <= number < num_layers:
            raise TrainingDataError(f"--layer {number}: the model has layers 0 to {num_layers - 1}.")
    return layers


def _record(options: TrainingOptions, examples: Examples, command: str) -> dict[str, Any]:
    """What it takes to make the profile again."""
    return {
        "command": command,
        "seed": options.seed,
        "versions": {"torch": torch.__version__},
        "data": {
            "pairs": file_record(options.pairs, len(examples.pairs)),
            **{
                name: file_record(getattr(options, name.lower()), len(rows))
                for name, rows in examples.groups.items()
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
