"""What being watched costs: throughput of one core with the metrics and without, in turn, `python -m tests.benchmarks.observer`.

One engine on a small model, 32 answers at once through the server's own `Generation`; "without" has the same calls do nothing. The
smaller the model, the larger the share: what a step of the model costs is what the metrics are measured by.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

from server.answers.generation import Generation, collect
from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native.build import EngineOptions
from server.engine.native.engine import NativeEngine
from server.engine.native.load import load_model, make_decoder
from server.observability.metrics import Metrics
from steering.decision import ProfileActivation, SteeringDecision, SteeringOptions
from steering.profile import SteeringProfile
from tests.benchmarks.checkpoints import MODELS, checkpoint, profile

OPEN = SteeringOptions((ProfileActivation("benchmark", 1.0, gate="open"),))
AIM = 0.01
PROMPT_TOKENS, NEW_TOKENS, CONTEXT = 64, 64, 256


class Unwatched(Metrics):
    """Hears everything, keeps nothing."""

    def decided(self, *_: object) -> None: ...

    def first_token(self, *_: object) -> None: ...

    def token(self, *_: object) -> None: ...

    def completion_ended(self, *_: object) -> None: ...

    def request_ended(self, *_: object, **__: object) -> None: ...


class Letters:
    """A vocabulary in which each token is a letter."""

    def text_bytes(self, token_id: int) -> bytes:
        return b"x"


async def seconds(engine: NativeEngine, metrics: Metrics, concurrency: int, seed: int) -> float:
    """Processor time of that many answers, which begin together: on a core of their own it is the wall's, whoever else runs here."""
    engine._core._observer = metrics
    sampling = SamplingOptions(NEW_TOKENS, temperature=0.0)
    prompts = [
        tuple((seed * 7919 + 31 * i + 13 * j) % 1000 + 3 for j in range(PROMPT_TOKENS)) for i in range(concurrency)
    ]
    requests = [GenerationRequest(str(i), prompt, sampling, OPEN) for i, prompt in enumerate(prompts)]
    begun = time.process_time()
    await asyncio.gather(*(collect(Generation(engine, request, Letters(), (), metrics)) for request in requests))
    return time.process_time() - begun


async def measure(folder: Path, model_name: str, concurrency: int, repeats: int) -> float:
    """Median over pairs of how much longer the watched run takes, as a share."""
    model = load_model(str(checkpoint(folder, model_name)))
    loaded = SteeringProfile.load(profile(folder, model_name), "benchmark")
    options = EngineOptions(max_model_len=CONTEXT, max_num_seqs=concurrency, prefix_cache_bytes=0)
    engine = NativeEngine(make_decoder(model, CONTEXT), model, [loaded], options)
    sides = {"watched": Metrics("m"), "not": Unwatched("m")}
    for metrics in sides.values():
        metrics.attach(engine)
    await engine.start()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, repeats):
        for name in sorted(sides, reverse=bool(repeat % 2)):
            spent = await seconds(engine, sides[name], concurrency, repeat + 1)
            if repeat >= 0:
                found[name].append(spent)
    decision = await engine.score(GenerationRequest("s", (1, 2, 3), SamplingOptions(1), OPEN))
    await engine.stop()
    quotients = [watched / bare - 1 for watched, bare in zip(found["watched"], found["not"], strict=True)]
    tokens = concurrency * NEW_TOKENS
    quartiles = statistics.quantiles(quotients, n=4)
    print(
        f"{model_name}, {concurrency} at once, {repeats} pairs: {tokens / statistics.median(found['not']):,.0f} tokens a "
        f"processor second unwatched, {tokens / statistics.median(found['watched']):,.0f} watched; "
        f"median cost {quartiles[1]:+.2%} (quartiles {quartiles[0]:+.2%} to {quartiles[2]:+.2%}); aim {AIM:.0%}"
    )
    token_us = counting_us(sides["watched"], decision)
    share = token_us * 1e-6 * tokens / statistics.median(found["not"])
    print(f"counting a token: {token_us:.1f} µs of processor time, {share:.2%} of what the token takes")
    return quartiles[1]


def counting_us(metrics: Metrics, decision: SteeringDecision, repeats: int = 50_000) -> float:
    """What is done for every token, alone: free of the noise of the rest."""
    begun = time.process_time()
    for _ in range(repeats):
        metrics.token(decision, 0.02)
    return 1e6 * (time.process_time() - begun) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for checkpoints; made if need be")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    asyncio.run(measure(options.checkpoints, options.model, options.concurrency, options.repeats))


if __name__ == "__main__":
    main()
