"""Choosing a profile's strength λ: generated answers at each of several strengths, read by a judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steering.decision import Positions, ProfileActivation, SteeringOptions
from steering.errors import TrainingDataError
from steering.evaluation.answers import PLAIN, Answer, Answerer
from steering.evaluation.degeneration import degeneration
from steering.evaluation.judges import Judge, Judged, is_refusal
from steering.training.data import Pair, Query
from steering.training.statistics import Share


@dataclass(frozen=True)
class StrengthPoint:
    """What one strength did to held-out queries.

    `success`: IR queries whose answer the judge takes for the preferred kind, in whole sentences. `over_refusal`: general
    queries whose answer is a refusal. `degenerate`: answers, of both, that are empty, repeat themselves or never end.
    `dose`: mean relative norm, λ·g·‖v‖/‖h‖, over the queries on which the gate fired.
    """

    strength: float
    success: Share
    over_refusal: Share
    degenerate: Share
    dose: float

    @property
    def score(self) -> float:
        """Success less over-refusal; a share of nothing counts 0."""
        return _value(self.success) - _value(self.over_refusal)

    @property
    def standard_error(self) -> float:
        """Of `score`, both shares taken as binomial and independent."""
        shares = [share for share in (self.success, self.over_refusal) if share.n]
        return math.sqrt(sum(share.value * (1 - share.value) / share.n for share in shares))


@dataclass(frozen=True)
class StrengthSweep:
    """The points in ascending order (0 is the plain model), the strength chosen, and the judge's name."""

    points: tuple[StrengthPoint, ...]
    chosen: float
    judge: str


def sweep_strength(
    answerer: Answerer,
    profile_name: str,
    ir: Sequence[Pair],
    general: Sequence[Query],
    judge: Judge,
    strengths: Sequence[float],
    *,
    positions: Positions = "all",
    max_tokens: int = 64,
    progress: bool = False,
) -> StrengthSweep:
    """Answer the queries plainly and at each strength, judge the answers, and choose the middle of the plateau.

    Args:
        ir: held-out pairs; a query that comes several times is answered once and judged by all its references.
        general: held-out queries that need no steering; may be empty.
        judge: reads the answers to `ir`; over-refusal is always counted by the refusal rules.
        strengths: above 0, in any order; 0 is always measured too.
    Raises:
        TrainingDataError: no pairs, or no strengths above 0.
    """
    steps = sorted({float(s) for s in strengths if s > 0})
    if not ir or not steps:
        raise TrainingDataError("a strength sweep needs at least one IR pair and one strength above 0.")
    items = _items(ir)
    queries = [*items, *general]
    plain = answerer.answer(queries, PLAIN, max_tokens=max_tokens, label="plain" if progress else "")
    points = [_point(0.0, items, plain, plain, judge)]
    for strength in steps:
        steering = SteeringOptions((ProfileActivation(profile_name, strength, positions=positions),))
        label = f"strength {strength:g}" if progress else ""
        answers = answerer.answer(queries, steering, max_tokens=max_tokens, label=label)
        points.append(_point(strength, items, answers, plain, judge))
    return StrengthSweep(tuple(points), middle_of_plateau(points[1:]), judge.name)


def middle_of_plateau(points: Sequence[StrengthPoint]) -> float:
    """Of the neighbouring strengths that score within one standard error of the best, the middle one (the lower of two).

    The best alone is a draw of noise, and often at the edge where text begins to collapse (ours).
    """
    points = sorted(points, key=lambda point: point.strength)
    best = max(range(len(points)), key=lambda i: points[i].score)
    enough = points[best].score - points[best].standard_error
    first = last = best
    while first > 0 and points[first - 1].score >= enough:
        first -= 1
    while last + 1 < len(points) and points[last + 1].score >= enough:
        last += 1
    return points[(first + last) // 2].strength


def _items(pairs: Sequence[Pair]) -> dict[Query, tuple[list[str], list[str]]]:
    """Each query's preferred and undesired references, in order, without repeats."""
    found: dict[Query, tuple[list[str], list[str]]] = {}
    for pair in pairs:
        preferred, undesired = found.setdefault(pair.query, ([], []))
        preferred += [pair.preferred] * (pair.preferred not in preferred)
        undesired += [pair.undesired] * (pair.undesired not in undesired)
    return found


def _point(
    strength: float,
    items: Mapping[Query, tuple[list[str], list[str]]],
    answers: Sequence[Answer],
    plain: Sequence[Answer],
    judge: Judge,
) -> StrengthPoint:
    """`answers` and `plain` are to the items' queries and then to the general ones."""
    broken = [
        degeneration(answer.text, answer.finished, before.finished) is not None
        for answer, before in zip(answers, plain, strict=True)
    ]
    judged = [
        Judged(query, answer.text, tuple(preferred), tuple(undesired))
        for (query, (preferred, undesired)), answer in zip(items.items(), answers, strict=False)
    ]
    success = [verdict and not bad for verdict, bad in zip(judge(judged), broken, strict=False) if verdict is not None]
    doses = [answer.dose for answer in answers if answer.fired]
    return StrengthPoint(
        strength,
        Share.of(success),
        Share.of([is_refusal(answer.text) for answer in answers[len(items) :]]),
        Share.of(broken),
        sum(doses) / len(doses) if doses else 0.0,
    )


def _value(share: Share) -> float:
    return share.value if share.n else 0.0
