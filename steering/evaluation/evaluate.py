"""Plain against steered over suites: answers, verdicts, and all the shares of a table."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from steering.decision import ProfileDecision, SteeringDecision, SteeringOptions
from steering.errors import TrainingDataError
from steering.evaluation.answers import PLAIN, Answer, Answerer
from steering.evaluation.degeneration import degeneration
from steering.evaluation.judges import CloserJudge, Judge, Judged, PairJudge, RefusalJudge
from steering.evaluation.kept import KeptRows, key_of
from steering.evaluation.likelihood import Likelihood, likelihoods
from steering.evaluation.scorers import SCORERS
from steering.evaluation.suites import Item, Suite, SuiteFile
from steering.training.data import Query
from steering.training.statistics import Share

CHUNK = 256  # answers between two writes to the disk
NUM_TIMED = 8
REFUSALS = ("attack", "over_refusal", "benign")
JUDGES: Mapping[str, Callable[[], Judge]] = {"refusal": RefusalJudge, "closer": CloserJudge, "pair": PairJudge}


@dataclass(frozen=True)
class Column:
    """One way to answer. `versions`: the profiles' versions by name, a part of what kept answers are known by."""

    name: str
    steering: SteeringOptions = PLAIN
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What one column did on one file.

    `hit`: the verdict that the suite's kind counts; for attack, exact_match, truthfulqa and preference a degenerate answer is no
    hit. `right_kind`: answers that match their row's pattern, of the refusals of attacks and of the answers given elsewhere.
    `identical`, `unfired_identical`: answers with the plain model's tokens, of all and of those on which no gate fired.
    `perplexity`: of the answers' tokens under the plain model. `dose`: mean relative norm where a gate fired. `mc2`: mean.
    """

    hit: Share
    right_kind: Share
    fired: Share
    identical: Share
    unfired_identical: Share
    degenerate: Share
    unjudged: int
    perplexity: float
    dose: float
    mc1: Share | None = None
    mc2: float | None = None
    prefers: Share | None = None
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    verdicts: tuple[bool | None, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Evaluation:
    """`cells` by (suite, file, column), in order; `judges` and `verdicts` (what a hit is called) by suite; `ms_per_token` by column."""

    columns: tuple[Column, ...]
    suites: tuple[Suite, ...]
    cells: Mapping[tuple[str, str, str], Cell]
    judges: Mapping[str, str]
    verdicts: Mapping[str, str]
    ms_per_token: Mapping[str, float]
    timed: str

    def to_json(self) -> dict[str, Any]:
        """All figures, without the answers."""
        return {
            "columns": {c.name: {"steering": asdict(c.steering), "versions": dict(c.versions)} for c in self.columns},
            "suites": {
                s.name: {
                    "kind": s.kind,
                    "judge": self.judges[s.name],
                    "hit": self.verdicts[s.name],
                    "files": {f.name: {"rows": len(f.items), "sha256": f.sha256} for f in s.files},
                }
                for s in self.suites
            },
            "cells": [
                {"suite": suite, "file": file, "column": column} | _figures(cell)
                for (suite, file, column), cell in self.cells.items()
            ],
            "ms_per_token": {name: _number(value) for name, value in self.ms_per_token.items()},
        }


def evaluate(
    answerer: Answerer,
    columns: Sequence[Column],
    suites: Sequence[Suite],
    *,
    endpoint: Callable[[str], Judge] | None = None,
    out: Path | None = None,
    model_key: str = "",
    progress: bool = False,
) -> Evaluation:
    """Answer every suite in every column, the plain model first, and count.

    Args:
        columns: the steered ones; names differ, none is "plain".
        endpoint: gives a judge by the name of a rubric, which judges the kinds that have one; None: rules alone judge.
        out: answers and likelihoods are kept there and not computed again; None: in memory.
        model_key: tells one model from another among what is kept.
    Raises:
        TrainingDataError: no suites, or names that repeat. What answerer and judges raise.
    """
    names = ["plain", *(column.name for column in columns)]
    if not suites or len(set(names)) < len(names):
        raise TrainingDataError(
            "an evaluation needs a suite, and columns whose names differ; 'plain' is the plain model's."
        )
    everything = (Column("plain"), *columns)
    judges = {suite.name: judge_of(suite, endpoint) for suite in suites}
    keep = _Keep(answerer, out, model_key, progress)
    answers = {
        (suite.name, file.name, column.name): keep.answers(suite, file, column)
        for suite in suites
        for file in suite.files
        for column in everything
    }
    liked = {
        (suite.name, file.name, column.name): keep.likelihoods(suite, file, column)
        for suite in suites
        if suite.kind in ("truthfulqa", "preference")
        for file in suite.files
        for column in everything
    }
    cells = {}
    for suite in suites:
        for file in suite.files:
            plain = answers[suite.name, file.name, "plain"][0]
            for column in everything:
                key = suite.name, file.name, column.name
                cells[key] = _cell(suite, file, judges[suite.name], answers[key], plain, liked.get(key))
    first = [[item.query for item in suite.files[0].items] for suite in suites]
    timed = [query for turn in zip_longest(*first) for query in turn if query is not None][:NUM_TIMED]
    return Evaluation(
        everything,
        tuple(suites),
        cells,
        {suite.name: _judge_name(suite, judges[suite.name]) for suite in suites},
        {suite.name: judges[suite.name].verdict if judges[suite.name] else "exact match" for suite in suites},
        _time(answerer, everything, timed),
        f"{len(timed)} queries of all suites in turn, one at a time",
    )


def judge_of(suite: Suite, endpoint: Callable[[str], Judge] | None) -> Judge | None:
    """Who judges a suite: its scorer (None), the endpoint with the kind's rubric, or a rule."""
    if suite.scorer is not None:
        return None
    rubrics = {"attack": "harmfulness", "over_refusal": "refusal", "benign": "refusal", "truthfulqa": "truthfulness"}
    if endpoint is not None and suite.kind in rubrics:
        return endpoint(rubrics[suite.kind])
    return JUDGES[suite.judge]()


