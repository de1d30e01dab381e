"""From this server's options and vLLM's own to a vLLM configuration; what steering cannot be had with is refused by name."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.engine.vllm.settings import PluginSettings
from server.vllm_flags import PREFIX
from steering.errors import ModelError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_LOGPROBS = 20
CPU_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
CPU_KV_CACHE_BYTES = 4 * 2**30  # vLLM would take nearly all memory
KNOWN_WORKERS = ("CPUWorker", "Worker")
# vLLM's flags that this server sets, and what to use in their place.
OURS = {
    "model": "the model's place on the command line",
    "served-model-name": "--served-model-name",
    "tensor-parallel-size": "--tensor-parallel-size",
    "max-model-len": "--max-model-len",
    "max-num-seqs": "--max-num-seqs",
    "max-num-batched-tokens": "--max-batched-tokens",
    "kv-cache-memory-bytes": "--kv-cache-memory",
    "dtype": "--dtype",
    "enable-prefix-caching": "--prefix-cache-memory 0 for none, and nothing for one",
    "no-enable-prefix-caching": "--prefix-cache-memory 0",
    "scheduling-policy": "nothing: requests' own priorities count",
    "generation-config": "nothing: how tokens are drawn is what requests say",
    "structured-outputs-config.backend": "nothing: it is the one that checks the grammars",
    "disable-log-stats": "nothing: this server's metrics need them",
    "scheduler-cls": "nothing: this server's scheduler hands on what steering found",
    "runner": "nothing: this server generates",
}


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is to run.

    Attributes:
        max_num_seqs, max_model_len, max_batched_tokens, max_waiting: as the native engine's.
        kv_cache_bytes: for keys and values, in all; None: as vLLM sees fit.
        prefix_cache: whether finished prompts are kept.
        dtype: "auto" or a torch dtype's name.
        tensor_parallel_size: cards over which each layer is spread.
        one_pass: decide and steer in the prompt's only pass; no prompt is cut, and none shares its beginning with another.
        flags: vLLM's own, as on its command line, such as ("--enforce-eager", "--block-size=32").
    """

    max_num_seqs: int = 32
    max_model_len: int | None = None
    max_batched_tokens: int | None = None
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None
    prefix_cache: bool = True
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    one_pass: bool = False
    flags: tuple[str, ...] = ()


def vllm_config(model: str, options: VllmOptions, settings: PluginSettings) -> VllmConfig:
    """What vLLM is started with. Raises ModelError: a flag that it does not know, a value that it does not take, or something
    that steering cannot be had with."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    given = _parse(options.flags)
    given.model = model
    given.tensor_parallel_size = options.tensor_parallel_size
    given.max_model_len = options.max_model_len
    given.max_num_seqs = options.max_num_seqs
    given.max_num_batched_tokens = options.max_batched_tokens
    given.kv_cache_memory_bytes = options.kv_cache_bytes
    if current_platform.is_cpu():
        given.kv_cache_memory_bytes = _cpu_kv_cache_bytes(options.kv_cache_bytes)
    given.enable_prefix_caching = options.prefix_cache
    given.dtype = options.dtype
    given.scheduling_policy = "priority"
    given.generation_config = "vllm"  # sampling is what the request says, not what the checkpoint's authors suggest
    given.max_logprobs = max(given.max_logprobs, MAX_LOGPROBS)
    given.structured_outputs_config.backend = "guidance"  # what this server checks grammars with
    given.disable_log_stats = True  # this server has metrics of its own
    given.additional_config = {**given.additional_config, **settings.to_config()}
    if options.one_pass:
        if given.enable_chunked_prefill:
            raise ModelError(f"{PREFIX}enable-chunked-prefill: not with --vllm-one-pass, in which no prompt is cut.")
        given.enable_chunked_prefill = False
    try:
        config = AsyncEngineArgs.from_cli_args(given).create_engine_config()
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"--engine vllm: vLLM refuses this configuration: {_said(error)}") from error
    refuse_unsupported(config, options)
    mode = "ReportingAsyncScheduler" if config.scheduler_config.async_scheduling else "ReportingScheduler"
    config.scheduler_config.scheduler_cls = f"server.engine.vllm.scheduling.{mode}"
    return config


def _cpu_kv_cache_bytes(wanted: int | None) -> int | None:
    """None where vLLM's own variable says how much, which overrules all else."""
    if CPU_KV_CACHE_VARIABLE not in os.environ:
        return CPU_KV_CACHE_BYTES if wanted is None else wanted
    if wanted is not None:
        raise ModelError(
            f"--kv-cache-memory: {CPU_KV_CACHE_VARIABLE} is set, and vLLM would take that; unset one of them."
        )
    return None


