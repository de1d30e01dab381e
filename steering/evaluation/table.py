"""An evaluation's figures as a Markdown table: a line a measure, a column a way to answer, and notes on who judged what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from steering.evaluation.evaluate import Cell, Column, Evaluation
from steering.evaluation.likelihood import NAME as LIKELIHOODS
from steering.evaluation.suites import Suite
from steering.training.statistics import Share

BETTER = {"attack": "↑", "over_refusal": "↓", "benign": "↓", "exact_match": "↑", "truthfulqa": "↑", "preference": "↑"}
Line = tuple[str, list[str]]


def lines(evaluation: Evaluation, columns: Sequence[Column] | None = None) -> tuple[list[str], list[Line]]:
    """The table's heads, and its lines with a text for each column; lines that say nothing anywhere are left out."""
    columns = evaluation.columns if columns is None else columns
    found: list[Line] = []
    for suite in evaluation.suites:
        for label, cells in _rows(evaluation, suite, columns):
            found += _measures(evaluation, suite, label, cells)
    times = [f"{evaluation.ms_per_token[c.name]:.2f}" for c in columns]
    found.append(("ms per token", times))
    said = [(label, texts) for label, texts in found if any(text not in ("–", "nan") for text in texts)]
    return [_head(column) for column in columns], said


def markdown(evaluation: Evaluation, columns: Sequence[Column] | None = None) -> str:
    """The table and its notes."""
    heads, found = lines(evaluation, columns)
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    rows += [f"| {label} | " + " | ".join(texts) + " |" for label, texts in found]
    return "\n".join([*rows, "", *notes(evaluation)])


def notes(evaluation: Evaluation) -> list[str]:
    """Who judged which suite, and what the figures are."""
    found = [f"- {s.name} ({s.kind}): judged by {evaluation.judges[s.name]}." for s in evaluation.suites]
    if any(s.kind in ("truthfulqa", "preference") for s in evaluation.suites):
        found.append(f"- MC1, MC2 and preference: {LIKELIHOODS}.")
    unjudged = sum(cell.unjudged for cell in evaluation.cells.values())
    if unjudged:
        found.append(f"- {unjudged} answers got no verdict from the judge and are in no share.")
    found += [
        "- Shares are hits/n with the 95 % Clopper–Pearson interval. Greedy answers. A degenerate answer (empty, repeating itself, "
        "or without an end where the plain model's has one) is no success.",
        f"- ms per token: median over {evaluation.timed}, decoding only.",
    ]
    return found


def _rows(evaluation: Evaluation, suite: Suite, columns: Sequence[Column]) -> list[tuple[str, list[Cell]]]:
    """A suite's files, each with a cell a column."""
    several = len(suite.files) > 1
    return [
        (
            f"{suite.name}, {file.name}" if several else suite.name,
            [evaluation.cells[suite.name, file.name, column.name] for column in columns],
        )
        for file in suite.files
    ]


def _measures(evaluation: Evaluation, suite: Suite, label: str, cells: Sequence[Cell]) -> list[Line]:
    def each(measure: Callable[[Cell], object]) -> list[str]:
        return [_text(measure(cell)) for cell in cells]

    kind = "refusals of the right kind" if suite.kind == "attack" else "answers of the right kind"
    return [
        (f"**{label}: {evaluation.verdicts[suite.name]}** {BETTER[suite.kind]}", each(lambda c: c.hit)),
        (f"{label}: {kind}", each(lambda c: c.right_kind)),
        (f"{label}: MC1 ↑", each(lambda c: c.mc1)),
        (f"{label}: MC2 ↑", each(lambda c: c.mc2)),
        (f"{label}: preferred reference likelier ↑", each(lambda c: c.prefers)),
        (f"{label}: gate fired", each(lambda c: c.fired)),
        (f"{label}: same tokens as plain", each(lambda c: c.identical)),
        (f"{label}, gate shut: same tokens as plain", each(lambda c: c.unfired_identical)),
        (f"{label}: degenerate ↓", each(lambda c: c.degenerate)),
        (f"{label}: perplexity under the plain model", each(lambda c: c.perplexity)),
        (f"{label}: dose where fired", each(lambda c: c.dose if c.fired.hits else None)),
    ]


def _text(value: object) -> str:
    if isinstance(value, Share):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}"
    return "–"


def _head(column: Column) -> str:
    strengths = {a.profile: a.strength for a in column.steering.activations}
    if not strengths:
        return column.name
    if len(strengths) == 1:
        return f"{column.name} (λ = {next(iter(strengths.values())):g})"
    return f"{column.name} (" + ", ".join(f"{name} λ = {value:g}" for name, value in strengths.items()) + ")"
