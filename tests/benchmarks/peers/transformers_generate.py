"""transformers' `generate`, all prompts of a round in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tests.benchmarks.protocol import RoundReply, RoundRequest, Stopwatch, arguments, serve


class TokenCounter(BaseStreamer):
    """Tells the stopwatch of each step's tokens; the first call brings the prompts."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._prompts_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompts_seen:
            for index in range(len(value)):
                self._stopwatch.count(index)
        self._prompts_seen = True

    def end(self) -> None:
        pass


@contextmanager
def load() -> Iterator[Callable[[RoundRequest], RoundReply]]:
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    yield lambda request: play(model, request)


def play(model: PreTrainedModel, request: RoundRequest) -> RoundReply:
    prompts = torch.tensor(request.prompts(model.config.vocab_size))
    stopwatch = Stopwatch(request.concurrency)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=request.new_tokens,
        streamer=TokenCounter(stopwatch),
    )
    return stopwatch.reply()


if __name__ == "__main__":
    serve(load)
