"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`).

Whoever runs vLLM without this server in an environment that has it installed gets the plugin, too: it then does nothing, for
it acts only where `additional_config` says so.
"""

from __future__ import annotations

from server.engine.vllm.versions import SUPPORTED, installed_version


def register() -> None:
    """Make vLLM's model runners steer. May be called several times."""
    if (installed_version() or "").split("+")[0] not in SUPPORTED:
        return  # the server refuses to start with it, and says why
    from server.engine.vllm import v1_runner, v2_runner
    from server.engine.vllm.tables import register_operation

    register_operation()
    v1_runner.patch()
    v2_runner.patch()
