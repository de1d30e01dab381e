"""What is judged out of sample is: no number by a rule that it shaped, and folds of one size."""

from __future__ import annotations

import pytest
import torch

from steering.training.cross_fitting import fold_numbers, judged_by_other_half


@pytest.mark.parametrize(("first", "second"), [(40, 7), (5, 1), (2, 3)])
def test_no_number_is_judged_by_a_rule_that_it_shaped_and_all_are_judged_once(first, second):
    groups, seen = (torch.arange(first) * 1.0, 100 + torch.arange(second) * 1.0), []

    def fit(*others):
        known = torch.cat(others)
        seen.append(len(known))
        return lambda mine: ~torch.isin(mine, known)

    judged = judged_by_other_half(fit, *groups, seed=3)
    assert [len(flags) for flags in judged] == [first, second] and all(flags.all() for flags in judged)
    assert sum(seen) == first + second and len(seen) == 2
    rule = fit(*groups)  # the control: fitted on all
    assert not any(rule(group).any() for group in groups)


def test_folds_differ_in_size_by_one_at_most_and_by_seed():
    numbers = [fold_numbers(23, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert sorted(numbers[0].bincount().tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])
