"""Losses of L1 logistic regression, against mpmath and automatic differentiation."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from bayes_svdo.inference.l1_losses import BinaryLoss, MultinomialLoss


def make_loss(num_classes: int, n: int = 12) -> tuple[BinaryLoss | MultinomialLoss, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % num_classes
    scale = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    rows = 1 if num_classes == 2 else num_classes
    logits = 3.0 * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    if num_classes == 2:
        return BinaryLoss(labels, labels[None].double(), scale), logits
    target = torch.nn.functional.one_hot(labels, num_classes).T.double()
    return MultinomialLoss(labels, target, scale), logits


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.5, 4.0, 900.0])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_bregman_distance_equals_mpmath(num_classes, size):
    loss, logits = make_loss(num_classes)
    step = size * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    probs = loss.probabilities(logits)

    def partition(column: list[mpmath.mpf]) -> mpmath.mpf:
        return mpmath.log(mpmath.fsum(mpmath.exp(z) for z in column))

    expected = mpmath.mpf(0)
    with mpmath.workdps(60):
        for i in range(logits.shape[1]):
            zero = [mpmath.mpf(0)] if num_classes == 2 else []
            before = zero + [mpmath.mpf(float(z)) for z in logits[:, i]]
            move = zero + [mpmath.mpf(float(d)) for d in step[:, i]]
            total = mpmath.fsum(mpmath.exp(z) for z in before)
            mean = mpmath.fsum(mpmath.exp(z) / total * d for z, d in zip(before, move, strict=True))
            after = [z + d for z, d in zip(before, move, strict=True)]
            expected += float(loss.scale[i]) * (partition(after) - partition(before) - mean)
    # Rounding of the centred step is eps in size and its square is the distance: eps / size.
    assert float(loss.bregman(logits, probs, step)) == pytest.approx(
        float(expected), rel=max(1e-13, 1e-14 / size), abs=0.0
    )


def test_binary_loss_is_exact_where_softplus_rounds():
    loss, logits = make_loss(2)
    far = torch.full_like(logits, 25.0)
    wrong = 1.0 - loss.target
    expected = (loss.scale * (wrong * 25.0 + math.log1p(math.exp(-25.0)))).sum()
    assert float(loss.value(far)) == pytest.approx(float(expected), rel=1e-15)
    right = BinaryLoss(loss.labels, torch.ones_like(loss.target), loss.scale)
    tail = float(loss.scale.sum()) * math.log1p(math.exp(-25.0))
    assert float(right.value(far)) == pytest.approx(tail, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("chunk", [2**24, 40])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_hessian_equals_autograd(num_classes, chunk, monkeypatch):
    monkeypatch.setattr("bayes_svdo.inference.l1_losses._CHUNK", chunk)
    loss, logits = make_loss(num_classes)
    generator = torch.Generator().manual_seed(3)
    design = torch.randn(4, logits.shape[1], generator=generator, dtype=torch.float64)
    weight = torch.randn(len(logits), 4, generator=generator, dtype=torch.float64)
    full = torch.autograd.functional.hessian(lambda w: loss.value(w @ design), weight)
    mask = torch.rand(weight.shape, generator=generator) < 0.7
    classes, features = mask.nonzero(as_tuple=True)
    probs = loss.probabilities(weight @ design)
    ours = loss.hessian(design, probs, classes, features)
    theirs = full[classes, features][:, classes, features]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
