"""Control vectors of other tools as files: a vector for each of one or many layers, added at that layer's output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steering.errors import ProfileError

ARCHITECTURE = "controlvector"
_NAMED_LAYER = re.compile(r"(?:(?:model\.)?(?:layers?|direction)[._])?(\d+)")


@dataclass(frozen=True)
class ControlVectors:
    """`by_layer`: each layer's vector, (d,) float32, from the lowest layer up. `model_hint`: the model's family as the file
    has it ("llama"); empty where it has none."""

    by_layer: dict[int, Tensor]
    model_hint: str = ""


def read_vectors(path: Path) -> ControlVectors:
    """Read a GGUF control vector (repeng, llama.cpp), a safetensors file with a tensor for each layer, or a `torch.save`d
    dictionary of steering-vectors' `layer_activations`; whichever it is, its content says.

    Raises ProfileError.
    """
    if not path.is_file():
        raise ProfileError(
            f"{path}: no such file. Give a .gguf, .safetensors or .pt file with a vector for each layer."
        )
    with path.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"GGUF":
        found = _read_gguf(path)
    elif start[:2] == b"PK":
        found = _read_dictionary(path)
    elif start[8:9] == b"{":
        found = _read_safetensors(path)
    else:
        raise ProfileError(f"{path}: none of GGUF, safetensors and torch.save's format. {_HOW_TO_SAVE}")
    return _checked(found, path)


def write_gguf(vectors: ControlVectors, path: Path) -> None:
    """Write a GGUF control vector as repeng does and llama.cpp's --control-vector reads.

    Raises ProfileError for layer 0, which llama.cpp refuses.
    """
    import gguf

    if 0 in vectors.by_layer:
        raise ProfileError(
            "a GGUF control vector has no place for layer 0: llama.cpp takes layers from 1 up. Train at a later layer."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", vectors.model_hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors.by_layer))
    for layer, vector in vectors.by_layer.items():
        writer.add_tensor(f"direction.{layer}", vector.float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


_HOW_TO_SAVE = (
    "Of a steering-vectors object, save the vectors alone: "
    'safetensors.torch.save_file({str(k): v for k, v in vector.layer_activations.items()}, "vector.safetensors").'
)


def _read_gguf(path: Path) -> ControlVectors:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        kind, hint = (_text(reader, key) for key in ("general.architecture", f"{ARCHITECTURE}.model_hint"))
        if kind != ARCHITECTURE:
            raise ProfileError(f"{path}: a GGUF file of {kind or 'no architecture'}, not a {ARCHITECTURE}.")
        named = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, NotImplementedError) as error:
        raise ProfileError(f"{path}: damaged, or of a form not known here ({error}). Export it again.") from error
    return ControlVectors({_layer(name, path): vector for name, vector in named.items()}, hint)


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field else ""


def _read_safetensors(path: Path) -> ControlVectors:
    try:
        with safe_open(path, "pt") as file:
            return ControlVectors({_layer(name, path): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise ProfileError(f"{path}: not a safetensors file ({error}). Save it again.") from error


def _read_dictionary(path: Path) -> ControlVectors:
    """`weights_only` builds tensors and containers and nothing else: a file that would run code is refused."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise ProfileError(f"{path}: damaged ({error}). Save it again.") from error
    except Exception as error:
        if "weights_only" not in str(error).lower() and "weights only" not in str(error).lower():
            raise
        raise ProfileError(f"{path}: holds objects, which would run code when read. {_HOW_TO_SAVE}") from error
    if isinstance(found, dict) and "layer_activations" in found:
        if (kind := found.get("layer_type", "decoder_block")) != "decoder_block":
            raise ProfileError(
                f"{path}: layer_type {kind!r}; only decoder_block is added where a profile acts. Train it there."
            )
        found = found["layer_activations"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ProfileError(f"{path}: must hold a dictionary of layer to tensor. {_HOW_TO_SAVE}")
    return ControlVectors({_layer(str(name), path): vector for name, vector in found.items()})


def _layer(name: str, path: Path) -> int:
    match = _NAMED_LAYER.fullmatch(name)
    if match is None:
        raise ProfileError(f"{path}: tensor {name!r} names no layer; expected 12, layer.12, layers.12 or direction.12.")
    return int(match.group(1))


def _checked(found: ControlVectors, path: Path) -> ControlVectors:
    """The same, in float32 and in order of layers. Raises ProfileError for what cannot be added to a residual stream."""
    if not found.by_layer:
        raise ProfileError(f"{path}: holds no vectors.")
    by_layer = {layer: found.by_layer[layer].detach().squeeze() for layer in sorted(found.by_layer)}
    for layer, vector in by_layer.items():
        if vector.ndim != 1 or not vector.is_floating_point():
            raise ProfileError(
                f"{path}: layer {layer} holds {vector.dtype} {tuple(vector.shape)}, must be one vector of floats."
            )
        if not torch.isfinite(vector.float()).all():
            raise ProfileError(f"{path}: layer {layer} holds NaN or infinity.")
    if len({len(vector) for vector in by_layer.values()}) > 1:
        raise ProfileError(f"{path}: the layers' vectors are not of one length.")
    return ControlVectors({layer: vector.float().contiguous() for layer, vector in by_layer.items()}, found.model_hint)
