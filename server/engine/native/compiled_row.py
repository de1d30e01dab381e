"""One decoding row on a CPU, a whole layer at a time, by kernels that `torch.compile` writes.

A lone request reads every weight for one product each, so its speed is memory's. The library's products reach about two
thirds of that; these loops do better, and there is one call a layer where there were twenty-five. For several rows the
library's blocked products win: see `compiled_rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.native.attention import DecodeStep


@dataclass(frozen=True)
class LayerWeights:
    """A layer without biases, query norms, or norms after its blocks: Llama's and Mistral's. Projections are (out, in), fused."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float
    num_heads: int
    num_kv_heads: int
    scaling: float


def layer_row(weights: LayerWeights, number: int, states: Tensor, cos: Tensor, sin: Tensor, step: DecodeStep) -> Tensor:
    """(1, d) → (1, d) float32: what the layer makes of the step's one row. Writes its key and value.

    Args:
        cos, sin: (1, 1, head_dim), the row's rotation.
    """
    keys, values = dynamic_pools(step, number)
    w = weights
    layer, _ = _kernels()
    return layer(
        states.float(), cos[0], sin[0], step.slots, step.positions, keys, values,
        w.attention_norm, w.qkv, w.output, w.mlp_norm, w.gate_up, w.down,
        w.eps, w.num_heads, w.num_kv_heads, w.scaling,
    )  # fmt: skip


def dynamic_pools(step: DecodeStep, number: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, of all slots, as far as the step sees: (slots, KV heads, L, head_dim), L free to vary.

    Whole pools, not the rows' own: a view that begins elsewhere for each slot would be compiled anew for each.
    """
    keys, values = (pool[number][:, :, : step.num_seen] for pool in (step.cache.keys, step.cache.values))
    layout = keys.stride(), values.stride(), keys.dtype, keys.shape[0], keys.is_inference(), len(step.slots) > 1
    if layout not in _known:
        for tensor in (keys, values):
            torch._dynamo.mark_dynamic(tensor, 2)
        _known.add(layout)
    return keys, values


def head_row(states: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(1, d) → (1, V) float32 logits."""
    _, head = _kernels()
    return head(states.float(), norm, weight, eps)


_known: set[tuple] = set()  # layouts whose length was said to vary: once is enough, and saying it takes time


@functools.cache
def _kernels() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Compiled layer and head. Made when first needed: the compiler takes seconds to import."""
    return torch.compile(_layer, dynamic=False), torch.compile(_head, dynamic=False)


def _layer(
    x,
    cos,
    sin,
    slots,
    positions,
    keys,
    values,
    attention_norm,
    qkv,
    output,
    mlp_norm,
    gate_up,
    down,
    eps,
    num_heads,
    num_kv_heads,
    scaling,
):
    head_dim = keys.shape[-1]
    heads = _product(qkv, _norm(x, attention_norm, eps)).view(-1, head_dim)
    turned = heads[: num_heads + num_kv_heads]
    turned = turned * cos + turned.roll(head_dim // 2, -1) * sin
    query, key, value = turned[:num_heads], turned[num_heads:], heads[num_heads + num_kv_heads :]
    keys[slots, :, positions] = key.to(keys.dtype)
    values[slots, :, positions] = value.to(values.dtype)
    query = _stored(query * scaling).view(num_kv_heads, -1, head_dim)
    mixed = _attend(query, keys[slots][0], values[slots][0])
    x = _stored(x + _product(output, _stored(mixed.flatten())))
    gate, up = _product(gate_up, _norm(x, mlp_norm, eps)).chunk(2)
    return x + _product(down, _stored(F.silu(gate) * up))


def _head(x, norm, weight, eps):
    return _product(weight, _norm(x, norm, eps))[None]


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in) times (in,) float32; narrow weights are widened in registers."""
    return (weight * x).sum(-1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of (1, d) → (d,)."""
    return _stored(x[0] * torch.rsqrt(x.square().mean() + eps) * weight.float())


def _stored(x: Tensor) -> Tensor:
    """`x`, written to memory: else the compiler computes it again for every row of what reads it."""
    return x.as_strided(x.shape, x.stride())


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(KV heads, group, head_dim) queries → the same, float32.

    Written for the loops that come of it: sums over equal ranges become one loop with an accumulator each, so a KV head's rows
    are read once for its whole group, and of the values sixteen columns at a time.
    """
    half, width = keys.shape[-1] // 2, keys.shape[-1]
    keys = keys.float()
    mixed = []
    for g in range(query.shape[1]):
        low = query[:, g, None, :half] * keys[..., :half]
        scores = (low + query[:, g, None, half:] * keys[..., half:]).sum(-1)  # (KV heads, L)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        columns = [(weights[..., None] * values[..., c : c + 16].float()).sum(1) for c in range(0, width, 16)]
        mixed.append(torch.cat(columns, -1) / weights.sum(-1, keepdim=True))
    return torch.stack(mixed, 1)
