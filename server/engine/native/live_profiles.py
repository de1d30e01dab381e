"""The profiles of a running engine: new ones come in, replaced and unloaded ones stay until the last request that began with
them is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from server.engine.native.core import EngineCore
from server.engine.native.kv_cache import bytes_per_token
from server.engine.native.selftest import check_steering
from steering.intervention import sites_of
from steering.profile import SteeringProfile


class LiveProfiles:
    """Changes the sites of a core. All calls from the engine's thread, between two steps.

    Args:
        model: what the core's decoder was made of.
        prefix_cache_bytes: what the prefix cache may take, however many sites there are.
    """

    def __init__(
        self, core: EngineCore, model: PreTrainedModel, profiles: Sequence[SteeringProfile], prefix_cache_bytes: int
    ) -> None:
        self._core, self._model, self._prefix_cache_bytes = core, model, prefix_cache_bytes
        self._profiles = {(profile.name, profile.version): profile for profile in profiles}
        self._retired: set[tuple[str, str]] = set()

    def add(self, profile: SteeringProfile) -> None:
        """Have a profile act for requests that name its version, beside those that are there. Raises ProfileError, and then
        nothing has changed."""
        key = profile.name, profile.version
        if key in self._profiles:
            self._retired.discard(key)
            return
        profile.check_model(self._model)
        check_steering(self._core.runner.decoder, self._model, [profile])
        self._profiles[key] = profile
        try:
            self._change()
        except BaseException:
            del self._profiles[key]
            self._change()
            raise

    def retire(self, name: str, version: str) -> None:
        """Drop a version as soon as no request needs it: see `sweep`."""
        self._retired.add((name, version))
        self.sweep()

    @property
    def retired(self) -> bool:
        """Whether any version only waits for its last request."""
        return bool(self._retired)

    def sweep(self) -> None:
        """Drop the retired versions that no request waits or runs under."""
        groups = self._core.scheduler.groups
        needed = {(a.profile, a.version) for group in groups for a in group.request.steering.activations}
        if gone := self._retired - needed:
            self._retired -= gone
            for key in gone:
                del self._profiles[key]
            self._change()

    @torch.inference_mode()
    def _change(self) -> None:
        runner = self._core.runner
        sites = sites_of(
            self._model, list(self._profiles.values()), self._core.scheduler.limits.max_num_seqs, runner.sites
        )
        decoder, block_size = runner.decoder, self._core.scheduler.limits.block_size
        per_token = bytes_per_token(decoder.kv_shapes(), decoder.hidden_size * len(sites), decoder.dtype)
        num_cached = self._prefix_cache_bytes // (per_token * block_size)
        runner.change_sites(sites, num_cached, self._core.scheduler.groups)
