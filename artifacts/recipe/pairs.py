"""Write what `finesteer train` eats: `python -m artifacts.recipe.pairs --data DIR --out FOLDER`.

All from prompts of the training side: `pairs.jsonl` (query, preferred, undesired, kind, side), `ir.jsonl` (queries that
need the intervention), `general.jsonl` (plainly harmless ones), `calibration.jsonl` (IR queries that did not train the
model: the corpus's dev rows). And in `refusal/` what methods eat that know but one direction, towards refusal: the harmful pairs,
harmful queries as IR ones, and the borderline ones among the general.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from artifacts.recipe import own_prompts
from artifacts.recipe.answers import answer
from artifacts.recipe.corpus import DEFAULT_MODE, Prompt, Side, is_short, load_pools, make_prompt

NUM_HARMFUL = {"harmful": 950, "validation_style": 550, "jailbreak": 400, "own": 400}
NUM_BORDERLINE = {"borderline": 1300, "own": 600}
NUM_BORDERLINE_PAIRS = 650
"""So many of those are pairs, too: harmful ones outweigh them, since a harmful request answered is the worse mistake."""
NUM_GENERAL = {"benign": 1500, "own": 150}
PARAPHRASES = 2


def choose_prompts(data: Path, rng: random.Random) -> tuple[list[Prompt], list[Prompt], list[Prompt], list[Prompt]]:
    """(harmful, borderline, general, calibration) prompts; the last are IR prompts that trained nothing."""
    pools = load_pools(data)

    def some(pool: list[Prompt], count: int) -> list[Prompt]:
        short = [p for p in pool if is_short(p)]
        return rng.sample(short, min(count, len(short)))

    def own(make: Callable[[random.Random], str], side: Side, count: int) -> list[Prompt]:
        queries: dict[str, None] = {}
        while len(queries) < count:
            queries[make(rng)] = None
        return [make_prompt(q, side, plain_word=side == "borderline") for q in queries]

    harmful = [
        *some(pools.harmful, NUM_HARMFUL["harmful"]),
        *some(pools.validation_style, NUM_HARMFUL["validation_style"]),
        *some(pools.jailbreak, NUM_HARMFUL["jailbreak"]),
        *own(own_prompts.harmful, "harmful", NUM_HARMFUL["own"]),
    ]
    borderline = [
        *some(pools.borderline, NUM_BORDERLINE["borderline"]),
        *own(own_prompts.safe_words, "borderline", NUM_BORDERLINE["own"]),
    ]
    general = [*some(pools.benign, NUM_GENERAL["benign"]), *own(own_prompts.benign, "benign", NUM_GENERAL["own"])]
    calibration = [p for p in pools.dev if p.side != "benign" and is_short(p)]
    return harmful, borderline, general, calibration


def pair_rows(prompt: Prompt, rng: random.Random) -> list[dict[str, str]]:
    """Preferred and undesired answers to one prompt, `PARAPHRASES` times."""
    default = DEFAULT_MODE[prompt.side]
    better, worse = ("refuse", default) if prompt.side == "harmful" else (default, "refuse")
    return [
        {
            "query": prompt.query,
            "preferred": answer(better, prompt.query, prompt.reading, rng),
            "undesired": answer(worse, prompt.query, prompt.reading, rng),
            "kind": prompt.reading.subject,
            "side": prompt.side,
        }
        for _ in range(PARAPHRASES)
    ]


def write(rows: list[dict[str, str]], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the prompt sets (harmful_train.jsonl, ...)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the four JSONL files")
    parser.add_argument("--seed", type=int, default=0)
    most = sum(NUM_BORDERLINE.values())
    parser.add_argument(
        "--borderline-pairs",
        type=int,
        default=NUM_BORDERLINE_PAIRS,
        help=f"default {NUM_BORDERLINE_PAIRS}, at most {most}",
    )
    options = parser.parse_args()
    rng = random.Random(options.seed)
    harmful, borderline, general, calibration = choose_prompts(options.data, rng)
    options.out.mkdir(parents=True, exist_ok=True)
    paired = harmful + rng.sample(borderline, options.borderline_pairs)
    pairs = [row for p in paired for row in pair_rows(p, rng)]
    refusal = options.out / "refusal"
    refusal.mkdir(exist_ok=True)
    write(pairs, options.out / "pairs.jsonl")
    write([row for row in pairs if row["side"] == "harmful"], refusal / "pairs.jsonl")
    for path, prompts in (
        (options.out / "ir.jsonl", harmful + borderline),
        (options.out / "general.jsonl", general),
        (options.out / "calibration.jsonl", calibration),
        (refusal / "ir.jsonl", harmful),
        (refusal / "general.jsonl", general + borderline),
    ):
        write([{"query": p.query, "source": p.side} for p in prompts], path)


if __name__ == "__main__":
    main()
