"""From a model reference and profile paths to a vLLM engine, with every way it can go wrong put into a sentence."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from server.engine.base import EngineObserver
from server.engine.vllm.versions import check_version
from steering.errors import ModelError
from steering.profile import SteeringProfile, profile_folder

if TYPE_CHECKING:
    from server.engine.vllm.engine import VllmEngine

ENVIRONMENT = {  # unless the operator says otherwise
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",  # so that an answer made of them is refused
}


def load_engine(
    model: str, profiles: Mapping[str, str], *, observer: EngineObserver | None = None, **options: Any
) -> VllmEngine:
    """Start vLLM on a checkpoint with its profiles; `start` then proves that they act.

    Args:
        model: a folder or a hub id.
        profiles: name → folder or hub id, in the order in which they are to be listed.
        options: of `VllmOptions`.
    Raises:
        ModelError, ProfileError.
    """
    check_version()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # in this process, where the log is ours
    torch.set_num_threads(1)  # gates are small, and the model runs in other processes
    folders = {name: str(profile_folder(reference)) for name, reference in profiles.items()}
    loaded = [SteeringProfile.load(folder, name) for name, folder in folders.items()]
    try:
        from server.engine.vllm.engine import VllmEngine
        from server.engine.vllm.options import VllmOptions
    except ImportError as error:
        raise ModelError(
            f"--engine vllm: vLLM cannot be imported here ({error}). Install it again, for this machine."
        ) from error
    try:
        return VllmEngine(model, loaded, VllmOptions(**options), folders=folders, model_name=model, observer=observer)
    except RuntimeError as error:
        if "initialization failed" not in str(error):
            raise
        raise ModelError(
            "--engine vllm: vLLM's processes did not start; what they wrote above says why. Where it is memory, lower "
            "--kv-cache-memory, --max-model-len or --vllm.gpu-memory-utilization, or raise --tensor-parallel-size."
        ) from error
