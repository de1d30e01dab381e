"""What an answer tells of its prompt where the client asks: token ids and log-probabilities, in vLLM's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.answers.generation import Generation
from server.engine.base import TokenLogprobs
from server.prompting.vocabulary import Vocabulary
from server.wire.extras import PromptLogprob, PromptLogprobs

LOWEST = -9999.0  # stands for -inf, which JSON has not


def prompt_fields(
    generation: Generation,
    vocabulary: Vocabulary,
    *,
    token_ids: bool = False,
    logprobs: Sequence[TokenLogprobs | None] | None = None,
) -> dict[str, Any]:
    """`prompt_token_ids` and `prompt_logprobs`, each if it is wanted."""
    prompt = generation.request.prompt_token_ids
    found: dict[str, Any] = {"prompt_token_ids": list(prompt)} if token_ids else {}
    if logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(prompt, logprobs, vocabulary)
    return found


def prompt_logprobs(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprobs | None], vocabulary: Vocabulary
) -> PromptLogprobs:
    """For each token of the prompt itself and the likeliest ones, by id; null for the first."""
    return [
        None if entry is None else _place(token_id, entry, vocabulary)
        for token_id, entry in zip(prompt, logprobs, strict=True)
    ]


def _place(token_id: int, entry: TokenLogprobs, vocabulary: Vocabulary) -> dict[str, PromptLogprob]:
    ranked = {token_id: (entry.logprob, entry.rank)}
    for rank, (likely, logprob) in enumerate(entry.top, 1):
        ranked.setdefault(likely, (logprob, rank))
    return {
        str(token): PromptLogprob(
            logprob=max(logprob, LOWEST),
            rank=rank,
            decoded_token=vocabulary.raw_bytes(token).decode("utf-8", "replace"),
        )
        for token, (logprob, rank) in ranked.items()
    }
