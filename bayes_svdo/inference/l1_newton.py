"""A proximal Newton step on a working set of weights.

The smooth part of the objective is replaced by its second-order expansion in the weights that are
non-zero or want to leave zero; the L1-penalised quadratic is minimised in the small space of these
weights, whatever the number of samples (Lee, Sun and Saunders 2014, "Proximal Newton-type methods
for minimizing composite functions", algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayes_svdo.inference.l1_problem import Evaluation, L1Problem

_ARMIJO = 1e-4  # share of the model's decrease that a step must bring
_MIN_STEP = 2.0**-30
_PATH = 24  # step lengths that are tried at once along a projected path
_MIN_GROWTH = 100  # cells that may always be added: their system costs next to nothing
_BURST = 8  # accelerated proximal gradient steps before each search within the signs
_ROUNDS = 8  # of both; more would refine a model that is itself local
_MODEL_TOL = 0.1  # the quadratic's gradient is reduced by this factor


def working_set(problem: L1Problem, weight: Tensor, point: Evaluation, limit: int) -> Tensor | None:
    """Cells to move next: those that are not zero, and those that want to leave zero.

    Where a system of all cells that a solution may need fits the limit, the set takes the strongest
    of those that want to leave and at most doubles from one step to the next: a start far from the
    solution does not pay for a large system that the next step would throw away. A problem that may
    need more takes all of them or none: added by parts, they would be too many steps.

    Returns:
        A mask ``(K, D)``, or None where the set exceeds the limit.
    """
    num = problem.num_penalised
    mask = weight != 0
    mask[:, num:] = True
    pull = torch.where(mask[:, :num], 0.0, problem.relative(point.gradient))
    wanted, held = torch.stack([(pull > 1.0).sum(), mask.sum()]).tolist()
    rank = point.logits.numel()  # some solution has no more non-zero weights than this
    if min(rank, weight.numel()) > limit:
        if held + wanted > limit:
            return None
        budget = wanted
    else:
        budget = max(min(held, rank - held), _MIN_GROWTH)
    if wanted > budget:
        # By position, not by value: among duplicate columns any number may share the last value.
        strongest = pull.flatten().topk(budget).indices
        mask[strongest // num, strongest % num] = True
    else:
        mask[:, :num] |= pull > 1.0
    return mask


def newton_step(
    problem: L1Problem,
    weight: Tensor,  # (K, D)
    point: Evaluation,
    mask: Tensor,  # (K, D)
) -> Tensor | None:  # (K, D)
    """The next iterate, or None where no step length brings a decrease."""
    classes, features = mask.nonzero(as_tuple=True)
    if not len(classes):
        return None
    hessian = problem.loss.hessian(problem.design, point.probs, classes, features)
    start = weight[classes, features]
    gradient = point.gradient[classes, features]
    penalty = problem.penalty[features]
    target = minimise_quadratic(hessian, gradient, start, penalty)
    move = target - start
    model = float(gradient @ move + (penalty * (target.abs() - start.abs())).sum())
    if not model < 0.0:
        return None
    direction = torch.zeros_like(weight)
    direction[classes, features] = move
    change = _change_along(problem, point, direction @ problem.design)
    step = 1.0
    while step >= _MIN_STEP:
        # A full step takes the target itself: start + move would not give exact zeros.
        trial = target if step == 1.0 else start + step * move
        growth = (penalty * (trial.abs() - start.abs())).sum()
        if float(change(step) + growth) <= _ARMIJO * step * model:
            out = weight.clone()
            out[classes, features] = trial
            return out
        step *= 0.5
    return None


def _change_along(
    problem: L1Problem, point: Evaluation, direction: Tensor
) -> Callable[[float], Tensor]:
    """The change of the loss along a direction of the logits, without cancellation."""
    slope = (point.residual * direction).sum()

    def change(step: float) -> Tensor:
        return step * slope + problem.loss.bregman(point.logits, point.probs, step * direction)

    return change


def minimise_quadratic(
    hessian: Tensor,  # (m, m)
    gradient: Tensor,  # (m,)
    start: Tensor,  # (m,)
    penalty: Tensor,  # (m,)
) -> Tensor:  # (m,)
    """Lower ``gradient·d + d·hessian·d / 2 + sum(penalty * |start + d|)`` towards its minimum.

    Rounds of a few accelerated proximal gradient steps, which find the signs, and of Newton steps
    within these signs. Every round lowers the quadratic.
    """
    ridge = _ridge(hessian)
    bound = hessian.abs().sum(1) + ridge  # diag(bound) - hessian is diagonally dominant
    point, slope = start, gradient
    first = 0.0
    for index in range(_ROUNDS):
        size = float(_subgradient(point, slope, penalty).abs().max())
        first = first or size
        if index and size <= _MODEL_TOL * first:
            break
        point, slope = _proximal_burst(hessian, bound, point, slope, penalty)
        point, slope = _newton_within_signs(hessian, ridge, point, slope, penalty)
    return point


def _ridge(hessian: Tensor) -> Tensor:
    """A multiple of the identity that makes the hessian safely invertible in its precision.

    It damps steps; it does not move the minimum, as each step starts anew.
    """
    eps = torch.finfo(hessian.dtype).eps
    size = hessian.diagonal().max().clamp(min=torch.finfo(hessian.dtype).tiny / eps)
    return max(1e-10, 10.0 * len(hessian) * eps) * size


def _subgradient(point: Tensor, slope: Tensor, penalty: Tensor) -> Tensor:
    """The subgradient of least norm."""
    at_zero = slope.sign() * (slope.abs() - penalty).clamp(min=0.0)
    return torch.where(point == 0.0, at_zero, slope + penalty * point.sign())


def _proximal_burst(
    hessian: Tensor, bound: Tensor, point: Tensor, slope: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    """Accelerated proximal gradient steps (Beck and Teboulle 2009) in the metric ``bound``."""
    last, last_slope, ahead, ahead_slope = point, slope, point, slope
    threshold = penalty / bound
    momentum = 1.0
    for _ in range(_BURST):
        raw = ahead - ahead_slope / bound
        new = raw - raw.clamp(-threshold, threshold)
        new_slope = ahead_slope + torch.mv(hessian, new - ahead)
        following = 0.5 + (0.25 + momentum * momentum) ** 0.5
        weight = (momentum - 1.0) / following
        ahead = torch.lerp(last, new, 1.0 + weight)
        ahead_slope = torch.lerp(last_slope, new_slope, 1.0 + weight)
        last, last_slope, momentum = new, new_slope, following
    move = last - point
    change = 0.5 * move @ (slope + last_slope) + penalty @ (last.abs() - point.abs())
    return (last, last_slope) if bool(change < 0.0) else (point, slope)


def _newton_within_signs(
    hessian: Tensor, ridge: Tensor, point: Tensor, slope: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimise the quadratic among points of the present signs, or of fewer non-zero weights.

    Newton directions, each followed along its projection to the best of its break points, where
    weights become zero. Those stay zero for the rest of the search, so it ends with a full step
    (Lawson and Hanson 1974, chapter 23, with several weights at once).
    """
    penalised = penalty > 0.0
    pull = _subgradient(point, slope, penalty)
    free = (point != 0.0) | (pull != 0.0) | ~penalised
    for _ in range(len(point)):
        leaving = torch.where(penalised & (point == 0.0), -pull.sign(), 0.0)
        move, free = _newton_direction(hessian, ridge, pull, free, leaving)
        limits = torch.where(penalised & (point * move < 0.0), (point / move).abs(), math.inf)
        steps = break_points(limits)
        trials = point[:, None] + move[:, None] * steps
        trials = torch.where(limits[:, None] <= steps, 0.0, trials)
        moves = trials - point[:, None]
        bends = hessian @ moves
        change = (moves * (slope[:, None] + 0.5 * bends)).sum(0)
        change += penalty @ (trials.abs() - point.abs()[:, None])
        best = int(change.argmin())
        if not bool(change[best] < 0.0):
            break
        point, slope = trials[:, best], slope + bends[:, best]
        if best == len(steps) - 1:
            break
        free = free & ((point != 0.0) | ~penalised)
        pull = torch.where(free, _subgradient(point, slope, penalty), 0.0)
    return point, slope


