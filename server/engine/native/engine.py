"""The native engine: a generation loop of its own on a thread of its own, behind the `Engine` interface.

The loop reads: take commands, schedule, step, hand out. The event loop hears from it by one `call_soon_threadsafe` a step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from server.engine.base import (
    Engine,
    EngineDeadError,
    EngineInfo,
    EngineObserver,
    EngineOverloadedError,
    EngineStats,
    GenerationError,
    GenerationRequest,
    PromptTooLongError,
    TokenEvent,
)
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import Results
from server.engine.native.decoder import Decoder
from server.engine.native.sequence import SequenceGroup
from steering.decision import SteeringDecision
from steering.manifest import ProfileManifest
from steering.profile import SteeringProfile

logger = logging.getLogger(__name__)


class NativeEngine(Engine):
    """Continuous batching with per-row steering on a decoder.

    Args:
        decoder: made of `model`; the engine owns both from now on.
        profiles: checked against the model. Raises ProfileError.
        options: limits. Raises ModelError where memory does not hold one sequence.
        model_name: for `info`.
        observer: told of each decision, on the engine's thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: PreTrainedModel,
        profiles: Sequence[SteeringProfile] = (),
        options: EngineOptions | None = None,
        *,
        model_name: str = "model",
        observer: EngineObserver | None = None,
    ) -> None:
        options = options or EngineOptions()
        self._core, memory = build_core(decoder, model, profiles, options, observer)
        self.info = EngineInfo(
            engine="native",
            model=model_name,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            dtype=str(decoder.dtype).removeprefix("torch."),
            device=str(decoder.device),
            kv_cache_bytes=memory.kv_cache_bytes,
            prefix_cache_bytes=memory.prefix_cache_bytes,
        )
        self._profiles = {profile.name: profile.manifest for profile in profiles}
        self._commands: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self._stats = EngineStats()
        self._failure: str | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def warm_up(self) -> None:
        """Run a few tokens, so that what is compiled at its first use is compiled before the first request. Before `start`."""
        self._core.warm_up()

    # -- the Engine interface, on the event loop ------------------------------------------------------------------------

    @property
    def profiles(self) -> Mapping[str, ProfileManifest]:
        return self._profiles

    @property
    def failure(self) -> str | None:
        return self._failure

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="finesteer-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        if self._thread is not None:
            self._commands.put((self._take_stop, None))
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        group, results = self._submit(request)
        unfinished = request.n
        try:
            while unfinished:
                event = await results.get()
                if isinstance(event, Exception):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            if unfinished:
                self._commands.put((self._take_abort, group))

    async def score(self, request: GenerationRequest) -> SteeringDecision:
        group, results = self._submit(request, score_only=True)
        decision = None
        try:
            decision = await results.get()
            if isinstance(decision, Exception):
                raise decision
            return decision
        finally:
            if decision is None:
                self._commands.put((self._take_abort, group))

    def stats(self) -> EngineStats:
        return self._stats

    def _submit(self, request: GenerationRequest, *, score_only: bool = False) -> tuple[SequenceGroup, asyncio.Queue]:
        if self._failure is not None or self._thread is None:
            raise EngineDeadError(self._failure or "the engine is not running")
        if len(request.prompt_token_ids) >= self.info.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(request.prompt_token_ids)} tokens; the limit is {self.info.max_model_len - 1}, "
                f"since prompt and completion share {self.info.max_model_len} positions"
            )
        if request.n > self.info.max_num_seqs:
            raise GenerationError(f"n is {request.n}; this server runs {self.info.max_num_seqs} at most", "n_too_large")
        if not self._core.scheduler.fits(request.n, len(request.prompt_token_ids)):
            raise GenerationError(
                f"{request.n} completions of {len(request.prompt_token_ids)} prompt tokens need more keys and values than "
                "this server has memory for; ask for fewer at once",
                "n_too_large",
            )
        unknown = [a.profile for a in request.steering.activations if a.profile not in self._profiles]
        if unknown:
            raise GenerationError(f"no steering profile {unknown[0]!r} is loaded", "profile_not_found")
        results: asyncio.Queue = asyncio.Queue()
        group = SequenceGroup.of(request, results.put_nowait, score_only=score_only)
        self._commands.put((self._take_request, group))
        if self._failure is not None:  # it failed in between: nobody will read that command
            raise EngineDeadError(self._failure)
        return group, results

    # -- the engine's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                if not self._stopping and self._core.has_work:
                    self._hand_out(self._core.step())
            self._fail_all("the engine was stopped")
        except Exception as error:  # the thread's edge: whatever it is, nothing more can be served
            logger.exception("the engine failed")
            self._fail_all(f"the engine failed ({type(error).__name__}: {error}); the process must be restarted")

    def _take_commands(self) -> None:
        """Carry out what the event loop sent; wait for it when there is nothing to do."""
        while not self._stopping:
            try:
                command, argument = self._commands.get(block=not self._core.has_work)
            except queue.Empty:
                return
            command(argument)
            self._stats = self._core.stats()

    def _take_request(self, group: SequenceGroup) -> None:
        try:
            self._core.add(group)
        except EngineOverloadedError as error:
            self._hand_out([(group, error)])

    def _take_abort(self, group: SequenceGroup) -> None:
        self._core.abort(group)

    def _take_stop(self, _: None) -> None:
        self._stopping = True

    def _fail_all(self, message: str) -> None:
        """End every request that was taken, and take no more."""
        self._failure = message
        groups = self._core.scheduler.groups
        while not self._commands.empty():
            command, argument = self._commands.get()
            if command == self._take_request:
                groups.append(argument)
        for group in groups:
            self._core.abort(group)
        self._hand_out([(group, EngineDeadError(message)) for group in groups])

    def _hand_out(self, results: Results) -> None:
        self._stats = self._core.stats()
        if results and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, results)


def _deliver(results: Results) -> None:
    for group, result in results:
        group.deliver(result)
