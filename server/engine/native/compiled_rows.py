"""Several decoding rows on a CPU, a whole layer at a time, by kernels that `torch.compile` writes around oneDNN's products.

For several rows the library's blocked products win, and the compiler cannot see into their packed weights: they are operators
of our own here, which find their weights by a handle. All between them (norms, rotation, attention, activation) becomes a few
loops that read each key and value once, where it lies, and copy nothing.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.native.attention import DecodeStep
from server.engine.native.compiled_row import LayerWeights, dynamic_pools
from server.engine.native.linear import PackedLinear

_linears: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def handle(linear: PackedLinear) -> Tensor:
    """A tensor () int64 that stands for `linear` in compiled code; good for as long as `linear` lives."""
    number = next(_numbers)
    _linears[number] = linear
    return torch.tensor(number)


_library = torch.library.Library("finesteer", "DEF")
_library.define("linear(Tensor states, Tensor handle, int width) -> Tensor")
_library.define("linear_add(Tensor residual, Tensor states, Tensor handle) -> Tensor")
_library.impl("linear", lambda states, number, width: _linears[int(number)](states), "CPU")
_library.impl("linear_add", lambda residual, states, number: _linears[int(number)].add_to(residual, states), "CPU")
torch.library.register_fake("finesteer::linear", lambda states, number, width: states.new_empty(states.shape[0], width))
torch.library.register_fake("finesteer::linear_add", lambda residual, states, number: torch.empty_like(residual))
_linear, _linear_add = torch.ops.finesteer.linear.default, torch.ops.finesteer.linear_add.default


def layer_rows(
    weights: LayerWeights,
    handles: tuple[Tensor, ...],
    number: int,
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    step: DecodeStep,
) -> Tensor:
    """(D, d) → (D, d): what the layer makes of a step's D ≥ 2 rows. Writes their keys and values.

    Args:
        handles: of the fused query-key-value, the output, the fused gate-up and the down projection.
        cos, sin: (D, 1, head_dim), the rows' rotations.
    """
    keys, values = dynamic_pools(step, number)
    w = weights
    rows = states, cos, sin, step.slots, step.positions
    layout = states.dtype, states.is_inference(), tuple(tensor.stride() for tensor in (*rows, keys, values))
    if layout not in _known:
        for tensor in rows:
            torch._dynamo.mark_dynamic(tensor, 0)
        _known.add(layout)
    return _kernel()(
        *rows,
        keys,
        values,
        w.attention_norm,
        w.mlp_norm,
        *handles,
        w.gate_up.shape[0],
        w.eps,
        w.num_heads,
        w.num_kv_heads,
        w.scaling,
    )


_known: set[tuple] = set()  # layouts whose batch was said to vary: once is enough, and saying it takes time


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    """The compiled layer. Made when first needed: the compiler takes seconds to import."""
    return torch.compile(_layer, dynamic=False)


def _layer(
    x,
    cos,
    sin,
    slots,
    positions,
    keys,
    values,
    attention_norm,
    mlp_norm,
    qkv,
    output,
    gate_up,
    down,
    mlp_width,
    eps,
    num_heads,
    num_kv_heads,
    scaling,
):
    head_dim = keys.shape[-1]
    heads = _linear(_norm(x, attention_norm, eps), qkv, (num_heads + 2 * num_kv_heads) * head_dim)
    heads = heads.view(x.shape[0], -1, head_dim)
    turned = heads[:, : num_heads + num_kv_heads]
    turned = turned * cos + turned.roll(head_dim // 2, -1) * sin
    keys[slots, :, positions] = turned[:, num_heads:]
    values[slots, :, positions] = heads[:, num_heads + num_kv_heads :]
    query = turned[:, :num_heads].float() * scaling
    mixed = _attend(query.view(x.shape[0], num_kv_heads, -1, head_dim), keys[slots], values[slots], positions)
    x = _linear_add(x, mixed.to(x.dtype).reshape(x.shape[0], -1), output)
    gate, up = _linear(_norm(x, mlp_norm, eps), gate_up, mlp_width).chunk(2, dim=-1)
    return _linear_add(x, F.silu(gate) * up, down)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of (D, d) rows."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """(D, KV heads, group, head_dim) queries at `positions` → the same, float32.

    Written for the loops that come of it, as `compiled_row._attend` is.
    """
    half, width = keys.shape[-1] // 2, keys.shape[-1]
    seen = (torch.arange(keys.shape[2]) <= positions[:, None])[:, None]  # (D, 1, L)
    keys = keys.float()
    mixed = []
    for g in range(query.shape[2]):
        low = query[:, :, g, None, :half] * keys[..., :half]
        scores = (low + query[:, :, g, None, half:] * keys[..., half:]).sum(-1)  # (D, KV heads, L)
        scores = torch.where(seen, scores, -torch.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        columns = [(weights[..., None] * values[..., c : c + 16].float()).sum(2) for c in range(0, width, 16)]
        mixed.append(torch.cat(columns, -1) / weights.sum(-1, keepdim=True))
    return torch.stack(mixed, 2)
