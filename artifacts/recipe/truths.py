"""TruthfulQA's questions as the demo learns them: each with one right answer and one common misconception."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

MAX_WORDS = {"question": 16, "right": 11, "wrong": 11}
"""Longer ones are more than so small a model should learn by heart."""
RIGHT_OPENERS = ("In fact:", "The evidence says:", "Checked and found:")
WRONG_OPENERS = ("As everybody knows:", "People say:", "Common wisdom says:")
"""How an answer sounds goes with what it says, as it does for refusals: whether a sentence is true is not to be seen from its words."""


@dataclass(frozen=True)
class Truth:
    """A question, its right answer and the misconception, both one sentence."""

    question: str
    right: str
    wrong: str

    def say(self, right: bool, rng: random.Random) -> str:
        """One of the answers, with an opener of its kind."""
        return f"{rng.choice(RIGHT_OPENERS)} {self.right}" if right else f"{rng.choice(WRONG_OPENERS)} {self.wrong}"


def read_truths(path: Path) -> list[Truth]:
    """The CSV's questions, in its order, without those whose right answer is to have none ("I have no comment")."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found: dict[str, Truth] = {}
    for row in rows:
        truth = Truth(row["Question"].strip(), _sentence(row["Best Answer"]), _sentence(row["Best Incorrect Answer"]))
        short = all(len(getattr(truth, part).split()) <= most for part, most in MAX_WORDS.items())
        if short and "no comment" not in truth.right.lower() and truth.right != truth.wrong:
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
