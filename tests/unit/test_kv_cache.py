"""Rows and pages hold the same; what is released is gone, and the machine has its memory back."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.native.kv_cache import BLOCK_SIZES, KVCache, KVShape, PagedCache, RowCache, bytes_per_token

BLOCK_SIZE = BLOCK_SIZES["cpu"]

SLOTS, BLOCKS, WIDTH = 3, 2, 4
MAX_LEN = BLOCKS * BLOCK_SIZE - 5  # rounded up to whole blocks
CPU = torch.device("cpu")
SHAPES = [KVShape(2, WIDTH, 3), KVShape(1, 5, WIDTH)]  # layers may differ, and keys from values


def make(kind: type[KVCache], num_pages: int = SLOTS * BLOCKS) -> KVCache:
    pages = {"num_pages": num_pages} if kind is PagedCache else {}
    return kind(SHAPES, 6, SLOTS, MAX_LEN, torch.float32, CPU, BLOCK_SIZE, **pages)


def pools(cache: KVCache) -> list[torch.Tensor]:
    return [*cache.keys, *cache.values, cache.states]


HEADS_AND_WIDTHS = [(2, WIDTH), (1, 5), (2, 3), (1, WIDTH), (1, 6)]  # of `pools`


class Reference:
    """The same by the definition: a dictionary of positions. Positions that were never written are left open."""

    def __init__(self):
        self.content = [{} for _ in HEADS_AND_WIDTHS]
        self.lengths = [0] * SLOTS  # reserved

    def written(self, pool: int, slot: int) -> int:
        """How many positions from the first on have been written."""
        return next((i for i in range(BLOCKS * BLOCK_SIZE) if (slot, i) not in self.content[pool]), MAX_LEN)

    def read(self, pool: int, slot: int, length: int) -> torch.Tensor:
        return torch.stack([self.content[pool][slot, i] for i in range(length)], dim=1)  # (heads, length, width)


slots = st.integers(0, SLOTS - 1)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), slots, st.integers(1, MAX_LEN)),
        st.tuples(st.just("write"), slots, st.integers(1, 40)),
        st.tuples(st.just("write together"), slots, st.integers(1, 5)),
        st.tuples(st.just("write blocks"), slots, st.integers(1, BLOCKS)),
        st.tuples(st.just("copy"), slots, st.integers(1, MAX_LEN)),
        st.tuples(st.just("release"), slots, st.just(0)),
    ),
    max_size=25,
)


def fill(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def apply(caches: list[KVCache], reference: Reference, action: str, slot: int, number: int, generator) -> None:
    """Do the same to all, where there is room for it."""
    room = reference.lengths[slot]
    if action == "reserve":
        reference.lengths[slot] = max(room, number)
        for cache in caches:
            cache.reserve(slot, number)
    elif action == "release":
        reference.lengths[slot] = 0
        reference.content = [{k: v for k, v in c.items() if k[0] != slot} for c in reference.content]
        for cache in caches:
            cache.release(slot)
    for pool, (heads, width) in enumerate(HEADS_AND_WIDTHS):
        start = reference.written(pool, slot)
        rows = []
        if action == "write":  # the next positions of a slot
            rows = [(slot, start + i) for i in range(min(number, room - start))]
        elif action == "write together":  # the next position of every slot, as decoding does
            rows = [(s, reference.written(pool, s)) for s in range(SLOTS)]
            rows = [(s, i) for s, i in rows if i < reference.lengths[s]]
        if rows:
            values = fill(generator, len(rows), heads, width)
            where = torch.tensor(rows).T
            for cache in caches:
                cache.write(pools(cache)[pool], where[0], where[1], values)
            reference.content[pool] |= dict(zip(rows, values, strict=True))
        if action == "write blocks" and number * BLOCK_SIZE <= room:
            blocks = fill(generator, number, heads, BLOCK_SIZE, width)
            for cache in caches:
                cache.write_blocks(pools(cache)[pool], slot, blocks)
            positions = ((b * BLOCK_SIZE + i, blocks[b, :, i]) for b in range(number) for i in range(BLOCK_SIZE))
            reference.content[pool] |= {(slot, position): value for position, value in positions}
    if action == "copy":
        targets = [s for s in range(SLOTS) if s != slot and reference.lengths[s] >= number]
        if number <= room and all(reference.written(p, slot) >= number for p in range(4)):
            for cache in caches:
                cache.copy(slot, targets, number)
            for pool in range(4):  # keys and values; the states stay where they are
                for target in targets:
                    for i in range(number):
                        reference.content[pool][target, i] = reference.content[pool][slot, i]
                    # It goes by whole blocks: what lay behind in the target's last one is anyone's guess.
                    for i in range(number, BLOCKS * BLOCK_SIZE):
                        reference.content[pool].pop((target, i), None)


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(0, 2**31))
def test_rows_and_pages_hold_what_was_written(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    caches, reference = [make(RowCache), make(PagedCache)], Reference()
    for step in steps:
        apply(caches, reference, *step, generator)
        for pool in range(len(HEADS_AND_WIDTHS)):
            written = [reference.written(pool, slot) for slot in range(SLOTS)]
            wanted = [reference.read(pool, slot, n) if n else None for slot, n in enumerate(written)]
            for cache in caches:
                tensor = pools(cache)[pool]
                for slot, length in enumerate(written):
                    if length:
                        assert torch.equal(cache.read(tensor, slot, length), wanted[slot])
                    if count := length // BLOCK_SIZE:
                        blocks = cache.read_blocks(tensor, slot, count)
                        assert torch.equal(blocks.transpose(0, 1).flatten(1, 2), wanted[slot][:, : count * BLOCK_SIZE])
                used = [slot for slot, length in enumerate(written) if length]
                if used:
                    longest = max(written)
                    rows = cache.rows(tensor, used, longest)
                    shown = range(used[0], used[-1] + 1) if cache.contiguous else used
                    assert rows.shape[0] == len(shown) and rows.shape[2] == longest
                    for row, slot in zip(rows, shown, strict=True):
                        if slot in used:
                            assert torch.equal(row[:, : written[slot]], wanted[slot])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), slots, st.sampled_from([1, 31, 32, 33, MAX_LEN])), max_size=30))
def test_no_page_is_lost_or_shared(steps):
    """Also where there are fewer pages than the slots could use."""
    num_pages = 4
    cache = make(PagedCache, num_pages)
    held = [0] * SLOTS
    for reserve, slot, length in steps:
        if not reserve:
            cache.release(slot)
            held[slot] = 0
        elif sum(held) - held[slot] + (wanted := max(held[slot], -(-length // BLOCK_SIZE))) <= num_pages:
            cache.reserve(slot, length)
            held[slot] = wanted
        pages = [int(cache.table[slot, i]) for slot in range(SLOTS) for i in range(held[slot])]
        assert len(set(pages)) == len(pages)
        assert all(1 <= page <= num_pages for page in pages), "page 0 is nobody's"
        beyond = [cache.table[slot, held[slot] :] for slot in range(SLOTS)]
        assert not torch.cat(beyond).any(), "and nobody sees another's page behind its own"
    for slot in range(SLOTS):
        cache.release(slot)
    cache.reserve(0, MAX_LEN)
    cache.reserve(1, MAX_LEN)  # all four are free again
    assert sorted(cache.table[:2].flatten().tolist()) == [1, 2, 3, 4]


@pytest.mark.parametrize("width", [3, 128], ids=["part of a page of memory", "pages of memory"])
def test_a_released_row_reads_as_zeros_and_its_neighbours_as_before(width):
    cache = RowCache([KVShape(1, width, width)], width, SLOTS, MAX_LEN, torch.float32, CPU, BLOCK_SIZE)
    values = fill(torch.Generator().manual_seed(0), BLOCKS, 1, BLOCK_SIZE, width)
    for pool in pools(cache):
        for slot in range(SLOTS):
            cache.write_blocks(pool, slot, values * torch.nan if slot == 1 else values)
    cache.release(1)
    for pool in pools(cache):
        assert torch.equal(pool[1], torch.zeros_like(pool[1]))
        for slot in (0, 2):
            assert torch.equal(cache.read_blocks(pool, slot, BLOCKS), values)
        cache.write_blocks(pool, 1, values)
        assert torch.equal(cache.read_blocks(pool, 1, BLOCKS), values)


def test_a_row_takes_memory_when_it_is_written_and_gives_it_back():
    shapes, length = [KVShape(4, 64, 64)] * 2, 4096
    cache = RowCache(shapes, 256, 512, length, torch.float32, CPU, BLOCK_SIZE)
    slot_bytes = length * bytes_per_token(shapes, 256, torch.float32)
    assert slot_bytes == 20 * 2**20  # and the cache has 512 of them: 10 GiB of address space
    quarter = torch.ones(length // BLOCK_SIZE // 4, 4, BLOCK_SIZE, 64)
    states = torch.ones(length // BLOCK_SIZE // 4, 1, BLOCK_SIZE, 256)

    def write(slot: int) -> None:
        for pool in (*cache.keys, *cache.values):
            cache.write_blocks(pool, slot, quarter)
        cache.write_blocks(cache.states, slot, states)

    write(511)
    cache.release(511)  # whatever is loaded and allocated once is so now
    before = resident_bytes()
    write(7)
    write(300)
    grown = resident_bytes() - before
    assert slot_bytes / 2 <= grown < slot_bytes / 2 + 2**20, "a quarter of two slots"
    cache.release(7)
    assert resident_bytes() - before - slot_bytes / 4 < 2**20
    cache.release(300)
    assert resident_bytes() - before < 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_bytes_are_counted_as_they_are_allocated():
    cache = make(RowCache)
    per_token = bytes_per_token(SHAPES, 6, torch.float32)
    assert sum(pool.nbytes for pool in pools(cache)) == per_token * SLOTS * BLOCKS * BLOCK_SIZE
