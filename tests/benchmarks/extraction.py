"""Extraction of all layers' states against a bare batched forward of the same batches: `python -m tests.benchmarks.extraction MODEL`.

The two alternate in one run; what is told is the median of the pairs' ratios, and the least and the greatest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steering.architecture import decoder_layers
from steering.training.data import Pair, Query
from steering.training.extraction import batches_by_length, encode_query, query_states, shifts

WORDS = "how do I bake the bread that my old aunt made for her friends in summer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="sdpa").eval()
    rng = random.Random(0)
    queries = [
        Query((("user", " ".join(rng.choices(WORDS.split(), k=rng.randint(5, 40)))),), str(i))
        for i in range(arguments.queries)
    ]
    pairs = [
        Pair(query, *(" ".join(rng.choices(WORDS.split(), k=rng.randint(20, 60))) for _ in "+-")) for query in queries
    ]
    layers = range(len(decoder_layers(model)))
    prompts = [encode_query(tokenizer, query) for query in queries]
    whole = [
        prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
        for side in ("preferred", "undesired")
        for prompt, pair in zip(prompts, pairs, strict=True)
        for answer in [getattr(pair, side)]
    ]
    options = {"batch_tokens": arguments.batch_tokens}
    for name, rows, ours in (  # tokenising included
        ("queries", prompts, lambda: query_states(model, tokenizer, queries, layers, **options)),
        ("answers", whole, lambda: shifts(model, tokenizer, pairs, layers, **options)),
    ):
        bare = forward(model, rows, arguments.batch_tokens)
        bare(), ours()
        ratios = [timed(bare) / timed(ours) for _ in range(arguments.repeats)]
        print(
            f"{name}, throughput of all {len(layers)} layers' states over a bare forward (without the head): "
            f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs of "
            f"{len(rows)} rows, {sum(map(len, rows)):,} tokens",
            flush=True,
        )


def forward(model: PreTrainedModel, rows: list[list[int]], batch_tokens: int) -> Callable[[], None]:
    """The model alone over the rows, in the batches that extraction makes of them."""
    batches = []
    for batch in batches_by_length(list(map(len, rows)), batch_tokens):
        ids = torch.zeros(len(batch), len(rows[batch[0]]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(batch):
            ids[b, : len(rows[i])], mask[b, : len(rows[i])] = torch.tensor(rows[i]), 1
        batches.append((ids, mask))

    def run() -> None:
        with torch.inference_mode():
            for ids, mask in batches:
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    return run


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
