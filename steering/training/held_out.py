"""A tenth of the examples set aside for choosing the strength: pairs and general queries that train nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from steering.errors import TrainingDataError
from steering.training.data import LabelledQuery, Pair, Query

SHARE, MOST = 0.1, 100
LEAST = 5
T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """Pairs and general queries that trained nothing."""

    pairs: list[Pair]
    general: list[Query]


def hold_out(
    pairs: list[Pair], rows: dict[str, list[LabelledQuery]], seed: int
) -> tuple[list[Pair], dict[str, list[LabelledQuery]], HeldOut]:
    """Set aside a tenth, at most `MOST`, of the pairs' queries, with all their pairs, and of the general queries.

    Args:
        rows: "IR", "general" and "calibration" queries; the queries set aside leave the first two.
    Returns:
        The pairs and rows that are left, and what was set aside. Seeded.
    Raises:
        TrainingDataError: fewer than `LEAST` queries would be set aside.
    """
    queries = _some(list(dict.fromkeys(pair.query for pair in pairs)), seed)
    if len(queries) < LEAST:
        raise TrainingDataError(
            f"choosing the strength needs {LEAST / SHARE:.0f} different queries among the pairs, a tenth of which is set aside "
            f"for it; there are {len({p.query for p in pairs})}. Add pairs, or give --strength a number."
        )
    general = _some([row.query for row in rows["general"]], seed)
    aside = {*queries, *general}
    left = {name: [row for row in found if row.query not in aside] for name, found in rows.items()}
    held = HeldOut([pair for pair in pairs if pair.query in aside], general)
    return [pair for pair in pairs if pair.query not in aside], left, held


def _some(items: list[T], seed: int) -> list[T]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in sorted(order[: min(MOST, int(SHARE * len(items)))])]