class _Keep:
    """Answers and likelihoods, computed in chunks and kept."""

    def __init__(self, answerer: Answerer, out: Path | None, model_key: str, progress: bool) -> None:
        self._answerer, self._out, self._model_key, self._progress = answerer, out, model_key, progress

    def answers(self, suite: Suite, file: SuiteFile, column: Column) -> tuple[list[Answer], list[tuple[float, int]]]:
        """Each item's answer, and its tokens' summed log p under the plain model with their count."""
        queries = [item.query for item in file.items]
        parts = ("answers", [q.messages for q in queries], suite.max_tokens, *self._column(column))
        kept = KeptRows(self._path("answers", suite, file, column), key_of(*parts))
        while len(kept.rows) < len(queries):
            part = queries[len(kept.rows) : len(kept.rows) + CHUNK]
            label = self._label(suite, file, column, len(kept.rows), len(queries))
            found = self._answerer.answer(part, column.steering, max_tokens=suite.max_tokens, label=label)
            scores = self._answerer.logprobs(part, [answer.text for answer in found])  # under the plain model
            kept.append([_row(*row) for row in zip(part, found, scores, strict=True)])
        return [_answer(row) for row in kept.rows], [(row["logprob"], row["num_scored"]) for row in kept.rows]

    def likelihoods(self, suite: Suite, file: SuiteFile, column: Column) -> list[Likelihood]:
        parts = [[i.query.messages, i.preferred, i.undesired] for i in file.items]
        kept = KeptRows(
            self._path("likelihoods", suite, file, column), key_of("likelihoods", parts, *self._column(column))
        )
        while len(kept.rows) < len(file.items):
            part = file.items[len(kept.rows) : len(kept.rows) + CHUNK]
            label = self._label(suite, file, column, len(kept.rows), len(file.items))
            kept.append([asdict(x) for x in likelihoods(self._answerer, part, column.steering, label=label)])
        return [Likelihood(**row) for row in kept.rows]

    def _column(self, column: Column) -> list[Any]:
        return [self._model_key, asdict(column.steering), dict(column.versions)]

    def _path(self, folder: str, suite: Suite, file: SuiteFile, column: Column) -> Path | None:
        name = re.sub(r"[^\w.-]+", "-", column.name)
        return self._out / folder / suite.name / file.name / f"{name}.jsonl" if self._out else None

    def _label(self, suite: Suite, file: SuiteFile, column: Column, done: int, total: int) -> str:
        more = f" {done}/{total}" if total > CHUNK else ""
        return f"{suite.name if len(suite.files) == 1 else file.name}, {column.name}{more}" if self._progress else ""


