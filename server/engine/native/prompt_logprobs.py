"""Log-probabilities of a prompt's own tokens, from the states of the tokens before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.engine.base import TokenLogprobs

MAX_ROWS = 128  # logits that are held at once: 77 MB in float32 with a vocabulary of 150,000


def foretold(
    logits_of: Callable[[Tensor], Tensor], states: Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """log softmax(logits_of(states[i]))[token_ids[i]] for each i, its rank, and the `num_top` likeliest tokens there.

    Args:
        logits_of: (R, d) → (R, V), called with `MAX_ROWS` rows at most.
        states: (T, d); not modified.
        token_ids: the tokens that follow the first of the rows; T at most, and fewer where the prompt ends.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), MAX_ROWS):
        tokens = torch.tensor(token_ids[start : start + MAX_ROWS], device=states.device)
        logits = logits_of(states[start : start + len(tokens)]).float()  # (R, V)
        own = logits.gather(-1, tokens[:, None])
        total = logits.logsumexp(dim=-1, keepdim=True)
        ranks = (logits > own).sum(dim=-1) + 1
        values, ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
        columns = (own - total).squeeze(-1), ids, values - total, ranks
        for logprob, top_ids, top_values, rank in zip(*(column.tolist() for column in columns), strict=True):
            found.append(TokenLogprobs(logprob, tuple(zip(top_ids, top_values, strict=True)), rank))
    return found
