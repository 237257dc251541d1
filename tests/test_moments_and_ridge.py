"""The regression under the refit, against plain float64 references."""

from __future__ import annotations

import math

import pytest
import torch

from slicecli.linalg import ridge
from slicecli.linalg.normal_equations import (
    BANDS,
    CHUNK_TOKENS,
    LEAST_BAND_ROWS,
    NormalEquations,
    add_outer,
    add_square,
    normalise,
)
from slicecli.linalg.ridge import RIDGES, TRIED, RidgeMemory, solve_ridge


def regression(tokens, inputs=12, outputs=5, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    truth = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    residual = z @ truth.T + noise * torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    return z, residual, truth


def moments_of(z, residual):
    equations = NormalEquations(z.shape[1], residual.shape[1], torch.device("cpu"))
    is_held_out = torch.arange(len(z)) % 5 == 4
    for part in range(0, len(z), 100):
        chosen = slice(part, part + 100)
        equations.add(z[chosen], residual[chosen], is_held_out[chosen])
    return equations


def test_normalise_has_unit_mean_square():
    stream = torch.randn(4, 7, 32) * 50
    torch.testing.assert_close(normalise(stream, 0.0).square().mean(-1), torch.ones(4, 7))


def test_normalise_keeps_float64_and_widens_bfloat16():
    assert normalise(torch.ones(2, 4, dtype=torch.float64), 1e-6).dtype == torch.float64
    assert normalise(torch.ones(2, 4, dtype=torch.bfloat16), 1e-6).dtype == torch.float32


def test_chunked_outer_products_equal_the_float64_sum():
    left = torch.randn(2 * CHUNK_TOKENS + 17, 6)
    right = torch.randn(len(left), 3) + 100
    total = torch.zeros(6, 3, dtype=torch.float64)
    add_outer(total, left, right)
    expected = left.double().T @ right.double()
    assert float((total - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("width", [1, 7, LEAST_BAND_ROWS, LEAST_BAND_ROWS + 1, BANDS * LEAST_BAND_ROWS + 3])
def test_squares_equal_the_float64_sum(width):
    rows = torch.randn(CHUNK_TOKENS + 17, width)
    total = torch.eye(width, dtype=torch.float64)
    add_square(total, rows)
    expected = torch.eye(width, dtype=torch.float64) + rows.double().T @ rows.double()
    assert float((total - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(total, total.T, rtol=1e-5, atol=1e-3)


def test_moments_of_both_parts_add_up():
    z, residual, _ = regression(237)
    equations = moments_of(z, residual)
    gram, cross = equations.sum_held_out()
    torch.testing.assert_close(equations.gram + gram, z.T @ z)
    torch.testing.assert_close(equations.cross + cross, z.T @ residual)
    torch.testing.assert_close(gram, z[4::5].T @ z[4::5])
    assert float(sum(equations.residual_energy)) == pytest.approx(float(residual.square().sum()))
    for merged, expected in zip(equations.merge(), (z.T @ z, z.T @ residual), strict=True):
        torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("tokens", [37, 150, 400])
def test_held_out_tokens_tell_the_same_as_their_sums(tokens):
    z, residual, _ = regression(tokens, inputs=40, noise=2.0)
    kept, summed = moments_of(z, residual), moments_of(z, residual)
    assert (kept.held_out_sums is None) == (tokens < 200)
    summed.sum_held_out()
    assert not summed.held_out
    delta = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = (residual[4::5, 1:4] - z[4::5] @ delta).square().sum() - residual[4::5, 1:4].square().sum()
    for equations in (kept, summed):
        assert equations.change_of_error(delta, torch.eye(residual.shape[1])[:, 1:4]) == pytest.approx(float(change))
    one, other = solve_ridge(kept), solve_ridge(summed)
    assert one.ridge == other.ridge
    assert one.error == pytest.approx(other.error)
    torch.testing.assert_close(one.matrix, other.matrix)


@pytest.mark.parametrize("start", [None, *RIDGES])
def test_wherever_the_search_begins_it_ends_at_the_best_ridge(start):
    z, residual, _ = regression(60, inputs=40, noise=2.0)
    errors = {ridge: solve_ridge(moments_of(z, residual), (ridge,)).error for ridge in RIDGES}
    found = solve_ridge(moments_of(z, residual), start=start)
    assert found.ridge == min(errors, key=errors.__getitem__)
    search = RidgeMemory({} if start is None else {"writers": start})
    assert search.solve("writers", moments_of(z, residual)).ridge == found.ridge
    assert search.found == {"writers": found.ridge}
    search.solve("readers", moments_of(z, torch.zeros_like(residual)))
    assert "readers" not in search.found


def test_the_solution_equals_ridge_regression_in_float64():
    z, residual, _ = regression(400, noise=0.5)
    found = solve_ridge(moments_of(z, residual), ridges=(1e-2,))
    penalty = 1e-2 * (z.T @ z).diagonal().mean().sqrt() ** 2
    stacked = torch.cat([z, penalty.sqrt() * torch.eye(12, dtype=torch.float64)])
    goal = torch.cat([residual, torch.zeros(12, 5, dtype=torch.float64)])
    torch.testing.assert_close(found.matrix, torch.linalg.lstsq(stacked, goal).solution.T)


def test_a_noiseless_map_is_recovered():
    z, residual, truth = regression(400)
    found = solve_ridge(moments_of(z, residual))
    torch.testing.assert_close(found.matrix, truth, atol=1e-3, rtol=1e-3)
    assert found.error < 1e-5


def test_no_residual_asks_for_no_correction():
    z, residual, _ = regression(100)
    found = solve_ridge(moments_of(z, torch.zeros_like(residual)))
    assert not found.matrix.any()


def test_pure_noise_is_left_to_the_projection_or_hardly_followed():
    generator = torch.Generator().manual_seed(5)
    z, residual, _ = regression(60, inputs=40)
    noise = torch.randn(residual.shape, generator=generator, dtype=torch.float64)
    found = solve_ridge(moments_of(z, noise))
    free = torch.linalg.lstsq(z, noise).solution.T
    assert math.isinf(found.ridge) or float(found.matrix.norm()) < 0.5 * float(free.norm())


def test_fewer_tokens_choose_a_stronger_ridge():
    few = solve_ridge(moments_of(*regression(60, inputs=40, noise=2.0)[:2]))
    many = solve_ridge(moments_of(*regression(6000, inputs=40, noise=2.0)[:2]))
    assert few.ridge > many.ridge


def test_the_chosen_ridge_is_the_best_on_held_out_tokens():
    z, residual, _ = regression(90, inputs=40, noise=2.0)
    ridges = (1e-3, 1e-1, 1e0, 1e1)
    errors = {ridge: solve_ridge(moments_of(z, residual), (ridge,)).error for ridge in ridges}
    best = solve_ridge(moments_of(z, residual), ridges)
    assert best.error == pytest.approx(min(errors.values()))


@pytest.mark.parametrize("kind", ["alike", "falling", "one"])
@pytest.mark.parametrize("noise", [0.5, 8.0])
def test_some_combinations_of_outputs_choose_the_ridge_that_all_would_choose(kind, noise, monkeypatch):
    outputs = 4 * TRIED + 3
    z, residual, _ = regression(300, inputs=80, outputs=outputs, noise=noise)
    sizes = {"alike": torch.ones(outputs), "falling": 1 / torch.arange(1, outputs + 1), "one": torch.zeros(outputs)}
    sizes["one"][7] = 1
    residual = residual * sizes[kind].double()
    some = solve_ridge(moments_of(z, residual))
    monkeypatch.setattr(ridge, "TRIED", outputs)
    every = solve_ridge(moments_of(z, residual))
    assert some.ridge == every.ridge
    assert some.error == pytest.approx(every.error, abs=0.05)
    torch.testing.assert_close(some.matrix, every.matrix)


def test_an_all_zero_input_is_no_failure():
    equations = NormalEquations(3, 2, torch.device("cpu"))
    found = solve_ridge(equations)
    assert math.isinf(found.ridge)
    assert found.matrix.shape == (2, 3)
