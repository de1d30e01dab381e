"""What the server asks of vLLM's workers for a request, and what they report: plain data that vLLM carries both ways.

An order travels in `SamplingParams.extra_args`, which only this server sets; a report comes back with a request's first token.
No torch and no vLLM here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steering.decision import ProfileActivation, ProfileDecision, SteeringOptions

KEY = "finesteer"


@dataclass(frozen=True)
class Addition:
    """What one layer's output gets: raw values in the model's dtype, d of them each.

    Attributes:
        prompt: for the prompt's tokens before its last; None: nothing.
        answer: for the prompt's last token and all that follow.
    """

    layer: int
    prompt: bytes | None
    answer: bytes


@dataclass(frozen=True)
class Order:
    """What to do for one request.

    Attributes:
        read: layers whose output at the prompt's last token is to be reported, as it is before anything is added there.
        add: at most one for a layer.
        decide: what the request asks of steering, for workers that decide by themselves (one-pass mode); None: they do not.
    """

    read: tuple[int, ...] = ()
    add: tuple[Addition, ...] = ()
    decide: SteeringOptions | None = None

    def to_args(self) -> dict[str, Any]:
        """For `extra_args`."""
        add = [[a.layer, a.prompt, a.answer] for a in self.add]
        decide = None if self.decide is None else json.dumps(asdict(self.decide))
        return {KEY: [list(self.read), add, decide]}

    @classmethod
    def from_args(cls, extra_args: Mapping[str, Any] | None) -> Order | None:
        """None where there is none."""
        found = (extra_args or {}).get(KEY)
        if found is None:
            return None
        read, add, decide = found
        return cls(tuple(read), tuple(Addition(*a) for a in add), None if decide is None else _options(decide))


@dataclass(frozen=True)
class Report:
    """What was done for one request in the step that held its prompt's last token.

    Attributes:
        states: by layer, d float32 values, raw.
        added: the layers at which something is added to this request.
        decided: the profiles' decisions, and the milliseconds that they took, where the workers decided.
    """

    states: Mapping[int, bytes]
    added: tuple[int, ...]
    decided: tuple[tuple[ProfileDecision, ...], float] | None = None

    def to_params(self) -> dict[str, Any]:
        """For the field of vLLM's outputs that carries it."""
        decided = None
        if self.decided is not None:
            profiles, compute_ms = self.decided
            decided = json.dumps([[asdict(profile) for profile in profiles], compute_ms])
        return {KEY: [list(self.states.items()), list(self.added), decided]}

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Report | None:
        """None where there is none."""
        found = (params or {}).get(KEY)
        if found is None:
            return None
        states, added, decided = found
        return cls(dict(states), tuple(added), None if decided is None else _decided(decided))


def _options(text: str) -> SteeringOptions:
    found = json.loads(text)
    return SteeringOptions(tuple(ProfileActivation(**a) for a in found["activations"]), found["opted_out"])


def _decided(text: str) -> tuple[Sequence[ProfileDecision], float]:
    profiles, compute_ms = json.loads(text)
    routed = [p | {"routing": None if p["routing"] is None else tuple(p["routing"])} for p in profiles]
    return tuple(ProfileDecision(**p) for p in routed), compute_ms
