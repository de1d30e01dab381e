"""Faults injected one by one into the real application and engine: `pytest tests/e2e/reliability/test_faults.py`.

The rule: the requests that the fault touches fail and the others are right, or the server says that it is unhealthy and takes
no more. Never a hang, never an unsteered answer that says steered, never anyone else's tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from server.engine.native import runner as runner_module
from server.engine.native.core import MAX_FAILED_PASSES
from server.grammar.matcher import MatcherState
from steering.intervention import Site
from tests.checkpoint import CALM, FIRING
from tests.serving import Served, chunks, serving

TOKENS = 24
PATIENCE_S = 20
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"enum": ["a", "b"]}}}


@dataclass
class Answer:
    """What one client got: a text and what was said of steering, or an error's status and code."""

    prompt: str
    text: str | None = None
    applied: bool | None = None
    status: int = 200
    code: str | None = None


async def ask(served: Served, prompt: str, *, stream: bool, **fields: Any) -> Answer:
    response = await served.chat(prompt, stream=stream, max_tokens=TOKENS, **fields)
    if response.status_code != 200:
        return Answer(prompt, status=response.status_code, code=response.json()["error"]["code"])
    if not stream:
        body = response.json()
        return Answer(prompt, body["choices"][0]["message"]["content"], body["steering"]["applied"])
    *_, last = [line for line in response.text.splitlines() if line.startswith("data: ")]
    if "[DONE]" not in last:
        return Answer(prompt, code=json.loads(last.removeprefix("data: "))["error"]["code"])
    events = chunks(response.text)
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    return Answer(prompt, text, events[0]["steering"]["applied"])


async def crowd(served: Served) -> list[Answer]:
    """Eight requests at once: steered and not, streamed and whole."""
    asked = [(text, bool(i % 2)) for i, text in enumerate((*FIRING, *CALM))]
    async with asyncio.timeout(PATIENCE_S):
        return list(await asyncio.gather(*(ask(served, text, stream=stream) for text, stream in asked)))


def right(answer: Answer, oracle) -> bool:
    """The tokens are this prompt's own, and what is said of steering is what was done."""
    wanted = oracle.steered(answer.prompt, TOKENS) if answer.applied else oracle.plain(answer.prompt, TOKENS)
    return answer.text == wanted and answer.applied == (answer.prompt in FIRING)


async def idle(served: Served) -> None:
    """Nothing runs, nothing waits, no block is held."""
    async with asyncio.timeout(PATIENCE_S):
        while (stats := served.engine.stats()).num_running or stats.num_waiting or stats.kv_cache_usage:
            await asyncio.sleep(0.005)


async def holds(served: Served, oracle, answers: list[Answer], codes: set[str]) -> list[Answer]:
    """Every answer is right or an error of `codes`, and the server is what it says. Returns those that failed."""
    failed = [answer for answer in answers if answer.text is None]
    for answer in answers:
        assert answer in failed or right(answer, oracle), answer
    assert {answer.code for answer in failed} <= codes
    health = (await served.client.get("/health")).status_code
    assert (await served.client.get("/ready")).status_code == health
    again = await crowd(served)
    if health == 200:
        assert all(right(answer, oracle) for answer in again), again
    else:
        assert {(answer.status, answer.code) for answer in again} == {(503, "engine_unavailable")}
    await idle(served)
    return failed


class Once:
    """A function that fails at its `at`-th call after `arm`, and works otherwise."""

    def __init__(self, function: Callable, fault: Callable[[], BaseException], at: int = 1) -> None:
        self._function, self._fault, self._left = function, fault, at

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._fault()
        return self._function(*args, **options)


def patched(monkeypatch, owner: Any, name: str, fault: Callable[[], BaseException], at: int = 1) -> None:
    """Have a function fail once. A method of a class fails for whichever object is first."""
    once = Once(getattr(owner, name), fault, at)
    monkeypatch.setattr(owner, name, (lambda *a, **k: once(*a, **k)) if isinstance(owner, type) else once)


def defect() -> Exception:
    return RuntimeError("injected")


