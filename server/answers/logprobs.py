"""Log-probabilities as both chat APIs write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.answers.generation import TokenNote
from server.prompting.vocabulary import Vocabulary
from server.wire.chat import TokenLogprob, TopLogprob


def token_logprobs(notes: Sequence[TokenNote], vocabulary: Vocabulary) -> list[TokenLogprob]:
    """One entry a token."""
    return [
        TokenLogprob(
            **_token(note.token_id, note.logprobs.logprob, vocabulary),
            top_logprobs=[TopLogprob(**_token(token_id, value, vocabulary)) for token_id, value in note.logprobs.top],
        )
        for note in notes
    ]


def _token(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    raw = vocabulary.raw_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
