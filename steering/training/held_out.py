"""A tenth of the examples set aside for choosing the strength: pairs and general queries that train nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steering.errors import TrainingDataError
from steering.training.data import LabelledQuery, Pair, Query, bare
from steering.training.on_disk import Rows, distinct

SHARE, MOST = 0.1, 100
LEAST = 5


@dataclass(frozen=True)
class HeldOut:
    """Pairs and general queries that trained nothing."""

    pairs: list[Pair]
    general: list[Query]


def hold_out(
    pairs: Rows[Pair], rows: dict[str, Rows[LabelledQuery]], seed: int
) -> tuple[Rows[Pair], dict[str, Rows[LabelledQuery]], HeldOut]:
    """Set aside a tenth, at most `MOST`, of the pairs' queries, with all their pairs, and of the general queries.

    Args:
        rows: "IR", "general" and "calibration" queries; the queries set aside leave the first two.
    Returns:
        The pairs and rows that are left, and what was set aside. Seeded.
    Raises:
        TrainingDataError: fewer than `LEAST` queries would be set aside.
    """
    queries = distinct(pairs.places["query"])[0]
    chosen = pairs.take(_some(queries, seed))
    if len(chosen) < LEAST:
        raise TrainingDataError(
            f"choosing the strength needs {LEAST / SHARE:.0f} different queries among the pairs, a tenth of which is set aside "
            f"for it; there are {len(queries)}. Add pairs, or give --strength a number."
        )
    general = rows["general"].take(_some(np.arange(len(rows["general"])), seed))
    aside = np.concatenate([chosen.places["query"], general.places["query"]])
    left = {name: found.take(~np.isin(found.places["query"], aside)) for name, found in rows.items()}
    mine = np.isin(pairs.places["query"], aside)
    return pairs.take(~mine), left, HeldOut(list(pairs.take(mine)), list(bare(general)))


def _some(numbers: Sequence[int] | np.ndarray, seed: int) -> list[int]:
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    return [int(numbers[i]) for i in sorted(order[: min(MOST, int(SHARE * len(numbers)))])]
