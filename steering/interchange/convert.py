"""Between control vectors and profiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steering.architecture import config_sha256, decoder_layers, text_config, weight_probe
from steering.decision import Positions
from steering.errors import ProfileError
from steering.experts import ConstantVector, LayeredVectors, LinearMap, MixtureOfSteeringExperts
from steering.gate import AlwaysOpenGate
from steering.interchange.vectors import ControlVectors
from steering.manifest import ExpertsManifest, GateManifest, ModelReference, ProfileManifest
from steering.profile import SteeringProfile


def to_profile(
    vectors: ControlVectors,
    model: nn.Module,
    *,
    name: str,
    model_id: str,
    layers: Collection[int] | None = None,
    strength: float = 1.0,
    positions: Positions = "all",
    description: str = "",
    training: Mapping[str, Any] | None = None,
) -> SteeringProfile:
    """A `caa` profile without a gate that adds strength · vector at each layer's output.

    Args:
        model: the one that the vectors are for; only it will be accepted.
        layers: which of the vectors' layers to take; None takes all.
    Raises:
        ProfileError: the vectors do not fit the model, or `layers` names one that has none.
    """
    config, num_layers = text_config(model), len(decoder_layers(model))
    wanted = sorted(vectors.by_layer if layers is None else set(layers))
    if missing := [layer for layer in wanted if layer not in vectors.by_layer]:
        has = ", ".join(map(str, vectors.by_layer))
        raise ProfileError(f"the file holds no vector for layer {missing[0]}; it has {has}. Choose among them.")
    if wanted[-1] >= num_layers:
        raise ProfileError(
            f"the file holds a vector for layer {wanted[-1]}, but the model has layers 0 to {num_layers - 1}: it was made "
            "for another. Give that model, or take the layers that both have."
        )
    rows = torch.stack([vectors.by_layer[layer] for layer in wanted])  # (L, d)
    if rows.shape[1] != config.hidden_size:
        raise ProfileError(
            f"the vectors are {rows.shape[1]} wide, the model's residual stream {config.hidden_size}: they were made for "
            "another model. Give that one."
        )
    many = len(wanted) > 1
    manifest = ProfileManifest(
        name=name,
        method="caa",
        model=ModelReference(
            model_id, config_sha256(model), config.hidden_size, num_layers, str(model.dtype).removeprefix("torch.")
        ),
        layer=wanted[0],
        positions=positions,
        strength=strength,
        gate=GateManifest("always"),
        experts=ExpertsManifest("constant", layers=wanted if many else None),
        tensors_sha256="",
        description=description,
        training=dict(training or {}),
    )
    experts = LayeredVectors(rows) if many else ConstantVector(rows[0])
    return SteeringProfile(manifest, AlwaysOpenGate(), experts, weight_probe(model))


def from_profile(profile: SteeringProfile, expert: int | None = None, model_hint: str = "") -> ControlVectors:
    """λ·v of a profile at its default strength, as control vectors: what a tool that knows no gate and no query can add.

    Of a mixture v is what it makes of the mean of its training queries' states, or, with `expert`, σ·(that expert's value).

    Raises ProfileError for an expert that the profile has not, and for `alphasteer`, whose vector is the query's alone.
    """
    experts, strength = profile.experts, profile.manifest.strength
    if isinstance(experts, MixtureOfSteeringExperts):
        return ControlVectors({profile.layer: strength * _of_mixture(experts, expert)}, model_hint)
    if expert is not None:
        raise ProfileError(f"profile {profile.name!r} ({profile.manifest.method}) has no experts. Leave --expert out.")
    if isinstance(experts, LinearMap):
        raise ProfileError(
            f"profile {profile.name!r} is alphasteer's: its vector follows from each query's state, and there is no one "
            "vector to export. Export a caa or refusal_vector profile of the same pairs."
        )
    rows = experts.vectors if isinstance(experts, LayeredVectors) else experts.vector[None]
    return ControlVectors(dict(zip(profile.manifest.layers, strength * rows, strict=True)), model_hint)


def _of_mixture(experts: MixtureOfSteeringExperts, expert: int | None) -> Tensor:
    if expert is None:
        return experts(experts.input_mean[None]).vector[0]
    if not 0 <= expert < len(experts.values):
        raise ProfileError(f"--expert {expert}: the profile has experts 0 to {len(experts.values) - 1}.")
    return experts.shift_scale * experts.values[expert]
