"""Keys, values and site states of everything that runs: one slot a sequence, in blocks of some positions each.

On a CPU a slot is a row of virtual memory, `max_len` positions long: contiguous, so that many rows decode in one call, yet
only what was written takes memory, and `release` gives it back (`RowCache`). On a GPU a slot is a list of pages out of one
pool, read through a block table (`PagedCache`). How many blocks may be in use at once is the scheduler's business.
"""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Positions in a block. On a GPU what flash attention asks of a page; on a CPU small, since prefixes are shared by whole blocks.
BLOCK_SIZES = {"cpu": 32, "cuda": 256}
_NO_RESERVE = 0x4000  # MAP_NORESERVE: named in Python from 3.13 on


@dataclass(frozen=True)
class KVShape:
    """One layer's: KV heads, and the sizes of a key and of a value."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def numel(self) -> int:
        """Numbers per token."""
        return self.num_heads * (self.key_size + self.value_size)


def bytes_per_token(shapes: Sequence[KVShape], state_size: int, dtype: torch.dtype) -> int:
    """Memory for one position: keys and values of every layer, and one site state of `state_size` numbers."""
    return (sum(shape.numel for shape in shapes) + state_size) * dtype.itemsize


class KVCache(ABC):
    """A pool for each layer's keys, for its values, and for the states that prefill keeps at a site.

    What goes in and comes out has the shape (heads, positions, width); a state counts as one head.

    Args:
        shapes: per layer.
        state_size: width of a site state; 0 keeps none.
        num_slots, max_len: sequences, and positions of each (rounded up to whole blocks).
        block_size: positions in a block.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        state_size: int,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
    ) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self.blocks_per_slot = -(-max_len // block_size)
        self.dtype, self.device = dtype, device
        self.keys = [self._pool(shape.num_heads, shape.key_size) for shape in shapes]
        self.values = [self._pool(shape.num_heads, shape.value_size) for shape in shapes]
        self.states = self._pool(1, state_size) if state_size else None

    @abstractmethod
    def _pool(self, heads: int, width: int) -> Tensor: ...

    @abstractmethod
    def reserve(self, slot: int, length: int) -> None:
        """Make room for a slot's first `length` positions. The scheduler has counted the blocks: there are enough."""

    @abstractmethod
    def release(self, slot: int) -> None:
        """Give a slot's memory back; nothing of it is read before it is written again."""

    @abstractmethod
    def write(self, pool: Tensor, slots: Tensor, positions: Tensor, values: Tensor) -> None:
        """Store (T, heads, width) at `slots`, `positions`, (T,) int64 each."""

    @abstractmethod
    def read(self, pool: Tensor, slot: int, length: int) -> Tensor:
        """A slot's first `length` positions: (heads, length, width)."""

    @abstractmethod
    def rows(self, pool: Tensor, slots: Sequence[int], length: int) -> Tensor:
        """The first `length` positions of several slots: (rows, heads, length, width).

        Where the cache is `contiguous` a view, of all slots from the first to the last of `slots`; else a copy of those alone.
        """

    contiguous: bool  # whether a slot's positions lie one after the other, so that what is read is a view
    flash = False  # whether `paged_attention.attend_pages` can read the pools

    @abstractmethod
    def write_blocks(self, pool: Tensor, slot: int, blocks: Tensor) -> None:
        """Store (n, heads, block_size, width) from a slot's first position on."""

    @abstractmethod
    def read_blocks(self, pool: Tensor, slot: int, count: int) -> Tensor:
        """A slot's first `count` blocks: (count, heads, block_size, width)."""

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of one slot to others: completions of one prompt share its prefill."""
        count = -(-length // self.block_size)
        for pool in (*self.keys, *self.values):
            blocks = self.read_blocks(pool, source, count)
            for target in targets:
                self.write_blocks(pool, target, blocks)


class RowCache(KVCache):
    """Pools of (num_slots, heads, max_len, width), on a CPU."""

    contiguous = True

    def __init__(self, *args, **kwargs) -> None:
        self._regions: list[tuple[mmap.mmap, Tensor]] = []
        super().__init__(*args, **kwargs)

    def _pool(self, heads: int, width: int) -> Tensor:
        shape = (self.num_slots, heads, self.blocks_per_slot * self.block_size, width)
        size = torch.Size(shape).numel() * self.dtype.itemsize
        # Address space that takes memory page by page, when written. Pages must be small: in huge ones a sequence's first token
        # would take 2 MiB a layer. A kernel that has none refuses to be told so.
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_NOHUGEPAGE)
        pool = torch.frombuffer(region, dtype=self.dtype).view(shape)
        self._regions.append((region, pool))
        return pool

    def reserve(self, slot: int, length: int) -> None:
        pass

    def release(self, slot: int) -> None:
        """Afterwards the slot reads as zeros, so nothing non-finite is left for a masked position to spread."""
        for region, pool in self._regions:
            size = pool[slot].nbytes
            if size % mmap.PAGESIZE:
                pool[slot] = 0
            else:
                region.madvise(mmap.MADV_DONTNEED, slot * size, size)

    def write(self, pool: Tensor, slots: Tensor, positions: Tensor, values: Tensor) -> None:
        pool[slots, :, positions] = values

    def read(self, pool: Tensor, slot: int, length: int) -> Tensor:
        return pool[slot, :, :length]

    def rows(self, pool: Tensor, slots: Sequence[int], length: int) -> Tensor:
        return pool[slots[0] : slots[-1] + 1, :, :length]

    def write_blocks(self, pool: Tensor, slot: int, blocks: Tensor) -> None:
        count = len(blocks)
        pool[slot, :, : count * self.block_size].unflatten(1, (count, self.block_size)).copy_(blocks.transpose(0, 1))

    def read_blocks(self, pool: Tensor, slot: int, count: int) -> Tensor:
        return pool[slot, :, : count * self.block_size].unflatten(1, (count, self.block_size)).transpose(0, 1)


class PagedCache(KVCache):
    """Pools of (num_pages + 1, block_size, heads, width), the layout of paged attention kernels.

    Attributes:
        table: (num_slots + 1, blocks_per_slot) int32: the page of each block of each slot. Page 0 belongs to nobody, and to
            the last slot, which is nobody's: rows that only fill a batch up write there.
    """

    contiguous = False

    def __init__(self, *args, num_pages: int, **kwargs) -> None:
        self._num_pages = num_pages
        super().__init__(*args, **kwargs)
        self.table = torch.zeros(self.num_slots + 1, self.blocks_per_slot, dtype=torch.int32, device=self.device)
        self._pages: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._free = list(range(num_pages, 0, -1))

    def _pool(self, heads: int, width: int) -> Tensor:
        shape = (self._num_pages + 1, self.block_size, heads, width)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def reserve(self, slot: int, length: int) -> None:
        held = self._pages[slot]
        new = [self._free.pop() for _ in range(-(-length // self.block_size) - len(held))]
        if new:
            pages = torch.tensor(new, device=self.device)
            # Whoever had them may have left NaN, and not even a masked position may be that: 0 · NaN is NaN.
            for pool in (*self.keys, *self.values, *([] if self.states is None else [self.states])):
                pool[pages] = 0
            self.table[slot, len(held) : len(held) + len(new)] = pages.int()
            held += new

    def release(self, slot: int) -> None:
        self._free.extend(reversed(self._pages[slot]))
        self._pages[slot] = []
        self.table[slot] = 0  # what a shorter row sees of it, masked, must not be whoever gets the pages next

    def write(self, pool: Tensor, slots: Tensor, positions: Tensor, values: Tensor) -> None:
        pool[self.table[slots, positions // self.block_size].long(), positions % self.block_size] = values

    def read(self, pool: Tensor, slot: int, length: int) -> Tensor:
        return self.rows(pool, [slot], length)[0]

    def rows(self, pool: Tensor, slots: Sequence[int], length: int) -> Tensor:
        pages = self.table[list(slots), : -(-length // self.block_size)].long()
        return pool[pages].flatten(1, 2)[:, :length].transpose(1, 2)

    def write_blocks(self, pool: Tensor, slot: int, blocks: Tensor) -> None:
        pool[self.table[slot, : len(blocks)].long()] = blocks.transpose(1, 2)

    def read_blocks(self, pool: Tensor, slot: int, count: int) -> Tensor:
        return pool[self.table[slot, :count].long()].transpose(1, 2)
