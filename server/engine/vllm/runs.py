"""Submissions to vLLM's AsyncLLM, each with the reports that belong to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from weakref import WeakKeyDictionary

from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from server.engine.base import EngineDeadError, EngineStoppedError, GenerationError, UnsupportedRequestError
from server.engine.vllm.orders import Report


class Run:
    """One submission. Read it by `first` and then by iteration, to its end, or `abort` it."""

    def __init__(self, runs: Runs, queue: RequestOutputCollector) -> None:
        self._runs, self._queue = runs, queue
        self._held: RequestOutput | None = None
        self.finished = False

    async def first(self) -> tuple[RequestOutput, Report | None]:
        """The first output, which is kept for iteration, and the report that came with it."""
        if self._held is None:
            self._held = await self._next()
        reports = self.reports
        return self._held, reports[0] if reports else None

    @property
    def reports(self) -> list[Report]:
        """So far, one for each completion that has begun."""
        return self._runs.reports_of(self._queue)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        if self._held is not None:
            held, self._held = self._held, None
            yield held
        while not self.finished:
            yield await self._next()

    async def abort(self) -> None:
        """Free what it holds. Nothing more is read from it."""
        if not self.finished:
            self.finished = True
            await self._runs.abort(self._queue)

    async def _next(self) -> RequestOutput:
        try:
            output = self._queue.get_nowait() or await self._queue.get()
        except (EngineStoppedError, GenerationError):
            raise
        except Exception as error:
            raise self._runs.dead(error) from error
        if output.finished:
            self.finished = True
            self._runs.close(self._queue)
        return output


class Runs:
    """All submissions to one AsyncLLM, which is told here of each."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._open: set[RequestOutputCollector] = set()
        self._reports: WeakKeyDictionary[RequestOutputCollector, list[Report]] = WeakKeyDictionary()
        self._ending: EngineStoppedError | None = None
        self._aborting: set[asyncio.Task[None]] = set()
        self._tap()

    def __len__(self) -> int:
        return len(self._open)

    async def submit(
        self, name: str, prompt: list[int], params: SamplingParams, salt: str | None, priority: int, arrived_s: float
    ) -> Run:
        """Begin a run. Raises EngineDeadError, UnsupportedRequestError (what vLLM refuses).

        Args:
            name: of all that are open, no other has it.
            arrived_s: the request's arrival, `time.time()`: among equal priorities the earlier goes first.
        """
        try:
            queue = await self._llm.add_request(
                name,
                tokens_input(prompt, cache_salt=salt),
                params,
                priority=priority,
                arrival_time=arrived_s,
            )
        except asyncio.CancelledError:
            await self._llm.abort(name)
            raise
        except VLLMValidationError as error:
            raise UnsupportedRequestError(f"vLLM refuses the request: {error}") from error
        except Exception as error:
            raise self.dead(error) from error
        self._open.add(queue)
        if self._ending is not None:
            queue.put(self._ending)
        return Run(self, queue)

    def reports_of(self, queue: RequestOutputCollector) -> list[Report]:
        return self._reports.get(queue, [])

    def close(self, queue: RequestOutputCollector) -> None:
        """It has ended by itself."""
        self._open.discard(queue)
        queue.close()

    async def abort(self, queue: RequestOutputCollector) -> None:
        """End it early; also where whoever asks is being cancelled."""
        self.close(queue)
        if self._llm.errored or self._ending is not None:
            return
        task = asyncio.ensure_future(self._llm.abort(queue.request_id, internal=True))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)
        await asyncio.shield(task)

    def end_all(self, error: EngineStoppedError) -> None:
        """Whoever reads gets the error, and so does whoever comes."""
        self._ending = error
        for queue in self._open:
            queue.put(error)

    def dead(self, error: Exception) -> Exception:
        """What a failure of vLLM's is to this server."""
        if self._ending is not None:
            return self._ending
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return EngineDeadError(f"vLLM failed ({reason}); the process must be restarted")

    def _tap(self) -> None:
        """Take reports off vLLM's outputs before it makes one of several, which keeps the last one's alone."""
        processor = self._llm.output_processor
        process = processor.process_outputs

        def tapped(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            for output in outputs:
                if not output.kv_transfer_params and not output.num_nans_in_logits:
                    continue
                state = processor.request_states.get(output.request_id)
                if state is None or state.queue is None:
                    continue
                report = Report.from_params(output.kv_transfer_params)
                if report is not None:
                    output.kv_transfer_params = None
                    self._reports.setdefault(state.queue, []).append(report)
                if output.num_nans_in_logits:
                    state.queue.put(GenerationError("the model produced NaN logits", "non_finite_logits"))
            return process(outputs, *args, **kwargs)

        processor.process_outputs = tapped  # type: ignore[method-assign] - this instance's alone
