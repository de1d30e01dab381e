"""Extracted states on disk: one safetensors file for each window of rows, named by all that its numbers depend on.

A file holds all layers of a window, and one layer of it can be read alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steering.architecture import model_key
from steering.errors import TrainingDataError


class Window(NamedTuple):
    """A window's file, where it has one, and its (L, n, d) float32 states, where they are held."""

    path: Path | None
    states: Tensor | None = None


@dataclass(frozen=True)
class StatesByLayer(Sequence[Tensor]):
    """(N, d) states of each of `num_layers` layers, made by `read` whenever one is asked for; none is held."""

    num_layers: int
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.num_layers:
            raise IndexError(index)
        return self.read(index)


def read_layer(path: Path, index: int) -> Tensor:
    """One layer of a window's file: (n, d) float32. Raises TrainingDataError if the file is gone."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("states")[index]
    except (SafetensorError, OSError) as error:
        raise TrainingDataError(
            f"cache file {path.name} was lost while it was needed ({error}). Start again."
        ) from error


class StateCache:
    """Finds and keeps the states of a window of rows. A file that is broken counts as absent, with a warning."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        self._model = model_key(model)

    def path(self, layers: Sequence[int], rows: Sequence[tuple[list[int], int]]) -> Path:
        """The window's file. `rows`: token ids (so template and text are in the name, too) and where the answer starts."""
        text = json.dumps([self._model, list(layers), rows], separators=(",", ":"))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def load(self, path: Path, shape: tuple[int, ...]) -> Tensor | None:
        """(L, N, d) float32 if the file is there and whole."""
        if not path.exists():
            return None
        try:
            states = load_file(path)["states"]
        except (SafetensorError, KeyError, OSError) as error:
            warnings.warn(f"cache file {path.name} is broken ({error}); its rows are computed again.", stacklevel=2)
            return None
        if tuple(states.shape) != shape:
            warnings.warn(f"cache file {path.name} has another shape; its rows are computed again.", stacklevel=2)
            return None
        return states

    def save(self, path: Path, states: Tensor) -> None:
        """Write whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({"states": states.contiguous()}, part)
        part.replace(path)
