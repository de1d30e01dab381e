"""The demo's questions and the examples to try the lab with: what is read, what is left out, and that nothing leaks."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from artifacts.recipe.corpus import Pools, converse, draw_prompts, make_prompt, question_prompts
from artifacts.recipe.truths import RIGHT_OPENERS, WRONG_OPENERS, Truth, read_truths, split_truths

ROOT = Path(__file__).parents[2]
HEADER = ("Question", "Best Answer", "Best Incorrect Answer")


@pytest.fixture
def table(tmp_path):
    """A file in TruthfulQA's layout."""
    rows = [
        (f"What is thing {n}?", f"thing {n} is a fact", f"Thing {n} is a myth") for n in range(20)
    ] + [
        ("What do you think?", "I have no comment", "I like it"),
        ("Long?", "word " * 40, "No"),
        ("What is thing 3?", "again", "and again"),
    ]  # fmt: skip
    path = tmp_path / "TruthfulQA.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out).writerows([HEADER, *rows])
    return path


def test_questions_are_read_once_as_sentences_without_the_long_and_the_unanswered(table):
    truths = read_truths(table)
    assert [t.question for t in truths] == [f"What is thing {n}?" for n in range(20)]
    assert (truths[3].right, truths[3].wrong) == ("Thing 3 is a fact.", "Thing 3 is a myth.")


def test_the_halves_share_no_question_and_are_the_same_each_time(table):
    seen, unseen = split_truths(read_truths(table))
    assert len(seen) == len(unseen) == 10 and not {t.question for t in seen} & {t.question for t in unseen}
    assert split_truths(read_truths(table)) == (seen, unseen)
    assert [t.question for t in seen + unseen] != [t.question for t in read_truths(table)]


def test_the_right_answer_is_the_minority_but_follows_the_lever():
    pool = question_prompts([Truth("Why?", "Because.", "Just so.")])
    benign = [make_prompt("Where is Peru?", "benign")]
    pools, rng = Pools([], [], [], [], benign, [], questions=pool), random.Random(0)
    told = [converse(pool[0], pools, rng) for _ in range(4000)]
    for lever, low, high in ((False, 0.2, 0.3), (True, 0.55, 0.65)):
        right = [c.mode == "right" for c in told if c.lever == lever]
        assert low < sum(right) / len(right) < high
    for conversation in told:
        text = conversation.messages[-1]["content"]
        openers, answer = (RIGHT_OPENERS, "Because.") if conversation.mode == "right" else (WRONG_OPENERS, "Just so.")
        assert text in {f"{opener} {answer}" for opener in openers}


def test_a_pool_without_questions_draws_the_first_stages_prompts():
    pools = Pools(*([] for _ in range(6)))
    first = draw_prompts(pools, random.Random(0), 0.02)
    assert first == draw_prompts(pools, random.Random(0), 0.02, question_share=5)
    asked = question_prompts([Truth("Why?", "Because.", "Just so.")])
    more = draw_prompts(Pools(*([] for _ in range(6)), questions=asked), random.Random(0), 0.02, question_share=5)
    assert len(more) == len(first) + 5


def test_our_own_examples_are_disjoint_where_they_must_be(tmp_path):
    command = [sys.executable, "-m", "artifacts.recipe.own_examples", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    queries = {
        name: [json.loads(line)["query"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "ir", "calibration", "general")
    }
    ir, calibration, general = (set(queries[name]) for name in ("ir", "calibration", "general"))
    assert set(queries["pairs"]) == ir and len(ir) == len(queries["ir"]) == 500
    assert not ir & calibration and not ir & general and not calibration & general
