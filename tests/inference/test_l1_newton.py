"""Proximal Newton steps: their parts, and where they end."""

from __future__ import annotations

import math

import pytest
import torch

from bayes_svdo.inference.l1_newton import (
    break_points,
    minimise_quadratic,
    newton_step,
    working_set,
)
from bayes_svdo.inference.l1_problem import standardised_problem


def test_break_points_keep_the_first_and_the_full_step():
    limits = torch.linspace(2.0, 0.002, 1000, dtype=torch.float64)
    steps = break_points(limits)
    assert len(steps) == 24
    assert steps[0] == limits.min()
    assert steps[-1] == 1.0
    assert (steps.diff() >= 0.0).all()
    few = break_points(torch.tensor([math.inf, 0.5, 3.0, 0.1]))
    assert few.tolist() == pytest.approx([0.1, 0.5, 1.0])


def test_no_step_is_taken_where_nothing_wants_to_move(noisy):
    x, y = noisy(3)
    problem = standardised_problem(x, y, torch.full_like(x[:, 0], 1e-6), 3, False)
    weight = problem.null_weight()
    point = problem.evaluate(weight)
    for mask in (torch.zeros_like(weight, dtype=torch.bool), torch.ones_like(weight).bool()):
        assert newton_step(problem, weight, point, mask) is None


@pytest.mark.parametrize("rank", [12, 5], ids=["definite", "singular"])
def test_quadratic_is_minimised_to_its_optimality_conditions(rank):
    generator = torch.Generator().manual_seed(rank)
    root = torch.randn(12, rank, generator=generator, dtype=torch.float64)
    hessian, gradient = root @ root.T, 5.0 * root.sum(1)
    penalty = torch.ones(12, dtype=torch.float64)
    penalty[-1] = 0.0
    point = torch.randn(12, generator=generator, dtype=torch.float64)
    start = point
    previous = math.inf
    for _ in range(20):
        move = point - start
        slope = gradient + hessian @ move
        value = float(gradient @ move + 0.5 * move @ hessian @ move + penalty @ point.abs())
        assert value <= previous + 1e-12
        previous = value
        point = minimise_quadratic(hessian, slope, point, penalty)
    slope = gradient + hessian @ (point - start)
    held = point != 0.0
    assert (slope + penalty * point.sign())[held].abs().max() < 1e-7
    assert (slope.abs() - penalty)[~held].max() < 1e-7


def test_quadratic_that_rounding_made_indefinite_is_still_lowered():
    hessian = torch.diag(torch.tensor([1.0, -1e-6, 0.5], dtype=torch.float64))
    gradient = torch.tensor([3.0, 2.0, -4.0], dtype=torch.float64)
    start, penalty = torch.zeros_like(gradient), torch.ones_like(gradient)
    point = minimise_quadratic(hessian, gradient, start, penalty)
    assert torch.isfinite(point).all()
    value = gradient @ point + 0.5 * point @ hessian @ point + penalty @ point.abs()
    assert value < -10.0  # the two sound weights alone reach -2 - 9


def test_working_set_is_exact_in_size_among_duplicate_columns(noisy):
    x, y = noisy(2, p=3)
    problem = standardised_problem(x.repeat(1, 200), y, torch.ones_like(x[:, 0]), 2, True)
    weight = problem.null_weight()
    mask = working_set(problem, weight, problem.evaluate(weight), limit=1000)
    assert mask.sum() == 101  # the intercept and the 100 that may always be added
