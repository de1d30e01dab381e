"""A checkpoint's shape, and a few of its weights, read from its files: the workers load the model, the server never does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from steering.architecture import spaced_places
from steering.errors import ModelError
from steering.profile import SteeringProfile

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
EMBEDDING = "embed_tokens.weight"
# Whose layers were proved here to give (hidden, residual) or the stream, by equal tokens: see tests/vllm.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)


@dataclass(frozen=True)
class Checkpoint:
    """`folder` of a checkpoint, and its decoder's configuration."""

    folder: Path
    config: PreTrainedConfig

    @classmethod
    def find(cls, model: str) -> Checkpoint:
        """From a folder or a hub id, which is downloaded. Raises ModelError, also where vLLM is not known to run it as
        steering needs it."""
        folder = Path(model)
        try:
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                folder = Path(
                    snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
                )
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load model {model!r}: {str(error).splitlines()[0]} Give a folder with config.json and safetensors "
                "weights, or a hub id of a decoder-only model."
            ) from error
        named = list(config.architectures or [])
        if not any(name in ARCHITECTURES for name in named):
            raise ModelError(
                f"--engine vllm: steering inside vLLM was not tried with {' or '.join(named) or 'a model of no architecture'}; "
                f"it was with {', '.join(ARCHITECTURES)}. Leave --engine out to serve it with this server's own engine."
            )
        return cls(folder, config.get_text_config(decoder=True))

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def dtype(self) -> str:
        """The weights', by name; "auto" where the configuration does not say."""
        return str(self.config.dtype or "auto").removeprefix("torch.")

    def check(self, profile: SteeringProfile) -> None:
        """Raise ProfileError unless the profile is for this checkpoint; ModelError where its weights cannot be read."""
        profile.check_checkpoint(self.config, self.num_layers, lambda: self.weight_probe)

    @cached_property
    def weight_probe(self) -> Tensor:
        """As `steering.architecture.weight_probe`, of the file's rows. Raises ModelError."""
        try:
            file, name = self._embedding()
            with safe_open(self.folder / file, framework="pt") as weights:
                rows = weights.get_slice(name)
                height, width = rows.get_shape()
                places = spaced_places(height * width).tolist()
                values = [rows[place // width : place // width + 1][0, place % width] for place in places]
            return torch.stack(values).float()
        except (OSError, SafetensorError, KeyError, StopIteration, ValueError) as error:
            raise ModelError(
                f"{self.folder}: its embedding cannot be read from safetensors files ({error}), so no profile can be checked "
                "against it. Give the checkpoint as safetensors."
            ) from error

    def _embedding(self) -> tuple[str, str]:
        """The file, and the tensor's name in it."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            name = next(name for name in files if name.endswith(EMBEDDING))
            return files[name], name
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as weights:
            return WEIGHTS_FILE, next(name for name in weights.keys() if name.endswith(EMBEDDING))  # noqa: SIM118
