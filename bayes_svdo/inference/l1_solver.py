"""Minimise an L1 problem to a given duality gap: proximal Newton, or FISTA where it must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayes_svdo.inference.l1_fista import fista_burst
from bayes_svdo.inference.l1_newton import newton_step, working_set
from bayes_svdo.inference.l1_problem import Evaluation, L1Problem

Solver = Literal["auto", "newton", "fista"]

_LARGEST_SYSTEM = 4096  # weights in one Newton system: 128 MiB in float64
_NEWTON_WORTH = 1000  # a Newton step may cost as much as this many products with the design
_BURST = 50  # FISTA steps between two looks at the gap
_PATIENCE = 5  # looks without progress before rounding is blamed


@dataclass(frozen=True, eq=False)
class Solution:
    """Where the minimisation stopped.

    Attributes:
        weight: Standardised weights, ``(K, D)``.
        point: The objective there.
        n_iter: Newton steps and FISTA steps.
        converged: Whether the gap is within the tolerance.
        stalled: Whether rounding stopped the progress before that.
    """

    weight: Tensor
    point: Evaluation
    n_iter: int
    converged: bool
    stalled: bool


@torch.no_grad()
def minimise(
    problem: L1Problem, weight: Tensor, *, tol: float, max_iter: int, solver: Solver = "auto"
) -> Solution:
    """Minimise from ``weight`` until the duality gap is at most ``tol`` times the objective.

    Newton steps where the working set fits (and ``solver`` allows), else bursts of FISTA, which
    need no more memory than the design; when FISTA has made the solution sparse enough, Newton
    finishes.
    """
    limit = {"auto": _affordable(problem), "newton": weight.numel(), "fista": -1}[solver]
    eps = torch.finfo(weight.dtype).eps
    curvature = 0.25 * float(problem.loss.scale.sum())
    best_value, best_gap, idle, n_iter = float("inf"), float("inf"), 0, 0
    while True:
        point = problem.evaluate(weight)
        converged = point.gap <= tol * point.value
        progress = point.value < best_value - 4.0 * eps * abs(best_value)
        progress |= point.gap < 0.9 * best_gap
        best_value, best_gap = min(best_value, point.value), min(best_gap, point.gap)
        idle = 0 if progress else idle + 1
        if converged or idle >= _PATIENCE or n_iter >= max_iter:
            return Solution(weight, point, n_iter, converged, idle >= _PATIENCE)
        trial = None
        mask = working_set(problem, weight, point, limit)
        if mask is not None:
            trial = newton_step(problem, weight, point, mask)
            n_iter += 1
        if trial is None:
            steps = min(_BURST, max_iter - n_iter)
            trial, curvature = fista_burst(problem, weight, point.logits, curvature, steps)
            n_iter += steps
        weight = trial


def _affordable(problem: L1Problem) -> int:
    """Weights in a working set whose Newton step is worth its price beside FISTA's."""
    num_weights = len(problem.design) * len(problem.loss.target)
    return min(_LARGEST_SYSTEM, int((_NEWTON_WORTH * num_weights) ** 0.5) + 1)
