"""One GPU: an 8 B Llama shape with random bfloat16 weights, `python -m tests.benchmarks.gpu`.

Decode at batch 1 against the card's measured copy bandwidth, batch 64, and the steering's cost (every request its own vector,
gate open); beside it transformers' `generate` with a static cache and its continuous batching. The paper's own prompts are
not needed: random tokens cost the same.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import EngineCore
from server.engine.native.fused import FusedDecoder
from steering.decision import ProfileActivation, SteeringOptions
from tests.tiny import tiny_profile

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
PROMPT_TOKENS, NEW_TOKENS = 128, 128
OPEN = SteeringOptions((ProfileActivation("benchmark", 1.0, gate="open"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, for a small card")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": options.layers})).eval()
        torch.set_default_dtype(torch.float32)
    bandwidth = copy_bandwidth()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    limit = bandwidth / weights
    profile = tiny_profile(model, options.layers // 2, name="benchmark")
    decoder = FusedDecoder(model, SHAPE["max_position_embeddings"])
    core, _ = build_core(decoder, model, [profile], EngineOptions(max(options.batch), 512, 8192, prefix_cache_bytes=0))
    runs: dict[str, Callable[[int], tuple[float, float]]] = {
        "ours": lambda n: ours(core, n, SteeringOptions()),
        "ours, steered": lambda n: ours(core, n, OPEN),
        "generate, static cache": lambda n: generate(model, n),
        "continuous batching": lambda n: continuous_batching(model, n),
    }
    table = Table(
        title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}; limit at batch 1: {limit:.1f} tok/s"
    )
    for heading in ("batch", "engine", "decode tok/s", "TTFT ms", "of the limit"):
        table.add_column(heading, justify="right")
    found = []
    for batch in options.batch:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for repeat in range(options.repeats + 1):
            for name, run in runs.items():
                measured = run(batch)
                if repeat:  # the first warms up
                    times[name].append(measured)
        for name, measured in times.items():
            speed, ttft = (statistics.median(column) for column in zip(*measured, strict=True))
            share = f"{speed / limit:.0%}" if batch == 1 else "–"
            table.add_row(str(batch), name, f"{speed:,.1f}", f"{1000 * ttft:.1f}", share)
            found.append({"batch": batch, "engine": name, "decode": speed, "ttft_s": ttft})
    Console(width=110).print(table)
    print(json.dumps({"bandwidth": bandwidth, "limit": limit, "rows": found}))


def copy_bandwidth() -> float:
    """Bytes per second of a large device copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    return 20 * 2 * source.nbytes / (time.perf_counter() - start)


def prompts(batch: int) -> list[list[int]]:
    """New random ones at every call, so that no cache helps."""
    return [random.choices(range(10, SHAPE["vocab_size"]), k=PROMPT_TOKENS) for _ in range(batch)]


def ours(core: EngineCore, batch: int, steering: SteeringOptions) -> tuple[float, float]:
    """Decode tokens per second, and seconds until every request has its first token."""
    sampling = SamplingOptions(NEW_TOKENS, temperature=0.0)
    requests = [GenerationRequest(str(i), tuple(p), sampling, steering) for i, p in enumerate(prompts(batch))]
    torch.cuda.synchronize()
    start, moments = time.perf_counter(), []
    core.run(requests, on_result=lambda _: moments.append(time.perf_counter() - start))
    first = moments[batch - 1]
    return (len(moments) - batch) / (moments[-1] - first), first


@torch.inference_mode()
def generate(model: LlamaForCausalLM, batch: int) -> tuple[float, float]:
    ids = torch.tensor(prompts(batch), device="cuda")

    def seconds(new_tokens: int) -> float:
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            compile_config=CompileConfig(mode="reduce-overhead"),
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, generation_config=config)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first, whole = seconds(1), seconds(NEW_TOKENS)
    return batch * (NEW_TOKENS - 1) / (whole - first), first


@torch.inference_mode()
def continuous_batching(model: LlamaForCausalLM, batch: int) -> tuple[float, float]:
    def seconds(new_tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        model.generate_batch(inputs=prompts(batch), generation_config=config, progress_bar=False)
        return time.perf_counter() - start

    first, whole = seconds(1), seconds(NEW_TOKENS)
    return batch * (NEW_TOKENS - 1) / (whole - first), first


if __name__ == "__main__":
    main()
