"""What the plugin is told at start, in vLLM's `additional_config`: part of the key of vLLM's compile cache, so that a graph
that was compiled without a site, or with it at another layer, is never taken for this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from server.engine.vllm.orders import KEY


@dataclass(frozen=True)
class PluginSettings:
    """Attributes:
    layers: the sites, ascending.
    profiles: name → folder, and `versions` what they must be, for workers that decide by themselves (one-pass mode).
    format: raised when the operation changes.
    """

    layers: tuple[int, ...]
    profiles: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = 1

    @property
    def one_pass(self) -> bool:
        return bool(self.profiles)

    def to_config(self) -> dict[str, Any]:
        return {KEY: asdict(self) | {"layers": list(self.layers)}}

    @classmethod
    def from_config(cls, additional_config: Any) -> PluginSettings | None:
        """None where this server is not the one that runs vLLM."""
        found = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        return None if found is None else cls(**found | {"layers": tuple(found["layers"])})
