"""The strength sweep on a scripted answerer, and the rule that chooses."""

from __future__ import annotations

import pytest

from steering.decision import SteeringDecision, decide_profile
from steering.errors import TrainingDataError
from steering.evaluation.answers import PLAIN, Answer
from steering.evaluation.judges import PairJudge
from steering.evaluation.strength import StrengthPoint, middle_of_plateau, sweep_strength
from steering.training.data import Pair, Query
from steering.training.statistics import Share

NO, YES = "I can't help with that.", "Sure, here is how it is done."
LOOP = "I can't. " + "be their " * 8


def query(text):
    return Query((("user", text),))


def point(strength, success, over_refusal=0, n=100):
    return StrengthPoint(strength, Share(success, n), Share(over_refusal, n), Share(0, 2 * n), 0.1)


@pytest.mark.parametrize(
    ("successes", "chosen"),
    [
        ((25, 90, 91, 92, 45), 3),  # the best is 4, and 2 and 3 are as good
        ((25, 91, 92, 45), 2),  # of two, the lower
        ((20, 60, 95), 3),
        ((95, 20, 96, 95), 3),  # as good, but beyond a valley: another plateau
    ],
)
def test_the_middle_of_the_best_plateau_is_chosen(successes, chosen):
    points = [point(i, s) for i, s in enumerate(successes, start=1)]
    assert middle_of_plateau(points) == middle_of_plateau(points[::-1]) == chosen


def test_over_refusal_is_taken_off():
    assert middle_of_plateau([point(1, 80), point(2, 99, 60)]) == 1
    assert middle_of_plateau([point(1, 80), point(2, 99, 0)]) == 2


class Scripted:
    """Refuses from λ = 1, loops from 3, and from 2 refuses general queries, too."""

    def __init__(self):
        self.asked = []

    def answer(self, queries, steering=PLAIN, *, max_tokens=64, label=""):
        strength = steering.activations[0].strength if steering.activations else 0
        self.asked.append((strength, [a.positions for a in steering.activations], len(queries)))
        return [self.one(q.messages[0][1], strength, steering) for q in queries]

    def one(self, text, strength, steering):
        bad = text.startswith("bad")
        said = LOOP if bad and strength >= 3 else NO if strength >= (1 if bad else 2) else YES
        profiles = tuple(
            decide_profile(a, version="", method="", layer=0, gate=float(bad), vector_norm=1.0, state_norm=10.0)
            for a in steering.activations
        )
        return Answer((), said, True, SteeringDecision(bool(profiles), "gate_open", profiles))


def test_each_strength_is_answered_judged_and_counted():
    answerer = Scripted()
    pairs = [Pair(query(f"bad {i}"), NO, YES) for i in range(4)] + [Pair(query("bad 0"), "I won't.", YES)]
    general = [query("how are you?"), query("what is a fox?")]
    sweep = sweep_strength(answerer, "p", pairs, general, PairJudge(), [3, 1, 2], positions="last")
    assert [p.strength for p in sweep.points] == [0, 1, 2, 3] and sweep.chosen == 1
    assert [(p.success.hits, p.success.n) for p in sweep.points] == [(0, 4), (4, 4), (4, 4), (0, 4)]
    assert [(p.over_refusal.hits, p.over_refusal.n) for p in sweep.points] == [(0, 2), (0, 2), (2, 2), (2, 2)]
    assert [(p.degenerate.hits, p.degenerate.n) for p in sweep.points] == [(0, 6), (0, 6), (0, 6), (4, 6)]
    assert [p.dose for p in sweep.points] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert answerer.asked == [(0, [], 6), *((s, ["last"], 6) for s in (1, 2, 3))]
    assert sweep.judge == PairJudge.name


def test_a_sweep_over_nothing_is_refused():
    with pytest.raises(TrainingDataError, match="strength"):
        sweep_strength(Scripted(), "p", [], [], PairJudge(), [1])
    with pytest.raises(TrainingDataError, match="strength"):
        sweep_strength(Scripted(), "p", [Pair(query("bad"), NO, YES)], [], PairJudge(), [0])
