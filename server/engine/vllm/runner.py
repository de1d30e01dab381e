"""What vLLM's two model runners have in common: how a `WorkerSteering` comes to one, what it is told, and how its reports leave.

Both are reached by wrapping methods. The second has an interface of its own for a model's state, but that would take as many
wraps (its place in the runner, the output), and it does not tell a request that is finished from one that is preempted, whose
decision must hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from server.engine.vllm.model import steer
from server.engine.vllm.orders import KEY, Order, Report
from server.engine.vllm.versions import installed_version
from server.engine.vllm.worker import Span, WorkerSteering
from steering.errors import ModelError

ATTRIBUTE = "_finesteer"
Step = Callable[..., Any]  # (the method, bound; the runner's WorkerSteering; the runner; the call's arguments)


def patch(loaders: Iterable[type], owner: type, steps: Mapping[str, Step]) -> None:
    """Have the `load_model` of `loaders` make the model steerable and, where this server runs vLLM, wrap the methods of `owner`
    that `steps` names. Idempotent."""

    def load_model(method: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        steering = steer(runner.get_model(), runner.vllm_config, runner.device, reports=sends_reports())
        setattr(runner, ATTRIBUTE, steering)
        if steering is not None:
            for name, step in steps.items():
                _wrap(owner, name, functools.partial(_step, step))
        return found

    for loader in loaders:
        _wrap(loader, "load_model", load_model)


def _step(step: Step, method: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    steering: WorkerSteering | None = getattr(runner, ATTRIBUTE, None)
    return method(*args, **kwargs) if steering is None else step(method, steering, runner, *args, **kwargs)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    method = owner.__dict__.get(name)
    if method is None:
        raise ModelError(
            f"--engine vllm: vLLM {installed_version()} has no {owner.__module__}.{owner.__name__}.{name}, which this server "
            "steers by. Install vLLM as its makers published it, or leave --engine out for this server's own engine."
        )
    if hasattr(method, ATTRIBUTE):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(method, self), self, *args, **kwargs)

    setattr(wrapped, ATTRIBUTE, True)
    setattr(owner, name, wrapped)


def follow(method: Callable[..., Any], steering: WorkerSteering, runner: Any, scheduler_output: Any) -> Any:
    """Before a runner's account of its requests is brought up to date, take note of who comes and goes."""
    for request_id in scheduler_output.finished_req_ids:
        steering.depart(request_id)
    for request_id in scheduler_output.preempted_req_ids or ():
        steering.pause(request_id)
    for new in scheduler_output.scheduled_new_reqs:
        if new.sampling_params is not None and new.sampling_params.extra_args:
            steering.arrive(new.req_id, len(new.prompt_token_ids), Order.from_args(new.sampling_params.extra_args))
    return method(scheduler_output)


def report(method: Callable[..., Any], steering: WorkerSteering, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """After a step, its reports beside its output."""
    output = method(*args, **kwargs)
    return reporting(output, steering.end())


def spans(request_ids: Iterable[str], num_tokens: np.ndarray, positions: np.ndarray) -> Iterator[Span]:
    """A step's requests in the order of their rows."""
    row = 0
    for request_id, count, position in zip(request_ids, num_tokens.tolist(), positions.tolist(), strict=False):
        yield Span(request_id, row, count, position)
        row += count


def sends_reports() -> bool:
    """Whether vLLM sends this worker's output on: the first of those that a layer is spread over."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def reporting(output: Any, reports: Callable[[], dict[str, Report]] | None) -> Any:
    """A step's output with the reports as the attribute `KEY`: of itself, or of what its `get_output` gives once the device is
    done."""
    if reports is None or output is None:
        return output
    if not hasattr(output, "get_output"):
        setattr(output, KEY, reports())
        return output
    get_output = output.get_output

    def and_reports() -> Any:
        found = get_output()
        setattr(found, KEY, reports())
        return found

    output.get_output = and_reports
    return output
