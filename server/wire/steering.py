"""The wire extension: the five request fields, the `steering` object of a response, and the steering endpoints' bodies."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.wire.base import RequestModel, ResponseModel
from server.wire.parsing import shown
from steering.decision import GateMode, Positions, ProfileDecision, Reason, SteeringDecision, StrengthSource

Mode = Literal["enforce", "shadow"]
MetadataLevel = Literal["none", "summary", "full"]
METADATA_LEVELS: tuple[MetadataLevel, ...] = ("none", "summary", "full")


def _strength(value: Any) -> Any:
    """A finite number, or an object of them by profile; its own words, since a union's errors read badly."""
    if value is None:
        return value
    numbers = list(value.items()) if isinstance(value, dict) else [(None, value)]
    for name, number in numbers:
        where = f"[{name!r}]" if name is not None else ""
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise PydanticCustomError(
                "strength", f"must be a number or an object {{profile: number}}; {shown(number)}{where} is neither"
            )
        if (isinstance(number, int) and abs(number) > 10**6) or not math.isfinite(number):
            raise PydanticCustomError("strength", f"must be a finite number, not {shown(number)}{where}")
    return {name: float(number) for name, number in numbers} if isinstance(value, dict) else float(value)


Strength = Annotated[
    Any,
    BeforeValidator(_strength),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number"},
                {"type": "object", "additionalProperties": {"type": "number"}},
                {"type": "null"},
            ]
        }
    ),
]


class SteeringFields(RequestModel):
    """What a request may say about steering. Null, everywhere, is the same as not saying it."""

    steer_strength: Strength = Field(
        None, description="λ for every active profile, or by profile; 0 computes and reports but changes nothing."
    )
    steer_profiles: list[str] | None = Field(
        None, description="The profiles to activate; null = the server's default, [] = none (no gate is computed)."
    )
    steer_gate: GateMode | None = Field(None, description="`auto` decides per query; `open` and `closed` force it.")
    steer_positions: Positions | None = Field(
        None, description="`all` prompt positions, or the `last` one, and every generated token."
    )
    steer_metadata: MetadataLevel | None = Field(None, description="How much of the decision the response holds.")


class ProfileReport(ResponseModel):
    """What one profile did. The last four are sent with `steer_metadata: full` only."""

    name: str
    version: str
    method: str
    layer: int
    positions: Positions
    fired: bool
    gate: float
    energy_ratio: float | None
    threshold: float | None
    strength: float
    strength_source: StrengthSource
    relative_norm: float
    routing: list[float] | None = None
    residual_norm: float | None = None
    vector_norm: float | None = None
    tail: float | None = None


class SteeringReport(ResponseModel):
    """The `steering` object of a response. `compute_ms` is sent with `steer_metadata: full` only."""

    applied: bool
    reason: Reason
    profiles: list[ProfileReport]
    compute_ms: float | None = None


def steering_report(decision: SteeringDecision, level: MetadataLevel) -> SteeringReport | None:
    """The decision as the response shows it at `level`, numbers to six digits; None for `none`."""
    if level == "none":
        return None
    report: dict[str, Any] = {
        "applied": decision.applied,
        "reason": decision.reason,
        "profiles": [_profile_report(profile, level == "full") for profile in decision.profiles],
    }
    if level == "full":
        report["compute_ms"] = _rounded(decision.compute_ms)
    return SteeringReport(**report)


def _profile_report(profile: ProfileDecision, full: bool) -> ProfileReport:
    report: dict[str, Any] = {
        "name": profile.name,
        "version": profile.version,
        "method": profile.method,
        "layer": profile.layer,
        "positions": profile.positions,
        "fired": profile.fired,
        "gate": _rounded(profile.gate),
        "energy_ratio": _rounded(profile.energy_ratio),
        "threshold": _rounded(profile.threshold),
        "strength": profile.strength,
        "strength_source": profile.strength_source,
        "relative_norm": _rounded(profile.relative_norm),
    }
    if full:
        report["routing"] = None if profile.routing is None else [_rounded(weight) for weight in profile.routing]
        report["residual_norm"] = _rounded(profile.residual_norm)
        report["vector_norm"] = _rounded(profile.vector_norm)
        report["tail"] = _rounded(profile.tail)
    return ProfileReport(**report)


def _rounded(value: float | None) -> float | None:
    """Six significant digits; NaN and infinities, which JSON cannot hold, become null."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


class ProfileCard(ResponseModel):
    """A loaded profile, as `/v1/steering/profiles` shows it."""

    id: str
    object: Literal["steering.profile"]
    version: str
    description: str
    method: str
    model: str
    layer: int
    positions: Positions
    strength: float
    max_strength: float
    gate: dict[str, Any]
    experts: dict[str, Any]
    override: str
    mode: str
    metrics: dict[str, Any]


class LoadProfileRequest(RequestModel):
    """`POST /v1/steering/profiles/load`. Operators only: `source` is a path on the server, or a hub id."""

    name: str = Field(description="What requests call it. One that is loaded is replaced.")
    source: str = Field(description="A profile folder on the server's disk, or a hub repository's id.")
    mode: Mode | None = Field(
        None, description="`enforce`, or `shadow`: it decides and reports only; null = as before."
    )
    default: bool = Field(True, description="Whether it acts on requests that name no profiles.")


class UnloadProfileRequest(RequestModel):
    """`POST /v1/steering/profiles/unload`."""

    name: str


class UnloadedProfile(ResponseModel):
    """What was unloaded. Requests under way go on with it."""

    object: Literal["steering.profile.unloaded"]
    id: str
    version: str


class DefaultsRequest(RequestModel):
    """`PUT /v1/steering/defaults`: all of them at once; what is left out is as at start-up."""

    profiles: list[str] | None = Field(
        None, description="Active where a request names none; null = all that are loaded."
    )
    strengths: dict[str, float] = Field({}, description="Default strength by profile.")
    modes: dict[str, Mode] = Field({}, description="`enforce` or `shadow` by profile.")


class Defaults(ResponseModel):
    """The defaults in force, every loaded profile named."""

    object: Literal["steering.defaults"]
    profiles: list[str]
    strengths: dict[str, float]
    modes: dict[str, Mode]


class ProfileList(ResponseModel):
    """`GET /v1/steering/profiles`."""

    object: Literal["list"]
    data: list[ProfileCard]


class ScoreResponse(ResponseModel):
    """`POST /v1/steering/score`: the decision this prompt would get, always in full."""

    object: Literal["steering.score"]
    model: str
    prompt_tokens: int
    steering: SteeringReport
