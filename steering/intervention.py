"""The intervention: H ← H + λ·g(h_q)·v(h_q) at a layer's output, for many sequences in one forward pass.

A model is cut at its sites, the layers at whose output profiles act. An engine runs a prompt's tokens up to a site, lets the
site read the last one's state, and runs on with what the site adds: a `Dose`, one vector per sequence. While decoding, the
doses of all running sequences lie in one dense table, so a step costs one gather and one add, however many vectors differ.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steering.architecture import text_config
from steering.decision import ProfileActivation, ProfileDecision, SteeringOptions, decide_profile
from steering.experts import ConstantVector
from steering.gate import AlwaysOpenGate, QuantileGate
from steering.profile import SteeringProfile

_FORCED = {"auto": math.nan, "open": 1.0, "closed": 0.0}


@dataclass(frozen=True)
class Dose:
    """What a site adds to one sequence, the sum of its profiles' λ·g·v: (d,) each, in the model's dtype.

    Attributes:
        prompt: to the prompt's tokens before its last; None where all profiles act at positions "last".
        answer: to the prompt's last token and to all generated ones.
        key: a hash of both; equal keys mean equal vectors, bit for bit.
        uniform: every position gets the same, wherever the prompt ends.
    """

    prompt: Tensor | None
    answer: Tensor
    key: bytes
    uniform: bool

    @classmethod
    def of(cls, prompt: Tensor | None, answer: Tensor) -> Dose:
        """A dose and its key. Waits for the device."""
        parts = [answer] if prompt is None or prompt is answer else [answer, prompt]
        raw = b"".join(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        return cls(prompt, answer, hashlib.blake2b(raw, digest_size=16).digest(), prompt is answer)

    def add(self, states: Tensor, start: int, num_prompt_tokens: int) -> Tensor:
        """(S, d) states of the positions from `start` on, with the dose added; `states` stay as they are."""
        if self.uniform:
            return states + self.answer
        states = states.clone()
        answer_from = min(max(num_prompt_tokens - 1 - start, 0), len(states))
        if self.prompt is not None:
            states[:answer_from] += self.prompt
        states[answer_from:] += self.answer
        return states


@dataclass(frozen=True)
class Reading:
    """What one site made of one query: a decision for each profile that was asked for here, and the dose (None: nothing is added)."""

    profiles: tuple[ProfileDecision, ...]
    dose: Dose | None
    compute_ms: float


class Site:
    """One layer's output, the profiles that act there, and the doses of the sequences that are being decoded.

    A profile with vectors for several layers acts at a site for each, with the same strength, gate mode, positions and
    shadow. Its first site alone reports it, so it is decided once and its `vector_norm` and `relative_norm` are those of the
    first layer's vector at the first site; a further site reports it only if its own vector is not finite, in the first
    one's place.

    Attributes:
        profiles: those that act here; may be replaced between two readings. Several versions of one name may be among them.
        table: (1 + num_slots, d), the model's dtype. Row 0 is zero; row 1 + slot is what the slot's answer gets.
    """

    def __init__(self, layer: int, profiles: list[SteeringProfile], table: Tensor) -> None:
        self.layer = layer
        self.profiles = profiles
        self.table = table

    def read(self, states: Tensor, options: Sequence[SteeringOptions]) -> list[Reading]:
        """Gate and vector of each query: (n, d) states of n prompts' last tokens, and what each asks for. Waits for the device.

        A profile that could not compute a finite vector is reported as `non_finite` and adds nothing: it is the caller who
        must not go on.
        """
        started = time.perf_counter()
        decisions: list[list[ProfileDecision]] = [[] for _ in options]
        # Vectors that act, and whether on the whole prompt.
        doses: list[list[tuple[Tensor, bool]]] = [[] for _ in options]
        for profile in self.profiles:
            asked = [(i, a) for i, o in enumerate(options) for a in o.activations if _means(a, profile)]
            if not asked:
                continue
            activations = [a for _, a in asked]
            mine = states if len(asked) == len(states) else states[[i for i, _ in asked]]
            vectors, numbers = _act(profile, activations, mine.float())
            for (i, activation), vector, row in zip(asked, vectors.to(self.table.dtype), numbers.tolist(), strict=True):
                decision = _decision(profile, activation, row)
                if profile.layer == self.layer or decision.reason == "non_finite":
                    decisions[i].append(decision)
                if decision.applied:
                    doses[i].append((vector, activation.positions == "all"))
        summed = [_sum(found) for found in doses]
        compute_ms = 1000 * (time.perf_counter() - started)
        return [
            Reading(tuple(found), dose, compute_ms if found or dose is not None else 0.0)
            for found, dose in zip(decisions, summed, strict=True)
        ]

    def foretell(self, options: SteeringOptions) -> Reading | None:
        """What this site adds for `options`, where that is the same for every query; None where the query decides.

        Of the reading's profiles only what does not depend on the query means anything.
        """
        if all(_is_fixed(a, p) for p in self.profiles for a in options.activations if _means(a, p)):
            return self.read(self.table.new_zeros(1, self.table.shape[1]), [options])[0]
        return None

    def hold(self, slot: int, dose: Dose | None) -> None:
        """Keep the dose of the sequence in `slot` for its decode steps."""
        if dose is not None:
            self.table[1 + slot] = dose.answer


def _means(activation: ProfileActivation, profile: SteeringProfile) -> bool:
    return activation.profile == profile.name and activation.version in ("", profile.version)


def _is_fixed(activation: ProfileActivation, profile: SteeringProfile) -> bool:
    """Whether a profile adds the same to every query, perhaps nothing."""
    if activation.shadow or activation.strength == 0 or activation.gate == "closed":
        return True
    always = activation.gate == "open" or isinstance(profile.gate, AlwaysOpenGate)
    return always and isinstance(profile.experts, ConstantVector)


def _act(profile: SteeringProfile, activations: list[ProfileActivation], states: Tensor) -> tuple[Tensor, Tensor]:
    """λ·g·v of each query, (n, d) float32, and (n, 5 + K) numbers: gate, energy ratio, ‖v‖, ‖h_q‖, ‖U_res β‖, α.

    Where v or g is not finite the gate among the numbers is NaN.
    """
    gate, ratio = profile.gate(states)
    if any(a.gate != "auto" for a in activations):
        forced = torch.tensor([_FORCED[a.gate] for a in activations], device=states.device)
        gate = torch.where(forced.isnan(), gate, forced)
    vector, routing, residual_norm = profile.experts(states)
    strength = torch.tensor([0.0 if a.shadow else a.strength for a in activations], device=states.device)
    norms = torch.linalg.vector_norm(vector, dim=-1)  # not finite where the vector is not
    nothing = torch.zeros_like(gate)
    columns = [
        torch.where(norms.isfinite(), gate, torch.nan),
        nothing if ratio is None else ratio,
        norms,
        torch.linalg.vector_norm(states, dim=-1),
        nothing if residual_norm is None else residual_norm,
    ]
    numbers = torch.stack(columns, dim=1)
    return (strength * gate)[:, None] * vector, numbers if routing is None else torch.cat([numbers, routing], dim=1)


def _sum(doses: list[tuple[Tensor, bool]]) -> Dose | None:
    """The dose of a query from its acting profiles' vectors, each with whether it acts on the whole prompt."""
    if not doses:
        return None
    everywhere = [vector for vector, whole in doses if whole]
    answer = sum((vector for vector, _ in doses[1:]), doses[0][0])
    if len(everywhere) == len(doses):
        return Dose.of(answer, answer)
    return Dose.of(sum(everywhere[1:], everywhere[0]) if everywhere else None, answer)


