"""Decode passes recorded once as CUDA graphs and replayed: one launch a step, steering inside.

A graph for each of a few batch sizes; a smaller batch is filled up with rows that belong to no slot. The doses lie in each
site's table, and which row gets which is a buffer, so a replay steers whoever is steered now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.engine.native.attention import DecodeStep
from server.engine.native.kv_cache import PagedCache

DecodePass = Callable[[DecodeStep, Tensor, list[Tensor | None]], Tensor]


class Graph(Protocol):
    """What `torch.cuda.CUDAGraph` is to us."""

    def replay(self) -> None: ...

    def pool(self) -> object: ...


@dataclass(frozen=True)
class _Recorded:
    """A graph with the buffers that it reads and the logits that it leaves."""

    graph: Graph
    step: DecodeStep
    token_ids: Tensor
    table_rows: list[Tensor]
    logits: Tensor


def capture(body: Callable[[], Tensor], pool: object | None) -> tuple[Graph, Tensor]:
    """Record `body`, whose inputs stay where they are, as a CUDA graph; the tensor holds its result after each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is initialised at the first call must not be recorded
        for _ in range(2):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = body()
    return graph, result


class GraphedDecode:
    """Replays `run`, the runner's decode pass, for up to `cache.num_slots` rows. Recording takes seconds."""

    def __init__(self, run: DecodePass, cache: PagedCache, num_sites: int) -> None:
        self._cache = cache
        self._nobody = cache.num_slots
        self._recorded: dict[int, _Recorded] = {}
        pool = None
        for size in reversed(_sizes(cache.num_slots)):  # the largest first: the others then fit into its memory
            self._recorded[size] = recorded = self._record(run, size, num_sites, pool)
            pool = recorded.graph.pool()

    def __call__(
        self,
        token_ids: Sequence[int],
        slots: Sequence[int],
        lengths: Sequence[int],
        table_rows: Sequence[Sequence[int]],
    ) -> Tensor:
        """Logits (D, V) of D rows. `table_rows`: for each site the row of its table that each of the D gets, 0 = none."""
        count = len(token_ids)
        recorded = self._recorded[min(size for size in self._recorded if size >= count)]
        fill = len(recorded.token_ids) - count
        step = recorded.step
        _copy(recorded.token_ids, [*token_ids, *[0] * fill])
        _copy(step.slots, [*slots, *[self._nobody] * fill])
        _copy(step.lengths, [*lengths, *[1] * fill])
        for buffer, rows in zip(recorded.table_rows, table_rows, strict=True):
            _copy(buffer, [*rows, *[0] * fill])
        recorded.graph.replay()
        return recorded.logits[:count]

    def _record(self, run: DecodePass, size: int, num_sites: int, pool: object | None) -> _Recorded:
        device = self._cache.device
        step = DecodeStep(self._cache, [self._nobody] * size, [1] * size)
        token_ids = torch.zeros(size, dtype=torch.long, device=device)
        table_rows = [torch.zeros(size, dtype=torch.long, device=device) for _ in range(num_sites)]
        graph, logits = capture(lambda: run(step.renewed(), token_ids, list(table_rows)), pool)
        return _Recorded(graph, step, token_ids, table_rows, logits)


def _copy(buffer: Tensor, numbers: list[int]) -> None:
    source = torch.tensor(numbers, dtype=buffer.dtype)
    buffer.copy_(source.pin_memory() if buffer.is_cuda else source, non_blocking=True)


def _sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to `most`."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})
