"""Between this server's requests and events and vLLM's. What vLLM has no equal for is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from server.engine.base import (
    FinishReason,
    GenerationError,
    SamplingOptions,
    TokenEvent,
    TokenLogprobs,
    UnsupportedRequestError,
)
from server.engine.vllm.orders import Order


def check_sampling(sampling: SamplingOptions) -> None:
    """Raise UnsupportedRequestError for what this engine cannot do as the interface says."""
    adjusted = (
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1
        or sampling.logit_bias
    )
    if sampling.logprobs is not None and (adjusted or sampling.grammar is not None or sampling.min_tokens):
        raise UnsupportedRequestError(
            "log-probabilities cannot be had together with penalties, logit_bias, min_tokens or a grammar: vLLM's are of the "
            "distribution before them; ask for one or the other"
        )
    if sampling.grammar is not None and sampling.grammar.source is None:
        raise UnsupportedRequestError(
            "a grammar that spells the model's special tokens is not followed by vLLM; let tool_choice be auto with tools that "
            "are not strict, or ask for JSON"
        )


def sampling_params(sampling: SamplingOptions, order: Order | None, n: int, max_tokens: int) -> SamplingParams:
    """vLLM's form of a request's options."""
    grammar = None if sampling.grammar is None else sampling.grammar.source
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        **_choice(sampling, n),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        stop_token_ids=sorted(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        ignore_eos=True,  # ends are stop_token_ids
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        structured_outputs=None if grammar is None else StructuredOutputsParams(**{grammar.kind: grammar.text}),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if order is None else order.to_args(),
        skip_clone=True,
    )


def _choice(sampling: SamplingOptions, n: int) -> dict[str, float]:
    """How tokens are drawn. vLLM refuses several greedy completions: theirs are drawn from the likeliest token alone."""
    if sampling.temperature == 0 and n > 1:
        return {"temperature": 1.0, "top_k": 1}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }


def events_of(output: CompletionOutput, num_top: int | None) -> Iterator[TokenEvent]:
    """The new tokens of one completion. Raises GenerationError where it did not end by itself."""
    ids, logprobs = output.token_ids, output.logprobs or ()
    for i, token_id in enumerate(ids):
        last = i == len(ids) - 1
        reason = finish_reason(output.finish_reason) if last and output.finish_reason is not None else None
        yield TokenEvent(output.index, token_id, reason, _chosen(token_id, logprobs[i], num_top) if logprobs else None)


def finish_reason(reason: str) -> FinishReason:
    """Raises GenerationError where the completion did not end by itself."""
    if reason in ("stop", "length"):
        return reason
    raise GenerationError(f"vLLM ended the request ({reason})", "engine_error")


def prompt_logprobs_of(
    found: Sequence[Any] | None, prompt: Sequence[int], num_top: int
) -> tuple[TokenLogprobs | None, ...]:
    """One a prompt token, None for the first."""
    entries: list[TokenLogprobs | None] = []
    for token_id, position in zip(prompt, found or (), strict=True):
        entries.append(_scored(token_id, position, num_top) if position else None)
    return tuple(entries)


def _chosen(token_id: int, found: Mapping[int, Any], num_top: int | None) -> TokenLogprobs:
    scored = _scored(token_id, found, num_top or 0)
    return TokenLogprobs(scored.logprob, scored.top)


def _scored(token_id: int, found: Mapping[int, Any], num_top: int) -> TokenLogprobs:
    """vLLM gives the likeliest and, besides, the chosen one, each with its rank."""
    ranked = sorted(found.items(), key=lambda item: -item[1].logprob)[:num_top]
    own = found[token_id]
    return TokenLogprobs(own.logprob, tuple((token, entry.logprob) for token, entry in ranked), own.rank)
