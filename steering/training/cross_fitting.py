"""Judging what was fitted on data that did not fit it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FOLDS = 5
Rule = Callable[[Tensor], Tensor]


def fold_numbers(count: int, folds: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers from 0 to folds − 1, in random order, each as often as any other to within one."""
    return torch.randperm(count, generator=generator) % folds


def judged_by_other_half(fit: Callable[..., Rule], *groups: Tensor, seed: int = 0) -> list[Tensor]:
    """What each of the groups' numbers gets from a rule that was fitted without it.

    Judged by the rule that they themselves set, numbers look better than new ones will.
    Args:
        fit: half of each group → a rule: (n,) → (n,) bool. It is fitted twice, and judges the other halves.
        groups: (n,) each.
    Returns:
        (n,) bool for each group.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = [fold_numbers(len(group), 2, generator) for group in groups]
    found = [torch.zeros(len(group), dtype=torch.bool) for group in groups]
    for half in (0, 1):
        rule = fit(*(group[mine != half] for group, mine in zip(groups, halves, strict=True)))
        for flags, group, mine in zip(found, groups, halves, strict=True):
            flags[mine == half] = rule(group[mine == half])
    return found
