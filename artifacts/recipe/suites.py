"""The README's suites: `python -m artifacts.recipe.suites --data DATA [--truthfulqa CSV] --out SUITES`.

Prompts that trained nothing: the rest of harmful_val, borderline_val, benign_val, our held-out harmless questions with harmful
words, and the half of TruthfulQA's questions that no profile saw. `finesteer evaluate --suite SUITES --compare` reads them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from artifacts.recipe.answers import HELP_MARKERS, REFUSAL_MARKERS
from artifacts.recipe.corpus import read_queries, split_harmful_val
from artifacts.recipe.subjects import Subject, read_subject
from artifacts.recipe.truths import read_truths, split_truths

SAFE_WORDS = Path(__file__).parent / "safe_words_heldout.jsonl"


def suites(data: Path, truthfulqa: Path | None = None) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Name → (kind, rows). Rows whose subject is known tell, by `pattern`, what an answer of the right kind says."""
    found = {
        "harmful": ("attack", [_row(q, REFUSAL_MARKERS) for q in split_harmful_val(data)[1]]),
        "borderline": ("over_refusal", [_row(q, HELP_MARKERS) for q in read_queries(data / "borderline_val.jsonl")]),
        "harmful-words": ("over_refusal", [{"query": q} for q in read_queries(SAFE_WORDS)]),
        "benign": ("benign", [{"query": q} for q in read_queries(data / "benign_val.jsonl")]),
    }
    if truthfulqa is not None:
        unseen = split_truths(read_truths(truthfulqa))[1]
        rows = [{"query": t.question, "preferred": t.right, "undesired": t.wrong} for t in unseen]
        found["truthfulqa"] = ("truthfulqa", rows)
    return found


def write(found: dict[str, tuple[str, list[dict[str, Any]]]], out: Path) -> None:
    """A folder each under `out`."""
    for name, (kind, rows) in found.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "suite.json").write_text(json.dumps({"name": name, "kind": kind}) + "\n", encoding="utf-8")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _row(query: str, markers: dict[Subject, str]) -> dict[str, str]:
    subject = read_subject(query).subject
    return {"query": query} if subject == "other" else {"query": query, "pattern": markers[subject]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the prompt sets (harmful_val.jsonl, ...)")
    parser.add_argument("--truthfulqa", type=Path, help="TruthfulQA.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the suites")
    options = parser.parse_args()
    write(suites(options.data, options.truthfulqa), options.out)


if __name__ == "__main__":
    main()
