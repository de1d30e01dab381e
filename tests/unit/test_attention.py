"""Decoding rows of very different lengths: cut into runs, and the same numbers as all at once."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.native import attention
from server.engine.native.attention import CALL_POSITIONS, DecodeStep, Scores, _runs
from server.engine.native.kv_cache import KVShape, RowCache

lengths_of = st.lists(st.integers(1, 4000), min_size=1, max_size=10)


def cost(slots, lengths, runs):
    return sum(CALL_POSITIONS + max(lengths[b:e]) * (slots[e - 1] - slots[b] + 1) for b, e in runs)


@settings(max_examples=200, deadline=None)
@given(lengths_of, st.integers(0, 2**16))
def test_runs_are_the_cheapest_cuts_of_all_rows(lengths, seed):
    gaps = [1 + (seed >> i) % 3 for i in range(len(lengths))]
    slots = list(itertools.accumulate(gaps))
    runs = _runs(slots, lengths)
    assert [b for b, _ in runs] == [0, *(e for _, e in runs[:-1])] and runs[-1][1] == len(lengths)
    if len(runs) > 1 or max(lengths) >= 2 * min(lengths) + CALL_POSITIONS:
        inner = range(1, len(lengths))
        every = (c for n in range(len(lengths)) for c in itertools.combinations(inner, n))
        ends = ([*zip((0, *c), (*c, len(lengths)), strict=True)] for c in every)
        assert cost(slots, lengths, runs) == min(cost(slots, lengths, e) for e in ends)


def test_rows_of_one_length_attend_together():
    assert _runs([0, 1, 2, 3], [130, 190, 128, 200]) == [(0, 4)]


def test_a_long_row_does_not_make_its_neighbours_long(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    cache = RowCache([KVShape(2, 8, 8)], 0, 6, 1024, torch.float32, torch.device("cpu"), 32)
    for pool in (cache.keys[0], cache.values[0]):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    slots, lengths = [0, 1, 2, 4, 5], [40, 1000, 33, 57, 900]
    query, key, value = (torch.randn(5, heads, 8, generator=generator) for heads in (4, 2, 2))
    step = DecodeStep(cache, slots, lengths)
    assert len(step._runs) > 1
    found = step.attend(0, query, key, value, Scores(0.3))
    monkeypatch.setattr(attention, "_runs", lambda slots, lengths: [(0, len(slots))])
    together = DecodeStep(cache, slots, lengths)
    assert len(together._runs) == 1
    assert torch.allclose(found, together.attend(0, query, key, value, Scores(0.3)), atol=1e-5)
