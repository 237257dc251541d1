"""The shared basis."""

from __future__ import annotations

import torch

from slicecli.linalg.basis import IDENTITY_SHARE, reader_basis


def spd(size, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def reader_error(basis, moment, metric):
    """What the readers lose when the rest is predicted from the kept directions as well as can be."""
    kept = moment @ basis
    return float((metric * (moment - kept @ torch.linalg.solve(basis.T @ kept, kept.T))).sum())


def test_the_basis_is_orthonormal():
    vectors = reader_basis(spd(20, 0), spd(20, 1)).vectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20, dtype=torch.float64))


def test_without_readers_it_is_principal_component_analysis():
    moment = spd(20, 0)
    basis = reader_basis(moment, torch.zeros(20, 20))
    values, vectors = torch.linalg.eigh(moment)
    torch.testing.assert_close(basis.energies, values.flip(0))
    torch.testing.assert_close((basis.vectors * vectors.flip(1)).sum(0).abs(), torch.ones(20, dtype=torch.float64))


def test_no_other_basis_loses_less_for_the_readers():
    moment, metric = spd(20, 0), spd(20, 1, rank=12)
    regular = metric / metric.diagonal().mean() + IDENTITY_SHARE * torch.eye(20, dtype=torch.float64)
    basis = reader_basis(moment, metric)
    best = reader_error(basis.leading(8), moment, regular)
    torch.testing.assert_close(best, float(basis.importances[8:].sum()))
    principal = reader_basis(moment, torch.zeros(20, 20)).leading(8)
    assert best < reader_error(principal, moment, regular)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        nudge = 0.1 * torch.randn(20, 8, generator=generator, dtype=torch.float64)
        other, _ = torch.linalg.qr(basis.leading(8) + nudge)
        assert best <= reader_error(other, moment, regular) + 1e-9


def test_shares_rise_from_nothing_to_all():
    basis = reader_basis(spd(20, 0), spd(20, 1))
    for share in (basis.energy_kept, basis.importance_kept):
        values = [share(dim) for dim in range(21)]
        assert values == sorted(values)
        assert values[0] == 0
        assert abs(values[-1] - 1) < 1e-12


def test_the_sign_does_not_depend_on_the_library():
    moment = spd(20, 0)
    vectors = reader_basis(moment, torch.eye(20)).vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