PASSES: dict[str, Callable[[Any, Served], None]] = {
    "the forward pass, first layers of a prefill": lambda m, s: patched(
        m, s.engine._core.runner.decoder, "run", defect
    ),
    "the forward pass, last layers of a prefill": lambda m, s: patched(
        m, s.engine._core.runner.decoder, "finish", defect
    ),
    "the forward pass, in mid-generation": lambda m, s: patched(m, s.engine._core.runner, "_decode_pass", defect, 5),
    "the head": lambda m, s: patched(m, s.engine._core.runner.decoder, "logits", defect, 4),
    "the sampler, first token": lambda m, s: patched(m, runner_module, "sample", defect),
    "the sampler, later": lambda m, s: patched(m, runner_module, "sample", defect, 6),
    "the gate": lambda m, s: patched(m, Site, "read", defect),
    "the vector's place in the table": lambda m, s: patched(m, Site, "hold", defect, 2),
    "memory for a write to the pool": lambda m, s: patched(
        m, s.engine._core.runner.cache, "write", lambda: torch.OutOfMemoryError("CUDA out of memory"), 3
    ),
    "memory for the sampler": lambda m, s: patched(m, runner_module, "sample", lambda: MemoryError(), 3),
    "the prefix cache, reading": lambda m, s: patched(m, s.engine._core.runner.prefix_cache, "load", defect),
}


@pytest.mark.parametrize("fault", PASSES)
async def test_a_pass_that_fails_ends_its_own_requests_alone(artifacts, oracle, monkeypatch, fault):
    async with serving(artifacts) as served:
        assert all(right(answer, oracle) for answer in await crowd(served))
        served.engine._core.runner.forget()
        PASSES[fault](monkeypatch, served)
        failed = await holds(served, oracle, await crowd(served), {"pass_failed"})
        assert failed, "the fault was not met"
        assert served.engine.failure is None


@pytest.mark.parametrize("forgets", [True, False])
async def test_a_prefix_cache_that_was_half_written_is_dropped(artifacts, oracle, monkeypatch, forgets):
    """The blocks are entered, and then the copy fails: whoever came next with the same prompt would get what is not there.
    Without the dropping they do."""
    prompt = "Tell me, in as many words as you can find, how a car works and how one bakes bread in it, and why. " * 2
    async with serving(artifacts) as served:
        runner = served.engine._core.runner
        patched(monkeypatch, runner.cache, "read_blocks", defect)
        if not forgets:
            monkeypatch.setattr(runner, "forget", lambda: None)
            with torch.inference_mode():
                for store in (store for stores in runner.prefix_cache._stores for store in stores):
                    store.zero_()
        first = await ask(served, prompt, stream=False, steer_profiles=[])
        assert first.code == "pass_failed"
        second = await ask(served, prompt, stream=False, steer_profiles=[])
        assert (second.text == oracle.plain(prompt, TOKENS)) == forgets


async def test_who_is_not_in_the_pass_goes_on(artifacts, oracle, monkeypatch):
    """A newcomer's prefill fails while another generates."""
    async with serving(artifacts) as served:
        running = asyncio.create_task(ask(served, FIRING[0], stream=True))
        async with asyncio.timeout(PATIENCE_S):
            while not served.engine.stats().num_running:
                await asyncio.sleep(0.001)
        patched(monkeypatch, served.engine._core.runner.decoder, "finish", defect)
        newcomer = await ask(served, CALM[0], stream=False)
        assert (newcomer.status, newcomer.code) == (500, "pass_failed")
        assert right(await running, oracle)


DEATHS: dict[str, Callable[[Any, Served], None]] = {
    "the thread ends": lambda m, s: patched(m, s.engine._core, "step", lambda: SystemExit(3), 3),
    "the scheduler": lambda m, s: patched(m, s.engine._core.scheduler, "chunks", defect, 3),
    "memory for a row": lambda m, s: patched(m, s.engine._core.scheduler, "_reserve", lambda: MemoryError(), 2),
    "the state is not sound": lambda m, s: (
        patched(m, runner_module, "sample", defect),
        m.setattr(s.engine._core, "still_sound", lambda: False),
    ),
}


@pytest.mark.parametrize("fault", DEATHS)
async def test_an_engine_that_cannot_go_on_says_so(artifacts, oracle, monkeypatch, fault):
    async with serving(artifacts) as served:
        DEATHS[fault](monkeypatch, served)
        failed = await holds(served, oracle, await crowd(served), {"engine_unavailable", "pass_failed"})
        assert failed and served.engine.failure is not None
        assert "restarted" in (await served.client.get("/health")).json()["error"]["message"]


async def test_passes_that_only_fail_end_the_engine(artifacts, oracle, monkeypatch):
    """A fault that stays must not make a server that is healthy and fails everyone."""
    async with serving(artifacts) as served:
        calls = 0

        def always(*_: Any) -> None:
            nonlocal calls
            calls += 1
            raise RuntimeError("injected")

        monkeypatch.setattr(served.engine._core.runner, "_decode_pass", always)
        for _ in range(MAX_FAILED_PASSES - 1):
            assert (await ask(served, CALM[0], stream=False)).code == "pass_failed"
            assert served.engine.failure is None
        assert (await ask(served, CALM[0], stream=False)).code in ("pass_failed", "engine_unavailable")
        await holds(served, oracle, [], set())
        assert served.engine.failure is not None and calls == MAX_FAILED_PASSES


