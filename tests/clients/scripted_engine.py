"""A test double of `Engine`: says what a script says, token by token, under the request's own grammar.

What it shows is the server around it with clients that need a clever model. It has no model and no profiles.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.engine.base import (
    Engine,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationError,
    GenerationRequest,
    GrammarState,
    SamplingOptions,
    TokenEvent,
    TokenLogprobs,
)
from server.prompting.vocabulary import Vocabulary
from steering.decision import SteeringDecision, combine
from steering.errors import ProfileError
from steering.manifest import ProfileManifest

MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Step:
    """One token of a reply, and whether and why it is the last."""

    token_id: int
    finish_reason: FinishReason | None = None


class ScriptedEngine(Engine):
    """Each completion of a request is the first of `replies(prompt)` that the request's grammar takes whole.

    Args:
        vocabulary: in which prompts are read and replies are spelt.
        replies: prompt text, special tokens included → what may be said, best first.
    """

    def __init__(
        self, vocabulary: Vocabulary, eos_token_id: int, vocab_size: int, replies: Callable[[str], Sequence[str]]
    ) -> None:
        self.info = EngineInfo(
            engine="scripted",
            model="scripted",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=16,
            vocab_size=vocab_size,
            hidden_size=1,
            num_layers=1,
            dtype="none",
            device="none",
        )
        self._vocabulary = vocabulary
        self._eos_token_id = eos_token_id
        self._replies = replies
        self._speller = Speller(vocabulary, vocab_size)

    @property
    def profiles(self) -> Mapping[str, ProfileManifest]:
        return {}

    @property
    def failure(self) -> str | None:
        return None

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def load_profile(self, name: str, reference: str, check=lambda _: None) -> ProfileManifest:
        raise ProfileError("this engine's profiles are fixed.")

    async def unload_profile(self, name: str) -> None:
        raise KeyError(name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        decision: SteeringDecision | None = await self.score(request)
        steps = self._steps(request)
        logprobs = None if request.sampling.logprobs is None else TokenLogprobs(0.0)
        for step in steps:
            for index in range(request.n):
                yield TokenEvent(index, step.token_id, step.finish_reason, logprobs, decision)
                decision = None
                await asyncio.sleep(0)  # so that streams of several requests are interleaved

    async def score(self, request: GenerationRequest) -> SteeringDecision:
        return combine(request.steering, ())

    def stats(self) -> EngineStats:
        return EngineStats()

    def _steps(self, request: GenerationRequest) -> list[Step]:
        """Raises GenerationError where the script has nothing that the grammar takes."""
        prompt = b"".join(map(self._vocabulary.raw_bytes, request.prompt_token_ids)).decode("utf-8", "replace")
        for reply in self._replies(prompt):
            steps = self._spelt(reply.encode(), request.sampling)
            if steps is not None:
                return steps
        raise GenerationError("the script has no reply that this request allows", "not_scripted")

    def _spelt(self, reply: bytes, sampling: SamplingOptions) -> list[Step] | None:
        """The reply in tokens up to its end or `max_tokens`; None where the grammar does not take it."""
        state = sampling.grammar.begin() if sampling.grammar else None
        steps: list[Step] = []
        while reply or not steps or steps[-1].finish_reason is None:
            allowed = None if state is None else allowed_tokens(state)
            token_id = self._speller.next_token(reply, allowed) if reply else self._eos_token_id
            if token_id is None or (allowed is not None and not allowed[token_id]):
                return None
            reply = reply[len(self._vocabulary.raw_bytes(token_id)) :]
            ended = token_id == self._eos_token_id
            if state is not None and not ended:
                state.accept(token_id)
                ended = state.finished
                if ended and reply:
                    return None
            cut = len(steps) + 1 == sampling.max_tokens
            steps.append(Step(token_id, "stop" if ended else "length" if cut else None))
            if cut:
                break
        return steps


class Speller:
    """Cuts bytes into tokens, the longest first."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        plain = (i for i in range(vocab_size) if i not in vocabulary.special_ids)
        self._ids = {raw: i for i in plain if (raw := vocabulary.raw_bytes(i))}
        self._longest = max(map(len, self._ids))

    def next_token(self, text: bytes, allowed: np.ndarray | None) -> int | None:
        """The longest token that begins `text`, and may come where `allowed` is given; None where there is none."""
        for size in range(min(self._longest, len(text)), 0, -1):
            token_id = self._ids.get(text[:size])
            if token_id is not None and (allowed is None or allowed[token_id]):
                return token_id
        return None


def allowed_tokens(state: GrammarState) -> np.ndarray:
    """A grammar's mask with one bool a token."""
    return np.unpackbits(state.mask().view(np.uint8), bitorder="little").astype(bool)
