r"""The evidence of a few basis functions, and its maximum over their precisions.

With targets ``y = Phi' w + noise``, weights ``w_i ~ N(0, 1 / alpha_i)`` and noise precision
``beta``, the log evidence of ``m`` basis functions depends on the data only through the Gram
matrix ``G = Phi Phi'``, the moment ``Phi y`` and the energy ``y'y``: once those are known a search
over ``log alpha`` and ``log beta`` costs ``O(m^3)`` a step whatever the number of data.

In ``U_ij = sqrt(alpha_i) Sigma_ij sqrt(alpha_j)`` and ``z_i = sqrt(alpha_i) mu_i``, both free of
units, all that is needed is short:

* gradient in ``log alpha_i``: ``(1 - U_ii - z_i^2) / 2``, the re-estimation equations of Tipping
  (2001), eq. 16 and 17, set to zero;
* Hessian: ``U * (U / 2 + z z')``, less ``(U_ii + z_i^2) / 2`` on its diagonal;
* a basis function is better off with ``alpha = inf`` given the others iff ``q^2 <= s`` (Faul and
  Tipping, 2002), that is iff ``z_i^2 <= U_ii (1 - U_ii)``.

So Tipping and Faul's re-estimation of one precision at a time becomes one Newton step for all of
them and the noise, and their deletion rule stays as it is.

These matrices are as small as the model is sparse, so they live on the host in NumPy and LAPACK,
always in float64: a call on ten numbers costs a third of what it costs in torch, and nothing on
the way from a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

Array: TypeAlias = NDArray[np.float64]

# A Newton step may change a precision by at most e^4 = 55: its quadratic model reaches no further.
_LONGEST_STEP = 4.0
# Nats. A bound on the error of the evidence, which is far smaller on average.
_MOST_ROUNDING = 1.0

_FIRST_DAMPING = 1e-2
_MOST_DAMPINGS = 30


@dataclass(frozen=True)
class Moments:
    """What the evidence of ``m`` basis functions needs to know of the data.

    Attributes:
        gram: ``(m, m)`` inner products of the basis functions, which have at most unit norm.
        moment: ``(m,)`` their inner products with the targets.
        energy: Squared norm of the targets.
        num_data: Number of data, less one where an intercept has been integrated out.
        rounding: Machine epsilon of the numbers that these were computed in.
    """

    gram: Array
    moment: Array
    energy: float
    num_data: int
    rounding: float = float(np.finfo(np.float64).eps)

    def select(self, left: NDArray[np.bool_]) -> Moments:
        """The same for some of the basis functions."""
        return replace(self, gram=self.gram[left][:, left], moment=self.moment[left])


class WeightPosterior(NamedTuple):
    """Gaussian posterior of the weights at given precisions.

    Attributes:
        log_alpha: ``(m,)`` log prior precisions.
        log_beta: Log noise precision.
        whitener: ``(m, m)`` inverse of the lower Cholesky factor of ``beta G + diag(alpha)``.
        covariance: ``(m, m)`` inverse of ``beta G + diag(alpha)``.
        mean: ``(m,)``.
        residual: Squared norm of targets less fit.
        log_evidence: In nats, without the constant ``-num_data / 2 log(2 pi)``.
    """

    log_alpha: Array
    log_beta: float
    whitener: Array
    covariance: Array
    mean: Array
    residual: float
    log_evidence: float


def weight_posterior(data: Moments, log_alpha: Array, log_beta: float) -> WeightPosterior | None:
    """Posterior and evidence, or None where rounding would decide about them.

    Basis functions that nearly cancel take weights so large that their squares, times the rounding
    of the Gram matrix, exceed the evidence to be told apart.
    """
    m = len(log_alpha)
    if m == 0:
        evidence = 0.5 * (data.num_data * log_beta - math.exp(log_beta) * data.energy)
        empty = np.empty((0, 0))
        return WeightPosterior(
            log_alpha, log_beta, empty, empty, np.empty(0), data.energy, evidence
        )
    alpha, beta = np.exp(log_alpha), math.exp(log_beta)
    precision = beta * data.gram
    precision.flat[:: m + 1] += alpha
    cholesky, info = lapack.dpotrf(precision, lower=1)
    if info != 0:
        return None
    whitener, _ = lapack.dtrtri(cholesky, lower=1)
    mean = beta * ((whitener @ data.moment) @ whitener)
    if beta * data.rounding * float(np.abs(mean).sum()) ** 2 > _MOST_ROUNDING:
        return None
    residual = data.energy + float(mean @ (data.gram @ mean - 2 * data.moment))
    half = np.add.reduce(0.5 * log_alpha + np.log(whitener.diagonal()))
    half -= 0.5 * (alpha * mean @ mean)
    return WeightPosterior(
        log_alpha=log_alpha,
        log_beta=log_beta,
        whitener=whitener,
        covariance=whitener.T @ whitener,
        mean=mean,
        residual=residual,
        log_evidence=float(half) + 0.5 * (data.num_data * log_beta - beta * residual),
    )


@dataclass(frozen=True)
class NoiseRange:
    """Whether the noise precision is learned, and how far it may go."""

    learned: bool
    log_beta_max: float

    def clip(self, log_beta: float) -> float:
        """The precision within its bound."""
        return min(log_beta, self.log_beta_max)


def maximise_evidence(
    data: Moments,
    start: WeightPosterior,
    noise: NoiseRange,
    *,
    tol: float,
    max_steps: int,
) -> tuple[NDArray[np.intp], WeightPosterior]:
    """Raise the evidence over all ``log alpha`` and ``log beta``, deleting what is irrelevant.

    Every step raises it: a deletion is exact for one precision given the others, and a Newton
    step is damped until it does.

    Args:
        data: Moments of the active basis functions.
        start: Posterior to start from.
        noise: Range of the noise precision.
        tol: Stop when the quadratic model promises less than this, in nats.
        max_steps: Most steps and deletions together.

    Returns:
        Positions of the basis functions that are left, and their posterior.
    """
    kept = np.arange(len(start.log_alpha))
    posterior, damping = start, 0.0
    for _ in range(max_steps):
        scaled, signal = unit_free(posterior)
        worst = _most_irrelevant(scaled.diagonal(), signal)
        if worst is not None:
            left = np.arange(len(kept)) != worst
            shorter = _without(data, posterior, left, noise)
            # Close to the boundary the sign of its gain can be a matter of rounding.
            if shorter is not None and shorter.log_evidence >= posterior.log_evidence:
                data, posterior, kept = data.select(left), shorter, kept[left]
                continue
        step = _newton_step(data, posterior, scaled, signal, noise, damping, tol)
        if step is None:
            break
        posterior, damping, promised = step
        if promised < tol:
            break
    return kept, posterior


def unit_free(posterior: WeightPosterior) -> tuple[Array, Array]:
    """``U`` and ``z`` of the module's docstring."""
    root = np.exp(0.5 * posterior.log_alpha)
    return root[:, None] * posterior.covariance * root, root * posterior.mean


