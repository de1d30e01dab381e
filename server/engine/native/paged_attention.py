"""Flash attention over pages, where this torch and this GPU have it: no keys are gathered, no mask is made, nothing is read
on the host, so a pass can be replayed as a CUDA graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.native.kv_cache import BLOCK_SIZES


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    longest_query: int,
    lengths: Tensor,
    table: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of N sequences' new rows against their pages.

    Args:
        query: (T, heads, head_dim), the sequences' rows one after the other; `starts`: (N + 1,) int32, where each begins.
        keys, values: (pages, block_size, KV heads, head_dim), which hold the new rows already.
        lengths: (N,) int32, positions of each sequence, the new ones included; `table`: (N, blocks) int32, its pages.
    Returns:
        (T, heads, head_dim).
    """
    from torch.nn.attention.varlen import varlen_attn  # not in every torch that can serve on a CPU

    return varlen_attn(
        query,
        keys,
        values,
        starts,
        None,
        longest_query,
        table.shape[1] * keys.shape[1],
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=lengths,
        block_table=table,
    )


def paged_kernel_works(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend_pages` runs here for such a model and computes what plain attention does."""
    if device.type != "cuda":
        return False
    size = BLOCK_SIZES["cuda"]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query, keys, values = (
        random(3, heads, head_dim),
        random(3, size, kv_heads, head_dim),
        random(3, size, kv_heads, head_dim),
    )
    length = size + 5
    starts, lengths, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3], [length], [[2, 1]]))
    try:
        found = attend_pages(
            query, keys, values, starts, 3, lengths, table, scaling=head_dim**-0.5, sliding_window=None
        )
    except (ImportError, RuntimeError, TypeError, ValueError):  # each torch and card refuses in its own way
        return False
    k, v = (x[[2, 1]].flatten(0, 1)[:length].transpose(0, 1)[None].float() for x in (keys, values))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    mask = torch.arange(length, device=device) <= torch.arange(length - 3, length, device=device)[:, None]
    wanted = F.scaled_dot_product_attention(query.transpose(0, 1)[None].float(), k, v, attn_mask=mask)
    return torch.allclose(found.float(), wanted[0].transpose(0, 1), atol=3e-2)
