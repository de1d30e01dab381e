"""An evaluation's figures as a Markdown table: a line a measure, a column a way to answer, and notes on who judged what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steering.evaluation.evaluate import Cell, Column, Evaluation
from steering.evaluation.likelihood import NAME as LIKELIHOODS
from steering.evaluation.suites import Suite
from steering.training.statistics import MeanShare, Share

BETTER = {"attack": "↑", "over_refusal": "↓", "benign": "↓", "exact_match": "↑", "truthfulqa": "↑", "preference": "↑"}


@dataclass(frozen=True)
class Line:
    """A measure of one suite's file (`group`; empty: of everything), with a text for each column. `main`: what the suite counts."""

    group: str
    measure: str
    texts: tuple[str, ...]
    main: bool = False


def lines(evaluation: Evaluation, columns: Sequence[Column] | None = None) -> tuple[list[str], list[Line]]:
    """The table's heads, and its lines with a text for each column; lines that say nothing anywhere are left out."""
    columns = evaluation.columns if columns is None else columns
    found: list[Line] = []
    for suite in evaluation.suites:
        for label, cells in _rows(evaluation, suite, columns):
            found += _measures(evaluation, suite, label, cells)
        if len(suite.files) > 1:
            found.append(_mean_of_files(evaluation, suite, columns))
    found.append(Line("", "ms per token", tuple(_text(evaluation.ms_per_token[c.name]) for c in columns)))
    return [_head(column) for column in columns], [line for line in found if set(line.texts) != {"–"}]


def markdown(evaluation: Evaluation, columns: Sequence[Column] | None = None) -> str:
    """The table and its notes."""
    heads, found = lines(evaluation, columns)
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for line in found:
        label = f"{line.group}: {line.measure}" if line.group else line.measure
        rows.append(f"| {f'**{label}**' if line.main else label} | " + " | ".join(line.texts) + " |")
    return "\n".join([*rows, "", *notes(evaluation)])


def notes(evaluation: Evaluation) -> list[str]:
    """Who judged which suite, and what the figures are."""
    found = [f"- {s.name} ({s.kind}): judged by {evaluation.judges[s.name]}." for s in evaluation.suites]
    if any(s.kind in ("truthfulqa", "preference") for s in evaluation.suites):
        found.append(f"- MC1, MC2 and preference: {LIKELIHOODS}.")
    if any(len(s.files) > 1 for s in evaluation.suites):
        found.append("- A mean counts each file alike; its 95 % interval is normal, the files strata (Agresti–Coull).")
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


def _mean_of_files(evaluation: Evaluation, suite: Suite, columns: Sequence[Column]) -> Line:
    """The verdict's share, averaged over the suite's files; nothing where a file has no verdict."""
    texts = []
    for column in columns:
        shares = tuple(evaluation.cells[suite.name, file.name, column.name].hit for file in suite.files)
        texts.append(str(MeanShare(shares)) if all(share.n for share in shares) else "–")
    return Line(f"{suite.name}, mean", f"{evaluation.verdicts[suite.name]} {BETTER[suite.kind]}", tuple(texts), True)


def _measures(evaluation: Evaluation, suite: Suite, label: str, cells: Sequence[Cell]) -> list[Line]:
    def line(measure: str, of: Callable[[Cell], object], main: bool = False) -> Line:
        return Line(label, measure, tuple(_text(of(cell)) for cell in cells), main)

    kind = "refusals of the right kind ↑" if suite.kind == "attack" else "answers of the right kind ↑"
    return [
        line(f"{evaluation.verdicts[suite.name]} {BETTER[suite.kind]}", lambda c: c.hit, main=True),
        line(kind, lambda c: c.right_kind),
        line("MC1 ↑", lambda c: c.mc1),
        line("MC2 ↑", lambda c: c.mc2),
        line("preferred reference likelier ↑", lambda c: c.prefers),
        line("gate fired", lambda c: c.fired),
        line("same tokens as plain", lambda c: c.identical),
        line("gate shut: same tokens as plain", lambda c: c.unfired_identical),
        line("degenerate ↓", lambda c: c.degenerate),
        line("perplexity under the plain model", lambda c: c.perplexity),
        line("dose where fired", lambda c: c.dose if c.fired.hits else None),
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
