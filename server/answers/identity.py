"""What all chunks of an answer share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.answers.generation import Generation
from server.wire.completions import CompletionTokensDetails, PromptTokensDetails, Usage
from server.wire.steering import MetadataLevel, SteeringReport, steering_report


@dataclass(frozen=True)
class AnswerIdentity:
    """Id, time, names, and how much the client is told of steering."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    metadata: MetadataLevel
    service_tier: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that every chunk and answer repeats."""
        repeated = {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
        return repeated if self.service_tier is None else repeated | {"service_tier": self.service_tier}

    def steering(self, generations: Sequence[Generation], *, as_list: bool = False) -> dict[str, Any]:
        """`{"steering": …}`, or nothing where the client is to see none. `as_list`: one object a prompt, in order."""
        decisions = [generation.decision for generation in generations if generation.decision is not None]
        reports = [steering_report(decision, self.metadata) for decision in decisions]
        shown: list[SteeringReport] = [report for report in reports if report is not None]
        if not shown:
            return {}
        return {"steering": shown if as_list else shown[0]}


def usage(generations: Sequence[Generation]) -> Usage:
    """Token counts of all prompts together."""
    prompt = sum(generation.prompt_tokens for generation in generations)
    completion = sum(generation.completion_tokens for generation in generations)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(item.cached_tokens for item in generations)),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )
