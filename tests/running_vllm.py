"""vLLM's engine around tiny models, in tests. Nothing here imports vLLM before `prepare`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from server.engine.base import Engine, EngineObserver
from server.engine.vllm.load import ENVIRONMENT
from steering.profile import SteeringProfile
from tests.tiny import save_tiny_checkpoint, tiny_model

INSTALLED = importlib.util.find_spec("vllm") is not None
MISSING = "vLLM is not installed here: make test-vllm"
SIZES = {"hidden_size": 128, "head_dim": 32}  # vLLM has no attention for narrower heads on a CPU
BLOCK_SIZE = 32
OPTIONS = {
    "max_num_seqs": 4,
    "max_model_len": 64,
    "kv_cache_bytes": 2**26,
    "dtype": "float32",
    "flags": ("--enforce-eager", f"--block-size={BLOCK_SIZE}"),
}


@functools.cache
def prepare() -> None:
    """Make vLLM's processes forks of this one, which has imported all that they need: 3 seconds a start, not 15.

    On a CPU vLLM itself always spawns them, for the sake of OpenMP's threads; with one thread there is nothing to lose.
    """
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule `kv_cache_bytes`
    torch.set_num_threads(1)

    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker

    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")


@functools.cache
def vllm_model(family: str = "llama") -> PreTrainedModel:
    """The model that `running_vllm` serves, as transformers runs it: for oracles and profiles."""
    return tiny_model(family, **SIZES)


@functools.cache
def vllm_folder(family: str = "llama") -> Path:
    """The same as a checkpoint, gone with this process."""
    folder = tempfile.TemporaryDirectory(prefix="finesteer-vllm-")
    _FOLDERS.append(folder)
    return save_tiny_checkpoint(folder.name, family, **SIZES)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@contextlib.asynccontextmanager
async def running_vllm(
    profiles: Sequence[SteeringProfile] = (),
    *,
    family: str = "llama",
    observer: EngineObserver | None = None,
    folders: Mapping[str, str] | None = None,
    **options: object,
) -> AsyncIterator[Engine]:
    """An engine around `vllm_model(family)`, started, and stopped at the end. It belongs to the event loop that it starts in.

    Args:
        options: of `VllmOptions`, over `OPTIONS`.
    """
    prepare()
    from server.engine.vllm.engine import VllmEngine
    from server.engine.vllm.options import VllmOptions

    engine = VllmEngine(
        str(vllm_folder(family)),
        profiles,
        VllmOptions(**OPTIONS | options),
        folders=folders,
        model_name="tiny",
        observer=observer,
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
