"""Principal directions of many wide rows: in float64, through sums whose cost grows linearly with the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024
EXACT_WIDTH = 512
BLOCK = 24  # no power of two: at a width of 4,096 those fall on the same lines of the cache, and cost twice the time
STEPS = 8
TOLERANCE = 1e-6
MAX_RESTARTS = 40


@dataclass(frozen=True)
class Moments:
    """What principal directions about any centre need to know of rows x, in float64 and about a `reference` point a.

    Moments of disjoint rows about one reference subtract: those without a fold are all rows' less the fold's. The
    reference should lie among the rows, lest the sums cancel.

    Attributes:
        count: number of rows n.
        reference: (d,), a.
        total: (d,), Σ (x − a).
        gram: (d, d), Σ (x − a)(x − a)ᵀ.
    """

    count: int
    reference: Tensor
    total: Tensor
    gram: Tensor

    @classmethod
    def of(cls, rows: Tensor, reference: Tensor, chosen: Tensor | None = None) -> Moments:
        """Of (n, d) rows of any float dtype, or of the `chosen` ones by number, a thousand at a time; not modified."""
        reference = reference.double()
        d = rows.shape[1]
        total, gram = torch.zeros(d, dtype=torch.double), torch.zeros(d, d, dtype=torch.double)
        for chunk in rows.split(CHUNK) if chosen is None else (rows[some] for some in chosen.split(CHUNK)):
            moved = chunk.double() - reference
            total += moved.sum(0)
            gram.addmm_(moved.T, moved)
        return cls(len(rows) if chosen is None else len(chosen), reference, total, gram)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.reference, self.total - other.total, self.gram - other.gram)

    def directions(self, centre: Tensor, rank: int) -> Tensor:
        """The top right singular vectors of the rows less `centre`, (d,), as orthonormal columns: (d, rank) float32.

        Each column's entry of largest magnitude is positive.
        """
        c = centre.double() - self.reference

        def product(block: Tensor) -> Tensor:
            """Σ (x − centre)(x − centre)ᵀ B: the Gram matrix about the reference and a change of rank two."""
            inside = c @ block
            return (
                self.gram @ block
                - self.total[:, None] * inside
                + c[:, None] * (self.count * inside - self.total @ block)
            )

        vectors = top_eigenvectors(product, len(c), rank)
        signs = torch.sign(vectors[vectors.abs().argmax(0), torch.arange(rank)])
        return (vectors * signs).float().contiguous()


def principal_directions(rows: Tensor, rank: int) -> Tensor:
    """The top right singular vectors of (n, d) rows as they are, uncentred: (d, rank) float32, as `Moments.directions`."""
    origin = torch.zeros(rows.shape[1])
    return Moments.of(rows, origin).directions(origin, rank)


def top_eigenvectors(product: Callable[[Tensor], Tensor], width: int, rank: int) -> Tensor:
    """Eigenvectors to the `rank` largest eigenvalues of a positive semidefinite matrix, largest first: (width, rank).

    Block Lanczos with full orthogonalisation and thick restarts (Wu and Simon, 2000) from a fixed start, until each
    residual ‖Av − θv‖ is below `TOLERANCE`·θ. Where eigenvalues are alike within that, their common subspace's energy is
    right and single vectors are anyone's guess, as with any method. Narrow matrices are decomposed outright.

    Args:
        product: B ↦ AB, for (width, k) float64 of any k.
    """
    keep = rank + BLOCK
    limit = keep + STEPS * BLOCK
    if width <= max(EXACT_WIDTH, limit):
        return torch.linalg.eigh(product(torch.eye(width, dtype=torch.double))).eigenvectors.flip(-1)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    new = torch.linalg.qr(torch.randn(width, BLOCK, dtype=torch.double, generator=generator)).Q
    known = image = torch.empty(width, 0, dtype=torch.double)  # orthonormal columns Q, and AQ
    best = known
    for _ in range(MAX_RESTARTS):
        while known.shape[1] < limit:
            known, image = torch.cat([known, new], -1), torch.cat([image, product(new)], -1)
            new = image[:, -BLOCK:]
            for _ in range(2):  # twice is enough; QR finds new directions where the product has none
                new = torch.linalg.qr(new - known @ (known.T @ new)).Q
        small = known.T @ image
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        values, vectors = values.flip(-1)[:keep], vectors.flip(-1)[:, :keep]
        known, image = known @ vectors, image @ vectors  # the best Ritz vectors; `new` is orthogonal to them, too
        best = known[:, :rank]
        residual = (image - known * values).norm(dim=0)[:rank]
        rounding = width * torch.finfo(torch.double).eps * values[0]
        if (residual <= TOLERANCE * values[:rank].clamp_min(0) + rounding).all():
            break
    return best
