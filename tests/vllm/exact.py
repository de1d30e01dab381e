"""Engines over vLLM, prompts and requests for them, and what must come out: `tests.parity.oracle` computes it alone, whole, in two
passes, by transformers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from server.engine.base import Engine, GenerationRequest
from steering.decision import ProfileActivation
from steering.profile import SteeringProfile
from tests.engine import Answer, asked
from tests.parity.oracle import two_pass
from tests.running_vllm import BLOCK_SIZE, running_vllm, vllm_model
from tests.tiny import PROFILES, constant_profile, tiny_profile

NUM_TOKENS = 4
TOLERANCE = 1e-4
NUM_COMMON = 70  # tokens that a test's prompts begin with: two blocks and a bit
SHARED = NUM_COMMON // BLOCK_SIZE * BLOCK_SIZE
PATIENCE_S = 60  # a defect must fail, not hang
OWN, OWN_LAST = (ProfileActivation("own", 3.0, gate="open", positions=where) for where in ("all", "last"))
SAME, SAME_LAST = (ProfileActivation("same", 3.0, gate="open", positions=where) for where in ("all", "last"))
SHUT = ProfileActivation("own", 3.0, gate="closed")
ASK = ProfileActivation("own", 3.0)
SHADOW = ProfileActivation("own", 3.0, gate="open", shadow=True)
NOTHING = ProfileActivation("own", 0.0, gate="open")
KINDS = ("orthogonal_residual", "alphasteer", "cast", "layered")  # beside `own` (standard) and `same` (constant)
NAMES = ("own", "same", "own2", "own3", "equal2", *KINDS)

COMPILED = (f"--block-size={BLOCK_SIZE}",)
CONFIGURATIONS = {
    "whole prompts": {"max_batched_tokens": 1024},
    "chunks": {"max_batched_tokens": 32},
    "compiled": {"max_batched_tokens": 32, "flags": COMPILED},
    "two ranks": {"max_batched_tokens": 32, "tensor_parallel_size": 2},
    "two ranks, compiled": {"max_batched_tokens": 64, "tensor_parallel_size": 2, "flags": COMPILED},
}


def profile_of(name: str, family: str = "llama") -> SteeringProfile:
    """The same at each call. `own…`: a vector for each prompt; `same…`: one vector; `equal…`: that of `same`, whatever the layer; or a kind's name.

    A number at the end is the layer, 1 if there is none.
    """
    return _profile(name, family)


@functools.cache
def _profile(name: str, family: str) -> SteeringProfile:
    layer = int(name[-1]) if name[-1].isdigit() else 1
    make = tiny_profile if name.startswith("own") else PROFILES.get(name, constant_profile)
    profile = make(vllm_model(family), layer, name=name, strength=3.0, seed=layer)
    return replace(profile, experts=profile_of("same", family).experts) if name.startswith("equal") else profile


@functools.cache
def oracle(
    prompt: tuple[int, ...], activations: tuple[ProfileActivation, ...], num_tokens: int, family: str
) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens, log-probabilities, gates (from the lowest layer up)."""
    steering = [(profile_of(a.profile, family), a) for a in activations]
    return two_pass(vllm_model(family), list(prompt), num_tokens, steering)


@dataclass(frozen=True)
class Prompts:
    """Random tokens that begin alike, and with what no other test's prompts begin with: they find an engine's cache cold."""

    seed: str

    def __call__(self, length: int, name: object, *, common: int = NUM_COMMON) -> tuple[int, ...]:
        heads, tails = random.Random(self.seed), random.Random(f"{self.seed} {name}")
        return tuple((heads if i < common else tails).randrange(5, 300) for i in range(length))

    def whose_gate(self, opens: bool, length: int, family: str = "llama") -> tuple[int, ...]:
        """One for which the gate of `own` is more than half open, or shut."""
        for name in itertools.count():
            found = self(length, f"gate {name}")
            [gate] = oracle(found, (ASK,), 0, family)[2]
            if gate > 0.5 if opens else gate == 0:
                return found
        raise AssertionError


def request(name: str, prompt: Sequence[int], *activations: ProfileActivation, **options) -> GenerationRequest:
    return asked(name, prompt, *activations, **{"max_tokens": NUM_TOKENS} | options)


