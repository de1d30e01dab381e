"""Puts an engine's core together: decoder, memory, caches, sites."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from server.engine.base import EngineObserver
from server.engine.native.core import EngineCore
from server.engine.native.decoder import Decoder
from server.engine.native.kv_cache import BLOCK_SIZES, KVCache, PagedCache, RowCache, bytes_per_token
from server.engine.native.memory import MemoryPlan, plan_memory
from server.engine.native.paged_attention import paged_kernel_works
from server.engine.native.runner import Runner
from server.engine.native.scheduler import Limits
from steering.intervention import sites_of
from steering.profile import SteeringProfile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How much may be in flight.

    Attributes:
        max_num_seqs: completions that run at once.
        max_model_len: prompt and completion tokens together.
        max_batched_tokens: prompt tokens in one step; None: 512 on a CPU, 2048 on a GPU.
        max_waiting: requests that may queue.
        kv_cache_bytes, prefix_cache_bytes: memory for running sequences and for finished prompts; None: see `memory`.
        live_profiles: profiles may be loaded and unloaded while it runs; costs a state a position where there are none.
    """

    max_num_seqs: int = 32
    max_model_len: int = 1024
    max_batched_tokens: int | None = None
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    live_profiles: bool = False


def build_core(
    decoder: Decoder,
    model: PreTrainedModel,
    profiles: Sequence[SteeringProfile],
    options: EngineOptions,
    observer: EngineObserver | None = None,
    *,
    paged: bool | None = None,
) -> tuple[EngineCore, MemoryPlan]:
    """A core for a decoder that was made of `model`. Raises ProfileError, ModelError.

    Args:
        paged: KV memory in pages instead of rows; None: on a GPU.
    """
    device = decoder.device
    sites = sites_of(model, profiles, options.max_num_seqs)
    shapes, state_size = decoder.kv_shapes(), decoder.hidden_size if sites or options.live_profiles else 0
    memory = plan_memory(
        bytes_per_token(shapes, state_size, decoder.dtype),
        bytes_per_token(shapes, state_size * len(sites), decoder.dtype),
        options.max_num_seqs,
        options.max_model_len,
        options.kv_cache_bytes,
        options.prefix_cache_bytes,
        device,
    )
    cache = new_cache(
        decoder, state_size, options.max_num_seqs, options.max_model_len, num_blocks=memory.num_blocks, paged=paged
    )
    batched = options.max_batched_tokens or (2048 if device.type == "cuda" else 512)
    limits = Limits(options.max_num_seqs, batched, options.max_waiting, memory.num_blocks, memory.block_size)
    with torch.inference_mode():
        runner = Runner(decoder, sites, cache, memory.num_cached_blocks)
        if cache.flash and not decoder.softcapped:
            _record_graphs(runner)
    return EngineCore(runner, limits, options.max_model_len, observer), memory


def _record_graphs(runner: Runner) -> None:
    """CUDA graphs where they can be had: without them decoding is slower, not wrong."""
    try:
        runner.record_graphs()
    except RuntimeError as error:
        logger.warning("decoding without CUDA graphs: %s", str(error).splitlines()[0])


def new_cache(
    decoder: Decoder, state_size: int, num_slots: int, max_len: int, *, num_blocks: int, paged: bool | None = None
) -> KVCache:
    """The KV cache that fits a decoder's device: pages on a GPU, rows elsewhere, unless `paged` says otherwise."""
    device = decoder.device
    block_size = BLOCK_SIZES[device.type]
    shapes = decoder.kv_shapes()
    size = (shapes, state_size, num_slots, max_len, decoder.dtype, device, block_size)
    if not (device.type == "cuda" if paged is None else paged):
        return RowCache(*size)
    cache = PagedCache(*size, num_pages=num_blocks)
    kinds = {(shape.num_heads, shape.key_size) for shape in shapes if shape.key_size == shape.value_size}
    cache.flash = all(s.key_size == s.value_size for s in shapes) and all(
        paged_kernel_works(decoder.num_heads, heads, width, decoder.dtype, device) for heads, width in kinds
    )
    return cache
