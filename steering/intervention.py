"""The intervention: H ← H + λ·g(h_q)·v(h_q) at a layer's output, for many sequences in one forward pass.

An engine packs its rows, T tokens of many sequences, and hands over a `StepPlan`: which rows are a prompt's last token
(their states are the queries), and which slot of a dense table each row belongs to. At the site, inside the pass, the
queries are read, their vectors written to the table, and each row gets its slot's vector added. Slot 0 is a zero row, so
a row that is not steered gets exactly 0. A vector costs a table row per sequence, never a configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steering.architecture import decoder_layers
from steering.decision import (
    ProfileActivation,
    ProfileDecision,
    SteeringDecision,
    SteeringOptions,
    combine,
    decide_profile,
)
from steering.errors import SteeringError
from steering.profile import SteeringProfile


@dataclass(frozen=True)
class Query:
    """One prompt whose last token is in this pass: its packed `row`, its sequence's table `slot` (≥ 1), what it asks for."""

    row: int
    slot: int
    options: SteeringOptions


@dataclass(frozen=True)
class StepPlan:
    """One forward pass, as steering sees it.

    Attributes:
        queries: prompts that decide in this pass.
        row_slots: (T,) int64, the table row whose vector each packed row gets: 0 = none; a sequence's `slot` for its
            prompt's last token and all generated tokens; `Intervention.prompt_row(slot)` for the prompt's other tokens.
            None if no row gets any.
    """

    queries: tuple[Query, ...] = ()
    row_slots: Tensor | None = None


@dataclass
class _Site:
    """One layer's output: the profiles that act there, and the vectors they wrote, in the model's dtype.

    `table`: (1 + 2·num_slots, d). Row 0 is zero; row `slot` sums all of the sequence's profiles; row num_slots + slot
    only those whose positions are "all", for the prompt's tokens before its last.
    """

    layer: int
    profiles: list[SteeringProfile]
    table: Tensor


@dataclass
class _Reading:
    """What one profile computed for its queries of this pass; `numbers`: (n, 5 + K) float32: gate, energy ratio, ‖v‖, ‖h_q‖, ‖U_res β‖, α."""

    profile: SteeringProfile
    queries: list[int]
    activations: list[ProfileActivation]
    numbers: Tensor


@dataclass
class StepRecord:
    """What a pass decided. Filled on the device during the pass; `decisions` copies it to the host, once."""

    plan: StepPlan
    readings: list[_Reading] = field(default_factory=list)
    compute_s: float = 0.0

    def decisions(self) -> list[SteeringDecision]:
        """One decision for each of the plan's queries, in their order.

        Raises SteeringError where a profile that a query asked for never read its state: the pass was not steered.
        """
        rows: list[dict[str, ProfileDecision]] = [{} for _ in self.plan.queries]
        for reading in self.readings:
            for query, activation, numbers in zip(
                reading.queries, reading.activations, reading.numbers.tolist(), strict=True
            ):
                rows[query][activation.profile] = _decision(reading.profile, activation, numbers)
        for query, row in zip(self.plan.queries, rows, strict=True):
            for activation in query.options.activations:
                if activation.profile not in row:
                    raise SteeringError(
                        f"profile {activation.profile!r} does not steer this model as it should: its layer's hook was never run."
                    )
        compute_ms = 1000 * self.compute_s
        return [
            combine(query.options, tuple(row[a.profile] for a in query.options.activations), compute_ms)
            for query, row in zip(self.plan.queries, rows, strict=True)
        ]


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
    )


