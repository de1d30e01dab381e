"""The running state of a request and of its completions. No torch here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from server.engine.base import FinishReason, GenerationRequest, GrammarState, TokenEvent, TokenLogprobs
from steering.decision import ProfileDecision, SteeringDecision

Deliver = Callable[[TokenEvent | SteeringDecision | Exception], None]


class Phase(Enum):
    """Where a sequence is: in the queue (new, or preempted), being prefilled, generating, or done."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Completion `index` of a request: its tokens, its slot in the KV cache, its own random stream and way through a grammar.

    While it is prefilled, `num_done` of its tokens have passed `segment`, and all of them the segments before it.
    """

    group: SequenceGroup
    index: int
    token_ids: list[int]
    phase: Phase = Phase.WAITING
    slot: int = -1
    segment: int = 0
    num_done: int = 0
    finish_reason: FinishReason | None = None
    random: random.Random = field(default_factory=random.Random)
    grammar: GrammarState | None = None

    @property
    def request(self) -> GenerationRequest:
        return self.group.request

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class Dose(Protocol):
    """What a site adds to a request: see `steering.intervention.Dose`."""

    @property
    def prompt(self) -> object | None: ...

    @property
    def key(self) -> bytes: ...

    @property
    def uniform(self) -> bool: ...


@dataclass
class SteeringState:
    """What the sites decided about a request so far, from the lowest up; kept when it is preempted, so that its answer goes
    on under the same vectors."""

    num_prompt_tokens: int
    doses: list[Dose | None] = field(default_factory=list)
    profiles: list[ProfileDecision] = field(default_factory=list)
    compute_ms: float = 0.0

    def move(self, before: list[int], after: list[int], decided: bool) -> None:
        """Follow a change of the sites' layers. What was decided stays; a new site below it adds nothing to this request."""
        kept = dict(zip(before, self.doses, strict=False))  # a prompt on its way has met the lowest sites only
        self.doses = [kept.get(layer) for layer in after if decided or layer <= max(kept, default=-1)]

    def salt(self, segment: int) -> tuple[bytes, int]:
        """What shaped the states of a segment of layers besides the tokens, and from which position on (see `block_index.chain`)."""
        salt, start = b"", self.num_prompt_tokens - 1
        for site, dose in enumerate(self.doses[:segment]):
            if dose is not None:
                salt += b"%d:" % site + dose.key + (b"" if dose.uniform else b"@%d" % self.num_prompt_tokens)
                start = start if dose.prompt is None else 0
        return salt, start


@dataclass(eq=False)
class SequenceGroup:
    """A request in flight: its n sequences share one prefill and one decision.

    `score_only`: stop after the decision. `deliver` hands a result to whoever waits for the request. `decision` is there once
    all sites have decided, `prefilled` tells that the prompt is through, `announced` that an event carried the decision.
    `prompt_logprobs` grows chunk by chunk; `num_cached_tokens` are those found in the prefix cache of every segment. `queue_s`: seconds until the first row, once it has one.
    """

    request: GenerationRequest
    deliver: Deliver
    steering: SteeringState
    sequences: list[Sequence] = field(default_factory=list)
    score_only: bool = False
    decision: SteeringDecision | None = None
    prefilled: bool = False
    announced: bool = False
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_cached_tokens: int = 0
    arrived_s: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None

    @classmethod
    def of(cls, request: GenerationRequest, deliver: Deliver, *, score_only: bool = False) -> SequenceGroup:
        """A waiting group of `request.n` sequences. With a seed, each completion's random stream follows from seed and index."""
        seed, grammar = request.sampling.seed, request.sampling.grammar
        group = cls(request, deliver, SteeringState(len(request.prompt_token_ids)), score_only=score_only)
        for index in range(1 if score_only else request.n):
            stream = random.Random(None if seed is None else f"{seed}/{index}")
            sequence = Sequence(group, index, list(request.prompt_token_ids), random=stream)
            sequence.grammar = None if grammar is None else grammar.begin()
            group.sequences.append(sequence)
        return group

    @property
    def scores_prompt(self) -> bool:
        """Whether the last segment's pass must give log-probabilities of the prompt: once, though a completion be prefilled again."""
        return self.request.sampling.prompt_logprobs is not None and not self.prefilled

    @property
    def finished(self) -> bool:
        return all(sequence.phase is Phase.FINISHED for sequence in self.sequences)
