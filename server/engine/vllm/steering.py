"""What steering decides about a request, from the states that vLLM's workers report, pass by pass. No vLLM here.

Sites decide from the lowest layer up, since a vector changes what the sites above it see: each that adds something costs another
pass, but for those whose vector no query changes, which act from the first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from server.engine.base import GenerationError, GenerationRequest
from server.engine.vllm.doses import addition_of, bearable, salt_of
from server.engine.vllm.orders import Addition, Order, Report
from steering.decision import SteeringDecision, SteeringOptions, combine
from steering.intervention import Dose, Reading, Site, profiles_by_layer
from steering.profile import SteeringProfile

MAX_REMEMBERED = 1024  # prompts whose decision and vectors are kept


@dataclass(frozen=True)
class Decided:
    """The decision, and what it adds at each layer."""

    decision: SteeringDecision
    additions: tuple[Addition, ...] = ()

    @property
    def order(self) -> Order | None:
        """For a pass that decides nothing."""
        return Order(add=self.additions) if self.additions else None


class Steering:
    """The profiles as the server applies them. All calls from the event loop.

    Args:
        hidden_size, dtype: the model's.
    """

    def __init__(self, profiles: Sequence[SteeringProfile], hidden_size: int, dtype: torch.dtype) -> None:
        self._table = torch.zeros(1, hidden_size, dtype=dtype)
        self._remembered: OrderedDict[tuple[str, bytes, SteeringOptions], Decided] = OrderedDict()
        self.set_profiles(profiles)

    def set_profiles(self, profiles: Iterable[SteeringProfile]) -> None:
        """Passes under way keep what they began with."""
        by_layer = profiles_by_layer(list(profiles), "cpu")
        self._sites = [Site(layer, found, self._table) for layer, found in by_layer.items()]

    def passes(self, request: GenerationRequest) -> Passes:
        """The way to a decision about a request, whose profiles' versions are pinned."""
        return Passes(self._sites, request)

    def recall(self, request: GenerationRequest) -> Decided | None:
        """What was decided about the same owner's same prompt under the same options; it took no time now."""
        key = _key(request)
        found = self._remembered.get(key)
        if found is not None:
            self._remembered.move_to_end(key)
        return found

    def remember(self, request: GenerationRequest, decided: Decided) -> None:
        """Keep it for whoever asks the same again."""
        decision = replace(decided.decision, compute_ms=0.0)
        self._remembered[_key(request)] = replace(decided, decision=decision)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)


class Passes:
    """One request's passes: submit `order` under `salt`, then give the report to `read`, until that says that the pass stands."""

    def __init__(self, sites: Sequence[Site], request: GenerationRequest) -> None:
        self._options = options = request.steering
        asked = {(a.profile, a.version) for a in options.activations}
        mine = [site for site in sites if any((p.name, p.version) in asked for p in site.profiles)]
        foretold = {site.layer: site.foretell(options) for site in mine}
        fixed = {layer: r for layer, r in foretold.items() if r is not None and (r.dose is None or bearable(r.dose))}
        self._sites = mine
        self._pending = [site for site in mine if site.layer not in fixed]
        self._fixed = [site for site in mine if site.layer in fixed]
        self._readings: dict[int, Reading] = {}
        self._doses: dict[int, Dose] = {layer: r.dose for layer, r in fixed.items() if r.dose is not None}

    @property
    def order(self) -> Order | None:
        """For the next pass; None where nothing is asked of steering."""
        read = tuple(site.layer for site in (*self._pending, *self._fixed))
        return Order(read, self._additions) if read or self._doses else None

    def read(self, report: Report | None) -> bool:
        """Whether the pass stands; else something is to be added that it did not add, and it must be done again.

        Raises GenerationError where the workers did not do what the order said, and where nobody could add what was decided.
        """
        if self.order is None:
            return True
        check_report(report, self._additions)
        while self._pending:
            site = self._pending.pop(0)
            reading = self._readings[site.layer] = self._reading(site, report)
            if reading.dose is not None:
                if not bearable(reading.dose):
                    raise self._unbearable()
                self._doses[site.layer] = reading.dose
                return False
        for site in self._fixed:
            self._readings[site.layer] = self._reading(site, report)
        return True

    @property
    def made(self) -> bool:
        """Whether nothing that is yet to be read changes the decision."""
        return len(self._readings) == len(self._sites)

    def decided(self) -> Decided:
        """What the sites decided that were read: all of them, once a pass stands or the decision is made."""
        readings = [self._readings[site.layer] for site in self._sites if site.layer in self._readings]
        profiles = tuple(profile for reading in readings for profile in reading.profiles)
        compute_ms = sum(reading.compute_ms for reading in readings)
        return Decided(combine(self._options, profiles, compute_ms), self._additions)

    def _unbearable(self) -> GenerationError:
        error = GenerationError(
            "steered as much as this the model's numbers would overflow; lower steer_strength", "non_finite_logits"
        )
        error.decision = self.decided().decision
        return error

    def _reading(self, site: Site, report: Report) -> Reading:
        state = torch.from_numpy(np.frombuffer(report.states[site.layer], np.float32).copy())
        return site.read(state[None], [self._options])[0]

    @property
    def _additions(self) -> tuple[Addition, ...]:
        return tuple(addition_of(layer, dose) for layer, dose in sorted(self._doses.items()))


def check_report(report: Report | None, additions: Sequence[Addition]) -> None:
    """Fail closed: raise GenerationError unless the workers say that they add what they were told to."""
    wanted = [addition.layer for addition in additions]
    if report is None or sorted(report.added) != wanted:
        raise steering_lost(report, wanted)


def steering_lost(report: Report | None, wanted: Sequence[int]) -> GenerationError:
    """For an answer that would not be steered at the layers `wanted`, as it should be."""
    told = "nothing" if report is None else f"layers {list(report.added)}"
    return GenerationError(
        f"vLLM's workers were to steer at layers {list(wanted)} and report {told}; the request was not answered",
        "steering_lost",
    )


def salt(request: GenerationRequest, additions: Sequence[Addition]) -> str | None:
    """The prefix cache's salt for a pass of a request: of its owner, and of what is added, where anything is."""
    parts = sorted(f"{a.profile}\0{a.version}" for a in request.steering.activations)
    if any(addition.prompt != addition.answer for addition in additions):
        parts.append(f"at {len(request.prompt_token_ids)}")  # where the answer's vector begins
    return salt_of(request.cache_owner, parts, additions)


def _key(request: GenerationRequest) -> tuple[str, bytes, SteeringOptions]:
    tokens = np.asarray(request.prompt_token_ids, np.int64).tobytes()
    return request.cache_owner, hashlib.blake2b(tokens, digest_size=16).digest(), request.steering
