"""transformers' continuous batching manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from tests.benchmarks.protocol import CONTEXT_LENGTH, RoundReply, RoundRequest, Stopwatch, arguments, serve

PAGE_SIZE = 32
MAX_BATCH_TOKENS = 2048
NO_TOKEN = -1


@contextmanager
def load() -> Iterator[Callable[[RoundRequest], RoundReply]]:
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto", attn_implementation="sdpa").eval()
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = NO_TOKEN
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=options.max_concurrency * CONTEXT_LENGTH // PAGE_SIZE,
        max_batch_tokens=MAX_BATCH_TOKENS,
        allow_block_sharing=False,
    )
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        yield lambda request: play(manager, request, model.config.vocab_size)


def play(manager: ContinuousBatchingManager, request: RoundRequest, vocab_size: int) -> RoundReply:
    prompts = request.prompts(vocab_size)
    stopwatch = Stopwatch(request.concurrency)
    names = {
        manager.add_request(prompt, max_new_tokens=request.new_tokens, streaming=True): index
        for index, prompt in enumerate(prompts)
    }
    while names:
        output = manager.get_result(timeout=60)
        if output is None or output.error is not None:
            raise RuntimeError(f"continuous batching failed: {output and output.error}")
        stopwatch.count(names[output.request_id])
        if output.is_finished():
            del names[output.request_id]
    return stopwatch.reply()


if __name__ == "__main__":
    serve(load)
