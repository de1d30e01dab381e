"""What every engine promises to the server (`server.engine.base.Engine`), on real events, threads and cancellations."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from server.engine.base import (
    EngineDeadError,
    EngineOverloadedError,
    GenerationError,
    GenerationRequest,
    PromptTooLongError,
    SamplingOptions,
)
from server.engine.native.engine import NativeEngine
from steering.decision import ProfileActivation, SteeringOptions
from tests.tiny import tiny_model, tiny_profile

STEERED = SteeringOptions((ProfileActivation("p", 3.0, gate="open"),))


class Observer:
    """Keeps what the engine tells."""

    def __init__(self):
        self.decisions = []

    def decided(self, decision):
        self.decisions.append(decision)


@contextlib.asynccontextmanager
async def running(**options):
    model = tiny_model("llama")
    options = {"max_num_seqs": 4, "max_model_len": 64} | options
    engine = NativeEngine(model, [tiny_profile(model, 1, name="p", strength=3.0)], **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(name, prompt=(5, 6, 7), *, steering=STEERED, n=1, **sampling):
    return GenerationRequest(
        name, tuple(prompt), SamplingOptions(**{"max_tokens": 6, "temperature": 0.0} | sampling), steering, n
    )


async def collect(engine, asked):
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


async def test_impossible_requests_are_refused_by_name():
    async with running() as engine:
        with pytest.raises(GenerationError, match="9") as refusal:
            await collect(engine, request("n", n=9))
        assert refusal.value.code == "n_too_large"
        unknown = SteeringOptions((ProfileActivation("nobody", 1.0),))
        with pytest.raises(GenerationError, match="nobody"):
            await collect(engine, request("p", steering=unknown))


async def test_stopping_ends_what_runs_and_takes_no_more():
    async with running() as engine:
        task = asyncio.create_task(collect(engine, request("a", max_tokens=55)))
        await asyncio.sleep(0.01)
        await engine.stop()
        with pytest.raises(EngineDeadError):
            await task
        with pytest.raises(EngineDeadError):
            await collect(engine, request("b"))


async def test_an_engine_that_fails_says_so_to_everyone(monkeypatch):
    async with running() as engine:

        def fail(batch):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._core.runner, "step", fail)
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
