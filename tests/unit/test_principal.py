"""Leading directions of wide rows, against LAPACK on the whole matrix and against planted spectra."""

from __future__ import annotations

import pytest
import torch

from steering.training import principal
from steering.training.principal import Moments, principal_directions, top_eigenvectors

WIDE = principal.EXACT_WIDTH + 188


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(rows, rank):
    """Right singular vectors of the rows, and the rows' energy along them, by a thin SVD in float64."""
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return directions[:rank].T, values[:rank].square()


def energies(rows, basis):
    return (rows.double() @ basis.double()).square().sum(0)


def assert_orthonormal(basis):
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=2e-6, rtol=0)


def test_what_checks_for_orthonormal_columns_sees_a_length_and_an_angle_that_are_slightly_off():
    basis = torch.linalg.qr(drawn(11, WIDE, 6)).Q
    assert_orthonormal(basis)
    longer, tilted = basis.clone(), basis.clone()
    longer[:, 2] *= 1 + 1e-5
    tilted[:, 2] += 1e-5 * basis[:, 4]
    for other in (longer, tilted):
        with pytest.raises(AssertionError, match="not close"):
            assert_orthonormal(other)


@pytest.mark.parametrize("width", [40, WIDE])
@pytest.mark.parametrize("count", [90, 1500])
def test_about_any_centre_they_are_the_singular_vectors_of_the_centred_rows(width, count):
    rows = drawn(1, count, width) * torch.arange(1, width + 1).rsqrt() + 5 * drawn(2, width)
    moments = Moments.of(rows, rows.mean(0))
    for centre in (torch.zeros(width), rows.mean(0), drawn(3, width)):
        found, (wanted, energy) = moments.directions(centre, 20), exact(rows.double() - centre.double(), 20)
        assert_orthonormal(found)
        torch.testing.assert_close(energies(rows.double() - centre.double(), found), energy, rtol=1e-4, atol=0)
        assert torch.linalg.svdvals(found[:, :19].double().T @ wanted).min() > 0.999
        assert (found.abs().amax(0) == found.amax(0)).all()  # the largest entry is positive
    other, wanted = moments.directions(torch.zeros(width), 20), exact(rows - rows.mean(0), 20)[0]
    assert (other[:, 0].double() @ wanted[:, 0]).abs() < 0.99  # the centre matters


def test_without_a_fold_they_are_the_other_rows_own():
    rows = drawn(4, 300, WIDE) * torch.arange(1, WIDE + 1).rsqrt()
    rest, fold = rows[60:], rows[:60] * 3
    rows = torch.cat([fold, rest])
    reference = rows.mean(0)
    others = Moments.of(rows, reference) - Moments.of(fold, reference)
    wanted = Moments.of(rest, reference)
    zero = torch.zeros(WIDE)
    energy = energies(rest, others.directions(zero, 10))
    torch.testing.assert_close(energy, energies(rest, wanted.directions(zero, 10)), rtol=1e-6, atol=0)
    assert others.count == 240 and (energies(rest, Moments.of(rows, reference).directions(zero, 10)) < energy).any()


def test_the_energy_is_right_where_the_spectrum_is_flat_and_no_single_direction_means_anything():
    rows = drawn(5, 2000, WIDE)
    found, (_, energy) = principal_directions(rows, 64), exact(rows, 64)
    assert_orthonormal(found)
    torch.testing.assert_close(energies(rows, found), energy, rtol=1e-5, atol=0)


def test_directions_a_million_times_as_strong_do_not_hide_the_weak_ones():
    """Planted: two massive directions and ten weak ones over less noise, as in a residual stream. Float32 sums lose the weak."""
    basis = torch.linalg.qr(drawn(6, WIDE, 12)).Q
    scales = torch.tensor([1e6**0.5 * 30, 1e6**0.5 * 20, *torch.linspace(6, 4, 10)])
    rows = (drawn(7, 1200, 12) * scales) @ basis.T + 0.3 * drawn(8, 1200, WIDE)
    found = principal_directions(rows, 12)
    assert torch.linalg.svdvals(found.T @ basis).min() > 0.99
    mistaken = torch.linalg.qr(drawn(9, WIDE, 12)).Q
    assert torch.linalg.svdvals(mistaken.T @ basis).min() < 0.5


def test_fewer_rows_than_directions_still_make_an_orthonormal_basis_that_holds_the_rows():
    rows = drawn(10, 7, WIDE)
    found = principal_directions(rows, 12)
    assert_orthonormal(found)
    torch.testing.assert_close(rows @ found @ found.T, rows, atol=1e-4, rtol=0)
    assert (rows @ found[:, :6] @ found[:, :6].T - rows).abs().max() > 0.1


def test_the_iteration_converges_in_few_products_and_gives_the_same_bits_twice():
    values = torch.arange(1, WIDE + 1).double().reciprocal()
    columns = 0

    def product(block):
        nonlocal columns
        columns += block.shape[1]
        return values[:, None] * block

    first, used = top_eigenvectors(product, WIDE, 16), columns
    torch.testing.assert_close(first.abs(), torch.eye(WIDE, dtype=torch.double)[:, :16], atol=1e-4, rtol=0)
    assert used < WIDE
    assert torch.equal(first, top_eigenvectors(product, WIDE, 16))
