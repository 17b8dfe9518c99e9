"""Relevance vector regression.

    y_n = b + sum_m w_m phi_m(x_n) + noise,   w_m ~ N(0, 1 / alpha_m),   noise ~ N(0, 1 / beta)

with a flat prior on ``b``. The evidence, weights integrated out, is maximised over every
``alpha_m`` and ``beta``; most ``alpha_m`` go to infinity and take their weight to exactly 0
(Tipping, 2001, "Sparse Bayesian learning and the relevance vector machine").

The search works on basis functions of unit norm (about their mean, with an intercept) and targets
of unit variance, and what it compares are gains of log evidence in nats. Nothing in it has a unit,
so scaling ``x`` or ``y`` scales the result and changes nothing else.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bayes_svdo.inference.arguments import is_number
from bayes_svdo.inference.rvm_basis import (
    BasisFunctions,
    DesignMatrix,
    Gamma,
    Kernel,
    Method,
    check_inputs,
    check_options,
    resolve_kernel,
)
from bayes_svdo.inference.rvm_evidence import NoiseRange, WeightPosterior
from bayes_svdo.inference.rvm_fixed_point import iterate
from bayes_svdo.inference.rvm_posterior import AbstractSparseFunction, check_representable
from bayes_svdo.inference.rvm_search import ActiveSet, search
from bayes_svdo.inference.scales import power_of_2

# Below these the rounding of the inner products shows in the residual.
_LEAST_MIN_NOISE = {torch.float64: 1e-5, torch.float32: 1e-2}

# Noise of 3 % of the targets' standard deviation to begin with. A search that begins with more may
# end in a model that takes signal for noise: on Friedman's first function with wide kernels a start
# from 10 % cost 24 nats on average, one from 100 % 177.
_FIRST_LOG_BETA = math.log(1000.0)


class NoiseBoundWarning(UserWarning):
    """The noise of a relevance vector machine fell to its lower bound: the fit is exact."""


@dataclass(frozen=True, kw_only=True)
class RVMRegression(AbstractSparseFunction):
    """A fitted relevance vector regression; for the rest see the base class.

    Attributes:
        beta: Noise precision. Infinite for a constant target.
        noise_at_bound: Whether the noise fell to ``min_noise``, or to within twice that. The
            predictive standard deviation is then not an estimate.
    """

    beta: float
    noise_at_bound: bool

    @overload
    def predict(self, x: Tensor, return_std: Literal[False] = False) -> Tensor: ...
    @overload
    def predict(self, x: Tensor, return_std: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def predict(
        self, x: Tensor, return_std: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:  # (n, num_columns) -> (n,)
        """Predictive mean of a new target, and its standard deviation if asked for.

        The variance is that of the noise, the weights and the intercept.
        """
        mean, variance = self.latent(x)
        if not return_std:
            return mean
        return mean, (variance + 1.0 / self.beta).sqrt()


@torch.no_grad()
def fit_rvm_regression(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "linear",
    gamma: Gamma = "scale",
    degree: int = 3,
    coef0: float = 1.0,
    fit_intercept: bool = True,
    method: Method = "fast",
    beta: float | None = None,
    min_noise: float | None = None,
    tol: float = 1e-3,
    max_iter: int = 1000,
    max_kernel_bytes: int = 2**30,
) -> RVMRegression:
    """Fit a relevance vector machine to ``y`` given ``x``.

    Args:
        x: ``(n, d)`` inputs, float64 or float32, on any device.
        y: ``(n,)`` targets of the same dtype, on the same device.
        kernel: ``"linear"`` (the features are the basis functions), ``"rbf"``, ``"poly"``,
            ``"precomputed"`` or a function; see :func:`~.rvm_basis.resolve_kernel`.
        gamma: Parameter of ``"rbf"`` and ``"poly"``; a number, ``"scale"`` or ``"auto"``.
        degree: Degree of ``"poly"``.
        coef0: Constant of ``"poly"``.
        fit_intercept: Whether to include an intercept, under a flat prior.
        method: ``"fast"``: grow from the empty model (:mod:`~.rvm_search`). ``"mackay"``, ``"em"``:
            shrink from the full one by the older updates (:mod:`~.rvm_fixed_point`).
        beta: Noise precision to hold fixed; by default it is learned.
        min_noise: Least standard deviation of the noise, as a fraction of that of ``y``; by
            default 1e-3 (1e-2 in float32), the bound of Tipping's own program. Where as many basis
            functions as data can fit exactly the evidence grows without limit as the noise
            vanishes: the bound keeps the result finite and a :class:`NoiseBoundWarning` says so.
        tol: An action that raises the log evidence by less, in nats, is not taken.
        max_iter: Most rounds (``"fast"``) or updates.
        max_kernel_bytes: Size up to which the kernel matrix is kept in memory. A larger one is
            computed again whenever a basis function enters (``"fast"`` only).

    Raises:
        TypeError: ``x`` or ``y`` is not a float tensor, they differ in dtype, or ``fit_intercept``
            is neither True nor False.
        ValueError: An argument is out of its range, NaN or infinite, or has the wrong shape; or
            the units of ``x`` and ``y`` are so extreme that a variance leaves the range of its
            dtype.
        ArithmeticError: An older update met a posterior precision singular to rounding.
    """
    check_inputs(x, y)
    if y.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} but y is {y.dtype}.\n  Try y.to(x.dtype).")
    fit_intercept = check_options(fit_intercept, method, tol, max_iter, max_kernel_bytes)
    beta, min_noise = _check_noise(x.dtype, beta, min_noise)
    basis = resolve_kernel(x, kernel, gamma, degree, coef0)
    design = DesignMatrix(basis, x, centred=fit_intercept, max_bytes=max_kernel_bytes)

    # By the power of 2 of the largest value, so that no square overflows or underflows.
    scale = float(power_of_2(y.abs().amax()))
    y = y / scale
    level = y.mean() if fit_intercept else y.new_zeros(())
    centred = y - level
    spread = float(centred.norm()) / math.sqrt(len(y))
    if spread <= 32 * torch.finfo(y.dtype).eps * abs(float(level)):
        spread = 0.0  # all that is left of a constant is rounding
    if spread == 0 and beta is None:
        return _constant(basis, x, level * scale, fit_intercept)

    active = ActiveSet(design, centred / (spread or 1.0), len(y) - fit_intercept)
    unit, level = (spread or 1.0) * scale, level * scale
    noise = NoiseRange(learned=beta is None, log_beta_max=-2 * math.log(min_noise))
    log_beta = _FIRST_LOG_BETA if beta is None else math.log(beta) + 2 * math.log(unit)
    if spread and log_beta > -2 * math.log(_LEAST_MIN_NOISE[x.dtype]):
        raise ValueError(
            f"beta={beta:g} is a noise of {math.exp(-0.5 * log_beta):.2g} of the standard "
            f"deviation of y, {unit:g}; below {_LEAST_MIN_NOISE[x.dtype]:g} of it rounding shows "
            f"in {x.dtype}.\n  Try a smaller beta, in the units of y, or beta=None: learned."
        )
    if method == "fast":
        posterior, trace, converged = search(active, noise, log_beta, tol=tol, max_iter=max_iter)
    else:
        active.add_all()
        kept, posterior, trace, converged = iterate(
            active.moments(),
            # Prior variances that together make up the variance of the targets.
            np.full(len(active.indices), math.log(max(len(active.indices), 1) / len(y))),
            noise,
            log_beta,
            update=method,
            tol=tol,
            max_iter=max_iter,
        )
        active.keep(kept)
    result = _in_units_of_the_data(active, posterior, trace, level, unit, noise, beta, converged)
    _report(result, num_basis=design.num_basis, num_data=len(y), min_noise=min_noise)
    return result


def _check_noise(
    dtype: torch.dtype, beta: float | None, min_noise: float | None
) -> tuple[float | None, float]:
    """Refuse noise out of range; ``beta`` and the ``min_noise`` to use."""
    if beta is not None and not (is_number(beta) and 0 < beta < math.inf):
        raise ValueError(f"beta, a noise precision, must be positive and finite, got {beta!r}.")
    least = _LEAST_MIN_NOISE[dtype]
    if min_noise is None:
        min_noise = max(1e-3, least)
    if not (is_number(min_noise) and least <= min_noise < 1):
        raise ValueError(
            f"min_noise must be a fraction of the standard deviation of y in [{least}, 1) for "
            f"{dtype}, got {min_noise!r}."
        )
    return None if beta is None else float(beta), float(min_noise)


def _constant(
    basis: BasisFunctions, x: Tensor, level: Tensor, fit_intercept: bool
) -> RVMRegression:
    """The limit of a target without variance: no weights, no noise."""
    warnings.warn(
        f"y is constant ({float(level):g}): no basis function is needed and there is no noise, so "
        "beta is infinite and the predictive standard deviation 0.",
        NoiseBoundWarning,
        stacklevel=4,
    )
    none = torch.empty(0, dtype=torch.long, device=x.device)
    return RVMRegression(
        basis=basis.at(x, none),
        weights=x.new_empty(0),
        covariance=x.new_empty(0, 0),
        alpha=x.new_empty(0),
        fit_intercept=fit_intercept,
        basis_mean=x.new_empty(0),
        level=level,
        level_variance=x.new_zeros(()),
        log_evidence=torch.tensor([math.inf], dtype=torch.float64),
        converged=True,
        beta=math.inf,
        noise_at_bound=True,
    )


def _in_units_of_the_data(
    active: ActiveSet,
    posterior: WeightPosterior,
    trace: list[float],
    level: Tensor,
    unit: float,
    noise: NoiseRange,
    beta: float | None,
    converged: bool,
) -> RVMRegression:
    """Undo the scaling of basis functions and targets, and sort by index."""
    design, x = active.design, active.design.x
    order = np.argsort(active.indices)
    indices = torch.tensor(active.indices, dtype=torch.long, device=x.device)[
        torch.from_numpy(order).to(x.device)
    ]
    scale = design.scale[indices].double()

    def at_home(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x.device)

    if beta is None:
        beta = math.exp(posterior.log_beta) / unit / unit  # its square may overflow where it cannot
    constant = -0.5 * active.num_data * math.log(2 * math.pi) - active.num_data * math.log(unit)
    if design.centred:
        constant -= 0.5 * math.log(design.num_data)
    scale = scale * unit
    covariance = at_home(posterior.covariance[order][:, order]) * torch.outer(scale, scale)
    covariance = covariance.to(x.dtype)
    alpha = (at_home(np.exp(posterior.log_alpha[order])) / scale.square()).to(x.dtype)
    check_representable(covariance, alpha, beta, unit=unit)
    return RVMRegression(
        basis=design.basis.at(x, indices),
        weights=(at_home(posterior.mean[order]) * scale).to(x.dtype),
        covariance=covariance,
        alpha=alpha,
        fit_intercept=design.centred,
        basis_mean=design.mean[indices],
        level=level,
        level_variance=x.new_tensor(1 / (design.num_data * beta) if design.centred else 0.0),
        log_evidence=torch.tensor(trace, dtype=torch.float64) + constant,
        converged=converged,
        beta=beta,
        # Where the evidence grows without limit its last maximum may lie just short of the bound.
        noise_at_bound=noise.learned and posterior.log_beta >= noise.log_beta_max - math.log(4),
    )


def _report(result: RVMRegression, *, num_basis: int, num_data: int, min_noise: float) -> None:
    """Warn where the result is not what the user asked for."""
    if result.noise_at_bound:
        warnings.warn(
            f"The noise fell to its bound, min_noise = {min_noise:g} of the standard deviation of "
            f"y: {len(result.weights)} of {num_basis} basis functions fit {num_data} data all but "
            "exactly. Either y is free of noise, or the machine interpolates and its predictive "
            "standard deviation means nothing. Try a fixed beta (1 / noise variance), fewer or "
            "smoother basis functions, or a smaller min_noise if y is that exact.",
            NoiseBoundWarning,
            stacklevel=4,
        )
    if not result.converged:
        warnings.warn(
            f"max_iter = {result.n_iter} rounds reached while the log evidence was still rising, "
            f"now {float(result.log_evidence[-1]):.4f}. Try a larger max_iter or tol.",
            ConvergenceWarning,
            stacklevel=4,
        )
