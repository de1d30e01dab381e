"""From vLLM's model to a worker that steers it: the tables, the operation behind each site, and what decides in one-pass mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from server.engine.vllm.orders import Addition
from server.engine.vllm.process import follow_parent
from server.engine.vllm.settings import PluginSettings
from server.engine.vllm.tables import SiteTable, install
from server.engine.vllm.worker import WorkerSteering
from steering.decision import ProfileDecision, SteeringOptions
from steering.errors import ModelError


def steer(model: nn.Module, vllm_config: Any, device: torch.device, *, reports: bool) -> WorkerSteering | None:
    """Make a model that is just loaded steerable; None where this server is not the one that runs vLLM. Raises ModelError.

    Args:
        reports: whether this worker's output is the one that vLLM sends to the server.
    """
    settings = PluginSettings.from_config(vllm_config.additional_config)
    if settings is None:
        return None
    follow_parent()
    scheduler, model_config = vllm_config.scheduler_config, vllm_config.model_config
    size, dtype = model_config.get_hidden_size(), model_config.dtype
    tables = {
        layer: SiteTable(
            size, 2 * scheduler.max_num_seqs, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, dtype, device
        )
        for layer in settings.layers
    }
    install(decoder_layers(model, model_config.hf_text_config.num_hidden_layers), tables)
    decider = ProfileDecider(settings, size, dtype, device) if settings.one_pass else None
    return WorkerSteering(tables, reports=reports, decider=decider)


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The one list of `num_layers` layers. Raises ModelError."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise ModelError(f"{type(model).__name__}: found {len(found)} lists of {num_layers} layers, need exactly one.")
    return found[0]


class ProfileDecider:
    """Gates and experts on a worker: `worker.Decider`. Raises ProfileError where a profile is not the one the server has."""

    def __init__(self, settings: PluginSettings, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        from steering.errors import ProfileError
        from steering.intervention import Site, profiles_by_layer
        from steering.profile import SteeringProfile

        profiles = [SteeringProfile.load(path, name) for name, path in settings.profiles.items()]
        for profile in profiles:
            if profile.version != settings.versions[profile.name]:
                raise ProfileError(
                    f"profile {profile.name!r} has changed on disk since the server read it; start again."
                )
        table = torch.zeros(1, hidden_size, dtype=dtype, device=device)
        self._sites = {layer: Site(layer, found, table) for layer, found in profiles_by_layer(profiles, device).items()}

    def read(
        self, layer: int, states: Tensor, options: list[SteeringOptions]
    ) -> list[tuple[tuple[ProfileDecision, ...], Addition | None, float]]:
        from server.engine.vllm.doses import addition_of, bearable

        readings = self._sites[layer].read(states, options)
        doses = [r.dose if r.dose is not None and bearable(r.dose) else None for r in readings]
        return [(r.profiles, addition_of(layer, d), r.compute_ms) for r, d in zip(readings, doses, strict=True)]
