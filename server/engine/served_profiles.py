"""Which profiles' versions requests may begin with, as these come and go while an engine runs. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from server.engine.base import GenerationError
from steering.decision import SteeringOptions
from steering.manifest import ProfileManifest

RETIRE_AFTER_S = 30.0  # how long requests may still begin with a version that was replaced or unloaded


class ServedProfiles:
    """All calls from the event loop.

    Args:
        retire: called with name and version once no request may begin with it any more.

    Attributes:
        manifests: those that a request finds by name alone. A change makes a new mapping.
    """

    def __init__(self, manifests: Iterable[ProfileManifest], retire: Callable[[str, str], None]) -> None:
        self.manifests: Mapping[str, ProfileManifest] = {manifest.name: manifest for manifest in manifests}
        self._retire = retire
        self._versions = {(name, manifest.version) for name, manifest in self.manifests.items()}
        self._retiring: dict[tuple[str, str], asyncio.TimerHandle] = {}

    def pinned(self, steering: SteeringOptions) -> SteeringOptions:
        """The same with each profile's version named: the one that is loaded, where the request names none.

        Raises GenerationError for one that is not there.
        """
        activations = []
        for activation in steering.activations:
            name, version = activation.profile, activation.version
            if not version and name in self.manifests:
                version = self.manifests[name].version
            if (name, version) not in self._versions:
                raise GenerationError(f"no steering profile {name!r} is loaded", "profile_not_found")
            activations.append(replace(activation, version=version))
        return replace(steering, activations=tuple(activations))

    def allow(self, name: str, version: str) -> None:
        """Let requests that name it begin with it."""
        self._versions.add((name, version))

    def drop(self, name: str, version: str) -> None:
        """Have no request begin with it from now on, and retire it."""
        self._versions.discard((name, version))
        self._retire(name, version)

    def put(self, name: str, manifest: ProfileManifest) -> None:
        """Have requests find it under `name`; one that was there before is retired later."""
        before = self.manifests.get(name)
        self.allow(name, manifest.version)
        self.manifests = {**self.manifests, name: manifest}
        if before is not None and before.version != manifest.version:
            self.retire_later(name, before.version)

    def remove(self, name: str) -> None:
        """Have requests find it no more. Raises KeyError where it is not there."""
        version = self.manifests[name].version
        self.manifests = {n: manifest for n, manifest in self.manifests.items() if n != name}
        self.retire_later(name, version)

    def retire_later(self, name: str, version: str) -> None:
        """Requests whose prompts are just being read have this version in hand."""
        timer = asyncio.get_running_loop().call_later(RETIRE_AFTER_S, self._retire_now, name, version)
        self._retiring[name, version] = timer

    def keep(self, name: str, version: str) -> bool:
        """Do not retire a version that is loaded again; whether it was about to be."""
        timer = self._retiring.pop((name, version), None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _retire_now(self, name: str, version: str) -> None:
        del self._retiring[name, version]
        self.drop(name, version)
