"""What steering costs inside vLLM: this server's vLLM engine against vLLM itself, `python -m tests.benchmarks.vllm_steering`.

Runs in vLLM's environment (`make test-vllm` makes one). Three engines are loaded at once, plain vLLM, ours and ours in one-pass
mode, and asked in turn within each repeat with prompts of their own; given are medians of the paired quotients. Two engines that do
the same differ by what their processes happen to get of the machine: so ours with no profile asked for is held against vLLM itself,
and steering against ours without, which is the same process where it is not one-pass.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.vllm.orders import Addition, Order
from server.engine.vllm.tables import SiteTable
from server.engine.vllm.worker import Span, WorkerSteering
from steering.decision import ProfileActivation, SteeringOptions
from steering.profile import SteeringProfile
from tests.benchmarks.checkpoints import MODELS, checkpoint, profile
from tests.benchmarks.protocol import CONTEXT_LENGTH, RoundReply, RoundRequest, Stopwatch

NAME = "benchmark"
OFF = SteeringOptions()
SHUT = SteeringOptions((ProfileActivation(NAME, 1.0, gate="closed"),))
OPEN = SteeringOptions((ProfileActivation(NAME, 1.0, gate="open"),))
KV_CACHE_BYTES = 2**30
WARM_UP_TOKENS = 16

Play = Callable[[RoundRequest], Awaitable[RoundReply]]


@dataclass(frozen=True)
class Quotients:
    """One side's times by another's, one of each repeat."""

    ttft: list[float]
    decode: list[float]

    def __str__(self) -> str:
        return f"{_median(self.ttft)} / {_median(self.decode)}"


def _median(values: Sequence[float]) -> str:
    if len(values) < 4:
        return f"{statistics.median(values):.3f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


async def measure(sides: dict[str, Play], concurrency: int, options: argparse.Namespace) -> dict[str, Quotients]:
    """Every side once a repeat, in an order of its own; one repeat before to warm up."""
    replies: dict[str, list[RoundReply]] = {name: [] for name in sides}
    names = list(sides)
    orders = random.Random(concurrency)
    for repeat in range(-1, options.repeats):
        for name in orders.sample(names, len(names)):
            new = WARM_UP_TOKENS if repeat < 0 else options.new_tokens
            request = RoundRequest(concurrency, options.prompt_tokens, new, next(options.seeds))
            reply = await sides[name](request)
            if repeat >= 0:
                replies[name].append(reply)
    against = {"off": "plain"} | {name: "off" for name in names if name not in ("plain", "off")}
    return {f"{name} by {base}": quotients(replies[name], replies[base]) for name, base in against.items()}


def quotients(ours: Sequence[RoundReply], base: Sequence[RoundReply]) -> Quotients:
    """Of the median time to the first token, and of the time a token after that."""
    pairs = list(zip(ours, base, strict=True))
    ttft = [statistics.median(a.ttft_s) / statistics.median(b.ttft_s) for a, b in pairs]
    decode = [(a.decode_s / a.decode_tokens) / (b.decode_s / b.decode_tokens) for a, b in pairs]
    return Quotients(ttft, decode)


async def plain_vllm(model: str, options: argparse.Namespace) -> tuple[Play, Callable[[], None]]:
    """vLLM's AsyncLLM by itself, with the settings that ours gives it, and what ends it."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.vllm.options import VllmOptions, vllm_config
    from server.engine.vllm.settings import PluginSettings

    config = vllm_config(model, engine_options(VllmOptions, options), PluginSettings(()))
    config.additional_config = {}  # the plugin does nothing then
    config.scheduler_config.scheduler_cls = None
    llm = AsyncLLM.from_vllm_config(config, usage_context=UsageContext.ENGINE_CONTEXT, disable_log_stats=True)
    vocab_size = config.model_config.get_vocab_size()

    async def play(request: RoundRequest) -> RoundReply:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        stopwatch = Stopwatch(request.concurrency)

        async def one(index: int, prompt: list[int]) -> None:
            name = f"{request.seed}-{index}"
            async for output in llm.generate(tokens_input(prompt), params, name):
                stopwatch.count(index, len(output.outputs[0].token_ids))

        await asyncio.gather(*(one(i, p) for i, p in enumerate(request.prompts(vocab_size))))
        return stopwatch.reply()

    return play, llm.shutdown


