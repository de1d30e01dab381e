"""Write a small set of examples to try the lab with, from our own prompts alone:
`python -m artifacts.recipe.own_examples --out FOLDER`.

`pairs.jsonl`, `ir.jsonl`, `calibration.jsonl` and `general.jsonl` for `finesteer train`; no query is in two of them but those of the
pairs, which are IR queries as well.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from artifacts.recipe import own_prompts
from artifacts.recipe.corpus import Prompt, Side, make_prompt
from artifacts.recipe.pairs import pair_rows, write

NUM_TRAINED = {"harmful": 300, "borderline": 200}
NUM_CALIBRATION = {"harmful": 90, "borderline": 60}
NUM_GENERAL = 400
MAKERS: dict[Side, Callable[[random.Random], str]] = {
    "harmful": own_prompts.harmful,
    "borderline": own_prompts.safe_words,
    "benign": own_prompts.benign,
}


def distinct(side: Side, count: int, rng: random.Random, taken: set[str]) -> list[Prompt]:
    """So many prompts of a side, none of them in `taken`, which grows by them."""
    found = []
    while len(found) < count:
        query = MAKERS[side](rng)
        if query not in taken:
            taken.add(query)
            found.append(make_prompt(query, side, plain_word=side == "borderline"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the four JSONL files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, taken = random.Random(options.seed), set()
    trained = [p for side, count in NUM_TRAINED.items() for p in distinct(side, count, rng, taken)]
    calibration = [p for side, count in NUM_CALIBRATION.items() for p in distinct(side, count, rng, taken)]
    general = distinct("benign", NUM_GENERAL, rng, taken)
    options.out.mkdir(parents=True, exist_ok=True)
    write([row for p in trained for row in pair_rows(p, rng)], options.out / "pairs.jsonl")
    for name, prompts in (("ir", trained), ("calibration", calibration), ("general", general)):
        write([{"query": p.query, "source": p.side} for p in prompts], options.out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
