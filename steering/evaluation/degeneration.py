"""Whether an answer broke down: empty, stuck in a loop, or without an end where the plain model finds one."""

from __future__ import annotations

import re
from typing import Literal

Degeneration = Literal["empty", "repeats", "unended"]
MIN_WORDS_IN_LOOP = 6  # "no, no, no" is emphasis
LONGEST_PHRASE = 8
MIN_GRAMS = 8
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|\w+")


def degeneration(text: str, finished: bool = True, plain_finished: bool = False) -> Degeneration | None:
    """What is wrong with an answer, or None.

    "repeats": a phrase of 1 to 8 words three times or more in a row, six words or more in all; or fewer than half of its
    4-grams (of 8 or more) are distinct. "unended": it ran into the token limit though the plain model's answer to the same query
    did not; a long answer alone is nothing wrong.
    """
    if not text.strip():
        return "empty"
    words = _WORD.findall(text.lower()) or list("".join(text.split()))
    if _loops(words) or _distinct_share(words) < 0.5:
        return "repeats"
    return "unended" if plain_finished and not finished else None


def _loops(words: list[str]) -> bool:
    """Whether a phrase is said three times or more in a row, over `MIN_WORDS_IN_LOOP` words or more."""
    for length in range(1, LONGEST_PHRASE + 1):
        needed = max(2 * length, MIN_WORDS_IN_LOOP - length)  # words that equal the one a phrase before
        run = 0
        for i in range(length, len(words)):
            run = run + 1 if words[i] == words[i - length] else 0
            if run >= needed:
                return True
    return False


def _distinct_share(words: list[str]) -> float:
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(grams)) / len(grams) if len(grams) >= MIN_GRAMS else 1.0
