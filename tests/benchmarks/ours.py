"""This project's engine, its loop driven directly, as the peers' are; run as a process by the orchestrator.

What its thread and HTTP add is measured in `steering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.engine.base import GenerationRequest, SamplingOptions, TokenEvent
from server.engine.native.core import EngineCore
from server.engine.native.load import load_engine
from server.engine.native.sequence import SequenceGroup
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
    yield lambda request: play(engine._core, engine.info.vocab_size, request)


def play(core: EngineCore, vocab_size: int, request: RoundRequest) -> RoundReply:
    """One round; raises where a request was not steered as the round asks."""
    sampling = SamplingOptions(max_tokens=request.new_tokens, temperature=0.0)
    steering = SteeringOptions()
    if request.steering != "off":
        steering = SteeringOptions((ProfileActivation(PROFILE, strength=1.0, gate=GATES[request.steering]),))
    stopwatch = Stopwatch(request.concurrency)
    for index, prompt in enumerate(request.prompts(vocab_size)):
        asked = GenerationRequest(str(index), tuple(prompt), sampling, steering)
        core.add(SequenceGroup.of(asked, lambda _: None))
    while core.has_work:
        for group, event in core.step():
            if not isinstance(event, TokenEvent):
                raise RuntimeError(str(event))
            stopwatch.count(int(group.request.request_id))
            if event.decision is not None and event.decision.applied != (request.steering == "open"):
                raise RuntimeError(f"steering is {request.steering}, but the engine says {event.decision.reason}")
    return stopwatch.reply()


if __name__ == "__main__":
    serve(load)
