"""One prompt's run: engine events in, text out, and an account of both for logs and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from server.engine.base import (
    DeadlineExceededError,
    Engine,
    EngineError,
    FinishReason,
    GenerationError,
    GenerationRequest,
    TokenEvent,
    TokenLogprobs,
)
from server.observability.metrics import Metrics
from server.prompting.detokenizer import TextStream, TokenBytes
from steering.decision import SteeringDecision

Result = TypeVar("Result")


async def by(deadline_s: float | None, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled at a time on the event loop's clock. Raises DeadlineExceededError."""
    try:
        async with asyncio.timeout_at(deadline_s):
            return await work
    except TimeoutError as error:
        raise DeadlineExceededError(
            "the answer was not done in the time that this server gives a request; ask for fewer tokens, or try again later"
        ) from error


@dataclass(frozen=True)
class TokenNote:
    """A token with its log-probabilities, and the offset of its text in the completion."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """What one token adds to completion `index`: text that may be shown, notes that go with it, and the end if it is one.

    `token_id`: None where the engine's token is not shown at all.
    """

    index: int
    text: str
    notes: tuple[TokenNote, ...] = ()
    finish_reason: FinishReason | None = None
    token_id: int | None = None


class Generation:
    """Runs one request. `start`, then `deltas` once; `aclose` at the end, whatever happened. Not to be shared by tasks.

    A completion that meets a stop string is finished for the client; once all n are, the engine's run is closed.

    Args:
        silent: each completion is its prompt alone. An engine makes a token at least; it is neither shown nor counted.
        note_ends: the token that ends a completion, which has no text, gets a note, too.
        deadline_s: when it fails if it is not done, on the event loop's clock.

    Attributes:
        token_ids: of each completion so far, with the one that ended it.
        prompt_logprobs, cached_tokens: as the engine's first event tells them.
        finish_reasons: of each completion; at the end of those that did not finish `abort` or `error`.
    """

    def __init__(
        self,
        engine: Engine,
        request: GenerationRequest,
        vocabulary: TokenBytes,
        stops: Sequence[str],
        metrics: Metrics,
        *,
        silent: bool = False,
        note_ends: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        self.request = request
        self.decision: SteeringDecision | None = None
        self.completion_tokens = 0
        self.token_ids: list[list[int]] = [[] for _ in range(request.n)]
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.cached_tokens = 0
        self.finish_reasons: list[str | None] = [None] * request.n
        self._logprob_sums = [0.0] * request.n
        self._silent, self._note_ends = silent, note_ends
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._hidden_ids = request.sampling.stop_token_ids
        self._texts: list[TextStream] = [
            TextStream(vocabulary, stops, request.sampling.min_tokens) for _ in range(request.n)
        ]
        self._events = cast(AsyncGenerator[TokenEvent, None], engine.generate(request))  # closing it aborts
        self._first: TokenEvent | None = None
        self._begun_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s: dict[int, float] = {}
        self._unfinished = request.n
        self._failed = self._closed = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from the request's arrival at the engine to its first token; None before it."""
        return None if self._first_token_s is None else self._first_token_s - self._begun_s

    def mean_logprob(self, index: int) -> float:
        """Of a completion's tokens; they must have been asked for with `logprobs`."""
        return self._logprob_sums[index] / max(1, len(self.token_ids[index]))

    async def start(self) -> SteeringDecision:
        """Wait until the prompt is prefilled and steering has decided. Raises the engine's errors."""
        try:
            self._first = await self._next()
        except GenerationError as error:
            self.decision = error.decision
            raise
        assert self._first.decision is not None, "an engine's first event carries the decision"
        self.decision = self._first.decision
        self.prompt_logprobs, self.cached_tokens = self._first.prompt_logprobs, self._first.num_cached_tokens
        self._first_token_s = time.perf_counter()
        self._metrics.first_token(self.decision, self._first_token_s - self._begun_s, self.prompt_tokens)
        return self.decision

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """The completions' texts as they grow, interleaved, until each has had its `finish_reason`."""
        assert self._first is not None, "start first"
        yield self._delta(self._first)
        while self._unfinished:
            event = await self._next()
            if self.finish_reasons[event.index] is None:
                yield self._delta(event)

    async def aclose(self) -> None:
        """End the run: an unfinished one is aborted in the engine and counted as such. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._events.aclose()
        for index, reason in enumerate(self.finish_reasons):
            if reason is None:
                self.finish_reasons[index] = reason = "error" if self._failed else "abort"
                self._metrics.completion_ended(reason)
        if self._first is not None and self.decision is not None and self._first_token_s is not None:
            self._metrics.request_ended(
                self.request,
                self.decision,
                completion_lengths=[len(tokens) for tokens in self.token_ids],
                queue_s=self._first.queue_s,
                first_token_s=self._first_token_s - self._begun_s,
                decode_s=time.perf_counter() - self._first_token_s,
            )

    async def _next(self) -> TokenEvent:
        try:
            return await by(self._deadline_s, anext(self._events))
        except EngineError:
            self._failed = True
            raise

    def _delta(self, event: TokenEvent) -> TextDelta:
        assert self.decision is not None
        if self._silent:
            return self._ended(TextDelta(event.index, "", finish_reason="length"))
        now = time.perf_counter()
        last = self._last_token_s.get(event.index)
        self._last_token_s[event.index] = now
        self._metrics.token(self.decision, None if last is None else now - last)
        self.completion_tokens += 1
        self.token_ids[event.index].append(event.token_id)
        self._logprob_sums[event.index] += 0.0 if event.logprobs is None else event.logprobs.logprob
        hidden = event.token_id in self._hidden_ids
        noted = event.logprobs is not None and (self._note_ends or not hidden)
        piece = self._texts[event.index].push(
            event.token_id,
            (event.token_id, event.logprobs) if noted else None,
            hidden=hidden,
            last=event.finish_reason is not None,
        )
        notes = tuple(TokenNote(token_id, logprobs, offset) for offset, (token_id, logprobs) in piece.notes)
        reason = "stop" if piece.stopped else event.finish_reason
        return self._ended(TextDelta(event.index, piece.text, notes, reason, event.token_id))

    def _ended(self, delta: TextDelta) -> TextDelta:
        """Take note of a completion's end, if this is one."""
        if delta.finish_reason is not None:
            self.finish_reasons[delta.index] = delta.finish_reason
            self._unfinished -= 1
            self._metrics.completion_ended(delta.finish_reason)
        return delta


@dataclass(frozen=True)
class Completion:
    """A finished completion."""

    text: str
    notes: tuple[TokenNote, ...]
    finish_reason: FinishReason


async def collect(generation: Generation) -> list[Completion]:
    """Run a generation to its end; its n completions in order. Closes it, also when it fails or is cancelled."""
    texts: list[list[str]] = [[] for _ in range(generation.request.n)]
    notes: list[list[TokenNote]] = [[] for _ in texts]
    reasons: dict[int, FinishReason] = {}
    try:
        await generation.start()
        async for delta in generation.deltas():
            texts[delta.index].append(delta.text)
            notes[delta.index] += delta.notes
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
    finally:
        await generation.aclose()
    return [Completion("".join(texts[i]), tuple(notes[i]), reasons[i]) for i in range(len(texts))]
