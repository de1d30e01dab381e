"""Finding one's way in a transformers decoder by structure, never by name of family."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from steering.errors import ModelError

SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
PROBE_SIZE = 256


def text_config(model: nn.Module):
    """The decoder's configuration, also where a multimodal wrapper nests it."""
    return model.config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the one ModuleList whose length is the configuration's `num_hidden_layers`.

    Raises ModelError where there is none, or more than one (an encoder-decoder, say).
    """
    wanted = text_config(model).num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted and _attends(m[0])]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: found {len(found)} lists of {wanted} decoder layers, need exactly one. "
            "Decoder-only transformers models with attention in every layer are supported."
        )
    return found[0]


def _attends(layer: nn.Module) -> bool:
    return any("attn" in name or "attention" in name for name, _ in layer.named_children())


class DecoderConfig(Protocol):
    """A transformers configuration; of its names only those that it has count for the hash."""

    hidden_size: int


def config_sha256(model: nn.Module) -> str:
    """`shape_sha256` of a model's decoder."""
    return shape_sha256(text_config(model))


def shape_sha256(config: DecoderConfig) -> str:
    """Hash of the numbers that fix the architecture's shape; the same for every dtype and quantisation of a checkpoint.

    Args:
        config: the decoder's, as `text_config` finds it.
    """
    shape = {key: getattr(config, key, None) for key in SHAPE_KEYS}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def weight_probe(model: nn.Module) -> Tensor:
    """A few of the weights, as the model's signature: evenly spaced embedding values, (PROBE_SIZE,) float32 on the CPU.

    Kept as numbers and not as a hash, so that the checkpoint loaded in another dtype still matches, to rounding.
    """
    embedding = model.get_input_embeddings()
    with _in_reach(embedding):
        return _some(embedding.weight, PROBE_SIZE)


def _some(weight: Tensor, count: int) -> Tensor:
    """Evenly spaced values: (count,) float32 on the CPU."""
    index = spaced_places(weight.numel(), count).to(weight.device)
    return weight.detach().flatten()[index].float().cpu()


def spaced_places(num_values: int, count: int = PROBE_SIZE) -> Tensor:
    """Where a probe looks in a flattened weight: (count,) int64, from its first value to its last."""
    return torch.linspace(0, num_values - 1, count, dtype=torch.float64).long()


@contextmanager
def _in_reach(module: nn.Module) -> Iterator[None]:
    """Within it the module's own weights are there, also where a device map left them on disk, or in memory beside a GPU."""
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, execution_device="cpu"):
        yield


def probes_match(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two probes are of the same weights, up to a cast through bfloat16."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=2e-2, atol=1e-4)


def model_key(model: nn.Module) -> str:
    """A hash that tells checkpoints, and their dtypes, apart: of the shape and of 64 values of every weight that is loaded.

    More than `weight_probe`, which reads the embedding alone: fine-tuning may leave that as it was.
    """
    digest = hashlib.sha256(f"{config_sha256(model)} {model.dtype}".encode())
    for name, weight in sorted(model.state_dict().items()):
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner) if weight.is_meta else nn.Identity()
        with _in_reach(module):
            weight = getattr(module, own) if weight.is_meta else weight
            if not weight.is_meta:
                digest.update(name.encode() + _some(weight, 64).numpy().tobytes())
    return digest.hexdigest()
