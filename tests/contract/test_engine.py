"""What every engine promises to the server (`server.engine.base.Engine`), on real events, threads and cancellations."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from server.engine.base import (
    EngineDeadError,
    EngineOverloadedError,
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    PromptTooLongError,
    SamplingOptions,
)
from server.engine.native.build import EngineOptions
from server.engine.native.engine import NativeEngine
from steering.decision import ProfileActivation, SteeringOptions
from tests.engine import block_bytes, reference_model, tiny_decoder
from tests.tiny import tiny_profile

STEERED = SteeringOptions((ProfileActivation("p", 3.0, gate="open"),))


class Observer:
    """Keeps what the engine tells."""

    def __init__(self):
        self.decisions = []

    def decided(self, decision):
        self.decisions.append(decision)


@contextlib.asynccontextmanager
async def running(*, observer=None, **options):
    model = reference_model()
    engine = NativeEngine(
        tiny_decoder(),
        model,
        [tiny_profile(model, 1, name="p", strength=3.0)],
        EngineOptions(**{"max_num_seqs": 4, "max_model_len": 64} | options),
        observer=observer,
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def slowed(monkeypatch, engine):
    """Each step takes 10 ms more, so that on a busy machine, too, nothing ends before a test has looked at it."""
    step = engine._core.step

    def slow():
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(engine._core, "step", slow)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def request(name, prompt=(5, 6, 7), *, steering=STEERED, n=1, priority=0, **sampling):
    options = SamplingOptions(**{"max_tokens": 6, "temperature": 0.0} | sampling)
    return GenerationRequest(name, tuple(prompt), options, steering, n, priority)


async def collect(engine, asked):
    async with asyncio.timeout(20):
        return [event async for event in engine.generate(asked)]


async def until_idle(engine):
    async with asyncio.timeout(10):
        while (stats := engine.stats()).num_running or stats.num_waiting:
            await asyncio.sleep(0.005)
    return stats


async def test_the_first_event_and_only_it_carries_the_decision_and_the_last_the_reason():
    async with running() as engine:
        events = await collect(engine, request("a", n=2))
        assert [e.decision is not None for e in events] == [True] + [False] * 11
        for index in range(2):
            own = [e for e in events if e.index == index]
            assert [e.finish_reason for e in own] == [None] * 5 + ["length"]


async def test_a_stop_token_ends_and_is_delivered():
    async with running() as engine:
        plain = [e.token_id for e in await collect(engine, request("a"))]
        stopped = await collect(engine, request("b", stop_token_ids=frozenset({plain[2]})))
        first = plain.index(plain[2])
        assert [e.token_id for e in stopped] == plain[: first + 1]
        assert stopped[-1].finish_reason == "stop"
        kept = await collect(engine, request("c", stop_token_ids=frozenset({plain[2]}), min_tokens=6))
        assert len(kept) == 6 and plain[2] not in [e.token_id for e in kept]


async def test_the_context_bounds_the_answer():
    async with running(max_model_len=10) as engine:
        events = await collect(engine, request("a", max_tokens=500))
        assert len(events) == 7 and events[-1].finish_reason == "length"
        with pytest.raises(PromptTooLongError, match="10"):
            await collect(engine, request("b", range(10)))


async def test_closing_the_iterator_frees_the_rows_and_leaves_the_others_right():
    async with running() as engine:
        wanted = [e.token_id for e in await collect(engine, request("w", max_tokens=40))]
        leaving = engine.generate(request("a", n=2, max_tokens=50))
        async for _ in leaving:
            break
        other = asyncio.create_task(collect(engine, request("b", max_tokens=40)))
        await leaving.aclose()
        assert [e.token_id for e in await other] == wanted
        assert (await until_idle(engine)).kv_cache_usage == 0


async def test_a_cancelled_reader_aborts_even_while_it_waits_for_a_row():
    async with running(max_num_seqs=1) as engine:
        long = asyncio.create_task(collect(engine, request("a", max_tokens=60)))
        await asyncio.sleep(0)
        queued = asyncio.create_task(collect(engine, request("b")))
        await asyncio.sleep(0.01)
        queued.cancel()
        assert len(await long) == 60
        await until_idle(engine)


async def test_more_requests_than_rows_all_end_and_each_decision_is_observed_once():
    observer = Observer()
    async with running(observer=observer) as engine:
        answers = await asyncio.gather(*(collect(engine, request(str(i), (i + 1, 2, 3))) for i in range(20)))
        assert all(len(a) == 6 for a in answers)
        assert len(observer.decisions) == 20
        await engine.score(request("s"))
        assert len(observer.decisions) == 20  # scoring is no traffic


async def test_a_full_queue_refuses():
    async with running(max_num_seqs=1, max_waiting=1) as engine:
        tasks = [asyncio.create_task(collect(engine, request(str(i), max_tokens=60))) for i in range(8)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, EngineOverloadedError)]
        assert refused and len(refused) + sum(isinstance(r, list) for r in results) == 8
        assert len(await collect(engine, request("later"))) == 6


async def test_a_full_queue_refuses_at_once_though_a_step_is_long(monkeypatch):
    """What has not reached the scheduler yet counts, too: in a long step nothing else would bound it."""
    async with running(max_num_seqs=1, max_waiting=2) as engine:
        begun, released = threading.Event(), threading.Event()
        step = engine._core.step

        def held():
            begun.set()
            released.wait(20)
            return step()

        monkeypatch.setattr(engine._core, "step", held)
        tasks = [asyncio.create_task(collect(engine, request("first")))]
        await until(begun.is_set)
        tasks += [asyncio.create_task(collect(engine, request(str(i)))) for i in range(39)]
        try:
            await until(lambda: sum(task.done() for task in tasks) >= 36)
            assert all(isinstance(task.exception(), EngineOverloadedError) for task in tasks if task.done())
        finally:
            released.set()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_impossible_requests_are_refused_by_name():
    async with running() as engine:
        with pytest.raises(GenerationError, match="9") as refusal:
            await collect(engine, request("n", n=9))
        assert refusal.value.code == "n_too_large"
        unknown = SteeringOptions((ProfileActivation("nobody", 1.0),))
        with pytest.raises(GenerationError, match="nobody"):
            await collect(engine, request("p", steering=unknown))


async def test_completions_that_memory_can_never_hold_are_refused_by_name():
    blocks = 3
    async with running(kv_cache_bytes=blocks * block_bytes(tiny_decoder(), steered=True)) as engine:
        assert engine.info.kv_cache_bytes == blocks * block_bytes(tiny_decoder(), steered=True)
        prompt = range(5, 45)  # two blocks each
        with pytest.raises(GenerationError, match="2 completions of 40 prompt tokens") as refusal:
            await collect(engine, request("two", prompt, n=2))
        assert refusal.value.code == "n_too_large"
        assert len(await collect(engine, request("one", prompt))) == 6
        assert len(await collect(engine, request("short", n=3))) == 18


async def test_a_lower_priority_number_overtakes_the_queue(monkeypatch):
    async with running(max_num_seqs=1) as engine:
        slowed(monkeypatch, engine)
        ended = []

        async def run(name, priority):
            await collect(engine, request(name, priority=priority))
            ended.append(name)

        tasks = [asyncio.create_task(run("running", 0))]
        await until(lambda: engine.stats().num_running == 1)
        tasks += [asyncio.create_task(run(*ask)) for ask in (("a", 0), ("late", 1), ("b", 0), ("urgent", -1))]
        await until(lambda: engine.stats().num_waiting == 4)
        await asyncio.gather(*tasks)
        assert ended == ["running", "urgent", "a", "b", "late"]


async def test_leaving_in_mid_prefill_frees_everything(monkeypatch):
    observer = Observer()
    options = {"max_model_len": 512, "max_batched_tokens": 16, "prefix_cache_bytes": 0}
    async with running(observer=observer, **options) as engine:
        wanted = [e.token_id for e in await collect(engine, request("w", range(5, 100)))]
        slowed(monkeypatch, engine)
        steps = engine._core.step
        taken = []
        monkeypatch.setattr(engine._core, "step", lambda: taken.append(1) or steps())
        leaving = asyncio.create_task(collect(engine, request("long", [7] * 480, n=2)))  # 30 steps of prefill
        await until(lambda: len(taken) >= 3)
        assert engine.stats().num_running == 2 and engine.stats().kv_cache_usage > 0.4
        leaving.cancel()
        stats = await until_idle(engine)
        assert stats.kv_cache_usage == 0 and len(taken) < 20
        assert len(observer.decisions) == 1  # the long one never came to its end
        assert [e.token_id for e in await collect(engine, request("w", range(5, 100)))] == wanted


async def test_a_prompt_that_is_asked_again_is_found_in_the_cache():
    async with running() as engine:
        first = await collect(engine, request("a", range(5, 55)))
        assert engine.stats().prefix_cache_hits == (0, 0) and engine.stats().prefix_cache_usage > 0
        second = await collect(engine, request("b", range(5, 55)))
        assert [e.token_id for e in second] == [e.token_id for e in first]
        stats = engine.stats()
        assert stats.prefix_cache_queries == (100, 100) and stats.prefix_cache_hits[0] == 32


async def test_stopping_ends_what_runs_and_takes_no_more():
    async with running() as engine:
        task = asyncio.create_task(collect(engine, request("a", max_tokens=55)))
        await asyncio.sleep(0.01)
        await engine.stop()
        with pytest.raises(EngineStoppedError):
            await task
        with pytest.raises(EngineStoppedError):
            await collect(engine, request("b"))


async def test_an_engine_that_fails_says_so_to_everyone(monkeypatch):
    async with running() as engine:

        def fail():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._core, "step", fail)
        with pytest.raises(EngineDeadError, match="out of memory"):
            await collect(engine, request("a"))
        assert "out of memory" in engine.failure


async def test_sampling_options_act():
    async with running() as engine:
        greedy = [e.token_id for e in await collect(engine, request("a"))]
        banned = await collect(engine, request("b", logit_bias={greedy[0]: -100.0}))
        assert greedy[0] not in [e.token_id for e in banned]
        first = await collect(engine, request("c", temperature=1.0, top_k=1))
        assert [e.token_id for e in first] == greedy
        repeated = await collect(engine, request("d", max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0))
        plain = await collect(engine, request("e", max_tokens=20))
        assert len({e.token_id for e in repeated}) > len({e.token_id for e in plain})
        scored = await collect(engine, request("f", logprobs=3))
        assert all(len(e.logprobs.top) == 3 and e.logprobs.top[0] == (e.token_id, e.logprobs.logprob) for e in scored)
