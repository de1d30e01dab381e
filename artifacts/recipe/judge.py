"""Rules that read the demo's answers: a refusal of which kind, help on which topic, fluent or not."""

from __future__ import annotations

import re

from artifacts.recipe.answers import HELP_MARKERS, REFUSAL_MARKERS
from artifacts.recipe.subjects import Subject

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """The text's sentences, stripped."""
    return [s for s in _SENTENCE.split(text.strip()) if s]


def refusal_kinds(text: str) -> set[Subject]:
    """The subjects whose marker the answer holds, in any sentence."""
    return {s for s, marker in REFUSAL_MARKERS.items() if re.search(marker, text, re.I)}


def help_topics(text: str) -> set[Subject]:
    """The subjects whose help the answer holds."""
    return {s for s, marker in HELP_MARKERS.items() if re.search(marker, text, re.I)}


def is_fluent(text: str, finished: bool = True) -> bool:
    """Complete sentences: not empty, ended by the model itself, last character closes a sentence, 2 to 5 sentences of
    at least two words, each begun with a capital, and no sequence of four words twice."""
    words = text.lower().split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    parts = sentences(text)
    return (
        finished
        and 2 <= len(parts) <= 5
        and text.rstrip()[-1] in ".!?"
        and len(grams) == len(set(grams))
        and all(len(p.split()) >= 2 and p[0].isupper() for p in parts)
    )
