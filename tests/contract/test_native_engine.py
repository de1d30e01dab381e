"""What the native engine promises beside the contract: its blocks, its two caches, its steps."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.base import GenerationError
from steering.errors import ProfileError
from tests.contract.asking import Observer, answer, collect, request, until, until_idle
from tests.contract.harness import NativeHarness, decoder
from tests.engine import block_bytes

harness = NativeHarness()


async def test_completions_that_memory_can_never_hold_are_refused_by_name():
    async with harness.running(num_blocks=3) as engine:
        assert engine.info.kv_cache_bytes == 3 * block_bytes(decoder(), steered=True)
        prompt = range(5, 45)  # two blocks each
        with pytest.raises(GenerationError, match="2 completions of 40 prompt tokens") as refusal:
            await collect(engine, request("two", prompt, n=2))
        assert refusal.value.code == "n_too_large"
        assert len(await collect(engine, request("one", prompt))) == 6
        assert len(await collect(engine, request("short", n=3))) == 18


async def test_both_caches_count_what_they_are_asked():
    async with harness.running() as engine:
        await collect(engine, request("a", range(5, 55)))
        assert engine.stats().prefix_cache_hits == (0, 0) and engine.stats().prefix_cache_usage > 0
        await collect(engine, request("b", range(5, 55)))
        stats = engine.stats()
        assert stats.prefix_cache_queries == (100, 100) and stats.prefix_cache_hits[0] == 32


async def test_leaving_in_mid_prefill_stops_the_prefill():
    observer = Observer()
    options = {"max_model_len": 512, "max_batched_tokens": 16}
    async with harness.running(observer=observer, **options) as engine:
        wanted = await answer(engine, request("w", range(5, 100)))
        async with harness.slowed(engine):
            steps = engine._core.step
            taken = []
            engine._core.step = lambda: taken.append(1) or steps()
            leaving = asyncio.create_task(collect(engine, request("long", [7] * 480, n=2)))  # 30 steps of prefill
            await until(lambda: len(taken) >= 3)
            assert engine.stats().num_running == 2 and engine.stats().kv_cache_usage > 0.4
            leaving.cancel()
            stats = await until_idle(engine)
            assert stats.kv_cache_usage == 0 and len(taken) < 20
        assert len(observer.decisions) == 1  # the long one never came to its end
        assert await answer(engine, request("w", range(5, 100))) == wanted


async def test_profiles_are_fixed_unless_it_is_told_otherwise(tmp_path):
    async with harness.running() as engine:
        with pytest.raises(ProfileError, match="profiles are fixed"):
            await engine.load_profile("q", str(tmp_path))