def _most_irrelevant(shrinkage: Array, signal: Array) -> int | None:
    """Position of the basis function whose deletion gains most, None if all are relevant."""
    square = signal * signal
    irrelevant = square <= shrinkage * (1 - shrinkage)
    if not irrelevant.any():
        return None
    return int(np.where(irrelevant, deletion_gain(shrinkage, square), -np.inf).argmax())


def deletion_gain(shrinkage: Array, square: Array) -> Array:
    """Log evidence gained by ``alpha = inf``; Tipping and Faul (2003), eq. 37, in U and z."""
    return np.asarray(-0.5 * (square / shrinkage + np.log(shrinkage)))


def _without(
    data: Moments, posterior: WeightPosterior, left: NDArray[np.bool_], noise: NoiseRange
) -> WeightPosterior | None:
    log_beta = posterior.log_beta
    if noise.learned and not left.any():
        log_beta = noise.clip(math.log(data.num_data / data.energy))
    return weight_posterior(data.select(left), posterior.log_alpha[left], log_beta)


def _newton_step(
    data: Moments,
    posterior: WeightPosterior,
    scaled: Array,
    signal: Array,
    noise: NoiseRange,
    damping: float,
    tol: float,
) -> tuple[WeightPosterior, float, float] | None:
    """One accepted step, the damping to begin the next with, and the gain the model promised."""
    gradient, curvature = derivatives(data, posterior, scaled, signal)
    m = len(signal)
    at_bound = posterior.log_beta >= noise.log_beta_max and gradient[m] >= 0
    if not noise.learned or at_bound:
        gradient, curvature = gradient[:m], curvature[:m, :m]
    if len(gradient) == 0:
        return None
    for _ in range(_MOST_DAMPINGS):
        system = -curvature
        system.flat[:: len(gradient) + 1] += damping
        cholesky, info = lapack.dpotrf(system, lower=1)
        if info == 0:
            step, _ = lapack.dpotrs(cholesky, gradient, lower=1)
            promised = 0.5 * float(gradient @ step)
            step *= min(1.0, _LONGEST_STEP / (max(step.max(), -step.min()) + 1e-300))
            log_beta = posterior.log_beta
            if len(step) > m:
                log_beta = noise.clip(log_beta + float(step[m]))
            new = weight_posterior(data, posterior.log_alpha + step[:m], log_beta)
            if new is not None and new.log_evidence >= posterior.log_evidence:
                return new, (damping / 8 if damping > 1e-4 else 0.0), promised
            if promised < tol:
                return None  # what is left to gain is below the rounding of the evidence
        damping = max(4 * damping, _FIRST_DAMPING)
    return None


def derivatives(
    data: Moments, posterior: WeightPosterior, scaled: Array, signal: Array
) -> tuple[Array, Array]:  # -> (m + 1,), (m + 1, m + 1)
    """Gradient and Hessian of the log evidence in ``(log alpha, log beta)``."""
    m = len(signal)
    shrinkage, square = scaled.diagonal(), signal * signal
    noise_energy = math.exp(posterior.log_beta) * posterior.residual
    free = float(shrinkage.sum())
    gradient = np.empty(m + 1)
    gradient[:m] = 0.5 * (1 - shrinkage - square)
    gradient[m] = 0.5 * (data.num_data - noise_energy - m + free)

    pairs = scaled * (0.5 * scaled + signal[:, None] * signal)
    of_all = np.add.reduce(pairs, 1)
    curvature = np.empty((m + 1, m + 1))
    curvature[:m, :m] = pairs
    curvature.flat[: m * (m + 1) : m + 2] -= 0.5 * (shrinkage + square)
    # A change of all precisions and the noise by one factor scales the posterior, so that this
    # row follows from the sums of the others.
    curvature[m, :m] = curvature[:m, m] = 0.5 * shrinkage - of_all
    curvature[m, m] = float(np.add.reduce(of_all)) - 0.5 * (free + noise_energy)
    return gradient, curvature