def engine_options(kind: type, options: argparse.Namespace, **more: object) -> object:
    flags = () if options.compile else ("--enforce-eager",)
    return kind(
        max_num_seqs=max(options.concurrency),
        max_model_len=CONTEXT_LENGTH,
        max_batched_tokens=options.batched_tokens,
        kv_cache_bytes=KV_CACHE_BYTES,
        dtype=options.dtype,
        flags=flags,
        **more,
    )


async def run(model: str, options: argparse.Namespace, console: Console) -> None:
    from server.engine.vllm.engine import VllmEngine
    from server.engine.vllm.options import VllmOptions

    folder, profile_folder = str(checkpoint(options.checkpoints, model)), str(profile(options.checkpoints, model))
    loaded = SteeringProfile.load(profile_folder, NAME)
    plain, end = await plain_vllm(folder, options)
    engines = [
        VllmEngine(
            folder, [loaded], engine_options(VllmOptions, options, one_pass=one_pass), folders={NAME: profile_folder}
        )
        for one_pass in (False, True)
    ]
    for engine in engines:
        await engine.start()

    def ours(engine: VllmEngine, steering: SteeringOptions) -> Play:
        async def play(request: RoundRequest) -> RoundReply:
            sampling = SamplingOptions(request.new_tokens, temperature=0.0)
            stopwatch = Stopwatch(request.concurrency)

            async def one(index: int, prompt: list[int]) -> None:
                asked = GenerationRequest(f"{request.seed}-{index}", tuple(prompt), sampling, steering)
                async for _ in engine.generate(asked):
                    stopwatch.count(index)

            await asyncio.gather(*(one(i, p) for i, p in enumerate(request.prompts(engine.info.vocab_size))))
            return stopwatch.reply()

        return play

    columns = ("off by plain", "shut by off", "open by off", "one-pass shut by off", "one-pass open by off")
    table = Table("requests at once", *columns, title=f"{model}: TTFT / time a token, median (quartiles)")
    for concurrency in options.concurrency:
        sides = {
            "plain": plain,
            "off": ours(engines[0], OFF),
            "shut": ours(engines[0], SHUT),
            "open": ours(engines[0], OPEN),
            "one-pass shut": ours(engines[1], SHUT),
            "one-pass open": ours(engines[1], OPEN),
        }
        found = await measure(sides, concurrency, options)
        table.add_row(str(concurrency), *(str(found[column]) for column in columns))
        console.print(f"{model} at {concurrency}: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    console.print(table)
    end()
    for engine in engines:
        await engine.stop()


def own_work(count: int, size: int, *, same_order: bool, steps: int = 3000) -> float:
    """Microseconds of a worker's decode step that steering takes: `count` requests, each with a vector of its own, on a CPU.

    Args:
        size: of a state, bfloat16.
        same_order: whether the batch is the last step's, as while nobody comes or goes.
    """
    table = SiteTable(size, 2 * count, count, count, torch.bfloat16, "cpu")
    steering = WorkerSteering({0: table})
    hidden, residual, vectors = (torch.randn(count, size).bfloat16() for _ in range(3))
    names = [str(i) for i in range(count)]
    for name, vector in zip(names, vectors, strict=True):
        raw = vector.view(torch.uint8).numpy().tobytes()
        steering.arrive(name, 1, Order(add=(Addition(0, raw, raw),)))
    times = []
    for step in range(1, steps):
        order = names if same_order else names[step % count :] + names[: step % count]
        started = time.perf_counter()
        steering.begin([Span(name, row, 1, step) for row, name in enumerate(order)], count)
        table.run(hidden, residual, 0)
        steering.end()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for checkpoints, made if need be")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama100m"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--batched-tokens", type=int, default=4096, help="prompt tokens of a step; one pass needs a prompt's"
    )
    parser.add_argument("--dtype", default="auto", help="auto: the checkpoint's")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile; it takes a minute for each engine")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    options.seeds = itertools.count()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    torch.set_num_threads(1)
    console = Console(width=160)
    for count, size in ((1, 768), (8, 768), (32, 768), (32, 4096)):
        same, other = (own_work(count, size, same_order=same_order) for same_order in (True, False))
        console.print(f"own work of a step, {count} x {size}: {same:.0f} us; where the batch changes {other:.0f} us")
    for model in options.models:
        asyncio.run(run(model, options, console))


if __name__ == "__main__":
    main()
