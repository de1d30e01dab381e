"""The gate-aware prefix cache: what was prefilled once is copied, not computed, for whoever begins with the same tokens.

A store for each segment of layers. Below the first site nothing depends on steering, so its blocks are keyed by tokens
alone and shared by everyone; above, by tokens and by the vectors that were added. A block holds its layers' keys and values
and, below a site, the residual stream there: a request that fires starts over from the site, not from the tokens.
A hit is copied into the request's own slot at once, so nothing can be evicted under a running request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.native.block_index import BlockIndex, chain
from server.engine.native.kv_cache import KVCache
from server.engine.native.sequence import Sequence as RunningSequence


@dataclass
class PrefixCacheStats:
    """Prompt tokens looked up and found, in the segment below the first site and in those above it."""

    lower_queries: int = 0
    lower_hits: int = 0
    upper_queries: int = 0
    upper_hits: int = 0


class PrefixCache:
    """Blocks of finished prefills, by segment.

    Args:
        cache: where sequences run; blocks are copied out of it and into it.
        segments: the layers of each; all but the last keep states.
        num_blocks: of each segment; 0 caches nothing.
    """

    def __init__(self, cache: KVCache, segments: Sequence[range], num_blocks: int) -> None:
        self.stats = PrefixCacheStats()
        self._cache = cache
        self._indexes = [BlockIndex(num_blocks) for _ in segments]
        self._pools: list[list[Tensor]] = []  # of each segment, those of the KV cache
        for number, layers in enumerate(segments):
            pools = [pool[layer] for layer in layers for pool in (cache.keys, cache.values)]
            if number < len(segments) - 1:
                pools.append(cache.states)
            self._pools.append(pools)
        self._stores = [
            [pool.new_empty(num_blocks, *cache.read_blocks(pool, 0, 1).shape[1:]) for pool in pools]
            for pools in self._pools
        ]

    @property
    def usage(self) -> float:
        """Share of the blocks that hold something, 0 to 1."""
        total = sum(index.num_blocks for index in self._indexes)
        return sum(map(len, self._indexes)) / total if total else 0.0

    def load(self, sequence: RunningSequence, segment: int) -> int:
        """Copy what is cached of a sequence's tokens into its slot; returns how many tokens that were.

        At least one token is left to compute: the last one's state is the query, and at the end gives the logits.
        """
        index = self._indexes[segment]
        if not index.num_blocks:
            return 0
        keys = self._keys(sequence, segment)[: (len(sequence.token_ids) - 1) // self._cache.block_size]
        places = index.match(keys)
        length = len(places) * self._cache.block_size
        if places:
            where = torch.tensor(places, device=self._cache.device)
            for pool, store in zip(self._pools[segment], self._stores[segment], strict=True):
                self._cache.write_blocks(pool, sequence.slot, store[where])
        self._count(segment, len(sequence.token_ids), length)
        return length

    def save(self, sequence: RunningSequence, segment: int) -> None:
        """Keep a sequence's full blocks; called when the segment is done with all of its tokens."""
        added = self._indexes[segment].insert(self._keys(sequence, segment))
        if not added:
            return
        numbers, places = torch.tensor(added, device=self._cache.device).T
        for pool, store in zip(self._pools[segment], self._stores[segment], strict=True):
            store[places] = self._cache.read_blocks(pool, sequence.slot, added[-1][0] + 1)[numbers]

    def _keys(self, sequence: RunningSequence, segment: int) -> list[bytes]:
        salt, salted_from = sequence.group.steering.salt(segment)
        return chain(sequence.token_ids, self._cache.block_size, salt, salted_from, sequence.request.cache_owner)

    def _count(self, segment: int, queries: int, hits: int) -> None:
        if segment == 0:
            self.stats.lower_queries += queries
            self.stats.lower_hits += hits
        else:
            self.stats.upper_queries += queries
            self.stats.upper_hits += hits
