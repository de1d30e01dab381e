"""What every engine promises to the server (`server.engine.base.Engine`): how requests begin, go on and end. On real events,
threads, processes and cancellations."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.engine.base import (
    EngineDeadError,
    EngineOverloadedError,
    EngineStoppedError,
    GenerationError,
    PromptTooLongError,
)
from steering.decision import SteeringOptions
from tests.contract.asking import Observer, activation, answer, collect, request, tokens, until, until_idle
from tests.contract.harness import BLOCK_SIZE, model

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_it_says_what_it_serves(harness):
    async with harness.running(max_num_seqs=3, max_model_len=48) as engine:
        info, config = engine.info, model().config
        assert (info.max_num_seqs, info.max_model_len) == (3, 48)
        assert (info.vocab_size, info.hidden_size, info.num_layers) == (
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
        )
        assert (info.engine, info.dtype, info.device) == (harness.kind, "float32", "cpu")
        assert list(engine.profiles) == ["p"] and engine.failure is None


async def test_the_first_event_and_only_it_carries_the_decision_and_the_last_the_reason(engine):
    events = await collect(engine, request("a", n=2))
    assert [e.decision is not None for e in events] == [True] + [False] * 11
    for index in range(2):
        own = [e for e in events if e.index == index]
        assert [e.finish_reason for e in own] == [None] * 5 + ["length"]


async def test_a_single_token_is_first_and_last(engine):
    [event] = await collect(engine, request("a", max_tokens=1))
    assert event.decision is not None and event.finish_reason == "length"


async def test_completions_come_interleaved(engine):
    """Nobody waits for one completion to end before the next begins."""
    order = [e.index for e in await collect(engine, request("a", n=3, max_tokens=12))]
    last_first_token = max(order.index(index) for index in range(3))
    first_last_token = min(len(order) - 1 - order[::-1].index(index) for index in range(3))
    assert last_first_token < first_last_token


async def test_a_stop_token_ends_and_is_delivered(engine):
    plain = await answer(engine, request("a"))
    stopped = await collect(engine, request("b", stop_token_ids=frozenset({plain[2]})))
    first = plain.index(plain[2])
    assert tokens(stopped) == plain[: first + 1]
    assert stopped[-1].finish_reason == "stop"
    kept = await answer(engine, request("c", stop_token_ids=frozenset({plain[2]}), min_tokens=6))
    assert len(kept) == 6 and plain[2] not in kept


async def test_the_context_bounds_the_answer(harness):
    async with harness.running(max_model_len=10) as engine:
        events = await collect(engine, request("a", max_tokens=500))
        assert len(events) == 7 and events[-1].finish_reason == "length"
        with pytest.raises(PromptTooLongError, match="10"):
            await collect(engine, request("b", range(10)))
        with pytest.raises(PromptTooLongError, match="10"):
            await engine.score(request("b", range(10)))
        [only] = await collect(engine, request("c", range(9), max_tokens=500))
        assert only.finish_reason == "length"


async def test_closing_the_iterator_frees_the_rows_and_leaves_the_others_right(harness):
    observer = Observer()
    async with harness.running(observer=observer) as engine:
        wanted = await answer(engine, request("w", max_tokens=40))
        leaving = engine.generate(request("a", n=2, max_tokens=50))
        async for _ in leaving:
            break
        other = asyncio.create_task(answer(engine, request("b", max_tokens=40)))
        await leaving.aclose()
        assert await other == wanted
        assert (await until_idle(engine)).kv_cache_usage == 0
        assert len(observer.decisions) == 3  # of the one that left, too


async def test_a_cancelled_reader_aborts_even_while_it_waits_for_a_row(harness):
    async with harness.running(max_num_seqs=1) as engine:
        async with harness.slowed(engine):
            long = asyncio.create_task(collect(engine, request("a", max_tokens=60)))
            await until(lambda: engine.stats().num_running == 1)
            queued = asyncio.create_task(collect(engine, request("b")))
            await until(lambda: engine.stats().num_waiting == 1)
            queued.cancel()
            await until(lambda: engine.stats().num_waiting == 0)
            assert not long.done()
        assert len(await long) == 60
        await until_idle(engine)


async def test_more_requests_than_rows_all_end_and_each_decision_is_observed_once(harness):
    observer = Observer()
    async with harness.running(observer=observer) as engine:
        answers = await asyncio.gather(*(collect(engine, request(str(i), (i + 1, 2, 3))) for i in range(20)))
        assert all(len(a) == 6 for a in answers)
        assert len(observer.decisions) == 20
        await engine.score(request("s"))
        assert len(observer.decisions) == 20  # scoring is no traffic


async def test_a_full_queue_refuses(harness):
    async with harness.running(max_num_seqs=1, max_waiting=1) as engine:
        tasks = [asyncio.create_task(collect(engine, request(str(i), max_tokens=60))) for i in range(8)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, EngineOverloadedError)]
        assert refused and len(refused) + sum(isinstance(r, list) for r in results) == 8
        assert len(await collect(engine, request("later"))) == 6


async def test_a_full_queue_refuses_at_once_though_a_step_is_long(harness):
    """What has not reached the scheduler yet counts, too: in a long step nothing else would bound it."""
    async with harness.running(max_num_seqs=1, max_waiting=2) as engine:
        tasks = [asyncio.create_task(collect(engine, request("first")))]
        async with harness.held(engine):
            tasks += [asyncio.create_task(collect(engine, request(str(i)))) for i in range(39)]
            await until(lambda: sum(task.done() for task in tasks) >= 36)
            assert all(isinstance(task.exception(), EngineOverloadedError) for task in tasks if task.done())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(results[0]) == 6, "the first was taken"


async def test_impossible_requests_are_refused_by_name(engine):
    for refused in (collect(engine, request("n", n=9)), engine.score(request("n", n=9))):
        with pytest.raises(GenerationError, match="9") as refusal:
            await refused
        assert refusal.value.code == "n_too_large"
    unknown = SteeringOptions((activation("nobody", 1.0),))
    for refused in (collect(engine, request("p", steering=unknown)), engine.score(request("p", steering=unknown))):
        with pytest.raises(GenerationError, match="nobody") as refusal:
            await refused
        assert refusal.value.code == "profile_not_found"


async def test_completions_that_memory_can_hardly_hold_end_or_are_refused_by_name(harness):
    """Nobody waits for ever: not for memory that there is not, nor for what he holds himself."""
    async with harness.running(num_blocks=4) as engine:
        prompt = range(5, 45)  # two blocks each
        asks = [request(str(n), prompt, n=n) for n in (1, 2, 3)] + [request("short", n=3)]
        results = await asyncio.gather(*(collect(engine, ask) for ask in asks), return_exceptions=True)
        for ask, found in zip(asks, results, strict=True):
            if isinstance(found, GenerationError):
                assert found.code == "n_too_large" and ask.n > 1
            else:
                assert len(found) == 6 * ask.n
        assert len(results[0]) == 6 and len(results[-1]) == 18
        assert (await until_idle(engine)).kv_cache_usage == 0


async def test_a_lower_priority_number_overtakes_the_queue(harness):
    async with harness.running(max_num_seqs=1) as engine, harness.slowed(engine):
        ended = []

        async def run(name, priority):
            await collect(engine, request(name, priority=priority))
            ended.append(name)

        running = engine.generate(request("running", max_tokens=40))
        await anext(running)
        tasks = [asyncio.create_task(run(*ask)) for ask in (("a", 0), ("late", 1), ("b", 0), ("urgent", -1))]
        await until(lambda: engine.stats().num_waiting == 4)
        assert len([e async for e in running]) == 39
        await asyncio.gather(*tasks)
        assert ended == ["urgent", "a", "b", "late"]


async def test_leaving_in_mid_prefill_frees_everything(harness):
    async with harness.running(max_model_len=512, max_batched_tokens=16, num_blocks=18) as engine:
        wanted = await answer(engine, request("w", range(5, 100)))
        async with harness.slowed(engine):
            leaving = asyncio.create_task(collect(engine, request("long", [7] * 480)))  # 30 steps of prefill
            await until(lambda: engine.stats().num_running == 1 and engine.stats().kv_cache_usage > 0.1)
            assert not leaving.done()
            leaving.cancel()
            assert (await until_idle(engine)).kv_cache_usage == 0
        assert len(await answer(engine, request("all of the memory", [8] * 500, max_tokens=12))) == 12
        assert await answer(engine, request("w", range(5, 100))) == wanted


async def test_a_request_says_how_long_it_waited_for_a_row(harness):
    async with harness.running(max_num_seqs=1) as engine, harness.slowed(engine):
        begun = time.monotonic()
        first = asyncio.create_task(collect(engine, request("first", max_tokens=30)))
        await until(lambda: engine.stats().num_running == 1)
        asked = time.monotonic()
        stream = engine.generate(request("second"))
        event = await anext(stream)
        arrived = time.monotonic()
        rest = [e async for e in stream]
        events = await first
        assert all(e.queue_s == 0 for e in [*rest, *events[1:]])
        assert 0 <= events[0].queue_s <= asked - begun
        # The first had 30 steps to go and the second one or two: nearly all of its time was waiting.
        assert (arrived - asked) / 2 < event.queue_s <= arrived - asked


async def test_stats_count_completions_that_run_and_requests_that_wait(harness):
    async with harness.running(max_num_seqs=2) as engine:
        assert (engine.stats().num_running, engine.stats().num_waiting, engine.stats().kv_cache_usage) == (0, 0, 0)
        async with harness.slowed(engine):
            tasks = [asyncio.create_task(collect(engine, request("a", n=2, max_tokens=60)))]
            await until(lambda: engine.stats().num_running == 2)
            tasks += [asyncio.create_task(collect(engine, request(str(i)))) for i in range(3)]
            await until(lambda: engine.stats().num_waiting == 3)
            assert 0 < engine.stats().kv_cache_usage <= 1
            for task in tasks:
                task.cancel()
        await until_idle(engine)


async def test_a_prompt_that_is_asked_again_is_found_in_the_cache(harness):
    async with harness.running() as engine:
        first = await collect(engine, request("a", range(5, 55)))
        assert engine.stats().prefix_cache_hits == (0, 0) and first[0].num_cached_tokens == 0
        second = await collect(engine, request("b", range(5, 55)))
        assert tokens(second) == tokens(first)
        assert [e.num_cached_tokens for e in second] == [BLOCK_SIZE, 0, 0, 0, 0, 0]
        stats = engine.stats()
        assert stats.prefix_cache_hits[0] >= BLOCK_SIZE and stats.prefix_cache_hits[1] >= BLOCK_SIZE
        assert all(h <= q for h, q in zip(stats.prefix_cache_hits, stats.prefix_cache_queries, strict=True))
        other = await collect(engine, request("c", [7, *range(6, 55)]))
        assert other[0].num_cached_tokens == 0, "another beginning is another prompt"


async def test_what_one_owner_asked_another_does_not_find(harness):
    async with harness.running() as engine:
        prompt = range(5, 55)
        wanted = await answer(engine, request("a", prompt, owner="alice"))
        for owner, found in (("bob", 0), ("", 0), ("alice", BLOCK_SIZE), ("bob", BLOCK_SIZE), ("", BLOCK_SIZE)):
            events = await collect(engine, request(f"of {owner}", prompt, owner=owner))
            assert (events[0].num_cached_tokens, tokens(events)) == (found, wanted), owner
            assert found or events[0].decision.compute_ms > 0, "nor what was decided"


async def test_stopping_ends_what_runs_and_takes_no_more(harness):
    async with harness.running() as engine:
        async with harness.slowed(engine):
            task = asyncio.create_task(collect(engine, request("a", max_tokens=55)))
            await until(lambda: engine.stats().num_running == 1)
        await engine.stop()
        with pytest.raises(EngineStoppedError):
            await task
        with pytest.raises(EngineStoppedError):
            await collect(engine, request("b"))
        with pytest.raises(EngineStoppedError):
            await engine.score(request("b"))
        await engine.stop()


async def test_an_engine_that_fails_says_so_to_everyone(harness):
    async with harness.running() as engine:
        async with harness.slowed(engine):
            under_way = asyncio.create_task(collect(engine, request("a", max_tokens=55)))
            await until(lambda: engine.stats().num_running == 1)
            said = harness.break_down(engine)
            with pytest.raises(EngineDeadError, match=said) as ended:
                await under_way
            assert not isinstance(ended.value, EngineStoppedError), "nobody stopped it"
        await until(lambda: engine.failure is not None)
        with pytest.raises(EngineDeadError, match=said):
            await collect(engine, request("b"))
        assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)
