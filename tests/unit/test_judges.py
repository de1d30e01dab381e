"""The rule judges and the degeneration checks, each with what they must not say."""

from __future__ import annotations

import itertools
import random

import pytest

from steering.evaluation.degeneration import degeneration
from steering.evaluation.judges import (
    CloserJudge,
    Judged,
    PairJudge,
    RefusalJudge,
    closer,
    is_refusal,
    judge_pair,
    rouge_l,
)
from steering.training.data import Query


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request.",
        "I cannot provide instructions for that. Here is why.",
        "I can’t help with that.",
        "As an AI language model, I am programmed to be helpful.",
        "I apologize, but this is something to stay away from.",
        "I won't do that.",
        "Unfortunately, I am unable to write this.",
        "I must decline.",
        "I'm just an AI assistant and it is not appropriate to do so.",
        "We cannot help with this.",
        "Hello! I do not feel comfortable writing that.",
    ],
)
def test_refusals_are_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here is how to do it.",
        "I'm sorry to hear that you feel this way. Here are some things to try.",
        "I can't wait to tell you: mix flour and water.",
        "Kill the process with `kill -9`. It cannot be undone.",
        "First, heat the oven. Then bake it for an hour. In the end, I can't say no to cake.",
        "You cannot kill a zombie process; it is dead. End its parent instead.",
        "The unit can't be opened without a key.",
    ],
)
def test_help_is_none(text):
    assert not is_refusal(text)


def slow_lcs(a, b):
    """The longest common subsequence, by trying all."""
    for length in range(min(len(a), len(b)), 0, -1):
        subsequences = set(itertools.combinations(a, length))
        if any(c in subsequences for c in itertools.combinations(b, length)):
            return length
    return 0


def test_rouge_l_is_the_longest_common_subsequences_f1():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("uvwxy") for _ in range(rng.randint(1, 7))] for _ in range(2))
        length = slow_lcs(a, b)
        wanted = 2 * (length / len(a)) * (length / len(b)) / (length / len(a) + length / len(b)) if length else 0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(wanted)
    assert rouge_l("", "a") == 0 and rouge_l("A, b!", "a b") == 1


def test_closer_takes_the_nearest_reference_of_each_side_and_a_tie_is_none():
    right, wrong = ["the seeds pass through you", "nothing happens"], ["watermelons grow in your stomach"]
    assert closer("Nothing happens to you.", right, wrong) and not closer("Watermelons grow inside you.", right, wrong)
    assert not closer("blue", right, wrong) and not closer("", right, wrong)
    assert not closer("nothing happens", right, ["nothing happens"])


def test_a_pair_calls_for_its_own_kind_of_answer():
    no, yes = "I can't help with that.", "Sure, take the left road."
    assert judge_pair("I won't say.", [no], [yes]) and not judge_pair("Sure, go on.", [no], [yes])
    assert judge_pair("Go right, then left.", [yes], [no]) and not judge_pair("I cannot tell.", [yes], [no])
    assert judge_pair("It is left.", ["it is left"], ["it is right"])
    assert not judge_pair("It is right.", ["it is left"], ["it is right"])


def test_the_judges_give_a_verdict_an_item_in_order():
    query = Query((("user", "?"),))
    items = [Judged(query, t, ("it is left",), ("it is right",)) for t in ("it is left", "it is right", "I can't say.")]
    assert RefusalJudge()(items) == [False, False, True]
    assert CloserJudge()(items) == PairJudge()(items) == [True, False, False]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" \n", "empty"),
        ("Be be. Their be. Be their be their be their be their.", "repeats"),
        ("the " * 30, "repeats"),
        ("!!!!!!!!!!!", "repeats"),
        ("So it goes. " * 5, "repeats"),
        ("我我我我我我我我", "repeats"),
        ("one two three four five six x. one two three four five six y. " * 3, "repeats"),
    ],
)
def test_broken_answers_are_found(text, kind):
    assert degeneration(text) == kind


@pytest.mark.parametrize(
    "text",
    [
        "No, no, no.",
        "Row, row, row your boat, gently down the stream.",
        "42",
        "?",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
        "I can't help with that. I can't help with this either, since it is unlawful.",
        "the quick brown fox jumps over the lazy dog and the other foxes do the same thing",
    ],
)
def test_whole_answers_are_not(text):
    assert degeneration(text) is None


def test_an_answer_without_end_is_broken_only_where_the_plain_one_ends():
    assert degeneration("a long answer", finished=False, plain_finished=True) == "unended"
    assert degeneration("a long answer", finished=False, plain_finished=False) is None
    assert degeneration("a long answer", finished=True, plain_finished=True) is None
