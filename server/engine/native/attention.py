"""Attention over packed rows, registered in transformers' attention interface: every decoder family runs on it.

A step's rows lie in one packed sequence, (1, T, d): first one row for each decoding sequence, then whole prompts. Keys
and values go to a `KVCache`; decode rows attend to their cache row, all at once; each prompt attends causally to itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "finesteer"


class KVCache:
    """Keys and values of all layers, one row of `max_len` positions for each sequence, allocated at a layer's first use.

    Shapes: per layer and for K and V each, (num_slots, KV heads, max_len, head_dim). Zero-filled, because a masked
    position still enters the kernel's sums: NaN left there would spread.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store (KV heads, T, head_dim) keys and values at `slots`, `positions` (T,); returns the layer's whole K and V."""
        if layer not in self._layers:
            self._layers[layer] = tuple(
                x.new_zeros(self.num_slots, x.shape[0], self.max_len, x.shape[-1]) for x in (keys, values)
            )
        k, v = self._layers[layer]
        k[slots, :, positions] = keys.transpose(0, 1)  # (T, KV heads, head_dim)
        v[slots, :, positions] = values.transpose(0, 1)
        return k, v

    def copy_slot(self, source: int, targets: list[int], length: int) -> None:
        """Copy the first `length` positions of one sequence to others: completions of one prompt share its prefill."""
        for pair in self._layers.values():
            for pool in pair:
                pool[targets, :, :length] = pool[source, :, :length].clone()

    def scrub(self, slot: int) -> None:
        """Zero a row that held non-finite numbers, before another sequence gets it."""
        for pair in self._layers.values():
            for pool in pair:
                pool[slot] = 0


@dataclass(frozen=True)
class AttentionStep:
    """Which packed row is whose.

    Attributes:
        cache: where keys and values live.
        slots, positions: (T,) int64, each row's sequence and its position there.
        decode_slots: (D,) int64, the first D rows' slots, ascending, and `decode_lengths`: (D,), keys they see, their own included.
        prefills: (start, end) packed rows of each prompt.
        first_slot, last_slot, max_length: the block of the cache that holds all decoding sequences (host numbers).
    """

    cache: KVCache
    slots: Tensor
    positions: Tensor
    decode_slots: Tensor
    decode_lengths: Tensor
    prefills: tuple[tuple[int, int], ...]
    first_slot: int = 0
    last_slot: int = 0
    max_length: int = 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention-function contract: query (1, H, T, head_dim), key and value (1, KV, T, ·) → (1, T, H, ·)."""
    query, key, value = query[0], key[0], value[0]
    keys, values = step.cache.write(module.layer_idx, step.slots, step.positions, key, value)
    num_decode = len(step.decode_slots)
    parts = []
    if num_decode:
        parts.append(_decode(query[:, :num_decode], keys, values, step, scaling, sliding_window, softcap))
    for start, end in step.prefills:
        rows = slice(start, end)
        parts.append(_prefill(query[:, rows], key[:, rows], value[:, rows], scaling, sliding_window, softcap))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    step: AttentionStep,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One token each: (H, D, head_dim) queries against the block of the cache that holds their rows; → (D, H, ·).

    The query heads that share a KV head are folded into the query axis, so no key is repeated. Rows of the block that
    do not decode now get a zero query and are thrown away.
    """
    k = keys[step.first_slot : step.last_slot + 1, :, : step.max_length]  # (B, KV, L, hd)
    v = values[step.first_slot : step.last_slot + 1, :, : step.max_length]
    heads, num_decode, head_dim = query.shape
    rows = step.decode_slots - step.first_slot
    grouped = query.new_zeros(k.shape[0], k.shape[1], heads // k.shape[1], head_dim)
    grouped[rows] = query.transpose(0, 1).reshape(num_decode, k.shape[1], -1, head_dim)
    lengths = rows.new_ones(k.shape[0])
    lengths[rows] = step.decode_lengths
    index = torch.arange(step.max_length, device=query.device)
    mask = index < lengths[:, None]
    if sliding_window is not None:
        mask &= index >= lengths[:, None] - sliding_window
    out = _attend(grouped, k, v, mask[:, None, None, :], scaling, softcap)
    return out[rows].reshape(num_decode, heads, -1)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """A whole prompt, causal: (H, S, head_dim) against its own (KV, S, ·) keys and values; → (S, H, ·)."""
    group = query.shape[0] // key.shape[0]
    key, value = (x.repeat_interleave(group, dim=0).unsqueeze(0) for x in (key, value))
    length = query.shape[1]
    if softcap is None and (sliding_window is None or length <= sliding_window):
        out = F.scaled_dot_product_attention(query.unsqueeze(0), key, value, is_causal=True, scale=scaling)
    else:
        index = torch.arange(length, device=query.device)
        mask = index <= index[:, None]
        if sliding_window is not None:
            mask &= index > index[:, None] - sliding_window
        out = _attend(query.unsqueeze(0), key, value, mask, scaling, softcap)
    return out[0].transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Masked attention; `mask` is True where a key is seen. Soft-capped scores (Gemma 2) have no fused kernel here."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def register() -> None:
    """Make `ATTENTION` known to transformers. It makes its own masks, so the models are told to make none. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _no_mask)


def _no_mask(*_: object, **__: object) -> None:
    return None
