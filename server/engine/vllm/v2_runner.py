"""vLLM's second model runner (`vllm.v1.worker.gpu.model_runner`), which it takes on GPUs. Written by reading it: it needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.engine.vllm import runner as common
from server.engine.vllm.worker import WorkerSteering


def patch() -> None:
    """Have it tell a `WorkerSteering` what it does. Idempotent."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    common.patch((GPUModelRunner,), GPUModelRunner, STEPS)


def _prepare_inputs(
    method: Callable[..., Any], steering: WorkerSteering, runner: Any, *args: Any, **kwargs: Any
) -> Any:
    """Not called in dummy runs; the model or its recorded graph runs next, on the same stream.

    A request that comes anew after it was preempted brings what it has answered as part of its prefill; its prompt's length is
    as it was. The positions of answers may be ahead of what will be kept, those within a prompt never are.
    """
    batch = method(*args, **kwargs)
    steering.begin(
        common.spans(batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np), batch.num_tokens
    )
    return batch


STEPS = {"finish_requests": common.follow, "prepare_inputs": _prepare_inputs, "sample_tokens": common.report}
