"""The few statistics that the fitters and reports share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta, rankdata


def clopper_pearson(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval for a share of `hits` in `total`; (0, 1) where total is 0."""
    if total == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, total - hits + 1))
    high = 1.0 if hits == total else float(beta.ppf(1 - tail, hits + 1, total - hits))
    return low, high


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """P(a positive's score > a negative's), ties half: the area under the ROC curve (Mann–Whitney)."""
    positive, negative = np.asarray(positive), np.asarray(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def share(hits: int, total: int) -> dict[str, float | int]:
    """A share with its count and its 95 % interval, as the manifest keeps it."""
    low, high = clopper_pearson(hits, total)
    return {"share": round(hits / total, 4) if total else 0.0, "n": total, "low": round(low, 4), "high": round(high, 4)}


@dataclass(frozen=True)
class Share:
    """`hits` of `n`."""

    hits: int
    n: int

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Share:
        return cls(sum(map(bool, flags)), len(flags))

    @property
    def value(self) -> float:
        """hits / n; NaN where n is 0."""
        return self.hits / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper–Pearson's 95 % interval."""
        return clopper_pearson(self.hits, self.n)

    def __str__(self) -> str:
        if not self.n:
            return "–"
        low, high = self.interval
        return f"{self.value:.1%} ({self.hits}/{self.n}; {low:.0%}–{high:.0%})"


@dataclass(frozen=True)
class MeanShare:
    """The mean of several files' shares, each file counting alike, whatever its rows: how attack suites are published."""

    shares: tuple[Share, ...]

    @property
    def value(self) -> float:
        return sum(share.value for share in self.shares) / len(self.shares)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, normal: the files are strata, each with two hits and two misses added (Agresti–Coull), so that a file of
        hits alone is not taken for certain."""
        variance = 0.0
        for share in self.shares:
            n, centre = share.n + 4, (share.hits + 2) / (share.n + 4)
            variance += centre * (1 - centre) / n
        half = 1.96 * variance**0.5 / len(self.shares)
        return max(0.0, self.value - half), min(1.0, self.value + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({len(self.shares)} files; {low:.0%}–{high:.0%})"
