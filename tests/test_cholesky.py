"""The factorisation that keeps its matrix, against one that does not."""

from __future__ import annotations

import pytest
import torch

from slicecli.linalg.cholesky import BAND, factorise, restore, substitute

SIZES = [1, 7, BAND - 1, BAND, BAND + 1, 2 * BAND + 5]


def positive(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size + 20, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("size", SIZES)
def test_the_lower_triangle_becomes_the_factor_and_the_upper_one_stays(size):
    matrix = positive(size)
    given = matrix.clone()
    assert factorise(matrix)
    expected = torch.linalg.cholesky(given)
    assert float((matrix.tril() - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    assert torch.equal(matrix.triu(1), given.triu(1))


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_comes_back_to_the_bit(size):
    given = positive(size)
    given = given.triu() + given.triu(1).mT
    matrix = given.clone()
    for ridge in (1.0, 100.0):
        matrix.diagonal().add_(ridge)
        assert factorise(matrix)
        restore(matrix, given.diagonal().clone())
        assert torch.equal(matrix, given)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_above_the_factor_s_diagonal_is_not_read(size):
    matrix = positive(size)
    right = torch.randn(size, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right)
    assert factorise(matrix)
    found = substitute(matrix, right)
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())
    matrix += torch.full_like(matrix, float("nan")).triu(1)
    assert torch.equal(substitute(matrix, right), found)


@pytest.mark.parametrize("row", [0, BAND - 1, BAND, 2 * BAND])
def test_a_matrix_that_is_not_positive_is_refused_and_comes_back(row):
    given = positive(2 * BAND + 5)
    given = given.triu() + given.triu(1).mT
    given[row, row] = -1.0
    matrix = given.clone()
    assert not factorise(matrix)
    restore(matrix, given.diagonal().clone())
    assert torch.equal(matrix, given)
