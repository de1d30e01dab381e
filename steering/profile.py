"""A profile: one trained artifact = manifest + gate + experts, and its folder on disk.

`profile.json` says what it is, `profile.safetensors` holds the tensors; the manifest holds the sha256 of the tensor file.
Loading is strict: whatever is unknown, missing, damaged or not finite is refused with a sentence that says what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from steering.architecture import (
    PROBE_SIZE,
    DecoderConfig,
    decoder_layers,
    probes_match,
    shape_sha256,
    text_config,
    weight_probe,
)
from steering.errors import ProfileError
from steering.experts import ConstantVector, Experts, LayeredVectors, LinearMap, MixtureOfSteeringExperts
from steering.gate import AlwaysOpenGate, CosineGate, Gate, QuantileGate
from steering.manifest import ProfileManifest

MANIFEST_FILE = "profile.json"
TENSOR_FILE = "profile.safetensors"
EVIDENCE_FILE = "evidence.json"  # what its report is drawn from; no part of the profile
REPORT_FILE = "report.html"
GATE_TENSORS = ("mean", "basis", "calibration")
MOSE_TENSORS = (
    "prototypes",
    "residual_basis",
    "query_projection",
    "key_projection",
    "hidden_weight",
    "hidden_bias",
    "output_weight",
    "output_bias",
    "input_mean",
    "input_std",
)


@dataclass(frozen=True)
class SteeringProfile:
    """A trained gate and its experts. `weight_probe`: see `architecture.weight_probe`."""

    manifest: ProfileManifest
    gate: Gate
    experts: Experts
    weight_probe: Tensor

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def layer(self) -> int:
        return self.manifest.layer

    @cached_property
    def version(self) -> str:
        """See `ProfileManifest.version`; kept, since every decision names it."""
        return self.manifest.version

    def to(self, device: torch.device | str) -> SteeringProfile:
        """The same profile with its tensors on `device`."""
        return replace(self, gate=self.gate.to(device), experts=self.experts.to(device))

    def by_layer(self) -> dict[int, SteeringProfile]:
        """What acts at each of its layers, from the lowest up: itself, or with each layer's vector in the vectors' place."""
        if not isinstance(self.experts, LayeredVectors):
            return {self.layer: self}
        layers = enumerate(self.manifest.layers)
        return {layer: replace(self, experts=self.experts.at(index)) for index, layer in layers}

    def layers_alone(self) -> list[SteeringProfile]:
        """Each layer of a profile with several as a profile of its own; none of one with one layer."""
        parts, manifest = self.by_layer(), self.manifest
        if len(parts) == 1:
            return []
        experts = replace(manifest.experts, layers=None)
        return [
            replace(part, manifest=replace(manifest, name=f"{self.name}, layer {layer}", layer=layer, experts=experts))
            for layer, part in parts.items()
        ]

    def save(self, folder: str | Path) -> SteeringProfile:
        """Write both files, creating the folder; returns the profile whose manifest holds the tensors' hash."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        payload = save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in self._tensors().items()})
        manifest = replace(self.manifest, tensors_sha256=hashlib.sha256(payload).hexdigest())
        text = manifest.to_json()
        (folder / TENSOR_FILE).write_bytes(payload)
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
        return replace(self, manifest=manifest)

    @classmethod
    def load(cls, reference: str | Path, name: str | None = None) -> SteeringProfile:
        """Read a profile from a folder, or from a hub repository id where no such folder exists.

        `name` renames it (the server's `--profile NAME=PATH`). Raises ProfileError.
        """
        folder = profile_folder(reference)
        manifest_path, tensor_path = folder / MANIFEST_FILE, folder / TENSOR_FILE
        for path in (manifest_path, tensor_path):
            if not path.is_file():
                raise ProfileError(
                    f"{path}: no such file. A profile is a folder with {MANIFEST_FILE} and {TENSOR_FILE}."
                )
        try:
            text = manifest_path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ProfileError(
                f"{manifest_path}: not UTF-8 text. Restore the file or train the profile again."
            ) from error
        manifest = ProfileManifest.from_json(text, str(manifest_path))
        if name is not None:
            manifest = replace(manifest, name=name)
        tensors = _read_tensors(tensor_path, manifest)
        return cls(
            manifest,
            _gate(manifest, tensors, tensor_path),
            _experts(manifest, tensors, tensor_path),
            tensors["weight_probe"],
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise ProfileError unless `model` is the checkpoint that this profile was trained on, in whatever dtype."""
        self.check_checkpoint(text_config(model), len(decoder_layers(model)), lambda: weight_probe(model))

    def check_checkpoint(self, config: DecoderConfig, num_layers: int, probe: Callable[[], Tensor]) -> None:
        """`check_model` where no model is loaded.

        Args:
            config: the decoder's.
            probe: gives the checkpoint's `weight_probe`; called where the shape is right.
        """
        reference = self.manifest.model
        for label, wanted, found in (
            ("hidden size", reference.hidden_size, config.hidden_size),
            ("number of layers", reference.num_layers, num_layers),
            ("architecture hash", reference.config_sha256[:12], shape_sha256(config)[:12]),
        ):
            if wanted != found:
                raise ProfileError(
                    f"profile {self.name!r} was trained for model {reference.id!r} ({label} {wanted}), but the loaded model "
                    f"has {label} {found}. Serve that model, or train a profile for this one with `finesteer train`."
                )
        if not probes_match(self.weight_probe, probe()):
            raise ProfileError(
                f"profile {self.name!r} was trained for model {reference.id!r}; the loaded model has the same shape but "
                "other weights. Serve that model, or train a profile for this one with `finesteer train`."
            )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"weight_probe": self.weight_probe}
        if isinstance(self.gate, QuantileGate):
            tensors |= {f"gate.{k}": getattr(self.gate, k) for k in GATE_TENSORS}
        elif isinstance(self.gate, CosineGate):
            tensors["gate.condition"] = self.gate.condition
        if isinstance(self.experts, MixtureOfSteeringExperts):
            tensors |= {f"experts.{k}": getattr(self.experts, k) for k in MOSE_TENSORS}
            if self.experts.value_projection is not None:
                tensors["experts.value_projection"] = self.experts.value_projection
        elif isinstance(self.experts, LinearMap):
            tensors |= {"experts.left": self.experts.left, "experts.right": self.experts.right}
        elif isinstance(self.experts, LayeredVectors):
            tensors["experts.vector"] = self.experts.vectors
        else:
            tensors["experts.vector"] = self.experts.vector
        return tensors


def profile_folder(reference: str | Path, *, download: bool = True) -> Path:
    """The folder behind a path or a hub id. Raises ProfileError where neither is to be had.

    `download`: whether to ask the hub; without, a hub id's folder is what was downloaded before.
    """
    folder = Path(reference)
    if folder.is_dir():
        return folder
    if str(reference).count("/") != 1 or str(reference).startswith((".", "/", "~")):
        raise ProfileError(f"{reference}: no such profile folder. Give the folder that `finesteer train --out` wrote.")
    from huggingface_hub import snapshot_download

    with hub_errors(f"{reference}: neither a folder here nor a repository that the hub would give us"):
        allowed = [MANIFEST_FILE, TENSOR_FILE, EVIDENCE_FILE]
        return Path(snapshot_download(str(reference), allow_patterns=allowed, local_files_only=not download))


@contextmanager
def hub_errors(problem: str) -> Iterator[None]:
    """Raise ProfileError, which begins with `problem`, for whatever the hub's client raises."""
    from huggingface_hub.errors import HTTPError  # of whichever HTTP client it uses

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        detail = type(error).__name__ + (f", HTTP {status}" if status else "")
        raise ProfileError(f"{problem} ({detail}). Check the spelling, the network and HF_TOKEN.") from error


def _read_tensors(path: Path, manifest: ProfileManifest) -> dict[str, Tensor]:
    """The tensor file, checked against the manifest: hash, names, shapes, dtype, finiteness."""
    payload = path.read_bytes()
    if hashlib.sha256(payload).hexdigest() != manifest.tensors_sha256:
        raise ProfileError(
            f"{path}: sha256 differs from tensors_sha256 in {MANIFEST_FILE}: the file is truncated, damaged or was changed. "
            "Copy the profile again from its source, or train it again."
        )
    try:
        tensors = load_tensors(payload)
    except SafetensorError as error:
        raise ProfileError(
            f"{path}: not a safetensors file ({error}). Copy the profile again from its source."
        ) from error
    shapes = _shapes(manifest, tensors, path)
    if set(tensors) != set(shapes):
        odd = sorted(set(tensors) ^ set(shapes))[0]
        state = "is missing" if odd in shapes else "is not known to this release"
        raise ProfileError(
            f"{path}: tensor {odd!r} {state}. Train the profile again, or use the release that wrote it."
        )
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[key]:
            raise ProfileError(
                f"{path}: tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, must be float32 {shapes[key]}. "
                "Train the profile again."
            )
        if not torch.isfinite(tensor).all():
            raise ProfileError(f"{path}: tensor {key!r} holds NaN or infinity. Train the profile again.")
    return tensors


def _shapes(manifest: ProfileManifest, tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """The shape that the manifest promises for each tensor."""
    d = manifest.model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight_probe": (PROBE_SIZE,)}
    gate, experts = manifest.gate, manifest.experts
    if gate.kind == "quantile":
        _require(manifest, "gate", ("centre", "rank", "tail", "decay", "floor", "threshold", "num_calibration"), path)
        shapes |= {"gate.mean": (d,), "gate.basis": (d, gate.rank), "gate.calibration": (gate.num_calibration,)}
    if gate.kind == "cosine":
        _require(manifest, "gate", ("threshold", "direction", "num_calibration"), path)
        shapes["gate.condition"] = (d,)
    if experts.kind == "constant":
        return shapes | {"experts.vector": (d,) if experts.layers is None else (len(experts.layers), d)}
    if experts.kind == "linear":
        _require(manifest, "experts", ("map_rank",), path)
        return shapes | {"experts.left": (d, experts.map_rank), "experts.right": (experts.map_rank, d)}
    _require(manifest, "experts", ("num_prototypes", "residual_rank", "key_size", "shift_scale"), path)
    k, m, d_k = experts.num_prototypes, experts.residual_rank, experts.key_size
    hidden = tensors.get("experts.hidden_bias", torch.empty(0)).shape[0]
    if experts.variant == "orthogonal_residual":
        shapes["experts.value_projection"] = (k, d)
    return shapes | {
        "experts.prototypes": (k, d),
        "experts.residual_basis": (d, m),
        "experts.query_projection": (d_k, d),
        "experts.key_projection": (d_k, d),
        "experts.hidden_weight": (hidden, d),
        "experts.hidden_bias": (hidden,),
        "experts.output_weight": (m, hidden),
        "experts.output_bias": (m,),
        "experts.input_mean": (d,),
        "experts.input_std": (d,),
    }


def _require(manifest: ProfileManifest, part: str, keys: tuple[str, ...], path: Path) -> None:
    for key in keys:
        if getattr(getattr(manifest, part), key) is None:
            raise ProfileError(f"{path.parent / MANIFEST_FILE}: {part}.{key} is missing for this kind of {part}.")


def _gate(manifest: ProfileManifest, tensors: dict[str, Tensor], path: Path) -> Gate:
    spec = manifest.gate
    if spec.kind == "always":
        return AlwaysOpenGate()
    if spec.kind == "cosine":
        condition = tensors["gate.condition"]
        if abs(condition.norm().item() - 1) > 1e-3:
            raise ProfileError(f"{path}: tensor 'gate.condition' is not of length 1. Train the profile again.")
        return CosineGate(condition, spec.threshold, spec.direction)
    if not (0 < spec.tail < 1 and spec.decay > 0 and 0 <= spec.floor < 1):
        raise ProfileError(f"{path.parent / MANIFEST_FILE}: gate needs 0 < tail < 1, decay > 0 and 0 <= floor < 1.")
    if (tensors["gate.calibration"].diff() < 0).any():
        raise ProfileError(f"{path}: tensor 'gate.calibration' is not in ascending order. Train the profile again.")
    basis = tensors["gate.basis"]
    if not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-3):
        raise ProfileError(f"{path}: tensor 'gate.basis' has no orthonormal columns. Train the profile again.")
    gate = QuantileGate(
        *(tensors[f"gate.{k}"] for k in GATE_TENSORS), tail=spec.tail, decay=spec.decay, floor=spec.floor
    )
    if abs(gate.threshold.item() - spec.threshold) > 1e-5:
        raise ProfileError(
            f"{path.parent / MANIFEST_FILE}: gate.threshold {spec.threshold} is not the {spec.tail} quantile of the "
            f"calibration ({gate.threshold.item():.6f}). Do not edit it by hand: calibrate again."
        )
    return gate


def _experts(manifest: ProfileManifest, tensors: dict[str, Tensor], path: Path) -> Experts:
    if manifest.experts.kind == "constant":
        made = ConstantVector if manifest.experts.layers is None else LayeredVectors
        return made(tensors["experts.vector"])
    if manifest.experts.kind == "linear":
        return LinearMap(tensors["experts.left"], tensors["experts.right"])
    if manifest.experts.variant == "orthogonal_residual":
        _check_orthogonal(tensors, path)
    return MixtureOfSteeringExperts(
        **{k: tensors[f"experts.{k}"] for k in MOSE_TENSORS},
        shift_scale=manifest.experts.shift_scale,
        value_projection=tensors.get("experts.value_projection"),
    )


def _check_orthogonal(tensors: dict[str, Tensor], path: Path) -> None:
    """That the variant's residual basis is what its name says. Raises ProfileError."""
    prototypes = torch.nn.functional.normalize(tensors["experts.prototypes"], dim=-1)
    if ((prototypes @ tensors["experts.residual_basis"]).abs() > 1e-3).any():
        raise ProfileError(
            f"{path}: tensor 'experts.residual_basis' is not orthogonal to the prototypes. Train the profile again."
        )
