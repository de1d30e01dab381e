"""Attention of packed rows against the KV cache. A step says which row is whose; every decoder calls `step.attend`.

A pass holds either one row of each decoding sequence (`DecodeStep`) or chunks of prompts (`PrefillStep`), never both: so a
decoding row's numbers do not depend on which prompts arrive beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.native.kv_cache import KVCache
from server.engine.native.paged_attention import attend_pages


@dataclass(frozen=True)
class Scores:
    """How a layer turns queries and keys into weights: the scale, and the window and soft cap that some families have."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None


class AttentionStep(ABC):
    """One pass's rows, as a decoder sees them. `positions`: (T,) int64 on the device."""

    positions: Tensor

    @cached_property
    def memo(self) -> dict[object, object]:
        """What layers share in this pass, by whoever made it: positions' rotations, say."""
        return {}

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Take note of (T, KV heads, ·) keys and values, attend with (T, heads, ·) queries; returns (T, heads, ·)."""


class CachedStep(AttentionStep):
    """One whose keys and values go to a KV cache. `slots`: (T,) int64 on the device."""

    cache: KVCache
    slots: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        self.write(layer, key, value)
        if self._flash(scores):
            return self._attend_pages(layer, query, scores)
        return self._attend(layer, query, key, value, scores)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take note of a layer's (T, KV heads, ·) keys and values."""
        self.cache.write(self.cache.keys[layer], self.slots, self.positions, key)
        self.cache.write(self.cache.values[layer], self.slots, self.positions, value)

    def _flash(self, scores: Scores) -> bool:
        return self.cache.flash and scores.softcap is None

    def _attend_pages(self, layer: int, query: Tensor, scores: Scores) -> Tensor:
        return attend_pages(
            query,
            self.cache.keys[layer],
            self.cache.values[layer],
            *self.pages,
            scaling=scores.scaling,
            sliding_window=scores.sliding_window,
        )

    @property
    @abstractmethod
    def pages(self) -> tuple[Tensor, int, Tensor, Tensor]:
        """For `attend_pages`: where each sequence's rows start, the most rows of one, the sequences' lengths, their pages."""

    @abstractmethod
    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor: ...


@dataclass(frozen=True)
class Span:
    """Packed rows from `row` on hold a slot's positions from `start` to `stop`; `last`: there the prompt ends."""

    row: int
    slot: int
    start: int
    stop: int
    last: bool


