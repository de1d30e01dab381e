"""A compiled grammar, and completions' ways through it."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.engine.base import GenerationError, GrammarSource, GrammarState
from server.grammar.schema import SchemaError

# An object's row grows by four items for each property that may be left out; 10,000 take a mask about 5 ms.
LIMITS = LLParserLimits(verbose_errors=False, max_items_in_row=10_000)
MAX_REASON = 300  # characters of the grammar engine's words that are repeated


class CompiledGrammar:
    """An `engine.base.Grammar`."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, source: GrammarSource | None = None) -> None:
        """`grammar`: as llguidance's `grammar_from_*` functions write them. Compiles it; the interpreter's lock is free meanwhile.

        Raises SchemaError: it cannot be compiled, or no token can begin it.
        """
        self.source = source
        self._vocab_size = tokenizer.vocab_size
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if self._matcher.is_error():
            raise SchemaError(_reason(self._matcher))
        try:
            self.begin().mask()
        except GenerationError as error:
            raise SchemaError("nothing can satisfy it, or it refers to itself without end") from error

    def begin(self) -> MatcherState:
        return MatcherState(self._matcher.deep_copy(), self._vocab_size)


class MatcherState(GrammarState):
    """An `engine.base.GrammarState`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        words = np.zeros(self._num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():  # it never raises by itself
            raise GenerationError(f"the grammar cannot be followed further: {_reason(self._matcher)}", "grammar_failed")


def _reason(matcher: LLMatcher) -> str:
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split()).rstrip(".")
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "…"
