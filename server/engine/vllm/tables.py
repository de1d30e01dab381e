"""What one worker adds to its model's states, and reads of them, in fixed memory: CUDA graphs and compiled code may keep it.

The operation `finesteer_vllm::site` stands behind each site's layer. All it does is index and add, so it can be recorded and
replayed; which rows are meant is written into the tables before a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

LIBRARY = "finesteer_vllm"
_library: torch.library.Library | None = None
_tables: dict[int, SiteTable] = {}  # of this process's model, by layer


class Decide(Protocol):
    """Called amid a pass, in one-pass mode: (n, d) states of the step's queries, in their order."""

    def __call__(self, layer: int, states: Tensor) -> None: ...


class SiteTable:
    """One site's memory. Nothing is allocated once it is made.

    Args:
        max_queries: prompts that may end in one step.
        max_rows: tokens of one step.
        num_slots: vectors that can be held at once.

    Attributes:
        vectors: (1 + num_slots, d), the model's dtype; row 0 is zero.
        row_of_token: (max_rows,) int32, the row of `vectors` that each of the step's tokens gets; 0 behind them.
        query_rows: (max_queries,) int32, which of the step's tokens are read; `num_queries` of them count, the others are 0: a
            recorded graph reads them too, and its step may have one token only.
        states: (max_queries, d), what was read.
        adds: whether any of the step's tokens gets a row but the zero row.
        decide: see `Decide`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_slots: int,
        max_queries: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.vectors = torch.zeros(1 + num_slots, hidden_size, dtype=dtype, device=device)
        self.row_of_token = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.query_rows = torch.zeros(max_queries, dtype=torch.int32, device=device)
        self.states = torch.zeros(max_queries, hidden_size, dtype=dtype, device=device)
        self.num_queries = 0
        self._num_written = 0  # of `row_of_token`: behind them all are 0
        self.adds = False
        self.decide: Decide | None = None
        # On a CPU Python runs at each step and can skip what is not needed; a recorded graph cannot.
        self._skips = torch.device(device).type == "cpu"

    def write_rows(self, rows: np.ndarray, decide: Decide | None = None) -> None:
        """Which row each of the step's tokens gets, int32, unless `decide` changes that amid the pass."""
        self.adds, self.decide = bool(rows.any()), decide
        acts = self.adds or decide is not None
        if acts or self._num_written:
            padded = np.zeros(max(len(rows), self._num_written), np.int32)
            padded[: len(rows)] = rows
            put(self.row_of_token[: len(padded)], torch.from_numpy(padded))
            self._num_written = len(rows) if acts else 0

    def clear(self) -> None:
        """Add nothing and read nothing, however many tokens the steps from now on have."""
        self.write_rows(np.zeros(0, np.int32))
        self.write_queries(())

    def write_queries(self, rows: Sequence[int]) -> None:
        """Which tokens to read."""
        if rows or self.num_queries:
            padded = torch.zeros(len(self.query_rows), dtype=torch.int32)
            padded[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
            put(self.query_rows, padded)
        self.num_queries = len(rows)

    def take(self) -> Callable[[], Tensor]:
        """What gives the states that the step read, (num_queries, d) float32 in main memory, once the device is done.

        They are set aside at once, in the device's order, so that the next step may be under way when it is called, which may be
        in another thread.
        """
        states = self.states[: self.num_queries].to("cpu", non_blocking=True, copy=True)
        done = None
        if self.states.is_cuda:
            done = torch.cuda.Event(blocking=True)
            done.record()

        def taken() -> Tensor:
            if done is not None:
                done.synchronize()
            return states.float()

        return taken

    def run(self, hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        """Read, then add in place: (T, d) each, the state is their sum."""
        recorded = not self._skips and self.decide is None  # then for all steps with as many tokens
        count = min(len(self.query_rows), len(hidden)) if recorded else self.num_queries
        if count:
            rows = self.query_rows[:count]
            states = hidden.index_select(0, rows)
            if residual is not None:
                states = states + residual.index_select(0, rows)
            self.states[:count] = states
            if self.decide is not None:
                self.decide(layer, states)
        if self.adds or not self._skips:
            hidden.add_(self.vectors.index_select(0, self.row_of_token[: len(hidden)]))


def put(target: Tensor, values: Tensor) -> None:
    """Copy from main memory, in the device's order and without waiting for it."""
    if target.is_cuda:
        values = values.pin_memory()  # its memory is used anew only after the copy
    target.copy_(values, non_blocking=True)


def register_operation() -> None:
    """Make `torch.ops.finesteer_vllm.site` known, once a process."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library(LIBRARY, "FRAGMENT")
    _library.define("site(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")
    _library.impl("site", _site, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY}::site", lambda hidden, residual, layer: None, lib=_library)


def _site(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    _tables[layer].run(hidden, residual, layer)


def install(layers: nn.ModuleList, tables: dict[int, SiteTable]) -> None:
    """Put the operation behind the layers that have a table; before anything of the model is traced or recorded.

    A layer of vLLM's gives (hidden, residual), whose sum is the residual stream, and the next one adds them up in place: so the
    vector goes to `hidden` alone. A layer that gives one tensor gives the stream itself.
    """
    register_operation()
    _tables.clear()
    _tables.update(tables)
    for layer in tables:
        layers[layer].register_forward_hook(_hook(layer))


def _hook(layer: int):
    def hook(module: nn.Module, args: object, output: object) -> object:
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        torch.ops.finesteer_vllm.site(hidden, residual, layer)
        return output

    return hook
