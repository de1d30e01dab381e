"""What the operator may change while the server runs: the profiles' rules and defaults. No torch, no FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from server.errors import InvalidRequestError
from server.steering_options import SteeringDefaults, SteeringPolicy
from server.wire.steering import Mode
from steering.manifest import ProfileManifest


class SteeringSettings:
    """The rules in force. Each change makes new objects, so that a request sees the old ones or the new, never a mixture."""

    def __init__(self, policy: SteeringPolicy) -> None:
        self._start_up = self.policy = policy
        self.defaults = SteeringDefaults()
        self.changing = asyncio.Lock()  # held by whoever changes these or the engine's profiles

    def change(
        self,
        manifests: Mapping[str, ProfileManifest],
        profiles: list[str] | None,
        strengths: Mapping[str, float],
        modes: Mapping[str, Mode],
    ) -> None:
        """Set all three anew; what `modes` does not name is as at start-up. Raises InvalidRequestError, and changes nothing then.

        Args:
            manifests: the loaded profiles.
            profiles: active where a request names none; None: all.
        """
        policy = replace(self._start_up, modes={**self._start_up.modes, **modes})
        for param, names in (("profiles", profiles or ()), ("strengths", strengths), ("modes", modes)):
            for name in names:
                if name not in manifests:
                    raise InvalidRequestError(
                        f"{param}: no profile {name!r} is loaded. Loaded: {', '.join(manifests) or 'none'}.",
                        param=param,
                        code="unknown_profile",
                    )
        for name in manifests:
            if profiles is not None and name not in profiles and not policy.allows_without(name):
                raise InvalidRequestError(
                    f"profiles: {name!r} is locked ({policy.override(name)}), so it must be among the defaults, or every request "
                    "that names no profile would be refused.",
                    param="profiles",
                )
        for name, strength in strengths.items():
            self.check_strength(name, strength, "strengths")
        self.policy = policy
        self.defaults = SteeringDefaults(None if profiles is None else tuple(dict.fromkeys(profiles)), dict(strengths))

    def admit(self, name: str, mode: Mode | None, default: bool, manifests: Mapping[str, ProfileManifest]) -> None:
        """Have a newly loaded profile run in `mode` (None: as before), and by default or not.

        Args:
            manifests: the profiles that were loaded before.
        """
        if mode is not None:
            self.policy = replace(self.policy, modes={**self.policy.modes, name: mode})
        active = self.defaults.profiles
        if default and active is not None:
            active = tuple(dict.fromkeys((*active, name)))
        elif not default:
            active = tuple(n for n in self.defaults.active(manifests) if n != name)
        self.defaults = replace(self.defaults, profiles=active)

    def forget(self, name: str) -> None:
        """Drop an unloaded profile's defaults and mode; its start-up rules hold again should it come back."""
        modes = {n: m for n, m in self.policy.modes.items() if n != name}
        if name in self._start_up.modes:
            modes[name] = self._start_up.modes[name]
        self.policy = replace(self.policy, modes=modes)
        active = self.defaults.profiles
        self.defaults = SteeringDefaults(
            None if active is None else tuple(n for n in active if n != name),
            {n: s for n, s in self.defaults.strengths.items() if n != name},
        )

    def check_manifest(self, manifest: ProfileManifest) -> None:
        """Raise InvalidRequestError for a profile whose own strength no request might ask for."""
        self.check_strength(manifest.name, manifest.strength, "source")

    def check_strength(self, name: str, strength: float, param: str) -> None:
        """Raise InvalidRequestError for a default that no request might ask for."""
        if abs(strength) > self.policy.max_strength:
            raise InvalidRequestError(
                f"{param}: {strength:g} for profile {name!r} is over this server's limit of {self.policy.max_strength:g}. "
                "Lower it, or start with another --max-steer-strength.",
                param=param,
                code="strength_over_limit",
            )
