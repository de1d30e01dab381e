"""What steering, its prefix cache and HTTP cost: our engine against itself, `python -m tests.benchmarks.steering`.

Every comparison alternates its two sides within one run and gives the median of the paired quotients.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import torch
from rich.console import Console

from server.engine.base import GenerationRequest, SamplingOptions, TokenEvent
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import EngineCore
from server.engine.native.decoder import Decoder
from server.engine.native.engine import NativeEngine
from server.engine.native.load import load_model, make_decoder
from steering.decision import ProfileActivation, SteeringOptions
from steering.profile import SteeringProfile
from tests.benchmarks.checkpoints import MODELS, checkpoint, profile
from tests.serving import process

OFF = SteeringOptions()
OPEN = SteeringOptions((ProfileActivation("benchmark", 1.0, gate="open"),))
SHUT = SteeringOptions((ProfileActivation("benchmark", 1.0, gate="closed"),))
PROMPT_TOKENS, NEW_TOKENS, CONTEXT = 128, 128, 1536
Times = tuple[float, float]  # seconds to the last first token, and from there to the end


class Bench:
    """One checkpoint with its profile, and as many cores on it as comparisons need."""

    def __init__(self, folder: Path, model: str) -> None:
        self._model = load_model(str(checkpoint(folder, model)))
        self._profile = SteeringProfile.load(profile(folder, model), "benchmark")
        self._decoder: Decoder = make_decoder(self._model, CONTEXT)
        self._random = random.Random(0)

    def core(self, **options: int) -> EngineCore:
        """Without a prefix cache unless `options` say so; prompts are not cut."""
        limits = EngineOptions(
            **{"max_model_len": CONTEXT, "max_batched_tokens": 4096, "prefix_cache_bytes": 0} | options
        )
        return build_core(self._decoder, self._model, [self._profile], limits)[0]

    def engine(self) -> NativeEngine:
        """The engine with its thread, and its own limits."""
        return NativeEngine(self._decoder, self._model, [self._profile], EngineOptions(max_model_len=CONTEXT))

    def prompt(self, length: int = PROMPT_TOKENS) -> tuple[int, ...]:
        """A new random one."""
        return tuple(self._random.choices(range(3, self._decoder.vocab_size), k=length))


def times(core: EngineCore, prompts: Sequence[tuple[int, ...]], steering: SteeringOptions, new: int) -> Times:
    """Run prompts that arrive together."""
    sampling = SamplingOptions(new, temperature=0.0)
    requests = [GenerationRequest(str(i), p, sampling, steering) for i, p in enumerate(prompts)]
    started, moments = time.perf_counter(), []

    def note(result: object) -> None:
        if not isinstance(result, TokenEvent):
            raise RuntimeError(str(result))
        moments.append(time.perf_counter() - started)

    core.run(requests, on_result=note)
    first = moments[len(prompts) - 1]
    return first, moments[-1] - first


def paired(sides: dict[str, Callable[[], Times]], repeats: int) -> dict[str, list[Times]]:
    """Each side `repeats` times, in turn, after one round to warm up."""
    found: dict[str, list[Times]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        names = list(sides)
        for name in names if repeat % 2 else reversed(names):
            measured = sides[name]()
            if repeat:
                found[name].append(measured)
    return found


def quotient(found: dict[str, list[Times]], name: str, base: str, which: int) -> float:
    """Median over the repeats of one side's seconds by the other's; `which`: 0 = first token, 1 = decode."""
    return statistics.median(a[which] / b[which] for a, b in zip(found[name], found[base], strict=True))


def steering_cost(bench: Bench, concurrency: Sequence[int], repeats: int) -> Iterator[str]:
    """Gate open on all, each with its own vector, or all with one; gate shut on all; against steering off."""
    core = bench.core()
    for count in concurrency:
        same = bench.prompt()

        def own(steering: SteeringOptions, count: int = count) -> Times:
            return times(core, [bench.prompt() for _ in range(count)], steering, NEW_TOKENS)

        def one(steering: SteeringOptions, count: int = count, same: tuple[int, ...] = same) -> Times:
            return times(core, [same] * count, steering, NEW_TOKENS)

        sides = {"off": lambda: own(OFF), "open": lambda: own(OPEN), "shut": lambda: own(SHUT)}
        found = paired(sides | {"one vector": lambda: one(OPEN)}, repeats)
        decode, first = (
            {name: quotient(found, name, "off", which) for name in ("open", "shut", "one vector")} for which in (1, 0)
        )
        yield (
            f"c={count}: decode time, gate open {decode['open']:.3f}, shut {decode['shut']:.3f}, "
            f"{count} vectors against one {quotient(found, 'open', 'one vector', 1):.3f}; "
            f"TTFT, gate open {first['open']:.3f}, shut {first['shut']:.3f}"
        )


def prefix_cache(bench: Bench, requests: int, repeats: int) -> Iterator[str]:
    """A shared system prompt of 1,000 tokens and 30 of one's own, nine of ten requests with the gate shut."""
    system = bench.prompt(1000)
    cached, uncached = bench.core(prefix_cache_bytes=2**30), bench.core()

    def traffic(core: EngineCore) -> Times:
        first = [times(core, [system + bench.prompt(30)], OPEN if i % 10 == 9 else SHUT, 1)[0] for i in range(requests)]
        return statistics.mean(first), 0.0

    found = paired({"cached": lambda: traffic(cached), "uncached": lambda: traffic(uncached)}, repeats)
    stats = cached.stats()
    shares = [hits / queries for hits, queries in zip(stats.prefix_cache_hits, stats.prefix_cache_queries, strict=True)]
    yield (
        f"1,000 shared tokens, 90 % unfired: mean TTFT with the cache {quotient(found, 'cached', 'uncached', 0):.3f} of "
        f"without; tokens found: lower layers {shares[0]:.0%}, upper {shares[1]:.0%}"
    )