def _newton_direction(
    hessian: Tensor, ridge: Tensor, pull: Tensor, free: Tensor, leaving: Tensor
) -> tuple[Tensor, Tensor]:
    """Newton direction of the free weights, and the free weights that it leaves free.

    A zero weight may leave zero only to its side of ``leaving``, against its pull; where the
    direction would take it to the other side, it stays and the rest is solved again.
    """
    while True:
        index = free.nonzero()[:, 0]
        move = torch.zeros_like(pull)
        move[index] = _solve(hessian[index][:, index], ridge, -pull[index])
        stays = move * leaving < 0.0
        if not bool(stays.any()):
            return move, free
        free = free & ~stays


def break_points(limits: Tensor) -> Tensor:  # (m,) -> (<= _PATH,)
    """Steps in (0, 1] to try: where weights reach zero, thinned out if many, and the full step."""
    steps = limits[limits < 1.0].sort().values
    if len(steps) >= _PATH:
        ranks = torch.logspace(0.0, math.log10(len(steps)), _PATH - 1, device=limits.device)
        steps = steps[ranks.long() - 1]  # the first of all is kept: up to it descent is certain
    return torch.cat([steps, torch.ones_like(limits[:1])])


def _solve(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive semi-definite system, with as little damping as it takes."""
    factor, info = torch.linalg.cholesky_ex(_damped(matrix, ridge))
    while bool(info) and bool(torch.isfinite(ridge)):
        ridge = 100.0 * ridge
        factor, info = torch.linalg.cholesky_ex(_damped(matrix, ridge))
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _damped(matrix: Tensor, ridge: Tensor) -> Tensor:
    out = matrix.clone()
    out.diagonal().add_(ridge)
    return out
