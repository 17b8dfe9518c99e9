"""Accelerated proximal gradient steps for the L1 problem, for when its Hessian is too large.

FISTA (Beck and Teboulle 2009) with backtracking and the adaptive restart of O'Donoghue and Candès
(2015, "Adaptive restart for accelerated gradient schemes", the gradient scheme of section 3.2). The
logits of the extrapolated point are the extrapolated logits, so that a step costs one product with
the design and one with its transpose.
"""

from __future__ import annotations

from torch import Tensor

from bayes_svdo.inference.l1_problem import L1Problem

_SHORTER = 2.0  # factor of a failed curvature bound
_LONGER = 0.5  # the bound is tried at half its size at every start


def fista_burst(
    problem: L1Problem,
    weight: Tensor,  # (K, D)
    logits: Tensor,  # (K, n)
    curvature: float,
    num_steps: int,
) -> tuple[Tensor, float]:
    """Take ``num_steps`` accelerated steps.

    Args:
        problem: The objective.
        weight: The point to start from.
        logits: Its logits.
        curvature: A guess at the largest curvature of the loss along any weight; steps are as long
            as its inverse. It is doubled until it bounds the curvature between two points.
        num_steps: Number of steps.

    Returns:
        The last point, and the curvature to start the next burst with.
    """
    loss, design = problem.loss, problem.design
    last, last_logits, ahead, ahead_logits = weight, logits, weight, logits
    momentum = 1.0
    # The trace of the standardised features' second moments: no curvature is larger. Without it,
    # rounding could double the guess for ever once the steps vanish.
    ceiling = float(loss.scale.amax()) * design.shape[0] * design.shape[1]
    for _ in range(num_steps):
        probs = loss.probabilities(ahead_logits)
        gradient = (loss.scale * (probs - loss.target)) @ design.T
        while True:
            raw = ahead - gradient / curvature
            threshold = problem.penalty / curvature
            new = raw - raw.clamp(-threshold, threshold)
            new_logits = new @ design
            bent = loss.bregman(ahead_logits, probs, new_logits - ahead_logits)
            quadratic = 0.5 * curvature * (new - ahead).square().sum()
            if curvature >= ceiling or bool(bent <= quadratic):
                break
            curvature *= _SHORTER
        if bool(((ahead - new) * (new - last)).sum() > 0.0):
            momentum = 1.0
            curvature *= _LONGER
        following = 0.5 + (0.25 + momentum * momentum) ** 0.5
        beyond = (momentum - 1.0) / following
        ahead = new + beyond * (new - last)
        ahead_logits = new_logits + beyond * (new_logits - last_logits)
        last, last_logits, momentum = new, new_logits, following
    return last, _LONGER * curvature
