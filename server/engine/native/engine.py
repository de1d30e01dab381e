"""The native engine: a generation loop of its own on a thread of its own, behind the `Engine` interface.

The loop reads: take commands, schedule, step, hand out. The event loop hears from it by one `call_soon_threadsafe` a step.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

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
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import Result, Results
from server.engine.native.decoder import Decoder
from server.engine.native.inbox import Inbox
from server.engine.native.live_profiles import LiveProfiles
from server.engine.native.probe import Probe
from server.engine.native.sequence import SequenceGroup
from server.engine.refusals import check_length_and_count
from server.engine.served_profiles import ServedProfiles
from steering.decision import SteeringDecision
from steering.errors import ProfileError
from steering.manifest import ProfileManifest
from steering.profile import SteeringProfile

logger = logging.getLogger(__name__)
STOPPED = "the server is shutting down"
STOP_WITHIN_S = 10.0  # a step that takes longer has hung


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
        self._core.still_sound = Probe(decoder).holds
        self._max_queued = options.max_num_seqs + options.max_waiting
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
        self._live = (
            LiveProfiles(self._core, model, profiles, memory.prefix_cache_bytes) if options.live_profiles else None
        )
        self._served = ServedProfiles((profile.manifest for profile in profiles), self._retire)
        self._changing = asyncio.Lock()
        self._awaited: set[concurrent.futures.Future[None]] = set()
        self._open: set[Inbox] = set()  # of requests that somebody waits for
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
        return self._served.manifests

    @property
    def failure(self) -> str | None:
        return self._failure

    async def start(self) -> None:
        if self._thread is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="finesteer-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        if self._thread is not None:
            self._commands.put((self._take_stop, None))
            await asyncio.to_thread(self._thread.join, STOP_WITHIN_S)
            if self._thread.is_alive():
                logger.error("the engine does not end its step; it is left alone")
                self._failure = self._failure or STOPPED
                self._end_open(self._failure)
            self._thread = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        group, inbox = self._submit(request)
        unfinished = request.n
        try:
            while unfinished:
                event = await inbox.get()
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            self._open.discard(inbox)
            if unfinished:
                self._commands.put((self._take_abort, group))

    async def score(self, request: GenerationRequest) -> SteeringDecision:
        group, inbox = self._submit(request, score_only=True)
        decision = None
        try:
            decision = await inbox.get()
            return decision
        finally:
            self._open.discard(inbox)
            if decision is None:
                self._commands.put((self._take_abort, group))

    async def load_profile(
        self, name: str, reference: str, check: Callable[[ProfileManifest], None] = lambda _: None
    ) -> ProfileManifest:
        if self._live is None:
            raise ProfileError(
                "this server's profiles are fixed; start it with an admin key to change them while it runs."
            )
        async with self._changing:
            profile = await asyncio.to_thread(SteeringProfile.load, reference, name)
            check(profile.manifest)
            retiring = self._served.keep(name, profile.version)
            try:
                await self._on_thread(self._live.add, profile)
            except BaseException:
                if retiring:
                    self._served.retire_later(name, profile.version)
                raise
            self._served.put(name, profile.manifest)
            return profile.manifest

    async def unload_profile(self, name: str) -> None:
        async with self._changing:
            self._served.remove(name)

    def _retire(self, name: str, version: str) -> None:
        self._commands.put((lambda key: self._live.retire(*key), (name, version)))

    async def _on_thread(self, work: Callable[[Any], None], argument: Any) -> None:
        """Have the engine's thread do something between two steps; raises what it raises."""
        self._check_alive()
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._awaited.add(done)
        done.add_done_callback(self._awaited.discard)

        def command(value: Any) -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work(value))
                except Exception as error:
                    done.set_exception(error)

        self._commands.put((command, argument))
        self._check_alive()  # if it failed in between, nobody will read that command
        await asyncio.wrap_future(done)

    def stats(self) -> EngineStats:
        return self._stats

    def _check_alive(self) -> None:
        """Raise EngineDeadError unless it runs."""
        if self._failure is not None or self._thread is None:
            raise _dead(self._failure or "the engine is not running")

    def _submit(self, request: GenerationRequest, *, score_only: bool = False) -> tuple[SequenceGroup, Inbox]:
        self._check_alive()
        check_length_and_count(request, self.info)
        if not self._core.scheduler.fits(request.n, len(request.prompt_token_ids)):
            raise GenerationError(
                f"{request.n} completions of {len(request.prompt_token_ids)} prompt tokens need more keys and values than "
                "this server has memory for; ask for fewer at once",
                "n_too_large",
            )
        queued = self._commands.qsize() + self._stats.num_waiting  # the scheduler itself counts once its step is done
        if queued >= self._max_queued:
            raise EngineOverloadedError("too many requests are waiting already; try again later")
        request = replace(request, steering=self._served.pinned(request.steering))
        inbox = Inbox()

        def deliver(result: Result) -> None:
            if not inbox.put(result):
                self._commands.put((self._take_abort, group))

        group = SequenceGroup.of(request, deliver, score_only=score_only)
        self._commands.put((self._take_request, group))
        self._check_alive()  # if it failed in between, nobody will read that command
        self._open.add(inbox)
        return group, inbox

    # -- the engine's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                if not self._stopping and self._core.has_work:
                    self._hand_out(self._core.step())
                    if self._live is not None and self._live.retired:
                        self._live.sweep()
            self._fail_all(STOPPED)
            for group in self._core.scheduler.groups:
                self._core.abort(group)
        except BaseException as error:  # the thread's edge: whatever it is, nothing more can be served
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
        """End every request, and take no more. Asks nothing of the core, whose state may be anything."""
        self._failure = message
        self._stats = replace(self._stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_open, message)

    def _end_open(self, message: str) -> None:
        """On the event loop: whoever waits for the engine need wait no more."""
        for inbox in self._open:
            inbox.fail(_dead(message))
        for done in list(self._awaited):
            done.set_exception(_dead(message))

    def _hand_out(self, results: Results) -> None:
        self._stats = self._core.stats()
        if results and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, results)


def _dead(message: str) -> EngineDeadError:
    return EngineStoppedError(message) if message == STOPPED else EngineDeadError(message)


def _deliver(results: Results) -> None:
    for group, result in results:
        group.deliver(result)