def _decision(profile: SteeringProfile, activation: ProfileActivation, numbers: list[float]) -> ProfileDecision:
    gate, ratio, vector_norm, state_norm, residual_norm, *routing = numbers
    spec = profile.manifest.gate
    return decide_profile(
        activation,
        version=profile.version,
        method=profile.manifest.method,
        layer=profile.layer,
        gate=gate,
        vector_norm=vector_norm,
        state_norm=state_norm,
        energy_ratio=ratio if spec.kind == "quantile" and math.isfinite(ratio) else None,
        threshold=spec.threshold,
        tail=spec.tail,
        routing=tuple(routing) or None,
        residual_norm=residual_norm if routing else None,
        calibration_rank=profile.gate.calibration_rank(ratio) if isinstance(profile.gate, QuantileGate) else None,
    )


def sites_of(
    model: nn.Module, profiles: Sequence[SteeringProfile], num_slots: int, before: Sequence[Site] = ()
) -> list[Site]:
    """The sites of `profiles` on a transformers decoder, from the lowest layer up. Raises ProfileError.

    Args:
        num_slots: how many sequences may hold a dose at once.
        before: sites that were; those whose layers are still wanted are changed in place, and keep what they hold.
    """
    for profile in profiles:
        profile.check_model(model)
    size, device = text_config(model).hidden_size, model.get_input_embeddings().weight.device
    kept = {site.layer: site for site in before}
    sites = []
    for layer, found in profiles_by_layer(profiles, device).items():
        table = torch.zeros(1 + num_slots, size, dtype=model.dtype, device=device)
        site = kept.get(layer) or Site(layer, found, table)
        site.profiles = found
        sites.append(site)
    return sites


def profiles_by_layer(
    profiles: Sequence[SteeringProfile], device: torch.device | str
) -> dict[int, list[SteeringProfile]]:
    """What acts at each layer, from the lowest up, on `device`."""
    by_layer: dict[int, list[SteeringProfile]] = {}
    for profile in profiles:
        for layer, part in profile.to(device).by_layer().items():
            by_layer.setdefault(layer, []).append(part)
    return dict(sorted(by_layer.items()))
