"""Grammars' masks on logits."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from server.engine.base import GenerationError, GrammarState

logger = logging.getLogger(__name__)


def constrain(logits: Tensor, grammars: Mapping[int, GrammarState]) -> dict[int, GenerationError]:
    """Set to -inf, in place, what each row's grammar does not allow next.

    Args:
        logits: (S, V), any float dtype; the rows that `grammars` names are changed.
    Returns:
        The errors of grammars that gave up, by row; those rows are left as they are.
    """
    words, failures = {}, {}
    for row, grammar in grammars.items():
        try:
            words[row] = grammar.mask()
        except GenerationError as error:
            failures[row] = error
        except Exception as error:  # the grammar engine's own: one row's grammar must not end the others' pass
            logger.exception("a grammar failed")
            failures[row] = GenerationError(f"the grammar failed ({type(error).__name__})", "grammar_failed")
    if words:
        banned = unpack(~np.stack(list(words.values())), logits.shape[-1], logits.device)
        for row, bans in zip(words, banned, strict=True):
            logits[row].masked_fill_(bans, -torch.inf)
    return failures


def unpack(words: np.ndarray, vocab_size: int, device: torch.device) -> Tensor:
    """(R, ceil(V / 32)) int32 → (R, V) bool on `device`: bit t % 32 of word t // 32. It is the words that travel to a GPU."""
    if device.type == "cpu":
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    return unpack_on_device(torch.from_numpy(words).to(device), vocab_size)


def unpack_on_device(words: Tensor, vocab_size: int) -> Tensor:
    """`unpack` by tensor operations alone."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocab_size]  # (R, W, 32) → (R, V)
