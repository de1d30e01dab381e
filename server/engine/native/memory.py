"""How much memory keys and values may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.native.kv_cache import BLOCK_SIZES
from steering.errors import ModelError

# Shares of what is free once the model is loaded, where the operator names no number. A GPU has nothing else to do with it.
KV_SHARE = {"cpu": 0.4, "cuda": 0.75}
PREFIX_SHARE = {"cpu": 0.1, "cuda": 0.1}


@dataclass(frozen=True)
class MemoryPlan:
    """Blocks for what runs, and blocks (of each segment of layers) for finished prompts."""

    num_blocks: int
    num_cached_blocks: int
    block_size: int
    block_bytes: int
    cached_block_bytes: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def prefix_cache_bytes(self) -> int:
        return self.num_cached_blocks * self.cached_block_bytes


def plan_memory(
    token_bytes: int,
    cached_token_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
    kv_cache_bytes: int | None,
    prefix_cache_bytes: int | None,
    device: torch.device,
) -> MemoryPlan:
    """From the operator's numbers, or where there are none from what the slots can use and the machine has free.

    `token_bytes`: a position that runs; `cached_token_bytes`: one in the prefix cache, which keeps a state for every site.
    Raises ModelError where not even one sequence of `max_model_len` would fit.
    """
    block_size = BLOCK_SIZES[device.type]
    block_bytes = token_bytes * block_size
    most = max_num_seqs * -(-max_model_len // block_size)
    free = free_bytes(device)
    kv = KV_SHARE[device.type] * free if kv_cache_bytes is None else kv_cache_bytes
    prefix = PREFIX_SHARE[device.type] * free if prefix_cache_bytes is None else prefix_cache_bytes
    num_blocks = min(int(kv // block_bytes), most)
    if num_blocks * block_size < max_model_len:
        raise ModelError(
            f"{kv / 2**20:,.0f} MiB for keys and values hold {num_blocks * block_size:,} tokens, fewer than one sequence of "
            f"--max-model-len {max_model_len:,} needs ({-(-max_model_len // block_size) * block_bytes / 2**20:,.0f} MiB). "
            "Lower --max-model-len, or raise --kv-cache-memory."
        )
    cached_block_bytes = cached_token_bytes * block_size
    num_cached = int(prefix // cached_block_bytes)
    num_cached = min(num_cached, most) if prefix_cache_bytes is None else num_cached
    return MemoryPlan(num_blocks, num_cached, block_size, block_bytes, cached_block_bytes)


def free_bytes(device: torch.device) -> int:
    """What this device, or this machine or container, has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_free())
    return _cgroup_free()


def _cgroup_free() -> int:
    """What the container's limit leaves; a very large number where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        return 2**62 if limit == "max" else int(limit) - int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2**62
