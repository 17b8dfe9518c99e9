"""A burst of accelerated proximal gradient steps."""

from __future__ import annotations

import pytest
import torch

from bayes_svdo.inference.l1_fista import fista_burst
from bayes_svdo.inference.l1_problem import standardised_problem
from bayes_svdo.inference.l1_solver import minimise


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("guess", [1e-9, 1.0, 100.0])
def test_bursts_reach_newtons_minimum_from_any_guess_of_the_curvature(num_classes, guess):
    generator = torch.Generator().manual_seed(num_classes)
    x = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(60) % num_classes
    x[:, 0] += y
    problem = standardised_problem(x, y, 0.5 * torch.ones_like(x[:, 0]), num_classes, True)
    best = minimise(problem, problem.null_weight(), tol=1e-12, max_iter=100, solver="newton")
    weight, curvature = problem.null_weight(), guess
    for _ in range(10):
        point = problem.evaluate(weight)
        weight, curvature = fista_burst(problem, weight, point.logits, curvature, 100)
    assert problem.evaluate(weight).value == pytest.approx(best.point.value, rel=1e-9)
    assert torch.equal(weight == 0, best.weight == 0)
    # No step is longer than the inverse of the largest curvature, nor needlessly short.
    ceiling = float(problem.loss.scale.amax()) * x.shape[0] * problem.design.shape[0]
    assert 1e-3 * ceiling / problem.design.shape[0] < curvature < ceiling
