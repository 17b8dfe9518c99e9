"""The older updates of the relevance vector machine: MacKay's and EM, from all basis functions.

Both begin with every basis function in use, so an iteration is cubic in their number until most
have gone; :mod:`~bayes_svdo.inference.rvm_search` is the method to use. They are here to be
compared with: MacKay's fixed point is what Tipping (2001, eq. 16 and 18) and most other programs
iterate, and EM (his eq. 20) raises the evidence with certainty, though slowly.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bayes_svdo.inference.rvm_evidence import (
    Array,
    Moments,
    NoiseRange,
    WeightPosterior,
    deletion_gain,
    unit_free,
    weight_posterior,
)

# MacKay's precisions of irrelevant weights grow geometrically without end. A weight that the data
# have determined by less than this fraction has no influence left and is dropped on the way.
_LEAST_DETERMINED = 1e-9


def iterate(
    data: Moments,
    log_alpha: Array,
    noise: NoiseRange,
    log_beta: float,
    *,
    update: Literal["mackay", "em"],
    tol: float,
    max_iter: int,
) -> tuple[NDArray[np.intp], WeightPosterior, list[float], bool]:
    """Iterate until the evidence rises by less than ``tol``, then delete what is irrelevant.

    Neither update ever reaches ``alpha = inf``. Where it has settled, every basis function that is
    better off there is deleted, the worst first, and the iteration goes on with those that are
    left; it ends when there is nothing to delete.

    Returns:
        Positions of the basis functions that are left, their posterior, the log evidence after
        each iteration, and whether the iteration ended within ``max_iter``.

    Raises:
        ArithmeticError: The posterior precision is singular to rounding.
    """
    kept = np.arange(len(log_alpha))
    posterior = _posterior(data, log_alpha, log_beta)
    trace: list[float] = []
    for _ in range(max_iter):
        before = posterior.log_evidence
        posterior = _updated(data, posterior, noise, update)
        scaled, _ = unit_free(posterior)
        left = 1 - scaled.diagonal() > _LEAST_DETERMINED
        settled = abs(posterior.log_evidence - before) < tol
        if settled:
            left &= relevant(posterior)
        if not left.all():
            settled = False
            data, kept = data.select(left), kept[left]
            posterior = _posterior(data, posterior.log_alpha[left], posterior.log_beta)
        trace.append(posterior.log_evidence)
        if settled:
            return kept, posterior, trace, True
    return kept, posterior, trace, False


def relevant(posterior: WeightPosterior) -> NDArray[np.bool_]:
    """Which basis functions stay when those with ``q^2 <= s`` are deleted, the worst first.

    Each deletion raises the evidence and changes the others' ``s`` and ``q``; the posterior is
    brought up to date by a change of rank one.
    """
    scaled, signal = unit_free(posterior)
    scaled = scaled.copy()
    left = np.ones(len(signal), dtype=bool)
    for _ in range(len(signal)):
        shrinkage, square = scaled.diagonal(), signal * signal
        irrelevant = left & (square <= shrinkage * (1 - shrinkage))
        if not irrelevant.any():
            break
        worst = int(np.where(irrelevant, deletion_gain(shrinkage, square), -np.inf).argmax())
        row = scaled[worst] / shrinkage[worst]
        signal = signal - row * signal[worst]
        scaled -= np.outer(row, row * shrinkage[worst])
        left[worst] = False
        scaled.flat[worst * (len(left) + 1)] = 1.0  # out of the way of the next division
    return left


def _posterior(data: Moments, log_alpha: Array, log_beta: float) -> WeightPosterior:
    posterior = weight_posterior(data, log_alpha, log_beta)
    if posterior is None:
        raise ArithmeticError(
            f"the posterior precision of {len(log_alpha)} weights is singular to rounding at noise "
            f"precision {math.exp(log_beta):.3g} (of a unit target).\n"
            '  Try method="fast", a larger min_noise or a kernel of a smaller reach.'
        )
    return posterior


def _updated(
    data: Moments, posterior: WeightPosterior, noise: NoiseRange, update: Literal["mackay", "em"]
) -> WeightPosterior:
    scaled, signal = unit_free(posterior)
    determined = 1 - scaled.diagonal()
    square = signal * signal
    count = float(determined.sum())
    if update == "em":
        log_alpha = posterior.log_alpha - np.log(square + scaled.diagonal())
        variance = (posterior.residual + count / math.exp(posterior.log_beta)) / data.num_data
    else:
        # The tiny number stands for log 0: such a weight is dropped on the next round.
        log_alpha = posterior.log_alpha + np.log(determined / (square + 1e-300))
        variance = posterior.residual / (data.num_data - count)
    log_beta = noise.clip(-math.log(variance)) if noise.learned else posterior.log_beta
    return _posterior(data, log_alpha, log_beta)
