"""Which inputs of a regression go, against brute force."""

from __future__ import annotations

import pytest
import torch

from slicecli.linalg import normal_equations
from slicecli.linalg.channels import choose_channels, removal_losses, removal_prices
from slicecli.linalg.normal_equations import NormalEquations
from slicecli.linalg.ridge import solve_ridge

INPUTS, OUTPUTS, TOKENS = 11, 4, 300


def correlated(seed=0, inputs=INPUTS, tokens=TOKENS):
    """Inputs, the target, and a map that exists, of a regression whose inputs explain each other in part."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    z = random(tokens, inputs) @ random(inputs, inputs)
    return z, z @ random(inputs, OUTPUTS) + random(tokens, OUTPUTS), random(OUTPUTS, inputs)


def equations_of(z, target, start, is_held_out=None):
    equations = NormalEquations(z.shape[1], target.shape[1], torch.device("cpu"))
    is_held_out = torch.zeros(len(z), dtype=torch.bool) if is_held_out is None else is_held_out
    for part in torch.arange(len(z)).split(50):
        equations.add(z[part], target[part] - z[part] @ start.T, is_held_out[part])
    return equations


def least_error(z, target, start, penalty, stays):
    """The least of Σ |r − B z|² + λ |B − B₀|² over maps of the inputs that stay, whose others are zero."""
    root = penalty**0.5
    rows = torch.cat([z, root * torch.eye(z.shape[1], dtype=z.dtype)])
    goal = torch.cat([target, root * start.T])
    found = torch.linalg.lstsq(rows[:, stays], goal).solution
    return float((rows[:, stays] @ found - goal).square().sum())


@pytest.mark.parametrize("ridge", [0.0, 3e-3, 1.0])
def test_a_price_is_what_the_least_squared_error_rises_by(ridge):
    z, target, start = correlated()
    equations = equations_of(z, target, start)
    penalty = ridge * float(equations.gram.diagonal().mean())
    everything = torch.ones(INPUTS, dtype=torch.bool)
    before = least_error(z, target, start, penalty, everything)
    expected = []
    for channel in range(INPUTS):
        stays = everything.clone()
        stays[channel] = False
        expected.append(least_error(z, target, start, penalty, stays) - before)
    prices = removal_prices(equations.gram, equations.cross, start, ridge)
    torch.testing.assert_close(prices, torch.tensor(expected, dtype=torch.float64))


def test_prices_leave_the_gram_matrix_as_it_was():
    equations = equations_of(*correlated())
    gram = equations.gram.clone()
    removal_prices(equations.gram, equations.cross, torch.zeros(OUTPUTS, INPUTS))
    torch.testing.assert_close(equations.gram, gram, rtol=1e-12, atol=0)


def test_the_prices_of_many_inputs_are_those_of_the_whole_inverse():
    z, target, start = correlated(inputs=1100, tokens=3000)
    equations = equations_of(z, target, start)
    whole = equations.gram + 3e-3 * equations.gram.diagonal().mean() * torch.eye(1100, dtype=torch.float64)
    inverse = torch.linalg.inv(whole)
    expected = (start.T + inverse @ equations.cross).square().sum(1) / inverse.diagonal()
    torch.testing.assert_close(removal_prices(equations.gram, equations.cross, start), expected)


def test_without_a_token_an_input_costs_its_weights():
    start = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 3.0]])
    prices = removal_prices(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64), start)
    assert prices.tolist() == [1.0, 8.0, 9.0]


@pytest.mark.parametrize("held_out", [0, 6, 60])
def test_equations_without_some_inputs_are_those_of_the_others(monkeypatch, held_out):
    """Of tokens that are held out as they are (few), and as sums (many)."""
    monkeypatch.setattr(normal_equations, "BAND_ROWS", 3)
    z, target, start = correlated()
    is_held_out = torch.arange(TOKENS) < held_out
    stays = torch.tensor([True, False, True, True, False, True, True, True, False, True, True])
    found = equations_of(z, target, start, is_held_out)
    found.keep_inputs(stays, start)
    expected = equations_of(z[:, stays], target, start[:, stays], is_held_out)
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.cross, expected.cross)
    for one, other in zip(found.residual_energy, expected.residual_energy, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(found.sum_held_out(), expected.sum_held_out(), strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_that_others_explain_go_first():
    """Of pairs of equal inputs one can go without loss, and no pair loses both."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(TOKENS, 8, generator=generator, dtype=torch.float64)
    target = z @ torch.randn(8, OUTPUTS, generator=generator, dtype=torch.float64)
    doubled = torch.cat([z, z], dim=1)
    start = torch.zeros(OUTPUTS, 16, dtype=torch.float64)
    stays = choose_channels(equations_of(doubled, target, start), start, slice(0, 16), 8, rounds=8)
    assert sorted(int(channel) % 8 for channel in stays) == list(range(8))


def test_inputs_that_are_no_candidates_stay():
    z, target, start = correlated()
    stays = choose_channels(equations_of(z, target, start), start, slice(3, 9), 2)
    assert {0, 1, 2, 9, 10} < set(stays.tolist())
    assert len(stays) == 7


@pytest.mark.parametrize("count", [1, 5, INPUTS - 1, INPUTS])
def test_as_many_stay_as_shall(count):
    z, target, start = correlated()
    equations = equations_of(z, target, start)
    stays = choose_channels(equations, start, slice(0, INPUTS), count)
    assert len(stays) == len(equations.gram) == len(equations.cross) == count
    assert torch.equal(stays, stays.sort().values)


def test_what_stays_is_solved_as_a_regression_of_its_own():
    z, target, start = correlated()
    is_held_out = torch.arange(TOKENS) % 5 == 4
    equations = equations_of(z, target, start, is_held_out)
    stays = choose_channels(equations, start, slice(0, INPUTS), 6)
    found = solve_ridge(equations)
    expected = solve_ridge(equations_of(z[:, stays], target, start[:, stays], is_held_out))
    assert found.ridge == expected.ridge
    torch.testing.assert_close(found.matrix, expected.matrix)


def test_several_rounds_lose_no_more_than_one():
    """On average: prices of one round do not see that inputs explain each other."""
    lost = {1: 0.0, 6: 0.0}
    for seed in range(20):
        z, target, start = correlated(seed)
        for rounds in lost:
            stays = choose_channels(equations_of(z, target, start), start, slice(0, INPUTS), 4, rounds)
            lost[rounds] += least_error(z, target, start, 0.0, stays)
    assert lost[6] < lost[1]


# what every width would cost


def test_losses_are_the_least_errors_of_the_outputs_on_fewer_inputs():
    z, _, weight = correlated()
    losses = removal_losses(z.T @ z, weight, ridge=0.0)
    target, nothing = z @ weight.T, torch.zeros_like(weight)
    whole = removal_prices(z.T @ z, (z.T @ target), nothing, ridge=0.0)
    for count in range(INPUTS + 1):
        stays = torch.zeros(INPUTS, dtype=torch.bool)
        stays[whole.argsort(descending=True)[:count]] = True
        expected = least_error(z, target, nothing, 0.0, stays) if count else float(target.square().sum())
        torch.testing.assert_close(float(losses[count]), expected, atol=1e-8, rtol=1e-9)


def test_tokens_that_are_all_zero_lose_nothing():
    assert not removal_losses(torch.zeros(5, 5, dtype=torch.float64), torch.ones(2, 5)).any()
