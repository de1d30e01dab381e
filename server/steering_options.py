"""What a request asks of steering, settled: body over header over alias over default, within the operator's policy.

Pure: manifests and policies in, `SteeringOptions` out, or an error that names the field. Nothing is ever dropped silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from server.errors import ForbiddenError, InvalidRequestError
from server.wire.steering import METADATA_LEVELS, MetadataLevel, Mode, SteeringFields
from steering.decision import Positions, ProfileActivation, SteeringOptions, StrengthSource
from steering.manifest import ProfileManifest

Override = Literal["any", "raise_only", "none"]
STRENGTH_HEADER = "X-FineSteer-Strength"
PROFILES_HEADER = "X-FineSteer-Profiles"
UNSTEERED = "unsteered"
RESERVED = (UNSTEERED, "load", "unload")
_PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
T = TypeVar("T")


@dataclass(frozen=True)
class SteeringPolicy:
    """The operator's rules. Profiles that `overrides` or `modes` do not name are `any` and `enforce`.

    `any`: clients may change everything. `raise_only`: they may steer more, never less. `none`: they may change nothing.
    """

    max_strength: float = 20.0
    metadata_cap: MetadataLevel = "full"
    overrides: Mapping[str, Override] = field(default_factory=dict)
    modes: Mapping[str, Mode] = field(default_factory=dict)

    def override(self, profile: str) -> Override:
        return self.overrides.get(profile, "any")

    def mode(self, profile: str) -> Mode:
        return self.modes.get(profile, "enforce")

    def allows_without(self, missing: str) -> bool:
        """Whether a request may leave this profile out."""
        return self.override(missing) == "any"


@dataclass(frozen=True)
class SteeringDefaults:
    """What a request gets that says nothing. `profiles`: those that are active; None: all that are loaded. `strengths`: by
    name; the others' are their own manifests'."""

    profiles: tuple[str, ...] | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)

    def active(self, manifests: Mapping[str, ProfileManifest]) -> tuple[str, ...]:
        """The active profiles among those that are loaded, in loading order."""
        return tuple(name for name in manifests if self.profiles is None or name in self.profiles)

    def strength(self, manifest: ProfileManifest) -> float:
        return self.strengths.get(manifest.name, manifest.strength)


START_UP = SteeringDefaults()


@dataclass(frozen=True)
class SteeringHeaders:
    """The two request headers, as sent."""

    strength: str | None = None
    profiles: str | None = None


@dataclass(frozen=True)
class Resolved:
    """Settled options, and the kinds of override that the client used (for the metrics)."""

    options: SteeringOptions
    metadata: MetadataLevel
    overrides: frozenset[str]


def resolve(
    fields: SteeringFields,
    headers: SteeringHeaders,
    alias: tuple[str, ...] | None,
    manifests: Mapping[str, ProfileManifest],
    policy: SteeringPolicy,
    defaults: SteeringDefaults = START_UP,
) -> Resolved:
    """Settle every steering option of one request.

    Args:
        alias: the profiles that the model's name asks for (`()` for `MODEL:unsteered`), None for the plain name.
        manifests: the loaded profiles, in order.
    Raises:
        InvalidRequestError: an unknown profile, a strength over the limit, options that contradict each other.
        ForbiddenError: `steering_locked`, or more metadata than the operator gives out.
    """
    active, chosen_by = _profiles(fields, headers, alias, manifests, defaults)
    _check_left_out(active, manifests, policy, chosen_by)
    strengths = _strengths(fields, headers, active, manifests, policy, chosen_by)
    if fields.steer_gate == "open" and not active:
        raise InvalidRequestError(
            "steer_gate: no profile is active in this request, so there is no gate to open.", param="steer_gate"
        )
    activations = []
    for name in active:
        manifest = manifests[name]
        default = defaults.strength(manifest)
        strength, source = strengths.get(name, (default, "profile"))
        activation = ProfileActivation(
            profile=name,
            strength=strength,
            strength_source=source,
            gate=fields.steer_gate or "auto",
            positions=fields.steer_positions or manifest.positions,
            shadow=policy.mode(name) == "shadow",
            version=manifest.version,
        )
        _check_lock(activation, default, manifest.positions, policy.override(name))
        activations.append(activation)
    opted_out = not active and chosen_by != "default"
    return Resolved(
        SteeringOptions(tuple(activations), opted_out),
        _metadata(fields, policy),
        _kinds(fields, strengths, chosen_by, opted_out),
    )


def _profiles(
    fields: SteeringFields,
    headers: SteeringHeaders,
    alias: tuple[str, ...] | None,
    manifests: Mapping[str, ProfileManifest],
    defaults: SteeringDefaults,
) -> tuple[tuple[str, ...], str]:
    """The active profiles in loading order, and who chose them: a field's or header's name, `model`, or `default`."""
    if fields.steer_profiles is not None:
        names, chosen_by = tuple(fields.steer_profiles), "steer_profiles"
    elif headers.profiles is not None:
        names, chosen_by = tuple(filter(None, (name.strip() for name in headers.profiles.split(",")))), PROFILES_HEADER
    elif alias is not None:
        return alias, "model"
    else:
        return defaults.active(manifests), "default"
    _check_known(names, manifests, chosen_by)
    if len(set(names)) < len(names):
        raise InvalidRequestError(f"{chosen_by}: names a profile twice.", param=chosen_by)
    return tuple(name for name in manifests if name in names), chosen_by


def _check_known(names: tuple[str, ...], manifests: Mapping[str, ProfileManifest], param: str) -> None:
    for name in names:
        if name not in manifests:
            loaded = ", ".join(manifests) or "none"
            raise InvalidRequestError(
                f"{param}: no profile {name!r} is loaded. Loaded: {loaded}.", param=param, code="unknown_profile"
            )


def _check_left_out(
    active: tuple[str, ...], manifests: Mapping[str, ProfileManifest], policy: SteeringPolicy, chosen_by: str
) -> None:
    for name in manifests:
        if name not in active and not policy.allows_without(name):
            raise _locked(name, "be switched off", chosen_by)


def _strengths(
    fields: SteeringFields,
    headers: SteeringHeaders,
    active: tuple[str, ...],
    manifests: Mapping[str, ProfileManifest],
    policy: SteeringPolicy,
    chosen_by: str,
) -> dict[str, tuple[float, StrengthSource]]:
    """λ of each active profile that the client set, and whether the body or the header set it."""
    body, header = fields.steer_strength, _header_strength(headers.strength)
    strengths: dict[str, tuple[float, StrengthSource]] = {}
    for value, param, source in ((header, STRENGTH_HEADER, "header"), (body, "steer_strength", "request")):
        if value is None:
            continue
        by_name = value if isinstance(value, dict) else dict.fromkeys(active, value)
        _check_known(tuple(by_name), manifests, param)
        overruled = source == "header" and chosen_by == "steer_profiles"  # the body chose others than the header meant
        for name in by_name:
            if name not in active and not overruled:
                raise InvalidRequestError(
                    f"{param}: profile {name!r} is not active in this request. Name it in steer_profiles too.",
                    param=param,
                )
        if not active and not overruled and not isinstance(value, dict) and value != 0:
            raise InvalidRequestError(
                f"{param}: no profile is active in this request, so there is nothing to steer with. "
                "Send 0, or name a profile in steer_profiles.",
                param=param,
            )
        for strength in by_name.values() if isinstance(value, dict) else (value,):
            if abs(strength) > policy.max_strength:
                raise InvalidRequestError(
                    f"{param}: {strength:g} is over this server's limit of {policy.max_strength:g} (either sign).",
                    param=param,
                    code="strength_over_limit",
                )
        strengths |= {name: (strength, source) for name, strength in by_name.items() if name in active}
    return strengths


def _header_strength(text: str | None) -> float | dict[str, float] | None:
    """`4`, or `safety=4,truth=2`."""
    if text is None:
        return None
    if "=" not in text:
        return _number(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {name.strip(): _number(number) for name, _, number in pairs}


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequestError(
            f"{STRENGTH_HEADER}: must be a finite number, or NAME=NUMBER pairs with commas between, not {text[:40]!r}.",
            param=STRENGTH_HEADER,
        )
    return value


def _check_lock(activation: ProfileActivation, default: float, positions: Positions, override: Override) -> None:
    """Raise ForbiddenError where the activation asks for what `override` does not allow: the default strength and positions."""
    if override == "any":
        return
    strength = activation.strength
    strength_param = STRENGTH_HEADER if activation.strength_source == "header" else "steer_strength"
    rules = {
        strength_param: strength == default
        or (override == "raise_only" and math.copysign(1, default) * strength > abs(default)),
        "steer_gate": activation.gate == "auto" or (override == "raise_only" and activation.gate == "open"),
        "steer_positions": activation.positions == positions
        or (override == "raise_only" and activation.positions == "all"),
    }
    for param, allowed in rules.items():
        if not allowed:
            verb = "be lowered" if override == "raise_only" else "be changed"
            raise _locked(activation.profile, verb, param)


def _locked(profile: str, verb: str, param: str) -> ForbiddenError:
    return ForbiddenError(
        f"{param}: the operator of this server does not let profile {profile!r} {verb}. Leave {param} as it is by default.",
        param=param,
        code="steering_locked",
    )


def _metadata(fields: SteeringFields, policy: SteeringPolicy) -> MetadataLevel:
    cap = METADATA_LEVELS.index(policy.metadata_cap)
    if fields.steer_metadata is None:
        return METADATA_LEVELS[min(cap, METADATA_LEVELS.index("summary"))]
    if METADATA_LEVELS.index(fields.steer_metadata) > cap:
        raise ForbiddenError(
            f"steer_metadata: this server gives out {policy.metadata_cap!r} at most.",
            param="steer_metadata",
            code="steering_metadata_capped",
        )
    return fields.steer_metadata


def _kinds(
    fields: SteeringFields, strengths: Mapping[str, tuple[float, StrengthSource]], chosen_by: str, opted_out: bool
) -> frozenset[str]:
    used = {
        "strength": bool(strengths),
        "profiles": chosen_by != "default" and not opted_out,
        "opt_out": opted_out,
        "gate": fields.steer_gate not in (None, "auto"),
        "positions": fields.steer_positions is not None,
    }
    return frozenset(kind for kind, is_used in used.items() if is_used)


OVERRIDE_KINDS = ("strength", "profiles", "opt_out", "gate", "positions")


def profile_name_problem(name: str) -> str | None:
    """Why a profile cannot be served under this name; None where it can."""
    if _PROFILE_NAME.fullmatch(name) and name not in RESERVED:
        return None
    return (
        "a profile's name is 1 to 64 letters, digits, dots, dashes and underscores, "
        f"and not {UNSTEERED!r}, which is an alias of the model, nor load or unload, which are paths."
    )


def alias_profiles(requested: str, served: str, manifests: Mapping[str, ProfileManifest]) -> tuple[str, ...] | None:
    """What a model name asks for: None for the plain name, `()` for `:unsteered`, one profile for `:NAME`.

    Raises KeyError where the name is neither the model nor an alias of it.
    """
    if requested == served:
        return None
    base, _, name = requested.rpartition(":")
    if base == served and name == UNSTEERED:
        return ()
    if base == served and name in manifests:
        return (name,)
    raise KeyError(requested)


def aliases(
    served: str,
    manifests: Mapping[str, ProfileManifest],
    policy: SteeringPolicy,
    defaults: SteeringDefaults = START_UP,
) -> dict[str, tuple[str, ...]]:
    """Every model name and the profiles it stands for, without those that a locked profile makes impossible."""
    names = {served: defaults.active(manifests), f"{served}:{UNSTEERED}": ()}
    names |= {f"{served}:{name}": (name,) for name in manifests}
    return {
        name: active
        for name, active in names.items()
        if all(profile in active or policy.allows_without(profile) for profile in manifests)
    }
