"""The vLLM engine: an optimistic run, and a second one for those whose gate opens.

A request is submitted unsteered, and the workers report the states of its last prompt token with its first token. Here, in the
server, gates and vectors are computed from them, by the same code as in the native engine. If nothing is to be added the run goes
on, and nothing was lost. Otherwise it is aborted, and the prompt is submitted again with the vectors, which then act on every one
of its tokens, however vLLM cuts, caches, preempts or spreads it. What a vector has shaped is cached under a salt of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

from server.engine.base import (
    Engine,
    EngineDeadError,
    EngineInfo,
    EngineObserver,
    EngineOverloadedError,
    EngineStats,
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    TokenEvent,
)
from server.engine.refusals import check_length_and_count, unsafe
from server.engine.served_profiles import ServedProfiles
from server.engine.vllm.checkpoint import Checkpoint
from server.engine.vllm.convert import check_sampling, events_of, prompt_logprobs_of, sampling_params
from server.engine.vllm.options import VllmOptions, vllm_config
from server.engine.vllm.orders import Order
from server.engine.vllm.runs import Run, Runs
from server.engine.vllm.selftest import check_steering
from server.engine.vllm.settings import PluginSettings
from server.engine.vllm.stats import StatsKeeper
from server.engine.vllm.steering import Decided, Steering, check_report, salt, steering_lost
from steering.decision import SteeringDecision, combine
from steering.errors import ProfileError
from steering.manifest import ProfileManifest
from steering.profile import SteeringProfile

STOPPED = "the server is shutting down"


@dataclass
class _Begun:
    """A request whose decision is made.

    Attributes:
        run: the pass that stands, its first output held; None where none is under way.
        queued_s: how long the passes that are over have waited for a row.
    """

    decided: Decided
    run: Run | None
    queued_s: float = 0.0


class VllmEngine(Engine):
    """Starts vLLM's processes at once, which takes a while.

    Args:
        model: a folder or a hub id.
        profiles: name → profile; checked against the checkpoint. With `one_pass` each needs its folder in `folders`.
        options: limits and vLLM's flags.
        folders: where the workers find the profiles, by name.
        model_name: for `info`.
        observer: told of each decision.
    Raises:
        ModelError, ProfileError.
    """

    def __init__(
        self,
        model: str,
        profiles: Sequence[SteeringProfile] = (),
        options: VllmOptions | None = None,
        *,
        folders: Mapping[str, str] | None = None,
        model_name: str = "model",
        observer: EngineObserver | None = None,
    ) -> None:
        self._options = options = options or VllmOptions()
        self._checkpoint = Checkpoint.find(model)
        for profile in profiles:
            self._checkpoint.check(profile)
        self._layers = tuple(sorted({layer for profile in profiles for layer in profile.by_layer()}))
        settings = PluginSettings(self._layers)
        if options.one_pass and profiles:
            settings = replace(
                settings,
                profiles={profile.name: (folders or {})[profile.name] for profile in profiles},
                versions={profile.name: profile.version for profile in profiles},
            )
        self._one_pass = settings.one_pass
        if options.dtype == "auto":  # vLLM would take float32 for bfloat16
            options = replace(options, dtype=self._checkpoint.dtype)
        config = vllm_config(str(self._checkpoint.folder), options, settings)
        self._keeper = StatsKeeper()
        self._llm = AsyncLLM(
            config,
            Executor.get_class(config),
            log_stats=False,
            log_requests=False,
            usage_context=UsageContext.ENGINE_CONTEXT,
            stat_loggers=[self._keeper.logger],
        )
        self._runs = Runs(self._llm)
        self._profiles = {(profile.name, profile.version): profile for profile in profiles}
        self._steering = Steering(profiles, self._checkpoint.config.hidden_size, config.model_config.dtype)
        self._served = ServedProfiles((profile.manifest for profile in profiles), self._retire)
        self._changing = asyncio.Lock()
        self._observer = observer
        self._names = itertools.count()
        self._failure: str | None = None
        self._started = False
        cache = config.cache_config
        num_blocks = cache.num_gpu_blocks or 0
        self.info = EngineInfo(
            engine="vllm",
            model=model_name,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size,
            vocab_size=config.model_config.get_vocab_size(),
            hidden_size=self._checkpoint.config.hidden_size,
            num_layers=self._checkpoint.num_layers,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=config.device_config.device_type,
            kv_cache_bytes=num_blocks * _block_bytes(config),
        )

    @property
    def profiles(self) -> Mapping[str, ProfileManifest]:
        return self._served.manifests

    @property
    def failure(self) -> str | None:
        if self._failure is None and self._llm.errored:
            self._failure = str(self._runs.dead(self._llm.dead_error))
        return self._failure

    async def start(self) -> None:
        if self._started:
            return
        self._started = True
        try:
            await self._prove(list(self._profiles.values()))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._failure is None:
            self._failure = STOPPED
        self._runs.end_all(EngineStoppedError(STOPPED))
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would take the processes' end for a failure
        await asyncio.to_thread(self._llm.shutdown)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        async with contextlib.aclosing(self._answer(self._admit(request), self._observer)) as events:
            async for event in events:
                yield event

    async def _answer(
        self, request: GenerationRequest, observer: EngineObserver | None = None
    ) -> AsyncGenerator[TokenEvent]:
        """As `generate`, of a request that is admitted."""
        arrived_s = time.time()
        try:
            begun = await self._begin(request, arrived_s, keep=request.n == 1 or self._one_pass)
        except GenerationError as error:
            if observer is not None and error.decision is not None:
                observer.decided(error.decision)
            raise
        decision, run, announced = begun.decided.decision, begun.run, False
        try:
            if observer is not None:
                observer.decided(decision)
            if (refusal := unsafe(request.steering, decision.profiles)) is not None:
                raise refusal
            if run is None:
                run = await self._submit(
                    request, begun.decided.order, salt(request, begun.decided.additions), arrived_s
                )
            async for event in self._events(request, run, begun):
                announced = True
                yield event
        except GenerationError as error:
            if not announced:
                error.decision = decision
            raise
        finally:
            if run is not None:
                await run.abort()

    async def score(self, request: GenerationRequest) -> SteeringDecision:
        request = replace(self._admit(request), n=1)
        try:
            begun = await self._begin(request, time.time(), keep=False)
        except GenerationError as error:
            if error.decision is None:
                raise
            return error.decision
        return begun.decided.decision

    async def load_profile(
        self, name: str, reference: str, check: Callable[[ProfileManifest], None] = lambda _: None
    ) -> ProfileManifest:
        if self._one_pass:
            raise ProfileError(
                "with --vllm-one-pass the workers' profiles are fixed; start the server anew to change them."
            )
        async with self._changing:
            profile = await asyncio.to_thread(SteeringProfile.load, reference, name)
            check(profile.manifest)
            await asyncio.to_thread(self._checkpoint.check, profile)
            missing = sorted(set(profile.by_layer()) - set(self._layers))
            if missing:
                raise ProfileError(
                    f"profile {name!r} acts at layer {missing[0]}, where vLLM's model was given no site when it was loaded; it has "
                    f"some at {', '.join(map(str, self._layers)) or 'no layer'}. Start the server with the profile."
                )
            key = name, profile.version
            known, retiring = key in self._profiles, self._served.keep(*key)
            self._change({**self._profiles, key: profile})
            self._served.allow(*key)
            try:
                await self._prove([profile])
            except BaseException:
                if retiring:
                    self._served.retire_later(*key)
                elif not known:
                    self._served.drop(*key)
                raise
            self._served.put(name, profile.manifest)
            return profile.manifest

    async def unload_profile(self, name: str) -> None:
        async with self._changing:
            self._served.remove(name)

    def stats(self) -> EngineStats:
        return self._keeper.stats(len(self._runs))

    async def _prove(self, profiles: list[SteeringProfile]) -> None:
        """That they act as they should, and each layer of one that has several. Raises ProfileError, ModelError."""
        alone = [] if self._one_pass else [part for profile in profiles for part in profile.layers_alone()]
        parts = {(part.name, part.version): part for part in alone}
        self._change(self._profiles | parts)
        try:
            await check_steering(self._answer, self.info, [*profiles, *parts.values()])
        finally:
            self._change({key: profile for key, profile in self._profiles.items() if key not in parts})

    def _retire(self, name: str, version: str) -> None:
        self._change({key: profile for key, profile in self._profiles.items() if key != (name, version)})

    def _change(self, profiles: dict[tuple[str, str], SteeringProfile]) -> None:
        self._profiles = profiles
        self._steering.set_profiles(profiles.values())

    def _admit(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its profiles' versions pinned. Raises what `generate` says."""
        if (failure := self.failure) is not None or not self._started:
            raise EngineStoppedError(STOPPED) if failure == STOPPED else EngineDeadError(failure or "it is not started")
        check_length_and_count(request, self.info)
        check_sampling(request.sampling)
        if len(self._runs) >= self.info.max_num_seqs + self._options.max_waiting:
            raise EngineOverloadedError("too many requests are waiting already; try again later")
        return replace(request, steering=self._served.pinned(request.steering))

    async def _begin(self, request: GenerationRequest, arrived_s: float, *, keep: bool) -> _Begun:
        """Decide. `keep`: the pass that stands is to be the answer's; else it is a pass for one token, and is not returned."""
        if self._one_pass and request.steering.activations:
            return await self._decide_within(request, arrived_s, keep=keep)
        if (known := self._steering.recall(request)) is not None:
            return _Begun(known, None)
        passes = self._steering.passes(request)
        if passes.order is None:
            return _Begun(passes.decided(), None)
        queued_s = 0.0
        while True:
            order = passes.order
            run = await self._submit(request, order, salt(request, order.add), arrived_s, probe=not keep)
            try:
                output, report = await run.first()
                stands = passes.read(report)
            except BaseException as error:
                if isinstance(error, GenerationError) and error.decision is None and passes.made:
                    error.decision = passes.decided().decision
                await run.abort()
                raise
            if not stands or not keep:
                queued_s += _queued_s(output)
                await run.abort()
            if stands:
                decided = passes.decided()
                self._steering.remember(request, decided)
                return _Begun(decided, run if keep else None, queued_s)

    async def _decide_within(self, request: GenerationRequest, arrived_s: float, *, keep: bool) -> _Begun:
        """Have the workers decide amid the prompt's only pass. Its salt is the whole prompt's and the options': nothing of it is
        found by a prompt that merely begins alike, whose vector is another."""
        asked = json.dumps([request.cache_owner, request.prompt_token_ids, asdict(request.steering)])
        own = hashlib.sha256(asked.encode()).hexdigest()
        run = await self._submit(request, Order(decide=request.steering), own, arrived_s, probe=not keep)
        try:
            _, report = await run.first()
            if report is None or report.decided is None:
                raise steering_lost(report, self._layers)
            decision = combine(request.steering, *report.decided)
            if decision.applied != bool(report.added):
                raise steering_lost(report, self._layers if decision.applied else ())
        except BaseException:
            await run.abort()
            raise
        if not keep:
            await run.abort()
        return _Begun(Decided(decision), run if keep else None)

    async def _submit(
        self,
        request: GenerationRequest,
        order: Order | None,
        salt: str | None,
        arrived_s: float,
        *,
        probe: bool = False,
    ) -> Run:
        sampling, length = request.sampling, len(request.prompt_token_ids)
        params: SamplingParams
        if probe:
            params = sampling_params(replace(sampling, logprobs=None, prompt_logprobs=None, grammar=None), order, 1, 1)
        else:
            most = min(sampling.max_tokens, self.info.max_model_len - length)
            params = sampling_params(sampling, order, request.n, most)
        name = f"{request.request_id}/{next(self._names)}"
        return await self._runs.submit(name, list(request.prompt_token_ids), params, salt, request.priority, arrived_s)

    async def _events(self, request: GenerationRequest, run: Run, begun: _Begun) -> AsyncIterator[TokenEvent]:
        """A run's tokens, the first with what is said once. Raises GenerationError where one would come that is not steered as decided."""
        sampling, announced, seen = request.sampling, False, set()
        async for output in run:
            for completion in output.outputs:
                if completion.index not in seen:
                    seen.add(completion.index)
                    self._check_steered(run, begun.decided, len(seen))
                for event in events_of(completion, sampling.logprobs):
                    if not announced:
                        announced = True
                        event = replace(
                            event,
                            decision=begun.decided.decision,
                            prompt_logprobs=None
                            if sampling.prompt_logprobs is None
                            else prompt_logprobs_of(
                                output.prompt_logprobs, request.prompt_token_ids, sampling.prompt_logprobs
                            ),
                            num_cached_tokens=output.num_cached_tokens or 0,
                            queue_s=begun.queued_s + _queued_s(output),
                        )
                    yield event

    def _check_steered(self, run: Run, decided: Decided, num_begun: int) -> None:
        """The `num_begun`-th completion has begun: its workers must have said that they add what was decided."""
        reports = run.reports
        report = reports[num_begun - 1] if len(reports) >= num_begun else None
        if self._one_pass and decided.decision.profiles:  # each completion is decided anew, and rounded anew
            if report is None or report.added != reports[0].added:
                raise steering_lost(report, reports[0].added)
        elif decided.decision.applied:
            check_report(report, decided.additions)


def _queued_s(output: object) -> float:
    """From the engine's queue to its first step; 0 where vLLM does not say."""
    metrics = getattr(output, "metrics", None)
    if metrics is None or not (metrics.queued_ts and metrics.scheduled_ts):
        return 0.0
    return max(metrics.scheduled_ts - metrics.queued_ts, 0.0)


def _block_bytes(config: object) -> int:
    """Memory of one block of keys and values, on all cards together."""
    model, parallel = config.model_config, config.parallel_config
    element = torch.empty(0, dtype=model.dtype).element_size()
    heads, size = model.get_total_num_kv_heads(), model.get_head_size()
    layers = model.get_num_layers(parallel)
    return 2 * heads * size * layers * config.cache_config.block_size * element