def authors_order(bench: Bench, repeats: int) -> Iterator[str]:
    """One pass against the authors' two: the prompt once to read its state, then again, steered."""
    core = bench.core()

    def twice() -> Times:
        prompt = bench.prompt()
        return times(core, [prompt], OFF, 1)[0] + times(core, [prompt], OPEN, 1)[0], 0.0

    found = paired({"one pass": lambda: times(core, [bench.prompt()], OPEN, 1), "two": twice}, repeats)
    yield f"TTFT against the prompt run twice: {quotient(found, 'one pass', 'two', 0):.3f}"


def http_cost(bench: Bench, folder: Path, model: str, core_number: int, repeats: int) -> Iterator[str]:
    """32 streams over HTTP against the engine alone, both on one core; the client runs on the others."""
    everywhere = os.sched_getaffinity(0)
    core = bench.core()
    options = [
        *("--model", str(checkpoint(folder, model)), "--profile", f"benchmark={profile(folder, model)}"),
        *("--max-model-len", str(CONTEXT), "--max-batched-tokens", "4096", "--prefix-cache-memory", "0"),
        *("--num-threads", "1", "--log-level", "error"),
    ]
    quotients = []
    os.sched_setaffinity(0, {core_number})  # the server inherits it
    with process(*options, log=folder / "server.log") as address:
        for repeat in range(repeats + 1):
            os.sched_setaffinity(0, everywhere - {core_number} or everywhere)
            over_http = asyncio.run(stream(address, [bench.prompt() for _ in range(32)]))
            os.sched_setaffinity(0, {core_number})
            alone = sum(times(core, [bench.prompt() for _ in range(32)], OPEN, NEW_TOKENS))
            if repeat:
                quotients.append(alone / over_http)
    os.sched_setaffinity(0, everywhere)
    yield f"32 streams over HTTP: {statistics.median(quotients):.3f} of the engine's own throughput"


def event_loop_lag(bench: Bench) -> Iterator[str]:
    """How late the event loop is while 32 streams run at full speed on the engine's thread."""

    async def measure() -> list[float]:
        engine = bench.engine()
        await engine.start()
        requests = [
            GenerationRequest(str(i), bench.prompt(), SamplingOptions(NEW_TOKENS, temperature=0.0), OPEN)
            for i in range(32)
        ]

        async def read(request: GenerationRequest) -> None:
            async for _ in engine.generate(request):
                pass

        streams = asyncio.gather(*(read(request) for request in requests))
        lags = []
        while not streams.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - before - 0.001)
        await streams
        await engine.stop()
        return sorted(lags)

    lags = asyncio.run(measure())
    yield f"event-loop lag at 32 streams: median {1000 * lags[len(lags) // 2]:.2f} ms, p99 {1000 * lags[len(lags) * 99 // 100]:.2f} ms"


async def stream(address: str, prompts: Sequence[tuple[int, ...]]) -> float:
    """Seconds until every prompt's stream has ended."""

    async def one(client: httpx.AsyncClient, prompt: tuple[int, ...]) -> None:
        body = {"model": client.headers["x-model"], "prompt": list(prompt), "max_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "steer_gate": "open", "steer_strength": 1.0}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_raw():
                pass

    async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=64)) as client:
        client.headers["x-model"] = (await client.get("/v1/models")).json()["data"][0]["id"]
        started = time.perf_counter()
        await asyncio.gather(*(one(client, prompt) for prompt in prompts))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for checkpoints, made if need be")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--core", type=int, default=0, help="the engine's; the HTTP client takes the others")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    everywhere = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    console = Console(width=140)
    for model in options.models:
        os.sched_setaffinity(0, {options.core})
        bench = Bench(options.checkpoints, model)
        console.print(f"[bold]{model}[/bold]")
        for lines in (
            authors_order(bench, 4 * options.repeats),
            prefix_cache(bench, 20, options.repeats),
            steering_cost(bench, options.concurrency, options.repeats),
            event_loop_lag(bench),
        ):
            for line in lines:
                console.print(line, highlight=False)
        os.sched_setaffinity(0, everywhere)
        for line in http_cost(bench, options.checkpoints, model, options.core, options.repeats):
            console.print(line, highlight=False)


if __name__ == "__main__":
    main()
