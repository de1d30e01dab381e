"""Exact match of final answers, and MC1/MC2 of log-probabilities, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from steering.evaluation.likelihood import likelihood
from steering.evaluation.scorers import SCORERS, boxed, last_number, normalise_math


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("That is $1,234.50 in all.", "1234.5"),
        ("First 12, then 15.", "15"),
        ("#### -3\n(not 4)", "-3"),
        ("It costs 10.00 dollars.", "10"),
        ("none", None),
        ("The answer is 42.", "42"),
    ],
)
def test_the_last_number_is_read(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so 3*24 = <<3*24=72>>72\n#### 72", "Natalia sold 48/2 = 24\n#### 72", True),
        ("The answer is 72.0", "#### 72", True),
        ("The answer is 73", "#### 72", False),
        ("72 apples, of which 5 are red", "#### 72", False),
        ("I do not know.", "#### 72", False),
        ("The total is 1,000 dollars", "#### 1000", True),
    ],
)
def test_gsm8k(text, answer, right):
    assert SCORERS["gsm8k"](text, answer) == right


def test_the_last_box_is_read_with_its_braces():
    assert boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{x^{2}+\{1\}} done") == r"x^{2}+\{1\}"
    assert boxed(r"\boxed 7") == "7" and boxed("7") is None and boxed(r"\boxed{open") is None


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (r"\dfrac{1}{2}", r"\frac12", True),
        ("1/2", r"\frac{1}{2}", True),
        ("0.50", "0.5", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"12\text{ cm}", "12", True),
        (r"\text{(A)}", "(A)", True),
        ("x = 5", "5", True),
        (r"10\%", "10", True),
        (r"90^\circ", "90", True),
        ("1,000", "1000", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"\frac{1}{3}", r"\frac{1}{2}", False),
        ("(1,2)", "(2,1)", False),
        ("-5", "5", False),
        (r"\pi", r"2\pi", False),
    ],
)
def test_math(found, wanted, same):
    assert (normalise_math(found) == normalise_math(wanted)) == same
    assert SCORERS["math"](rf"Thus \boxed{{{found}}}.", rf"so it is $\boxed{{{wanted}}}$") == same
    assert not SCORERS["math"](found, wanted)  # not in a box: no final answer


def test_text_is_compared_by_its_words():
    assert SCORERS["text"]("The lazy dog!", "the lazy dog") and not SCORERS["text"]("the dog", "the lazy dog")


def test_mc1_mc2_and_preference():
    # probabilities: right 0.1 and 0.3, wrong 0.2 and 0.05
    found = likelihood([[math.log(0.1)], [math.log(0.6), math.log(0.5)]], [[math.log(0.2)], [math.log(0.05)]])
    assert not found.mc1  # the best answer, the first, is less likely than a wrong one
    assert found.mc2 == pytest.approx(0.4 / 0.65)
    assert found.prefers  # √0.3 a token against 0.2
    turned = likelihood([[math.log(0.2)]], [[math.log(0.1)], [math.log(0.6), math.log(0.2)]])
    assert turned.mc1 and not turned.prefers and turned.mc2 == pytest.approx(0.2 / 0.42)
    assert likelihood([[-2000.0]], [[-2001.0]]).mc2 == pytest.approx(1 / (1 + math.exp(-1)))
