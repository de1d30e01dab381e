"""vLLM's first model runner (`vllm.v1.worker.gpu_model_runner`, and the CPU's, which is made of it)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from server.engine.vllm.model import steer
from server.engine.vllm.orders import KEY, Order, Report
from server.engine.vllm.worker import Span, WorkerSteering

ATTRIBUTE = "_finesteer"


def patch() -> None:
    """Have its loading, its preparation of a step and its sampling tell a `WorkerSteering`. Idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (GPUModelRunner, CPUModelRunner):
        _wrap(runner, "load_model", _load_model)
    _wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    _wrap(GPUModelRunner, "sample_tokens", _sample_tokens)
    _wrap(GPUModelRunner, "_update_states", _update_states)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    method = owner.__dict__[name]
    if hasattr(method, ATTRIBUTE):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(method, self), self, *args, **kwargs)

    setattr(wrapped, ATTRIBUTE, True)
    setattr(owner, name, wrapped)


def _load_model(method: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    found = method(*args, **kwargs)
    if getattr(runner, ATTRIBUTE, None) is None:  # the CPU's calls the other's
        setattr(runner, ATTRIBUTE, steer(runner.model, runner.vllm_config, runner.device, reports=sends_reports()))
    return found


def _update_states(method: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    steering: WorkerSteering | None = getattr(runner, ATTRIBUTE, None)
    if steering is not None:
        follow(steering, scheduler_output)
    return method(scheduler_output)


def _prepare_inputs(
    method: Callable[..., Any], runner: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray
) -> Any:
    found = method(scheduler_output, num_scheduled_tokens)
    steering: WorkerSteering | None = getattr(runner, ATTRIBUTE, None)
    if steering is not None:
        batch = runner.input_batch
        positions = batch.num_computed_tokens_cpu
        steering.begin(
            spans(batch.req_ids, num_scheduled_tokens, positions), scheduler_output.total_num_scheduled_tokens
        )
    return found


def _sample_tokens(method: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    output = method(*args, **kwargs)
    steering: WorkerSteering | None = getattr(runner, ATTRIBUTE, None)
    return output if steering is None else reporting(output, steering.end())


def follow(steering: WorkerSteering, scheduler_output: Any) -> None:
    """Take note of who comes and goes."""
    for request_id in scheduler_output.finished_req_ids:
        steering.depart(request_id)
    for request_id in scheduler_output.preempted_req_ids or ():
        steering.pause(request_id)
    for new in scheduler_output.scheduled_new_reqs:
        if new.sampling_params is not None and new.sampling_params.extra_args:
            steering.arrive(new.req_id, len(new.prompt_token_ids), Order.from_args(new.sampling_params.extra_args))


def spans(request_ids: list[str], num_tokens: np.ndarray, positions: np.ndarray) -> Iterator[Span]:
    """A step's requests in the order of their rows."""
    row = 0
    for request_id, count, position in zip(request_ids, num_tokens.tolist(), positions.tolist(), strict=False):
        yield Span(request_id, row, count, position)
        row += count


def sends_reports() -> bool:
    """Whether vLLM sends this worker's output on."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def reporting(output: Any, reports: Callable[[], dict[str, Report]] | None) -> Any:
    """A step's output with the reports beside it, under the attribute `KEY`."""
    if reports is None or output is None:
        return output
    from vllm.v1.outputs import AsyncModelRunnerOutput

    if not isinstance(output, AsyncModelRunnerOutput):
        setattr(output, KEY, reports())
        return output

    class ReportingOutput(AsyncModelRunnerOutput):
        """The same, once the device is done."""

        def get_output(self) -> Any:
            found = output.get_output()
            setattr(found, KEY, reports())
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(output, name)

    return ReportingOutput()