def mixed(prompts: Prompts) -> list[GenerationRequest]:
    """Ten completions of prompts of 40 to 150 tokens that begin alike and are steered in every way."""
    return [
        request("all", prompts(150, 1), OWN),
        request("last", prompts(97, 2), OWN_LAST),
        request("plain, three times", prompts(96, 3), n=3),
        request("gate closed", prompts(120, 4), SHUT),
        request("gate opens", prompts.whose_gate(True, 81), ASK),
        request("gate stays shut", prompts.whose_gate(False, 101), ASK),
        request("short", prompts(40, 5), SAME),
        request("shadow", prompts(128, 6), SHADOW),
        request("strength 0", prompts(65, 7), NOTHING),
        request("two profiles, three times", prompts(130, 8), OWN, SAME_LAST, n=3),
    ]


@asynccontextmanager
async def running(*profiles: str | SteeringProfile, family: str = "llama", **options) -> AsyncIterator[Engine]:
    """An engine with profiles, or with those of these names, for 14 completions of 192 tokens unless `options` say otherwise."""
    profiles = [profile_of(profile, family) if isinstance(profile, str) else profile for profile in profiles]
    options = {"max_num_seqs": 14, "max_model_len": 192} | options
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        if options.get("one_pass"):  # the workers read the profiles' files, of which the version is then
            profiles = [profile.save(f"{folder}/{profile.name}") for profile in profiles]
            options["folders"] = {profile.name: f"{folder}/{profile.name}" for profile in profiles}
        if options.get("tensor_parallel_size", 1) > 1:
            environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        async with running_vllm(profiles, family=family, **options) as engine:
            yield engine


def block_bytes(family: str = "llama") -> int:
    """Memory of one block of keys and values."""
    config = vllm_model(family).config
    return BLOCK_SIZE * 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


async def answers(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, Answer]:
    """What becomes of requests that are sent together: none may fail, and each one's decision comes with its first event."""

    async def answer(r: GenerationRequest) -> Answer:
        found, first = Answer([[] for _ in range(r.n)]), True
        async for event in engine.generate(r):
            assert (event.decision is not None) == first, f"{r.request_id}: the decision is the first event's"
            first = False
            found.completions[event.index].append(event)
            if event.decision is not None:
                found.decisions.append(event.decision)
        assert all(c[-1].finish_reason for c in found.completions), f"{r.request_id}: a completion has no end"
        return found

    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(*(answer(r) for r in requests))
    return {r.request_id: answer for r, answer in zip(requests, found, strict=True)}


@asynccontextmanager
async def arriving_together(engine: Engine, num_runs: int) -> AsyncIterator[None]:
    """No step begins before so many runs have been submitted: the same requests are then scheduled alike each time."""
    await engine._llm.pause_generation(mode="keep", clear_cache=False)

    async def resume() -> None:
        while len(engine._runs) < num_runs:
            await asyncio.sleep(0.002)
        await engine._llm.resume_generation()

    task = asyncio.create_task(resume())
    try:
        yield
    finally:
        await asyncio.wait_for(task, PATIENCE_S)


def forget(engine: Engine) -> None:
    """Of decisions, not of the prefix cache: the next request reads its states anew."""
    engine._steering._remembered.clear()


def assert_exact(found: dict[str, Answer], requests: Sequence[GenerationRequest], family: str = "llama") -> None:
    """Every completion has the oracle's tokens and log-probabilities, every decision its gates."""
    for r in requests:
        activations = r.steering.activations
        tokens, logprobs, gates = oracle(r.prompt_token_ids, activations, r.sampling.max_tokens, family)
        answer = found[r.request_id]
        for index in range(r.n):
            assert answer.tokens(index) == tokens, f"{r.request_id}: not the oracle's tokens"
            error = max(abs(a - b) for a, b in zip(answer.logprobs(index), logprobs, strict=True))
            assert error < TOLERANCE, f"{r.request_id}: {error} from the oracle's log-probabilities"
        by_layer = sorted(answer.decision.profiles, key=lambda decision: profile_of(decision.name, family).layer)
        assert [d.gate for d in by_layer] == pytest.approx(gates, abs=1e-3)
        acting = [a for a, d in zip(activations, answer.decision.profiles, strict=True) if a.strength and not a.shadow]
        assert answer.decision.applied == any(
            d.fired for d in answer.decision.profiles if d.name in {a.profile for a in acting}
        )


def num_cached(answer: Answer) -> int:
    """Tokens of the prompt that were in the prefix cache."""
    return max(completion[0].num_cached_tokens for completion in answer.completions)


def full_blocks(r: GenerationRequest) -> int:
    """Tokens of a prompt that a repetition finds: all full blocks that leave a token to compute."""
    return (len(r.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
