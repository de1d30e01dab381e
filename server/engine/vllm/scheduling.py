"""vLLM's schedulers, which also hand a worker's report on with the request's first token."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from server.engine.vllm.orders import KEY, Report
from server.engine.vllm.process import follow_parent


class _Reporting:
    """Mixed into a scheduler. The reports come as an attribute of the runner's output: see `runner.reporting`."""

    _reports: dict[str, Report]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reports = {}
        follow_parent()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        waiting = self._reports
        waiting.update(getattr(model_runner_output, KEY, None) or {})
        if waiting:  # of a token that was dropped by a preemption, until the next one
            for found in outputs.values():
                for output in found.outputs:
                    report = waiting.pop(output.request_id, None)
                    if report is not None:
                        output.kv_transfer_params = report.to_params()
            for request_id in [name for name in waiting if name not in self.requests]:  # type: ignore[attr-defined]
                del waiting[request_id]
        return outputs


class ReportingScheduler(_Reporting, Scheduler):
    """For runners that return a step's tokens before the next step is scheduled."""


class ReportingAsyncScheduler(_Reporting, AsyncScheduler):
    """For runners that do not."""