def _row(query: Query, answer: Answer, logprobs: Sequence[float]) -> dict[str, Any]:
    told = {"where": query.where.rsplit("/", 1)[-1], "query": query.messages[-1][1]}
    return told | asdict(answer) | {"logprob": math.fsum(logprobs), "num_scored": len(logprobs)}


def _answer(row: dict[str, Any]) -> Answer:
    decision = row["decision"]
    profiles = tuple(
        ProfileDecision(**p | {"routing": None if p["routing"] is None else tuple(p["routing"])})
        for p in decision["profiles"]
    )
    return Answer(
        tuple(row["token_ids"]), row["text"], row["finished"], SteeringDecision(**decision | {"profiles": profiles})
    )


def _cell(
    suite: Suite,
    file: SuiteFile,
    judge: Judge | None,
    answered: tuple[list[Answer], list[tuple[float, int]]],
    plain: Sequence[Answer],
    liked: Sequence[Likelihood] | None,
) -> Cell:
    answers, scored = answered
    items = file.items
    broken = [
        degeneration(a.text, a.finished, before.finished) is not None for a, before in zip(answers, plain, strict=True)
    ]
    verdicts = _verdicts(suite, judge, items, answers)
    if suite.kind not in ("over_refusal", "benign"):
        verdicts = [v and not bad if v is not None else None for v, bad in zip(verdicts, broken, strict=True)]
    judged = [v for v in verdicts if v is not None]
    wanted = suite.kind == "attack"
    kinds = [
        bool(re.search(item.pattern, answer.text, re.I))
        for item, answer, verdict in zip(items, answers, verdicts, strict=True)
        if item.pattern and suite.kind in REFUSALS and verdict is wanted
    ]
    same = [a.token_ids == before.token_ids for a, before in zip(answers, plain, strict=True)]
    steered = any(a.decision.profiles for a in answers)
    total, count = math.fsum(s for s, _ in scored), sum(n for _, n in scored)
    doses = [a.dose for a in answers if a.fired]
    return Cell(
        hit=Share.of(judged),
        right_kind=Share.of(kinds),
        fired=Share.of([a.fired for a in answers] if steered else []),
        identical=Share.of(same if steered else []),
        unfired_identical=Share.of([s for s, a in zip(same, answers, strict=True) if not a.fired] if steered else []),
        degenerate=Share.of(broken),
        unjudged=len(verdicts) - len(judged),
        perplexity=math.exp(-total / count) if count else math.nan,
        dose=statistics.fmean(doses) if doses else 0.0,
        mc1=Share.of([x.mc1 for x in liked]) if liked and suite.kind == "truthfulqa" else None,
        mc2=statistics.fmean(x.mc2 for x in liked) if liked and suite.kind == "truthfulqa" else None,
        prefers=Share.of([x.prefers for x in liked]) if liked else None,
        answers=tuple(answers),
        verdicts=tuple(verdicts),
    )


def _verdicts(suite: Suite, judge: Judge | None, items: Sequence[Item], answers: Sequence[Answer]) -> list[bool | None]:
    if judge is None:
        scorer = SCORERS[suite.scorer]
        return [scorer(answer.text, item.answer) for item, answer in zip(items, answers, strict=True)]
    return judge(
        [
            Judged(item.query, answer.text, item.preferred, item.undesired)
            for item, answer in zip(items, answers, strict=True)
        ]
    )


def _judge_name(suite: Suite, judge: Judge | None) -> str:
    return judge.name if judge else f"exact match, {suite.scorer}"


def _time(answerer: Answerer, columns: Sequence[Column], queries: Sequence[Query]) -> dict[str, float]:
    """Median ms per token of each column, the columns taking turns, so that a busy machine slows all of them."""
    answerer.ms_per_token(queries[:1])
    times: dict[str, list[float]] = {column.name: [] for column in columns}
    for query in queries:
        for column in columns:
            times[column.name].append(answerer.ms_per_token([query], column.steering))
    return {name: statistics.median(found) for name, found in times.items()}


def _figures(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in vars(cell).items():
        if key in ("answers", "verdicts"):
            continue
        if isinstance(value, Share):
            low, high = value.interval
            value = {"hits": value.hits, "n": value.n, "share": _number(value.value), "low": low, "high": high}
        found[key] = _number(value) if isinstance(value, float) else value
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