async def test_a_decoder_that_computes_something_else_is_noticed(artifacts, oracle, monkeypatch):
    """A pass fails and the weights have changed with it: the probe must see it."""
    async with serving(artifacts) as served:
        patched(monkeypatch, runner_module, "sample", defect)
        decoder = served.engine._core.runner.decoder
        embed = decoder.embed
        monkeypatch.setattr(decoder, "embed", lambda ids: embed(ids) * 1.5)
        await holds(served, oracle, [await ask(served, CALM[0], stream=False)], {"engine_unavailable", "pass_failed"})
        assert served.engine.failure is not None


@pytest.mark.parametrize("method", ["mask", "accept"])
async def test_a_grammar_that_fails_ends_one_request(artifacts, oracle, monkeypatch, method):
    async with serving(artifacts) as served:
        patched(monkeypatch, MatcherState, method, lambda: ValueError("injected"), 2 if method == "mask" else 1)
        constrained = served.chat(CALM[0], response_format=SCHEMA)
        response, others = await asyncio.gather(constrained, crowd(served))
        assert (response.status_code, response.json()["error"]["code"]) == (500, "grammar_failed")
        assert not await holds(served, oracle, others, set())
        assert json.loads(
            (await served.chat(CALM[0], response_format=SCHEMA)).json()["choices"][0]["message"]["content"]
        )


async def test_nan_logits_end_one_request(artifacts, oracle, monkeypatch):
    async with serving(artifacts) as served:
        decoder = served.engine._core.runner.decoder
        logits, left = decoder.logits, 6

        def spoilt(states: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            found = logits(states)
            if left == 0:
                found = found.clone()
                found[0, 7] = torch.nan
            return found

        monkeypatch.setattr(decoder, "logits", spoilt)
        failed = await holds(served, oracle, await crowd(served), {"non_finite_logits"})
        assert len(failed) == 1


async def test_nan_in_a_vector_never_answers_unsteered(artifacts, oracle, monkeypatch):
    """A profile's tensors go bad in memory: whom it should steer fails, whom its gate leaves alone is right."""
    async with serving(artifacts) as served:
        [site] = served.engine._core.runner.sites
        [profile] = site.profiles
        with torch.no_grad():
            profile.experts.prototypes.fill_(torch.nan)
        answers = await crowd(served)
        by_prompt = {answer.prompt: answer for answer in answers}
        assert {by_prompt[text].code for text in FIRING} == {"steering_non_finite"}
        for text in CALM:
            assert by_prompt[text].code == "steering_non_finite" or right(by_prompt[text], oracle)
        off = await ask(served, FIRING[0], stream=False, steer_profiles=[])
        assert (off.applied, off.text) == (False, oracle.plain(FIRING[0], TOKENS))
        assert (await served.client.get("/health")).status_code == 200
        await idle(served)


@pytest.mark.parametrize("jump_s", [-3e8, 3e8])
async def test_the_wall_clock_jumps(artifacts, oracle, monkeypatch, jump_s):
    async with serving(artifacts) as served:
        now = time.time
        before = asyncio.create_task(crowd(served))
        await asyncio.sleep(0.01)
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        assert not await holds(served, oracle, await before, set())
        created = (await served.chat(CALM[0])).json()["created"]
        assert abs(created - (now() + jump_s)) < 5


async def test_the_monotonic_clock_jumps_ahead(artifacts, oracle, monkeypatch):
    """As after a suspended machine: deadlines are over, the requests fail, the next ones do not."""
    async with serving(artifacts, request_timeout_s=60.0) as served:
        step, now = served.engine._core.step, time.monotonic

        def slow() -> Any:
            time.sleep(0.02)
            return step()

        monkeypatch.setattr(served.engine._core, "step", slow)
        before = [asyncio.create_task(ask(served, text, stream=bool(i))) for i, text in enumerate(FIRING[:2])]
        await asyncio.sleep(0.1)
        monkeypatch.setattr(time, "monotonic", lambda: now() + 1e4)
        answers = await asyncio.gather(*before)
        assert [(answer.status, answer.code) for answer in answers] == [
            (504, "request_timeout"),
            (200, "request_timeout"),
        ]
        monkeypatch.setattr(served.engine._core, "step", step)
        await holds(served, oracle, [], set())
