"""vLLM's first model runner (`vllm.v1.worker.gpu_model_runner`, and the CPU's, which is made of it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from server.engine.vllm import runner as common
from server.engine.vllm.worker import WorkerSteering


def patch() -> None:
    """Have it tell a `WorkerSteering` what it does. Idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    common.patch((GPUModelRunner, CPUModelRunner), GPUModelRunner, STEPS)


def _prepare_inputs(
    method: Callable[..., Any],
    steering: WorkerSteering,
    runner: Any,
    scheduler_output: Any,
    num_scheduled_tokens: np.ndarray,
) -> Any:
    found = method(scheduler_output, num_scheduled_tokens)
    batch = runner.input_batch
    spans = common.spans(batch.req_ids, num_scheduled_tokens, batch.num_computed_tokens_cpu)
    steering.begin(spans, scheduler_output.total_num_scheduled_tokens)
    return found


STEPS = {"_update_states": common.follow, "_prepare_inputs": _prepare_inputs, "sample_tokens": common.report}
