"""`profile.json`: what a profile is, in words and numbers. Parsed strictly: an unknown or missing key is refused by name. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from steering.decision import Positions
from steering.errors import ProfileError

FORMAT_VERSION = 1
Method = Literal["finesteer", "caa", "refusal_vector", "alphasteer", "cast"]
Variant = Literal["standard", "orthogonal_residual"]


@dataclass(frozen=True)
class ModelReference:
    """The model that the profile was trained on. `config_sha256` covers the shape of the architecture (see `fingerprint`)."""

    id: str
    config_sha256: str
    hidden_size: int
    num_layers: int
    dtype: str


@dataclass(frozen=True)
class GateManifest:
    """`quantile`: SCS with a calibrated threshold. `cosine`: CAST's hard threshold on a cosine similarity, open on the side
    that `direction` names. `always`: no gate, g = 1 (METHOD's ungated baselines)."""

    kind: Literal["quantile", "cosine", "always"]
    centre: Literal["none", "general", "ir"] | None = None
    rank: int | None = None
    tail: float | None = None
    decay: float | None = None
    floor: float | None = None
    threshold: float | None = None
    num_calibration: int | None = None
    direction: Literal["above", "below"] | None = None


@dataclass(frozen=True)
class ExpertsManifest:
    """`mose`: prototypes, routing and residual refinement, in one of two variants (None is standard). `constant`: one vector
    for every query (caa, refusal_vector, cast), or one for each of `layers`, in ascending order. `linear`: a matrix of rank
    `map_rank` times the state (alphasteer)."""

    kind: Literal["mose", "constant", "linear"]
    num_prototypes: int | None = None
    residual_rank: int | None = None
    key_size: int | None = None
    shift_scale: float | None = None
    variant: Variant | None = None
    map_rank: int | None = None
    layers: list[int] | None = None


_LATER_KEYS = {"gate": ("direction",), "experts": ("variant", "map_rank", "layers")}


@dataclass(frozen=True)
class ProfileManifest:
    """All of `profile.json`. `training` (command, seed, data hashes, choices) and `metrics` are free-form records.

    `layer`: where gate and experts read and act; of a profile with `experts.layers` the first of them.
    """

    name: str
    method: Method
    model: ModelReference
    layer: int
    positions: Positions
    strength: float
    gate: GateManifest
    experts: ExpertsManifest
    tensors_sha256: str
    description: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer at whose output the profile acts."""
        return tuple(self.experts.layers or (self.layer,))

    @property
    def version(self) -> str:
        """`sha256:` and 16 hex digits over everything that changes an answer: two profiles that act alike share it.

        A key that came to the format later does not count where it says what its absence says, so old profiles keep theirs.
        """
        silent = ("name", "description", "training", "metrics")
        acting = {k: v for k, v in dataclasses.asdict(self).items() if k not in silent}
        for part, keys in _LATER_KEYS.items():
            acting[part] = {k: v for k, v in acting[part].items() if k not in keys or v not in (None, "standard")}
        return "sha256:" + hashlib.sha256(json.dumps(acting, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of `profile.json`; raises ValueError on NaN or infinity, which JSON cannot hold."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> ProfileManifest:
        """Parse and check. `source` names the file in messages. Raises ProfileError."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ProfileError(
                f"{source}: not valid JSON ({error}). Restore the file or train the profile again."
            ) from error
        if not isinstance(data, dict):
            raise ProfileError(f"{source}: must hold one JSON object.")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ProfileError(
                f"{source}: format_version is {version!r}; this server reads version {FORMAT_VERSION}. "
                "Train the profile again with this release, or use the release that wrote it."
            )
        manifest = _parse(cls, data, source, "")
        if not 0 <= manifest.layer < manifest.model.num_layers:
            raise ProfileError(
                f"{source}: layer {manifest.layer} is outside the model's layers 0 to {manifest.model.num_layers - 1}."
            )
        _check_layers(manifest, source)
        return manifest


def _check_layers(manifest: ProfileManifest, source: str) -> None:
    """Raise ProfileError where `experts.layers` cannot be served."""
    layers, last = manifest.experts.layers, manifest.model.num_layers - 1
    if layers is None:
        return
    if manifest.gate.kind != "always" or manifest.experts.kind != "constant":
        raise ProfileError(
            f"{source}: experts.layers needs gate.kind always and experts.kind constant: a gate decides at one layer, and "
            "vectors that follow from a query's state are made at one. Keep one layer, or leave the gate out."
        )
    if len(layers) < 2 or layers != sorted(set(layers)) or layers[0] != manifest.layer or layers[-1] > last:
        raise ProfileError(
            f"{source}: experts.layers is {layers}; it must hold two or more of the model's layers 0 to {last} in ascending "
            f"order, the first of them layer {manifest.layer}. Import the vectors again."
        )


def _parse(cls: type, data: Any, source: str, path: str) -> Any:
    """Build dataclass `cls` from `data`, checking every key and type; nested dataclasses recurse."""
    if not isinstance(data, dict):
        raise ProfileError(f"{source}: {path or 'the file'} must be an object.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise ProfileError(f"{source}: unknown key {path + unknown[0]!r}. Remove it, or use the release that wrote it.")
    values = {}
    for name, spec in fields.items():
        if name not in data:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise ProfileError(
                    f"{source}: key {path + name!r} is missing. Restore the file or train the profile again."
                )
            continue
        values[name] = _value(hints[name], data[name], source, path + name)
    return cls(**values)


def _value(hint: Any, value: Any, source: str, path: str) -> Any:
    """Check one value against its annotation; ints are taken for floats, never booleans for numbers."""
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast(type, hint), value, source, path + ".")
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _value(next(h for h in typing.get_args(hint) if h is not type(None)), value, source, path)
    if origin is Literal:
        if value not in typing.get_args(hint):
            allowed = ", ".join(map(str, typing.get_args(hint)))
            raise ProfileError(f"{source}: {path} is {value!r}; this release knows: {allowed}.")
        return value
    expected = origin or hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ProfileError(f"{source}: {path} must be {expected.__name__}, not {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ProfileError(f"{source}: {path} is {value}; it must be a finite number.")
    if expected is list:
        [item] = typing.get_args(hint)
        return [_value(item, entry, source, f"{path}[{index}]") for index, entry in enumerate(value)]
    return value
