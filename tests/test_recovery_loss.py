"""The loss of distillation against a reference in float64."""

from __future__ import annotations

import pytest
import torch

from slicecli.recovery.loss import forward_divergence, likeliest_divergence, likeliest_tokens, next_token_divergence


def reference(student, teacher):
    own, other = (torch.log_softmax(one.double(), -1) for one in (student, teacher))
    return (other.exp() * (other - own)).sum(-1)


def logits(*shape, seed, dtype=torch.float32):
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_value_and_gradient_are_those_of_the_reference_in_chunks_of_any_size(chunk):
    student, teacher = logits(7, 50, seed=0).requires_grad_(), logits(7, 50, seed=1)
    wide = student.detach().double().requires_grad_()
    reference(wide, teacher).sum().backward()
    found = forward_divergence(student, teacher, chunk)
    found.backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(reference(student.detach(), teacher).sum()), rel=1e-6)
    torch.testing.assert_close(student.grad.double(), wide.grad, atol=1e-6, rtol=1e-5)


def test_the_last_position_of_each_row_does_not_count():
    student, teacher = logits(3, 5, 20, seed=0).requires_grad_(), logits(3, 5, 20, seed=1)
    found = next_token_divergence(student, teacher)
    found.mean().backward()
    expected = reference(student.detach()[:, :-1], teacher[:, :-1]).mean(-1)
    torch.testing.assert_close(found.detach().double(), expected, atol=0, rtol=1e-6)
    assert torch.equal(student.grad[:, -1], torch.zeros(3, 20))


def test_half_precision_is_summed_in_float32():
    student, teacher = (logits(2, 9, 4000, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    expected = reference(student[:, :-1], teacher[:, :-1]).mean(-1)
    torch.testing.assert_close(next_token_divergence(student, teacher).double(), expected, atol=0, rtol=1e-5)


def test_equal_predictions_have_no_divergence_and_no_gradient():
    student = logits(4, 30, seed=0).requires_grad_()
    loss = forward_divergence(student, student.detach() + 3.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert float(student.grad.abs().max()) < 1e-6


def test_a_chunk_bounds_the_float32_copies(monkeypatch):
    positions = []
    log_softmax = torch.log_softmax

    def watched(values, *arguments, **options):
        positions.append(len(values))
        return log_softmax(values, *arguments, **options)

    monkeypatch.setattr(torch, "log_softmax", watched)
    forward_divergence(logits(10, 8, seed=0), logits(10, 8, seed=1), chunk=4)
    assert max(positions) == 4 and sum(positions) == 20


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("count", [1, 10, 40])
def test_of_the_likeliest_tokens_value_and_gradient_are_those_of_the_reference(count, chunk):
    student, teacher = logits(7, 50, seed=0).requires_grad_(), logits(7, 50, seed=1)
    wide = student.detach().double().requires_grad_()
    own, other = torch.softmax(wide, -1), torch.softmax(teacher.double(), -1)
    tokens = other.topk(count).indices
    kept = torch.zeros_like(own).scatter(-1, tokens, 1.0)
    buckets = [
        torch.cat([one.gather(-1, tokens), ((1 - kept) * one).sum(-1, keepdim=True)], -1) for one in (own, other)
    ]
    expected = (buckets[1] * (buckets[1].log() - buckets[0].log())).sum()
    expected.backward()
    found = likeliest_divergence(student, likeliest_tokens(teacher, count), chunk)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), wide.grad, atol=2e-6, rtol=1e-4)
    assert float(found.detach()) < float(reference(student.detach(), teacher).sum())


def test_more_of_the_likeliest_tokens_bring_the_divergence_closer_and_all_of_them_make_it_exact():
    student, teacher = logits(7, 50, seed=0).requires_grad_(), logits(7, 50, seed=1)
    found = [
        float(likeliest_divergence(student, likeliest_tokens(teacher, count)).detach()) for count in (1, 5, 25, 50)
    ]
    assert found == sorted(found)
    whole, exact = forward_divergence(student, teacher), likeliest_divergence(student, likeliest_tokens(teacher, 50))
    gradients = [torch.autograd.grad(one, student)[0] for one in (whole, exact)]
    assert float(exact.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    torch.testing.assert_close(*gradients)
