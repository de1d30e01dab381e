"""The seam between the server and whatever runs the model. No torch here.

An engine takes frozen `GenerationRequest`s and yields `TokenEvent`s; the first event of a request carries its
`SteeringDecision`. Engines know token ids only: text, stop strings, templates and JSON are the server's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from steering.decision import SteeringDecision, SteeringOptions
from steering.manifest import ProfileManifest

FinishReason = Literal["stop", "length"]
# Layers up to the first steering site, cached by tokens alone, and those above it, cached by tokens and vector.
PREFIX_CACHE_PARTS = ("lower", "upper")


class GrammarState(Protocol):
    """One completion's way through a grammar; used by one thread at a time."""

    def mask(self) -> np.ndarray:
        """(ceil(V / 32),) int32: bit t % 32 of word t // 32 is set where token t may come next. Never all zeros."""

    def accept(self, token_id: int) -> None:
        """Move on by a token that the mask allows. Raises GenerationError where the grammar's engine gives up."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow: the completion ends here, with no end token."""


@dataclass(frozen=True)
class GrammarSource:
    """What a grammar was made of, a JSON schema's text or llguidance's dialect of Lark, with no white space in its JSON."""

    kind: Literal["json", "grammar"]
    text: str


class Grammar(Protocol):
    """What a completion's tokens must spell. Immutable, shared by requests.

    `source`: for engines that follow grammars by themselves; None where it spells special tokens in plain quotes, which others
    do not understand.
    """

    @property
    def source(self) -> GrammarSource | None: ...

    def begin(self) -> GrammarState:
        """A state at the grammar's start; cheap."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Temperature 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and penalties 0 / 1 are off.

    `stop_token_ids` must already hold the model's end-of-sequence ids unless the request ignores them.
    `logprobs`: None = none, k = the chosen token's and the k likeliest (0 = only the chosen one's), of the model's
    distribution before temperature and truncation (OpenAI's meaning), after penalties and bias.
    `repetition_penalty` counts prompt and completion; presence and frequency penalties count the completion.
    `prompt_logprobs`: the same for the prompt's tokens, each given those before it: of the distribution that the model has
    under the request's steering, and untouched by penalties, bias and grammar. With `positions: "all"` a vector acts on the
    prompt's states, so these are the steered model's; with "last" the prompt's are the plain model's.
    `grammar` masks each completion's logits, after penalties and bias: it wins over all of them, over `min_tokens` too.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, `n` completions of it, one steering decision for all of them.

    `cache_owner`: only requests of the same owner find what the prefix cache kept of this one; empty: all that name none.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingOptions
    steering: SteeringOptions = field(default_factory=SteeringOptions)
    n: int = 1
    priority: int = 0
    cache_owner: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of the chosen token, and the likeliest `(token_id, logprob)` in falling order.

    `rank`: one more than there are likelier tokens, so 1 for the likeliest. Given for prompts' tokens only.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One new token of completion `index` (0 ≤ index < n). `decision` is set on a request's first event, and only there.

    So are `prompt_logprobs`, where they are asked for: one a prompt token, None for the first, which nothing foretells; and
    `num_cached_tokens`: how many of the prompt's tokens passed no layer, since all that comes of them was in the prefix cache;
    and `queue_s`: how long the request waited for a row of the batch, before any preemption.

    A token in `stop_token_ids` ends the completion and is delivered with `finish_reason="stop"` (the server shows no
    text for it); it counts as a completion token.
    """

    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    decision: SteeringDecision | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0
    queue_s: float = 0.0


@dataclass(frozen=True)
class EngineInfo:
    """What the server must know of the model. `max_model_len` counts prompt and completion tokens together.

    `kv_cache_bytes`, `prefix_cache_bytes`: the memory that running and finished prompts may take.
    """

    engine: str
    model: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    dtype: str
    device: str
    kv_cache_bytes: int = 0
    prefix_cache_bytes: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Gauges and counters since start-up, read at any time from any thread.

    Attributes:
        num_running, num_waiting: completions that hold a slot, and requests in the queue.
        kv_cache_usage, prefix_cache_usage: shares in [0, 1] of the memory set apart for running and for finished prompts.
        num_preemptions: sequences that had to go back to the queue.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up and found, for each `PREFIX_CACHE_PARTS`.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_usage: float = 0.0
    num_preemptions: int = 0
    prefix_cache_queries: tuple[int, int] = (0, 0)
    prefix_cache_hits: tuple[int, int] = (0, 0)


class EngineObserver(Protocol):
    """Told by the engine, on the engine's thread, of each decision exactly once: also where the client has since gone."""

    def decided(self, decision: SteeringDecision) -> None: ...


class EngineError(Exception):
    """Root of an engine's failures."""


class PromptTooLongError(EngineError):
    """Prompt leaves no room for a single new token within `max_model_len`."""


class UnsupportedRequestError(EngineError):
    """This engine cannot do what the request asks as the interface says; another one may."""


class EngineOverloadedError(EngineError):
    """The waiting queue is full; try again later."""


class EngineDeadError(EngineError):
    """The engine's thread has failed; the process must be restarted. `/health` says so too."""


class EngineStoppedError(EngineDeadError):
    """The engine was told to stop: the server is shutting down."""


class DeadlineExceededError(EngineError):
    """The request took longer than it may. Whoever waits for an engine raises it, not the engine."""


class GenerationError(EngineError):
    """This request failed alone (non-finite numbers, say); others go on. `code` is a stable machine-readable name.

    `decision`: what steering had decided, where no event has carried it.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
        self.decision: SteeringDecision | None = None


class Engine(ABC):
    """Runs one model with steering profiles. Construct, `start`, use, `stop`; all calls from one event loop."""

    info: EngineInfo

    @property
    @abstractmethod
    def profiles(self) -> Mapping[str, ProfileManifest]:
        """The loaded profiles' manifests by name, in the order in which they were given. A change makes a new mapping."""

    @property
    @abstractmethod
    def failure(self) -> str | None:
        """Why the engine can serve no more, or None while it is sound."""

    @abstractmethod
    async def start(self) -> None:
        """Begin to serve. Returns when the engine takes requests; at once where it does already. Raises SteeringError where the
        engine finds that profiles do not act as they should."""

    @abstractmethod
    async def stop(self) -> None:
        """End running requests with `EngineDeadError` and free everything. Idempotent."""

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Run a request; yields events of its n completions, interleaved, until each has had a `finish_reason`.

        Closing the iterator (`aclose`, or cancelling the task that reads it) aborts: the rows are freed at the next step.
        Raises on the first `__anext__`: PromptTooLongError, UnsupportedRequestError, EngineOverloadedError, EngineDeadError; later:
        GenerationError, EngineDeadError.
        """

    @abstractmethod
    async def score(self, request: GenerationRequest) -> SteeringDecision:
        """The decision that `request` would get; nothing is generated and nothing is changed. Raises as `generate`."""

    @abstractmethod
    async def load_profile(
        self, name: str, reference: str, check: Callable[[ProfileManifest], None] = lambda _: None
    ) -> ProfileManifest:
        """Have requests that begin from now on find a profile under `name`, in place of one that has it; those under way keep
        the version they began with. Returns the manifest.

        Args:
            reference: a folder or a hub id.
            check: may raise once the manifest is read.
        Raises:
            ProfileError: it cannot be used, or this engine's profiles are fixed; nothing has changed. What `check` raises.
        """

    @abstractmethod
    async def unload_profile(self, name: str) -> None:
        """Have no request that begins from now on use it; those under way go on with it. Raises KeyError where there is none."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Current gauges."""