class Intervention:
    """Steers one model with a fixed set of profiles: one forward hook per site, fed by an explicit plan per pass.

    Args:
        model: a transformers decoder.
        profiles: checked against the model here; names must differ. Raises ProfileError.
        num_slots: how many sequences may hold a vector at once; slots are 1 … num_slots.
    """

    def __init__(self, model: nn.Module, profiles: Sequence[SteeringProfile], num_slots: int) -> None:
        parameter = model.get_input_embeddings().weight
        self._layers = decoder_layers(model)
        self._num_slots = num_slots
        for profile in profiles:
            profile.check_model(model)
        by_layer: dict[int, list[SteeringProfile]] = {}
        for profile in profiles:
            by_layer.setdefault(profile.layer, []).append(profile.to(parameter.device))
        self._sites = []
        for layer, found in sorted(by_layer.items()):
            shape = (1 + 2 * num_slots, found[0].manifest.model.hidden_size)
            table = torch.zeros(shape, dtype=model.dtype, device=parameter.device)
            self._sites.append(_Site(layer, found, table))
        self._record: StepRecord | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the model inside this context and gone after it, whatever happens."""
        with ExitStack() as stack:
            for site in self._sites:
                handle = self._layers[site.layer].register_forward_hook(self._hook(site))
                stack.callback(handle.remove)
            yield

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[StepRecord]:
        """Steer the forward passes made inside this context by `plan`; outside any, the hooks do nothing."""
        self._record = StepRecord(plan)
        try:
            yield self._record
        finally:
            self._record = None

    def prompt_row(self, slot: int) -> int:
        """The table row of a sequence for its prompt's tokens before the last."""
        return self._num_slots + slot

    def copy_slot(self, source: int, targets: Sequence[int]) -> None:
        """Give the generated tokens of `targets` the vectors of `source`: completions of one prompt share its decision."""
        for site in self._sites:
            site.table[list(targets)] = site.table[source].clone()

    def _hook(self, site: _Site):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]):
            record = self._record
            if record is None or (not record.plan.queries and record.plan.row_slots is None):
                return None
            states = output if isinstance(output, Tensor) else output[0]  # (..., T, d)
            flat = states.view(-1, states.shape[-1])
            if record.plan.queries:
                started = time.perf_counter()
                self._read(site, flat, record)
                record.compute_s += time.perf_counter() - started
            if record.plan.row_slots is None:
                return None
            steered = (flat + site.table[record.plan.row_slots]).view_as(states)
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        return hook

    def _read(self, site: _Site, flat: Tensor, record: StepRecord) -> None:
        """Write λ·g·v of each of the pass's queries into the site's table, and the numbers into the record."""
        queries = record.plan.queries
        site.table[[row for q in queries for row in (q.slot, self.prompt_row(q.slot))]] = 0
        for profile in site.profiles:
            asked = [
                (i, q, a) for i, q in enumerate(queries) for a in q.options.activations if a.profile == profile.name
            ]
            if not asked:
                continue
            states = flat[[q.row for _, q, _ in asked]].float()  # (n, d)
            activations = [a for _, _, a in asked]
            gate, ratio = profile.gate(states)
            forced = torch.tensor([_FORCED[a.gate] for a in activations], device=flat.device)
            gate = torch.where(forced.isnan(), gate, forced)
            vector, routing, residual_norm = profile.experts(states)
            finite = vector.isfinite().all(-1) & gate.isfinite()
            strength = torch.tensor([0.0 if a.shadow else a.strength for a in activations], device=flat.device)
            dose = torch.where(finite[:, None], (strength * gate)[:, None] * vector, 0.0)
            dose = dose.to(site.table.dtype)
            everywhere = [i for i, a in enumerate(activations) if a.positions == "all"]
            slots = [q.slot for _, q, _ in asked]
            site.table[slots] += dose
            site.table[[self.prompt_row(slots[i]) for i in everywhere]] += dose[everywhere]
            nothing = torch.zeros_like(gate)
            columns = [
                torch.where(finite, gate, torch.nan),
                nothing if ratio is None else ratio,
                vector.norm(dim=-1),
                states.norm(dim=-1),
                nothing if residual_norm is None else residual_norm,
            ]
            numbers = torch.stack(columns, dim=1)
            if routing is not None:
                numbers = torch.cat([numbers, routing], dim=1)
            record.readings.append(_Reading(profile, [i for i, _, _ in asked], activations, numbers))


_FORCED = {"auto": math.nan, "open": 1.0, "closed": 0.0}
