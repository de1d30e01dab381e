"""Engine cores around tiny models, requests for them, and what they answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from server.engine.base import GenerationRequest, SamplingOptions, TokenEvent
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import EngineCore
from server.engine.native.decoder import Decoder, TransformersDecoder
from server.engine.native.kv_cache import BLOCK_SIZES, bytes_per_token
from server.engine.native.load import make_decoder
from server.engine.native.sequence import SequenceGroup
from steering.decision import ProfileActivation, SteeringDecision, SteeringOptions
from steering.profile import SteeringProfile
from tests.tiny import tiny_model

# What `make_decoder` picks, and what it falls back to.
DECODERS: Mapping[str, Callable[[PreTrainedModel], Decoder]] = {
    "fused": make_decoder,
    "transformers": TransformersDecoder,
}
MOST_STEPS = 1000  # a defect must fail, not hang


@functools.cache
def reference_model(family: str = "llama") -> PreTrainedModel:
    """The model as transformers runs it, for oracles and profiles: no decoder has taken it over, and no test changes it."""
    return tiny_model(family)


@functools.cache
def tiny_decoder(family: str = "llama", kind: str = "fused") -> Decoder:
    """A decoder of its own copy of `reference_model(family)`, made once: it takes its model over."""
    return DECODERS[kind](tiny_model(family))


def tiny_core(
    profiles: Sequence[SteeringProfile] = (),
    family: str = "llama",
    decoder: Decoder | None = None,
    *,
    paged: bool | None = None,
    num_blocks: int | None = None,
    **options: int | None,
) -> EngineCore:
    """A core with empty caches.

    Args:
        decoder: default `tiny_decoder(family)`.
        num_blocks: KV blocks for what runs; default as many as the slots can use.
        options: of `EngineOptions`; small unless told otherwise, the prefix cache large enough for a whole test.
    """
    decoder = decoder or tiny_decoder(family)
    options = {"max_num_seqs": 8, "max_model_len": 64, "max_batched_tokens": 256, "max_waiting": 64} | options
    if num_blocks is not None:
        options["kv_cache_bytes"] = num_blocks * block_bytes(decoder, steered=bool(profiles))
    options.setdefault("prefix_cache_bytes", 128 * block_bytes(decoder, steered=bool(profiles)))
    core, _ = build_core(decoder, reference_model(family), profiles, EngineOptions(**options), paged=paged)
    return core


def block_bytes(decoder: Decoder, *, steered: bool) -> int:
    """Memory of one KV block."""
    return BLOCK_SIZES["cpu"] * bytes_per_token(
        decoder.kv_shapes(), decoder.hidden_size if steered else 0, decoder.dtype
    )


def asked(
    name: str,
    prompt: Sequence[int],
    *activations: ProfileActivation,
    max_tokens: int = 8,
    n: int = 1,
    priority: int = 0,
    **sampling,
) -> GenerationRequest:
    """A greedy request with five log-probabilities, unless `sampling` says otherwise."""
    options = SamplingOptions(max_tokens=max_tokens, **{"temperature": 0.0, "logprobs": 5} | sampling)
    return GenerationRequest(name, tuple(prompt), options, SteeringOptions(tuple(activations)), n, priority)


@dataclass
class Answer:
    """A request's events, by completion, and its decision."""

    completions: list[list[TokenEvent]]
    decisions: list[SteeringDecision] = field(default_factory=list)

    @property
    def decision(self) -> SteeringDecision:
        [decision] = self.decisions
        return decision

    def tokens(self, index: int = 0) -> list[int]:
        return [event.token_id for event in self.completions[index]]

    def logprobs(self, index: int = 0) -> list[float]:
        return [event.logprobs.logprob for event in self.completions[index]]

    @property
    def numbers(self) -> list[list[tuple]]:
        """Tokens and all log-probabilities of every completion, for comparisons bit for bit."""
        return [[(event.token_id, event.logprobs) for event in completion] for completion in self.completions]


def answers(core: EngineCore, requests: Sequence[GenerationRequest]) -> dict[str, Answer]:
    """What becomes of requests that arrive together."""
    return carry_out(core, [(0, request) for request in requests])


def carry_out(
    core: EngineCore,
    arrivals: Sequence[tuple[int, GenerationRequest]],
    after_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Answer]:
    """Run requests, each joining before the step that it is given with; none may fail, and nothing may be left held.

    Args:
        after_step: called with 1, 2, … between steps.
    """
    found = {request.request_id: Answer([[] for _ in range(request.n)]) for _, request in arrivals}
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    step = 0
    while waiting or core.has_work:
        while waiting and waiting[0][0] <= step:
            core.add(SequenceGroup.of(waiting.pop(0)[1], lambda _: None))
        for group, event in core.step():
            assert isinstance(event, TokenEvent), event
            answer = found[group.request.request_id]
            answer.completions[event.index].append(event)
            if event.decision is not None:
                answer.decisions.append(event.decision)
        step += 1
        assert step < MOST_STEPS, "somebody waits for ever"
        after_step(step)
    assert all(len(answer.decisions) == 1 for answer in found.values()), "one decision for each request"
    assert all(c[-1].finish_reason for answer in found.values() for c in answer.completions), "every completion ends"
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0), "nothing is held at the end"
    return found
