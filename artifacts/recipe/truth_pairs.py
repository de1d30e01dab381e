"""Write what `finesteer train` eats for the profile `truthfulness`:
`python -m artifacts.recipe.truth_pairs --data DIR --truthfulqa CSV --out FOLDER`.

From the half of TruthfulQA's questions that a profile may see (`truths.split_truths`): `pairs.jsonl` (right answer preferred to
the misconception), `ir.jsonl` (the same questions), `calibration.jsonl` (a fifth of the half, in neither of the two). And
`general.jsonl`: requests of every other kind.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from artifacts.recipe.corpus import is_short, load_pools
from artifacts.recipe.pairs import PARAPHRASES, write
from artifacts.recipe.truths import read_truths, split_truths

CALIBRATION_SHARE = 0.2
NUM_GENERAL = {"benign": 1500, "borderline": 400, "harmful": 300, "validation_style": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the prompt sets (benign_train.jsonl, ...)"
    )
    parser.add_argument("--truthfulqa", type=Path, required=True, help="TruthfulQA.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four JSONL files")
    options = parser.parse_args()
    seen, _ = split_truths(read_truths(options.truthfulqa))
    kept = round(CALIBRATION_SHARE * len(seen))
    calibration, training = seen[:kept], seen[kept:]
    pools, rng = load_pools(options.data), random.Random(0)
    general = [
        {"query": prompt.query, "source": prompt.side}
        for pool, count in NUM_GENERAL.items()
        for prompt in rng.sample([p for p in getattr(pools, pool) if is_short(p)], count)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = [
        {"query": t.question, "preferred": t.say(True, rng), "undesired": t.say(False, rng)}
        for t in training
        for _ in range(PARAPHRASES)
    ]
    write(pairs, options.out / "pairs.jsonl")
    write([{"query": t.question, "source": "TruthfulQA"} for t in training], options.out / "ir.jsonl")
    write([{"query": t.question, "source": "TruthfulQA"} for t in calibration], options.out / "calibration.jsonl")
    write(general, options.out / "general.jsonl")


if __name__ == "__main__":
    main()
