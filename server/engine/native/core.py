"""The generation loop: admit, prefill chunks, decide, decode, append. Synchronous; the engine puts a thread around it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import torch

from server.engine.base import (
    EngineObserver,
    EngineStats,
    GenerationError,
    GenerationRequest,
    PromptTooLongError,
    SamplingOptions,
    TokenEvent,
)
from server.engine.native.inbox import Result
from server.engine.native.prefix_cache import PrefixCacheStats
from server.engine.native.runner import Runner
from server.engine.native.sampler import Sampled
from server.engine.native.scheduler import Limits, Scheduler
from server.engine.native.sequence import Phase, Sequence, SequenceGroup
from server.engine.refusals import unsafe

Results = list[tuple[SequenceGroup, Result]]
Kind = Literal["entering", "prefill", "decode"]
Found = TypeVar("Found")
MAX_FAILED_PASSES = 8  # of one kind, one after the other
logger = logging.getLogger(__name__)


class EngineCore:
    """The scheduler and the runner together. `add`, `abort` and `step` are called from one thread.

    What a pass raises ends the requests that were in it, and the others go on, where `still_sound` is given and says that the
    model is what it was: slots and blocks are taken back, and what is kept of finished prompts, which the pass may have left
    half written, is dropped. Where the model is not, or one kind of pass does nothing but fail, or anything else fails, `step` raises, and
    the core must not be used any more. Without `still_sound` every failure is raised.

    Args:
        max_model_len: prompt and completion tokens together.
        observer: told of each decision that a generation gets, when it is made.
    """

    def __init__(
        self, runner: Runner, limits: Limits, max_model_len: int, observer: EngineObserver | None = None
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(limits, runner.cache.reserve, runner.cache.release)
        self.max_model_len = max_model_len
        self.still_sound: Callable[[], bool] | None = None
        self._failed_passes: Counter[Kind] = Counter()
        self._observer = observer
        self._results: Results = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Raises EngineOverloadedError."""
        self.scheduler.add(group)

    def abort(self, group: SequenceGroup) -> None:
        """Drop a request at whatever stage; its slots are free at once."""
        self.scheduler.abort(group)

    @torch.inference_mode()
    def step(self) -> Results:
        """Chunks of prompts, and one token for everyone who is generating. Returns what to tell whom."""
        decoding = self.scheduler.decoding()
        for sequence in self.scheduler.admit():
            self._pass("entering", [sequence], partial(self.runner.enter, sequence, 0))
        for segment in range(len(self.runner.segments)):
            chunks = self.scheduler.chunks(segment)
            if chunks:
                sequences = [chunk.sequence for chunk in chunks]
                prefilled = self._pass("prefill", sequences, partial(self.runner.prefill, segment, chunks))
                if prefilled is not None:
                    for group in prefilled.decided:
                        self._decide(group)
                    self._append(prefilled.sampled)
        if decoding := [s for s in decoding if s.phase is Phase.DECODE]:  # a failed prefill ends its siblings
            self._append(self._pass("decode", decoding, partial(self.runner.decode, decoding)) or [])
        results, self._results = self._results, []
        return results

    def _pass(self, kind: Kind, sequences: Seq[Sequence], run: Callable[[], Found]) -> Found | None:
        """What `run` gives; None where it failed and the requests of its sequences are ended."""
        try:
            found = run()
        except Exception as error:
            if self.still_sound is None:
                raise
            logger.exception("a pass failed (%s, %d sequences)", kind, len(sequences))
            self._failed_passes[kind] += 1
            for group in dict.fromkeys(sequence.group for sequence in sequences):
                self._fail(
                    group, GenerationError(f"the server failed at this request ({_named(error)})", "pass_failed")
                )
            self.runner.forget()
            if self._failed_passes[kind] >= MAX_FAILED_PASSES or not self.still_sound():
                raise
            return None
        self._failed_passes[kind] = 0
        return found

    def run(
        self, requests: Seq[GenerationRequest], on_result: Callable[[Result], None] = lambda _: None
    ) -> dict[str, list[Result]]:
        """Carry requests out to their ends, without a thread: each one's events in order, by request id.

        `on_result` is called with each as it comes. Raises PromptTooLongError.
        """
        longest = max((len(request.prompt_token_ids) for request in requests), default=0)
        if longest >= self.max_model_len:
            raise PromptTooLongError(f"a prompt has {longest} tokens; the limit is {self.max_model_len - 1}")
        found: dict[str, list[Result]] = {request.request_id: [] for request in requests}
        waiting = [SequenceGroup.of(request, lambda _: None) for request in reversed(requests)]
        while waiting or self.has_work:
            while waiting and self.scheduler.num_waiting < self.scheduler.limits.max_waiting:
                self.add(waiting.pop())
            for group, result in self.step():
                found[group.request.request_id].append(result)
                on_result(result)
        return found

    def warm_up(self) -> None:
        """Run requests that nobody sees: two rows at once, then, since the second is longer, a lone one."""
        observer, self._observer = self._observer, None
        prompt = tuple(range(max(1, min(4, self.max_model_len - 3))))
        options = [SamplingOptions(length, temperature=0.0) for length in (3, 4)]
        self.run([GenerationRequest(f"warm-up-{o.max_tokens}", prompt, o) for o in options])
        self.runner.prefix_cache.stats = PrefixCacheStats()
        self._observer = observer

    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        cached = self.runner.prefix_cache
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_cache_usage=self.scheduler.kv_usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_usage=cached.usage,
            prefix_cache_queries=(cached.stats.lower_queries, cached.stats.upper_queries),
            prefix_cache_hits=(cached.stats.lower_hits, cached.stats.upper_hits),
        )

    def _decide(self, group: SequenceGroup) -> None:
        """Take note of what steering decided for a prompt."""
        if group.score_only:
            self._results.append((group, group.decision))
            self.scheduler.abort(group)
            return
        if self._observer is not None:
            self._observer.decided(group.decision)
        refusal = unsafe(group.request.steering, group.steering.profiles)
        if refusal is not None:
            self._fail(group, refusal)

    def _append(self, tokens: list[tuple[Sequence, Sampled]]) -> None:
        """Give sequences their tokens, and end those whose last it was."""
        for sequence, sampled in tokens:
            if sequence.phase is Phase.FINISHED:
                continue
            sequence.phase = Phase.DECODE
            group = sequence.group
            if not sampled.finite or not (group.announced or _finite(group)):
                self._fail(group, GenerationError("the model produced NaN or infinite logits", "non_finite_logits"))
                continue
            grammar = sequence.grammar
            try:
                if sampled.failure is not None:
                    raise sampled.failure
                if grammar is not None:
                    grammar.accept(sampled.token_id)
            except GenerationError as error:
                self._fail(group, error)
                continue
            except Exception as error:  # the grammar engine's own: its state is this completion's alone
                logger.exception("a grammar failed")
                self._fail(group, GenerationError(f"the grammar failed ({_named(error)})", "grammar_failed"))
                continue
            options = sequence.request.sampling
            sequence.token_ids.append(sampled.token_id)
            full = len(sequence.token_ids) >= self.max_model_len
            if sampled.token_id in options.stop_token_ids or (grammar is not None and grammar.finished):
                sequence.finish_reason = "stop"
            elif full or sequence.num_completion_tokens >= options.max_tokens:
                sequence.finish_reason = "length"
            event = TokenEvent(sequence.index, sampled.token_id, sequence.finish_reason, sampled.logprobs)
            self._results.append((group, event if group.announced else _announce(group, event)))
            if sequence.finish_reason is not None:
                self.scheduler.finish(sequence)

    def _fail(self, group: SequenceGroup, error: GenerationError) -> None:
        """End one request with an error."""
        self.scheduler.abort(group)
        if not group.announced:
            error.decision = group.decision
        self._results.append((group, error))


def _named(error: Exception) -> str:
    """Its kind; what it says is for the log."""
    return type(error).__name__


def _announce(group: SequenceGroup, event: TokenEvent) -> TokenEvent:
    """A request's first event, with what is said of the request once."""
    group.announced = True
    scored = group.request.sampling.prompt_logprobs is not None
    logprobs = tuple(group.prompt_logprobs) if scored else None
    group.prompt_logprobs.clear()
    return replace(
        event,
        decision=group.decision,
        prompt_logprobs=logprobs,
        num_cached_tokens=group.num_cached_tokens,
        queue_s=group.queue_s or 0.0,
    )


def _finite(group: SequenceGroup) -> bool:
    """Whether the prompt's log-probabilities, if there are any, are numbers."""
    return not any(found is not None and math.isnan(found.logprob) for found in group.prompt_logprobs)
