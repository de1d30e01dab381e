"""What a request asks of steering, and what steering decided: plain data, no torch.

A `ProfileActivation` is one profile switched on for one request, with every option resolved (request over header over
alias over profile default). A `ProfileDecision` is what that profile did; a `SteeringDecision` sums the profiles up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

GateMode = Literal["auto", "open", "closed"]
Positions = Literal["all", "last"]
StrengthSource = Literal["request", "header", "profile"]
Reason = Literal[
    "gate_open",
    "gate_closed",
    "strength_zero",
    "forced_open",
    "forced_closed",
    "opted_out",
    "no_profile",
    "shadow",
    "non_finite",
]

# When several profiles act on one request, the request's reason is the first of these that any profile reports.
REASON_PRECEDENCE: tuple[Reason, ...] = (
    "non_finite",
    "gate_open",
    "forced_open",
    "shadow",
    "strength_zero",
    "forced_closed",
    "gate_closed",
)


@dataclass(frozen=True)
class ProfileActivation:
    """One profile switched on for one request. `strength` is the absolute λ; 0 computes and reports but changes nothing.

    `version`: the profile's, so that a request keeps the one it started with; empty: the one that is loaded.
    """

    profile: str
    strength: float
    strength_source: StrengthSource = "profile"
    gate: GateMode = "auto"
    positions: Positions = "all"
    shadow: bool = False
    version: str = ""


@dataclass(frozen=True)
class SteeringOptions:
    """All that a request asks of steering. `opted_out`: the client sent `steer_profiles: []` (or used `MODEL:unsteered`)."""

    activations: tuple[ProfileActivation, ...] = ()
    opted_out: bool = False


@dataclass(frozen=True)
class ProfileDecision:
    """What one profile did to one request. Of a profile with several layers, `layer`, `vector_norm` and `relative_norm` are the
    first one's.

    `fired` means gate > 0; `applied` means the numbers were changed. `relative_norm` = |λ|·g·‖v‖/‖h_q‖, the dose.
    `energy_ratio`, `threshold` and `tail` are None where the profile's gate has none; `routing` and `residual_norm`
    where its experts have none. `calibration_rank`: see `QuantileGate.calibration_rank`; for the operator only.
    """

    name: str
    version: str
    method: str
    layer: int
    positions: Positions
    strength: float
    strength_source: StrengthSource
    gate: float
    fired: bool
    applied: bool
    reason: Reason
    relative_norm: float
    vector_norm: float
    energy_ratio: float | None = None
    threshold: float | None = None
    tail: float | None = None
    routing: tuple[float, ...] | None = None
    residual_norm: float | None = None
    calibration_rank: float | None = None


@dataclass(frozen=True)
class SteeringDecision:
    """What steering did to one prompt. `compute_ms`: time spent on gates and vectors in the step that decided."""

    applied: bool
    reason: Reason
    profiles: tuple[ProfileDecision, ...] = ()
    compute_ms: float = 0.0


def decide_profile(
    activation: ProfileActivation,
    *,
    version: str,
    method: str,
    layer: int,
    gate: float,
    vector_norm: float,
    state_norm: float,
    energy_ratio: float | None = None,
    threshold: float | None = None,
    tail: float | None = None,
    routing: tuple[float, ...] | None = None,
    residual_norm: float | None = None,
    calibration_rank: float | None = None,
) -> ProfileDecision:
    """Name what happened to one profile from the numbers that its gate and experts computed.

    Args:
        gate: g after the gate mode, its floor and the finiteness check; NaN stands for "not finite".
        vector_norm, state_norm: ‖v‖ and ‖h_q‖.
    """
    reason: Reason
    finite = math.isfinite(gate) and math.isfinite(vector_norm)
    fired = finite and gate > 0
    if not finite:
        reason = "non_finite"
    elif activation.gate == "closed":
        reason = "forced_closed"
    elif not fired:
        reason = "gate_closed"
    elif activation.shadow:
        reason = "shadow"
    elif activation.strength == 0:
        reason = "strength_zero"
    else:
        reason = "forced_open" if activation.gate == "open" else "gate_open"
    applied = reason in ("gate_open", "forced_open")
    dose = abs(activation.strength) * gate * vector_norm / max(state_norm, 1e-12) if finite else 0.0
    return ProfileDecision(
        name=activation.profile,
        version=version,
        method=method,
        layer=layer,
        positions=activation.positions,
        strength=activation.strength,
        strength_source=activation.strength_source,
        gate=gate if finite else 0.0,
        fired=fired,
        applied=applied,
        reason=reason,
        relative_norm=dose if math.isfinite(dose) else 0.0,
        vector_norm=vector_norm if math.isfinite(vector_norm) else 0.0,
        energy_ratio=energy_ratio,
        threshold=threshold,
        tail=tail,
        routing=routing,
        residual_norm=residual_norm,
        calibration_rank=calibration_rank,
    )


def combine(
    options: SteeringOptions, profiles: tuple[ProfileDecision, ...], compute_ms: float = 0.0
) -> SteeringDecision:
    """Sum the profiles' decisions up into the request's: applied if any is; the reason that `REASON_PRECEDENCE` puts first."""
    if not profiles:
        return SteeringDecision(False, "opted_out" if options.opted_out else "no_profile")
    reasons = {profile.reason for profile in profiles}
    reason = next(r for r in REASON_PRECEDENCE if r in reasons)
    return SteeringDecision(any(p.applied for p in profiles), reason, profiles, compute_ms)
