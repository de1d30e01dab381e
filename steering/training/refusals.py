"""What cannot make a profile, said before the model has read anything, or as soon as its states tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from steering.errors import TrainingDataError
from steering.training import fit_alphasteer, fit_cast, fit_experts, fit_gate
from steering.training.options import TrainingOptions

ONE_SIDED = ("refusal_vector", "alphasteer", "cast")
"""Methods that steer by the harmful pairs alone, where any pair has a side."""
SAME = 1e-5
"""Relative difference up to which states are one and the same, batched differently."""


def refuse_senseless(options: TrainingOptions) -> None:
    """Raise TrainingDataError where the method lacks a file that it cannot do without, or where a file or option does nothing."""
    if options.ir and not options.general:
        raise TrainingDataError("--ir needs --general: a gate is chosen by how well it tells the two apart.")
    if options.method == "alphasteer" and not options.general:
        raise TrainingDataError("alphasteer needs --general: queries on whose states its matrix is to do nothing.")
    if options.method == "cast" and not options.ir:
        raise TrainingDataError(
            "cast needs --ir and --general: its condition is what tells the two apart. Without a condition it is --method caa."
        )
    if options.experts.variant != "standard" and options.method != "finesteer":
        raise TrainingDataError(
            f"--variant {options.experts.variant} is of --method finesteer; {options.method} has none."
        )
    if options.calibration and not options.ir:
        raise TrainingDataError("--calibration needs --ir and --general: without a gate there is no threshold to set.")
    if options.general and not options.ir and options.method != "alphasteer" and options.strength != "auto":
        raise TrainingDataError(
            "--general needs --ir: alone it would train nothing. Give both for a gate, or neither for none."
        )


def refuse_too_few(
    options: TrainingOptions,
    sides: Collection[str | None],
    counts: Mapping[str, int],
    num_pair_queries: int,
    width: int,
) -> None:
    """Raise TrainingDataError where the examples are too few, or none of the side, that is to be fitted to.

    Args:
        sides: the pairs'.
        counts: of the queries, by "IR", "general" and "calibration".
        num_pair_queries: different ones among the pairs.
        width: d.
    """
    named = sorted(set(sides) - {None})
    if "harmful" not in named and (options.method == "refusal_vector" or (named and options.method in ONE_SIDED)):
        found = f"their sides are {', '.join(named)}" if named else "the files have none"
        raise TrainingDataError(f'{options.method} needs pairs with "side": "harmful"; {found}.')
    if options.method == "alphasteer":
        fit_alphasteer.refuse_too_few(counts["IR"] or num_pair_queries, counts["general"])
    elif options.method == "cast":
        fit_cast.refuse_too_few(counts["IR"], counts["general"])
    elif options.ir:
        calibration = counts["calibration"] if options.calibration else None
        fit_gate.refuse_too_few(counts["IR"], counts["general"], calibration, width, options.rank, options.tail)
    if options.method == "finesteer":
        fit_experts.refuse_too_few(num_pair_queries)


def refuse_constant(states: Mapping[str, Tensor]) -> None:
    """Raise TrainingDataError where all (n, d) states of a group are one: queries that differ, and that the model sees alike."""
    for name, rows in states.items():
        low, high = rows.amin(0), rows.amax(0)
        if len(rows) > 1 and (high - low).max() <= SAME * torch.maximum(high, -low).max():
            raise TrainingDataError(
                f"the {len(rows)} {name} queries have one and the same state, so there is nothing to tell them by. Look at the "
                "queries, and at whether the chat template shows them to the model."
            )


def refuse_cancelling(method: str, shifts: Tensor) -> None:
    """Raise TrainingDataError where the mean of (n, d) shifts is zero, or nothing but rounding."""
    if not shifts.mean(0).norm() > SAME * shifts.norm(dim=-1).mean():
        raise TrainingDataError(
            f"{method}: the pairs' mean shift is zero: nothing to steer towards. Look for pairs whose preferred and undesired "
            "answers are swapped."
        )
