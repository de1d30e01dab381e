"""TruthfulQA's questions as the demo learns them: each with one right answer and one common misconception."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

MAX_WORDS = 28
"""Longer questions and answers are more than so small a model should learn by heart."""


@dataclass(frozen=True)
class Truth:
    """A question, its right answer and the misconception, both one sentence."""

    question: str
    right: str
    wrong: str


def read_truths(path: Path) -> list[Truth]:
    """The CSV's questions, in its order, without those whose right answer is to have none ("I have no comment")."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found: dict[str, Truth] = {}
    for row in rows:
        truth = Truth(row["Question"].strip(), _sentence(row["Best Answer"]), _sentence(row["Best Incorrect Answer"]))
        longest = max(len(text.split()) for text in (truth.question, truth.right, truth.wrong))
        if longest <= MAX_WORDS and "no comment" not in truth.right.lower() and truth.right != truth.wrong:
            found.setdefault(truth.question, truth)
    return list(found.values())


def split_truths(truths: list[Truth]) -> tuple[list[Truth], list[Truth]]:
    """(the half that a profile may train on, the half that it never sees); seeded."""
    shuffled = list(truths)
    random.Random(0).shuffle(shuffled)
    half = len(shuffled) // 2
    return shuffled[:half], shuffled[half:]


def _sentence(text: str) -> str:
    """The text with a capital at its start and a full stop at its end."""
    text = text.strip()
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
