"""The duality gap is a bound wherever one stands."""

from __future__ import annotations

import pytest
import torch

from bayes_svdo.inference.l1_problem import standardised_problem
from bayes_svdo.inference.l1_solver import minimise


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_duality_gap_bounds_the_excess_at_any_point(num_classes, fit_intercept, noisy):
    x, y = noisy(num_classes)
    scale = 0.3 * torch.linspace(0.5, 1.5, len(x), dtype=torch.float64)
    problem = standardised_problem(x, y, scale, num_classes, fit_intercept)
    best = minimise(problem, problem.null_weight(), tol=1e-12, max_iter=100)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(best.weight.shape, generator=generator, dtype=torch.float64)
    points = [size * noise for size in (0.0, 1e-3, 0.1, 1.0, 30.0)]
    points += [best.weight + size * noise for size in (1e-6, 1e-3, 0.1)]
    if fit_intercept:  # a dual point that forgets the intercept's constraint claims too much here
        shift = torch.zeros_like(noise)
        shift[:, -1] = noise[:, -1]
        points += [best.weight + size * shift for size in (1e-4, 1e-2, 1.0)]
    for weight in points:
        point = problem.evaluate(weight)
        assert point.gap >= point.value - best.point.value - 1e-10
    null = problem.with_scale(1e-4 * scale)
    assert null.evaluate(null.null_weight()).gap == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_balanced_residuals_sum_to_zero(num_classes, noisy):
    x, y = noisy(num_classes)
    problem = standardised_problem(x, y, torch.ones_like(x[:, 0]), num_classes, True)
    logits = torch.randn(problem.loss.target.shape, generator=torch.Generator().manual_seed(0))
    probs = problem.loss.probabilities(logits.double())
    alpha = problem.loss.balance(probs)
    assert alpha.min() > 0.0
    assert alpha.max() == 1.0
    assert (alpha * (probs - problem.loss.target)).sum(1).abs().max() < 1e-12
