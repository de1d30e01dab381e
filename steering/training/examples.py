"""All examples of one training: checked against each other, and each distinct query given a row of the states to be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from steering.training.data import LabelledQuery, Pair, Query, bare, read_pairs, read_queries, refuse_overlap
from steering.training.held_out import HeldOut, hold_out
from steering.training.on_disk import Rows, distinct
from steering.training.options import TrainingOptions
from steering.training.refusals import refuse_senseless, refuse_too_few


@dataclass(frozen=True)
class Examples:
    """The pairs, and the `groups` of queries, "IR", "general" and "calibration", no two of which share one.

    `held_out`: what was set aside for choosing the strength, where that is "auto"; in none of the others.
    """

    pairs: Rows[Pair]
    groups: dict[str, Rows[LabelledQuery]]
    held_out: HeldOut | None

    @cached_property
    def queries(self) -> Rows[Query]:
        """Every query once, N: the groups' in their order, then those that only pairs have. IR queries are often the pairs' own."""
        ir, general, calibration = self.groups.values()
        every = bare(ir + general + calibration + self.pairs)
        return every.take(distinct(every.places["query"])[0])

    @cached_property
    def pair_number(self) -> Tensor:
        """Which of the pairs' P distinct queries, in order of appearance, each pair has: (num pairs,)."""
        return torch.from_numpy(distinct(self.pairs.places["query"])[1])

    @cached_property
    def pair_rows(self) -> np.ndarray:
        """The row, among `queries`, of each distinct query of the pairs: (P,)."""
        digests, found = self.queries.places["query"], self.pairs.places["query"]
        order = digests.argsort()
        return order[np.searchsorted(digests, found[distinct(found)[0]], sorter=order)]

    @cached_property
    def harmful(self) -> Tensor:
        """Whether any pair of each distinct query has the side "harmful": (P,) bool."""
        found = torch.zeros(len(self.pair_rows), dtype=torch.bool)
        found[self.pair_number[torch.tensor([side == "harmful" for side in self.pairs.labels("side")])]] = True
        return found

    @cached_property
    def last_pairs(self) -> Rows[Pair]:
        """The last pair of each distinct query: P."""
        last = np.empty(len(self.pair_rows), dtype=np.int64)
        last[self.pair_number.numpy()] = np.arange(len(self.pairs))
        return self.pairs.take(last)

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        """Each query's source, by group."""
        return {name: rows.labels("source") for name, rows in self.groups.items()}

    def states_of_groups(self, states: Tensor) -> dict[str, Tensor]:
        """Views of (N, d) states of `queries`: {group: (n, d)}, without those that have no queries."""
        parts = states.split([*(len(rows) for rows in self.groups.values()), len(states) - self._num_grouped])
        return {name: part for name, part in zip(self.groups, parts, strict=False) if len(part)}

    def states_of_pairs(self, states: Tensor) -> Tensor:
        """(N, d) states of `queries` → (P, d): a view where the rows lie together."""
        first = int(self.pair_rows[0])
        together = np.array_equal(self.pair_rows, np.arange(first, first + len(self.pair_rows)))
        return states[first : first + len(self.pair_rows)] if together else states[torch.from_numpy(self.pair_rows)]

    @property
    def _num_grouped(self) -> int:
        return sum(map(len, self.groups.values()))


def read_examples(options: TrainingOptions, width: int) -> Examples:
    """Read and check all files. Raises TrainingDataError, also for all that is too few; `width`: d."""
    refuse_senseless(options)
    pairs = read_pairs(options.pairs)
    names = {"IR": options.ir, "general": options.general, "calibration": options.calibration}
    groups = {name: read_queries(paths) for name, paths in names.items()}
    refuse_overlap(groups)
    refuse_overlap({"pair": pairs, "calibration": groups["calibration"]})
    held_out = None
    if options.strength == "auto":
        pairs, groups, held_out = hold_out(pairs, groups, options.seed)
    found = Examples(pairs, groups, held_out)
    counts = {name: len(rows) for name, rows in groups.items()}
    refuse_too_few(options, set(pairs.labels("side")), counts, len(found.pair_rows), width)
    return found
