"""The seam between evaluation and whatever answers: no engine here.

`Answerer` is what the strength sweep and `finesteer evaluate` ask; the server's lab gives one that runs the native engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from steering.decision import SteeringDecision, SteeringOptions
from steering.training.data import Query

PLAIN = SteeringOptions()
"""Asks nothing of steering: the plain model."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer. `finished`: the model ended it itself; `token_ids` are without the end token."""

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    decision: SteeringDecision

    @property
    def fired(self) -> bool:
        """Whether any profile's gate was above 0."""
        return any(profile.fired for profile in self.decision.profiles)

    @property
    def dose(self) -> float:
        """The largest relative norm that any profile applied; 0 where none acted."""
        return max((p.relative_norm for p in self.decision.profiles if p.applied), default=0.0)


class Answerer(Protocol):
    """Answers queries, batched, under any steering that its loaded profiles allow."""

    def answer(
        self, queries: Sequence[Query], steering: SteeringOptions = PLAIN, *, max_tokens: int = 64, label: str = ""
    ) -> list[Answer]:
        """A greedy answer to each query, in their order. `label` names the progress bar; empty shows none."""

    def logprobs(
        self, queries: Sequence[Query], answers: Sequence[str], steering: SteeringOptions = PLAIN, *, label: str = ""
    ) -> list[tuple[float, ...]]:
        """log p of each token of each answer, given its query (and under the steering that the query gets)."""

    def ms_per_token(self, queries: Sequence[Query], steering: SteeringOptions = PLAIN) -> float:
        """Median decode time per token, each query alone; NaN where none could be timed."""