def _parse(flags: Sequence[str]) -> argparse.Namespace:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = [_spelled(flag) for flag in flags]
    for name, instead in OURS.items():
        if any(flag.partition("=")[0] == f"--{name}" for flag in flags):
            raise ModelError(f"{PREFIX}{name}: use {instead}.")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = parser.parse_known_args(flags)
    except (SystemExit, ValueError, TypeError) as error:
        reason = _said(error) if not isinstance(error, SystemExit) else said.getvalue().strip().splitlines()[-1]
        raise ModelError(f"{PREFIX}…: vLLM does not take it: {reason}") from error
    if unknown:
        raise ModelError(f"{PREFIX}{unknown[0].lstrip('-')}: vLLM has no such option.")
    return parsed


def _spelled(word: str) -> str:
    """A flag with dashes in its name, as vLLM's command line takes it with either."""
    name, separator, value = word.partition("=")
    return name.replace("_", "-") + separator + value if word.startswith("--") else word


def refuse_unsupported(config: VllmConfig, options: VllmOptions) -> None:
    """Raise ModelError for what steering would be wrong with, or was never proved right with."""
    parallel = config.parallel_config
    for wanted, what, why in (
        (
            parallel.pipeline_parallel_size > 1,
            "--vllm.pipeline-parallel-size",
            "a site's states stay on their own stage",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "--vllm.prefill-context-parallel-size",
            "prompts are cut over cards",
        ),
        (parallel.decode_context_parallel_size > 1, "--vllm.decode-context-parallel-size", "it was not tried"),
        (
            parallel.use_ubatching,
            "--vllm.enable-dbo (--vllm.ubatch-size)",
            "a step is cut up, and rows are counted anew",
        ),
        (parallel.enable_elastic_ep, "--vllm.enable-elastic-ep", "a model that is loaded anew has no sites"),
        (
            config.cache_config.kv_sharing_fast_prefill,
            "--vllm.kv-sharing-fast-prefill",
            "upper layers then see some of a prompt's rows only",
        ),
        (
            parallel.use_sequence_parallel_moe or parallel.enable_hc_sp,
            "sequence parallelism (--vllm.enable-expert-parallel over several cards and replicas, --vllm.enable-hc-sp)",
            "each card then has other rows of the residual stream",
        ),
        (config.speculative_config is not None, "--vllm.speculative-config", "drafts were not tried"),
        (config.lora_config is not None, "--vllm.enable-lora", "it was not tried"),
        (config.kv_transfer_config is not None, "--vllm.kv-transfer-config", "another server's cache knows no vectors"),
        (config.model_config.enable_prompt_embeds, "--vllm.enable-prompt-embeds", "prompts are tokens here"),
        (
            parallel.worker_cls.rsplit(".", 1)[-1] not in KNOWN_WORKERS,
            "--vllm.worker-cls",
            "the plugin knows vLLM's own",
        ),
    ):
        if wanted:
            raise ModelError(f"{what} cannot be used with steering: {why}. Leave it out.")
    if options.one_pass:
        scheduler = config.scheduler_config
        if scheduler.enable_chunked_prefill:
            raise ModelError("--vllm-one-pass: prompts must not be cut; leave --vllm.enable-chunked-prefill out.")
        if scheduler.long_prefill_token_threshold or scheduler.long_prefill_token_threshold_adaptive:
            raise ModelError("--vllm-one-pass: prompts must not be cut; leave --vllm.long-prefill-token-threshold out.")
        if config.device_config.device_type != "cpu" and not config.model_config.enforce_eager:
            raise ModelError(
                "--vllm-one-pass: workers decide amid the pass, which a recorded graph cannot; add --vllm.enforce-eager, or leave "
                "it out."
            )


def _said(error: Exception) -> str:
    """Its last line: what pydantic and vLLM write before it is where it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    return lines[-1] if lines else type(error).__name__
