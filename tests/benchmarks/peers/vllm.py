"""vLLM, in this process, by its engine's step loop; runs in vLLM's own environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.benchmarks.protocol import CONTEXT_LENGTH, RoundReply, RoundRequest, Stopwatch, arguments, serve


@contextmanager
def load() -> Iterator[Callable[[RoundRequest], RoundReply]]:
    parser = arguments()
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=options.checkpoint,
            dtype=stored_dtype(options.checkpoint),
            skip_tokenizer_init=True,
            enforce_eager=not options.compile,
            enable_prefix_caching=False,
            max_model_len=CONTEXT_LENGTH,
            max_num_seqs=options.max_concurrency,
            disable_log_stats=True,
        )
    )
    yield lambda request: play(engine, request)


def stored_dtype(checkpoint: str) -> str:
    """The checkpoint's own dtype: vLLM's "auto" would run a float32 checkpoint in bfloat16."""
    return json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))["dtype"]


def play(engine: LLMEngine, request: RoundRequest) -> RoundReply:
    prompts = request.prompts(engine.model_config.get_vocab_size())
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request.new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    stopwatch = Stopwatch(request.concurrency)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            stopwatch.count(int(output.request_id), len(output.outputs[0].token_ids))
    return stopwatch.reply()


if __name__ == "__main__":
    serve(load)
