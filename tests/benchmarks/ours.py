"""This project's engine through its public interface; run as a process by the orchestrator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.engine.base import Engine, GenerationRequest, SamplingOptions
from server.engine.native.load import load_engine
from steering.decision import GateMode, ProfileActivation, SteeringOptions
from tests.benchmarks.protocol import CONTEXT_LENGTH, RoundReply, RoundRequest, Steering, Stopwatch, arguments, serve

PROFILE = "benchmark"
GATES: dict[Steering, GateMode] = {"open": "open", "closed": "closed"}


@contextmanager
def load() -> Iterator[Callable[[RoundRequest], RoundReply]]:
    parser = arguments()
    parser.add_argument("--profile", required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    engine = load_engine(
        options.checkpoint,
        {PROFILE: options.profile},
        max_num_seqs=options.max_concurrency,
        max_model_len=CONTEXT_LENGTH,
        num_threads=options.threads,
        compiled=options.compile,
    )
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        yield lambda request: runner.run(play(engine, request))
        runner.run(engine.stop())


async def play(engine: Engine, request: RoundRequest) -> RoundReply:
    """One round; raises where a request was not steered as the round asks."""
    sampling = SamplingOptions(max_tokens=request.new_tokens, temperature=0.0)
    steering = SteeringOptions()
    if request.steering != "off":
        steering = SteeringOptions((ProfileActivation(PROFILE, strength=1.0, gate=GATES[request.steering]),))
    requests = [
        GenerationRequest(f"{request.seed}-{index}", tuple(prompt), sampling, steering)
        for index, prompt in enumerate(request.prompts(engine.info.vocab_size))
    ]

    async def read(index: int) -> None:
        async for event in engine.generate(requests[index]):
            stopwatch.count(index)
            if event.decision is not None and event.decision.applied != (request.steering == "open"):
                raise RuntimeError(f"steering is {request.steering}, but the engine says {event.decision.reason}")

    stopwatch = Stopwatch(request.concurrency)
    async with asyncio.TaskGroup() as group:
        for index in range(request.concurrency):
            group.create_task(read(index))
    return stopwatch.reply()


if __name__ == "__main__":
    serve(load)
