"""What evaluation asks the native engine: greedy answers and teacher-forced log-probabilities, batched, under any profile."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from server.engine.base import GenerationRequest, SamplingOptions, TokenEvent
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import EngineCore
from server.engine.native.load import DEFAULT_MAX_MODEL_LEN, load_model, make_decoder
from server.engine.native.selftest import check_steering
from server.engine.native.sequence import SequenceGroup, SteeringState
from steering.architecture import model_key, text_config
from steering.decision import SteeringDecision, SteeringOptions
from steering.errors import ModelError, TrainingDataError
from steering.evaluation.answers import PLAIN, Answer
from steering.intervention import Dose
from steering.profile import SteeringProfile
from steering.training.data import Query
from steering.training.extraction import encode_query
from steering.training.progress import progress_bar

DEFAULT_BATCH = 64
TIMED_TOKENS = 48


@dataclass(frozen=True)
class _AnchoredDose(Dose):
    """A query's dose on query and answer scored as one prompt: it counts positions from the query's end, not the answer's."""

    num_query_tokens: int

    def add(self, states: Tensor, start: int, num_prompt_tokens: int) -> Tensor:
        """As `Dose.add`, whatever the scored prompt's length."""
        return Dose.add(self, states, start, self.num_query_tokens)


class NativeAnswerer:
    """An `Answerer` over the native engine. Loads the profiles once; every request says which of them act, and how.

    Args:
        model: a loaded transformers model, which the engine takes over: do not use it afterwards.
        profiles: checked against the model; their names must differ.
        batch: requests that run at once.
    Raises:
        ModelError, ProfileError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        profiles: Sequence[SteeringProfile] = (),
        *,
        batch: int = DEFAULT_BATCH,
        reload: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        limit = getattr(text_config(model), "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
        length = min(limit, DEFAULT_MAX_MODEL_LEN)
        self.tokenizer = tokenizer
        self.profiles = {profile.name: profile for profile in profiles}
        self.model_key = model_key(model)
        self._stop_ids = stop_token_ids(model, tokenizer)
        decoder = make_decoder(model, length, reload)
        check_steering(decoder, model, list(profiles))
        options = EngineOptions(max_num_seqs=batch, max_model_len=length)
        self._core: EngineCore = build_core(decoder, model, list(profiles), options)[0]
        self._names = itertools.count()

    @classmethod
    def load(
        cls,
        model: str | Path,
        profiles: Sequence[SteeringProfile] = (),
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch: int = DEFAULT_BATCH,
    ) -> NativeAnswerer:
        """From a model folder or hub id. Raises ModelError, ProfileError."""

        def once() -> PreTrainedModel:
            return load_model(str(model), dtype=dtype, device=device)

        return cls(once(), AutoTokenizer.from_pretrained(str(model)), profiles, batch=batch, reload=once)

    def answer(
        self, queries: Sequence[Query], steering: SteeringOptions = PLAIN, *, max_tokens: int = 64, label: str = ""
    ) -> list[Answer]:
        """See `Answerer.answer`. Raises TrainingDataError where a prompt is too long, ModelError where numbers break down."""
        sampling = SamplingOptions(max_tokens, temperature=0.0, stop_token_ids=self._stop_ids)
        prompts = [self._encode(query) for query in queries]
        self._check_lengths(queries, prompts)
        groups = [self._group(prompt, sampling, steering) for prompt in prompts]
        return [self._answer(events) for events in self._run(groups, label)]

    def logprobs(
        self, queries: Sequence[Query], answers: Sequence[str], steering: SteeringOptions = PLAIN, *, label: str = ""
    ) -> list[tuple[float, ...]]:
        """See `Answerer.logprobs`. Two runs: the prompts alone are read by gate and experts, then prompt and answer are scored
        as one prompt under the doses that the prompts got, so h_q is the prompt's and never the answer's.

        An answer's tokens are those of its text alone, without the end token. Raises as `answer`.
        """
        prompts = [self._encode(query) for query in queries]
        tails = [tuple(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        self._check_lengths(queries, [prompt + tail for prompt, tail in zip(prompts, tails, strict=True)])
        distinct = dict.fromkeys(prompts)
        one = SamplingOptions(1, temperature=0.0)
        asked = {prompt: self._group(prompt, one, steering, score_only=True) for prompt in distinct}
        if steering.activations:
            self._run(list(asked.values()), label and f"{label}: gates")
        scored = SamplingOptions(1, temperature=0.0, prompt_logprobs=0)
        groups = []
        for prompt, tail in zip(prompts, tails, strict=True):
            group = self._group(prompt + tail, scored, steering)
            if steering.activations:
                _take_over(group, asked[prompt], len(prompt))
            groups.append(group)
        found = []
        for prompt, events in zip(prompts, self._run(groups, label), strict=True):
            given = events[0].prompt_logprobs[len(prompt) :]
            found.append(tuple(token.logprob for token in given))
        return found

    def ms_per_token(self, queries: Sequence[Query], steering: SteeringOptions = PLAIN) -> float:
        """Median decode time per token, ms: each query alone, `TIMED_TOKENS` tokens, the prompt's time left out."""
        found = []
        for query in queries:
            prompt = self._encode(query)
            num = min(TIMED_TOKENS, self._core.max_model_len - len(prompt))
            if num < 2:
                continue
            times: list[float] = []
            group = self._group(prompt, SamplingOptions(num, temperature=0.0), steering)
            self._run([group], on_event=lambda times=times: times.append(time.perf_counter()))
            found.append(1000 * (times[-1] - times[0]) / (len(times) - 1))
        return statistics.median(found) if found else float("nan")

    def _encode(self, query: Query) -> tuple[int, ...]:
        return tuple(encode_query(self.tokenizer, query))

    def _group(
        self, prompt: tuple[int, ...], sampling: SamplingOptions, steering: SteeringOptions, *, score_only: bool = False
    ) -> SequenceGroup:
        request = GenerationRequest(str(next(self._names)), prompt, sampling, steering)
        return SequenceGroup.of(request, lambda _: None, score_only=score_only)

    def _check_lengths(self, queries: Sequence[Query], prompts: Sequence[tuple[int, ...]]) -> None:
        """Raise TrainingDataError where a prompt (with the answer to score) leaves no room for a token."""
        for query, prompt in zip(queries, prompts, strict=True):
            if len(prompt) >= self._core.max_model_len:
                raise TrainingDataError(
                    f"{query.where or 'a query'}: the prompt has {len(prompt)} tokens; this model takes "
                    f"{self._core.max_model_len - 1} at most. Remove the row or shorten it."
                )

    def _run(
        self, groups: Sequence[SequenceGroup], label: str = "", on_event: Callable[[], None] = lambda: None
    ) -> list[list[TokenEvent]]:
        """Carry groups out to their ends; each one's events, in the groups' order (none for those that are only decided)."""
        core, found = self._core, {id(group): [] for group in groups}
        waiting = list(reversed(groups))
        with progress_bar(label, len(groups), bool(label)) as advance:
            while waiting or core.has_work:
                while waiting and core.scheduler.num_waiting < core.scheduler.limits.max_waiting:
                    core.add(waiting.pop())
                for group, result in core.step():
                    if isinstance(result, Exception):
                        self._drop(groups)
                        raise ModelError(f"an answer could not be generated: {result}") from result
                    if isinstance(result, SteeringDecision):
                        advance()
                        continue
                    found[id(group)].append(result)
                    on_event()
                    if result.finish_reason is not None:
                        advance()
        return [found[id(group)] for group in groups]

    def _drop(self, groups: Sequence[SequenceGroup]) -> None:
        """Leave nothing of a failed run behind."""
        for group in groups:
            self._core.abort(group)

    def _answer(self, events: Sequence[TokenEvent]) -> Answer:
        finished = events[-1].finish_reason == "stop"
        ids = tuple(event.token_id for event in events)
        ids = ids[:-1] if finished else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(ids, text, finished, events[0].decision)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: the generation config's and the tokenizer's. Raises ModelError where there are none."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ModelError("the model names no end-of-sequence token, so no answer would end. Set eos_token_id.")
    return frozenset(ids)


def _take_over(group: SequenceGroup, decided: SequenceGroup, num_query_tokens: int) -> None:
    """Give `group`, a query and an answer as one prompt, what was decided for the query alone."""
    doses = [
        None if dose is None else _AnchoredDose(dose.prompt, dose.answer, dose.key, dose.uniform, num_query_tokens)
        for dose in decided.steering.doses
    ]
    group.steering = SteeringState(num_query_tokens, doses, list(decided.steering.profiles))
    group.decision = decided.decision
