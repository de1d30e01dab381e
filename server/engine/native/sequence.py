"""The running state of one completion. No torch here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from server.engine.base import FinishReason, GenerationRequest, TokenEvent
from steering.decision import SteeringDecision

Deliver = Callable[[TokenEvent | SteeringDecision | Exception], None]


class Phase(Enum):
    """Where a sequence is: not yet admitted, admitted and to be prefilled, generating, or done."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Completion `index` of a request: its tokens, its row in the KV cache, and its own random stream.

    `slot` is 0-based in the KV cache; the steering table keeps its row 0 for zeros, so there it is `slot + 1`.
    """

    group: SequenceGroup
    index: int
    token_ids: list[int]
    phase: Phase = Phase.WAITING
    slot: int = -1
    finish_reason: FinishReason | None = None
    steered: bool = False
    random: random.Random = field(default_factory=random.Random)

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


@dataclass(eq=False)
class SequenceGroup:
    """A request in flight: its n sequences share one prefill and one decision.

    `score_only`: stop after the decision. `deliver` hands a result to whoever waits for the request.
    """

    request: GenerationRequest
    deliver: Deliver
    sequences: list[Sequence] = field(default_factory=list)
    score_only: bool = False
    decision: SteeringDecision | None = None

    @classmethod
    def of(cls, request: GenerationRequest, deliver: Deliver, *, score_only: bool = False) -> SequenceGroup:
        """A waiting group of `request.n` sequences. With a seed, each completion's random stream follows from seed and index."""
        seed = request.sampling.seed
        group = cls(request, deliver, score_only=score_only)
        for index in range(1 if score_only else request.n):
            stream = random.Random(None if seed is None else f"{seed}/{index}")
            group.sequences.append(Sequence(group, index, list(request.prompt_token_ids), random=stream))
        return group

    @property
    def finished(self) -> bool:
        return all(sequence.phase is Phase.FINISHED for sequence in self.sequences)