class PrefillStep(CachedStep):
    """Chunks of prompts, each attending causally to its slot's earlier positions and to itself.

    `end_rows`: the packed rows at which prompts end, in the order of their slots.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self._spans = spans
        positions = [p for span in spans for p in range(span.start, span.stop)]
        slots = [span.slot for span in spans for _ in range(span.start, span.stop)]
        self.positions = torch.tensor(positions, device=cache.device)
        self.slots = torch.tensor(slots, device=cache.device)
        last = sorted((span for span in spans if span.last), key=lambda span: span.slot)
        self.end_rows = torch.tensor(
            [s.row + s.stop - s.start - 1 for s in last], dtype=torch.long, device=cache.device
        )
        self._last = last

    @cached_property
    def ends(self) -> DecodeStep:
        """The rows at `end_rows`, of which there must be some: what they see is what a decoding row at their place would."""
        return DecodeStep(self.cache, [s.slot for s in self._last], [s.stop for s in self._last])

    @cached_property
    def pages(self) -> tuple[Tensor, int, Tensor, Tensor]:
        spans, device = self._spans, self.cache.device
        starts = torch.tensor([*(s.row for s in spans), len(self.slots)], dtype=torch.int32, device=device)
        lengths = torch.tensor([s.stop for s in spans], dtype=torch.int32, device=device)
        return starts, max(s.stop - s.start for s in spans), lengths, self.cache.table[[s.slot for s in spans]]

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        parts = []
        for span in self._spans:
            mine = slice(span.row, span.row + span.stop - span.start)
            if span.start == 0:
                keys, values = key[mine].transpose(0, 1), value[mine].transpose(0, 1)
            else:
                keys = self.cache.read(self.cache.keys[layer], span.slot, span.stop)
                values = self.cache.read(self.cache.values[layer], span.slot, span.stop)
            parts.append(_causal(query[mine].transpose(0, 1), keys, values, scores))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _causal(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """The last S of L positions: (heads, S, ·) queries, (KV heads, L, ·) keys and values → (S, heads, ·)."""
    length, total = query.shape[1], key.shape[1]
    # A KV head is a batch item with its group of query heads, so expanding the keys copies nothing.
    q = query.unflatten(0, (len(key), -1))  # (KV heads, group, S, ·)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (key, value))
    plain = scores.softcap is None and (scores.sliding_window is None or total <= scores.sliding_window)
    if plain and length == total:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scaling)
    else:
        seen = torch.arange(total, device=query.device)
        last = torch.arange(total - length, total, device=query.device)[:, None]
        mask = seen <= last
        if scores.sliding_window is not None:
            mask &= seen > last - scores.sliding_window
        out = _masked(q, k, v, _additive(mask, query.dtype), scores)
    return out.flatten(0, 1).transpose(0, 1)


class DecodeStep(CachedStep):
    """One row each of D sequences, attending to its slot's `lengths` positions, its own included.

    Args:
        slots, lengths: D host numbers, slots ascending.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.cache = cache
        self.slots = torch.tensor(slots, device=cache.device)
        self.lengths = torch.tensor(lengths, device=cache.device)
        self._slots, self._longest = list(slots), max(lengths)
        self._runs = [_Run(self, slice(*ends), slots, lengths) for ends in _runs(slots, lengths)]

    @cached_property
    def positions(self) -> Tensor:
        return self.lengths - 1

    def renewed(self) -> DecodeStep:
        """The same step, sharing `slots` and `lengths`, with all that follows from them to be computed anew."""
        step = copy(self)
        for name in ("positions", "pages", "memo"):
            step.__dict__.pop(name, None)
        return step

    @property
    def uniform(self) -> bool:
        """Whether all rows attend in one call, padded to the longest."""
        return len(self._runs) == 1

    @property
    def num_seen(self) -> int:
        """Positions that the longest sequence has."""
        return self._longest

    @cached_property
    def pages(self) -> tuple[Tensor, int, Tensor, Tensor]:
        starts = torch.arange(len(self._slots) + 1, dtype=torch.int32, device=self.cache.device)
        return starts, 1, self.lengths.int(), self.cache.table[self.slots]

    def look(self, layer: int, query: Tensor, scores: Scores) -> Tensor:
        """Attend to keys and values that the cache has already; (D, heads, ·) → (D, heads, ·)."""
        if self._flash(scores):
            return self._attend_pages(layer, query, scores)
        return self._attend(layer, query, None, None, scores)

    def _attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, scores: Scores) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        parts = [run.attend(self.cache, keys, values, query[run.rows], scores) for run in self._runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# One more call costs about as much as so many positions of one row.
CALL_POSITIONS = 256


def _runs(slots: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts of the rows into runs that attend together, each padded to its longest: the fewest padded positions and calls."""
    if max(lengths) < 2 * min(lengths) + CALL_POSITIONS:
        return [(0, len(slots))]
    costs, cuts = [0], [0]
    for end in range(1, len(slots) + 1):
        longest, found = 0, []
        for begin in range(end - 1, -1, -1):
            longest = max(longest, lengths[begin])
            padded = longest * (slots[end - 1] - slots[begin] + 1)  # the slots in between are read, too
            found.append((costs[begin] + CALL_POSITIONS + padded, begin))
        cost, begin = min(found)
        costs.append(cost)
        cuts.append(begin)
    runs, end = [], len(slots)
    while end:
        runs.append((cuts[end], end))
        end = cuts[end]
    return runs[::-1]


class _Run:
    """Rows that attend together. `rows`: which of the step's."""

    def __init__(self, step: DecodeStep, rows: slice, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.rows = rows
        self._slots, own = slots[rows], lengths[rows]
        self._longest = max(own)
        self._even = min(own) == self._longest
        self._lengths = step.lengths[rows]
        # Rows between these, of slots that do not decode now: they get a zero query and are thrown away.
        contiguous = step.cache.contiguous
        self._num_rows = self._slots[-1] - self._slots[0] + 1 if contiguous else len(self._slots)
        self._where = step.slots[rows] - self._slots[0] if self._num_rows != len(self._slots) else None
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}

    def attend(self, cache: KVCache, keys: Tensor, values: Tensor, query: Tensor, scores: Scores) -> Tensor:
        """(D, heads, ·) → (D, heads, ·), against one layer's pools."""
        k, v = (cache.rows(pool, self._slots, self._longest) for pool in (keys, values))  # (B, KV heads, L, ·)
        num_rows, heads, head_dim = query.shape
        kv_heads = k.shape[1]
        # The query heads that share a KV head are folded into the query axis, so no key is repeated.
        grouped = query.reshape(num_rows, kv_heads, heads // kv_heads, head_dim)
        if self._where is not None:
            grouped = query.new_zeros(self._num_rows, *grouped.shape[1:]).index_copy_(0, self._where, grouped)
        mask = self._mask(scores.sliding_window, kv_heads, query.dtype)
        out = _few_queries(grouped.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, scores)
        out = out.view(self._num_rows, heads, -1)
        return out if self._where is None else out[self._where]

    def _mask(self, sliding_window: int | None, kv_heads: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (B · KV heads, 1, L); the same for all layers of one kind. None where all is seen."""
        kind = sliding_window, kv_heads
        if kind not in self._masks:
            self._masks[kind] = self._new_mask(sliding_window, kv_heads, dtype)
        return self._masks[kind]

    def _new_mask(self, sliding_window: int | None, kv_heads: int, dtype: torch.dtype) -> Tensor | None:
        windowed = sliding_window is not None and sliding_window < self._longest
        if self._even and self._where is None and not windowed:
            return None
        lengths = self._lengths
        if self._where is not None:
            lengths = lengths.new_ones(self._num_rows).index_copy_(0, self._where, lengths)
        index = torch.arange(self._longest, device=lengths.device)
        mask = index < lengths[:, None]
        if windowed:
            mask &= index >= lengths[:, None] - sliding_window
        return _additive(mask, dtype).repeat_interleave(kv_heads, dim=0)[:, None]


def _few_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention of a few queries each: (N, Q, ·) against (N, L, ·) keys and values under (N, 1, L) `mask`; → (N, Q, ·).

    Two batched products and a softmax: on a CPU up to twice as fast as the fused kernel, which is made for many queries.
    """
    if key.dtype != torch.float32 and key.device.type == "cpu":
        key = key.contiguous()  # oneDNN's batched product takes a dense one; the copy costs less than the other way
    key = key.transpose(1, 2)
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(torch.bmm(query, key) * (scores.scaling / scores.softcap))
        raw = raw if mask is None else raw + mask
    elif mask is None:
        raw = torch.bmm(query * scores.scaling, key)
    else:
        raw = torch.baddbmm(mask, query, key, alpha=scores.scaling)
    return torch.bmm(torch.softmax(raw, dim=-1), value)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention of many queries with `mask` added to the scores. Soft-capped scores (Gemma 2) have no fused kernel here."""
    if scores.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scaling)
    raw = scores.softcap * torch.tanh(query @ key.transpose(-1, -2) * (scores.scaling / scores.softcap)) + mask
    return raw.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
