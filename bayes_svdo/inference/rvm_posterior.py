"""What a relevance vector machine has found: the posterior of a function with few weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from bayes_svdo.inference.rvm_basis import BasisFunctions


@dataclass(frozen=True, kw_only=True)
class AbstractSparseFunction:
    """Gaussian posterior of ``f(x) = b + sum_m w_m phi_m(x)`` over ``m`` basis functions.

    An intercept has a flat prior, and is held as the level of ``f`` where every basis function
    takes its training mean: there it is independent of the weights. The intercept at ``phi = 0``,
    its variance and its covariance with the weights follow from it.

    Attributes:
        basis: The relevant basis functions, in the order of their indices.
        weights: ``(m,)`` posterior mean.
        covariance: ``(m, m)`` posterior covariance of the weights.
        alpha: ``(m,)`` prior precisions of the weights.
        fit_intercept: Whether there is an intercept.
        basis_mean: ``(m,)`` training mean of every basis function (0 without an intercept).
        level: Posterior mean of ``f`` at ``basis_mean`` (0 without an intercept).
        level_variance: Its posterior variance (0 without an intercept).
        log_evidence: ``(n_iter,)`` log marginal likelihood in nats after each round, float64. An
            intercept is integrated out under the flat prior ``p(b) = 1``.
        converged: Whether the fit ended before ``max_iter``.
    """

    basis: BasisFunctions
    weights: Tensor
    covariance: Tensor
    alpha: Tensor
    fit_intercept: bool
    basis_mean: Tensor
    level: Tensor
    level_variance: Tensor
    log_evidence: Tensor
    converged: bool

    def to(self, device: torch.device | str) -> Self:
        """The same function on another device."""
        moved: dict[str, Any] = {
            field.name: getattr(self, field.name).to(torch.device(device))
            for field in fields(self)
            if hasattr(getattr(self, field.name), "to")
        }
        return replace(self, **moved)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.weights.device

    @property
    def relevance(self) -> Tensor:  # (m,)
        """Indices of the relevant basis functions: features, or training data with a kernel."""
        return self.basis.indices

    @property
    def relevance_vectors(self) -> Tensor:  # (m, d)
        """Training inputs that the relevant kernels are centred on.

        Raises:
            AttributeError: The basis functions have no centres (``"linear"``, ``"precomputed"``).
        """
        if self.basis.kernel in ("linear", "precomputed"):
            raise AttributeError(
                f"kernel={self.basis.kernel!r} has no relevance vectors; `relevance` says which "
                "columns are relevant."
            )
        return self.basis.centres

    @property
    def n_iter(self) -> int:
        """Rounds that the fit took."""
        return len(self.log_evidence)

    @property
    def intercept(self) -> Tensor:  # ()
        """Posterior mean of ``b``."""
        return self.level - self.basis_mean @ self.weights

    @property
    def intercept_variance(self) -> Tensor:  # ()
        """Posterior variance of ``b``."""
        return self.level_variance + self.basis_mean @ (self.covariance @ self.basis_mean)

    @property
    def intercept_covariance(self) -> Tensor:  # (m,)
        """Posterior covariance of ``b`` with the weights."""
        return -(self.covariance @ self.basis_mean)

    @property
    def coefficients(self) -> Tensor:  # (n_features,)
        """Weight of every feature, exactly 0 for an irrelevant one.

        Raises:
            AttributeError: The kernel is not ``"linear"``.
        """
        if self.basis.kernel != "linear":
            raise AttributeError(
                f'coefficients belong to kernel="linear"; this machine has {self.basis.kernel!r}, '
                "with `weights` over basis functions."
            )
        full = self.weights.new_zeros(self.basis.num_columns)
        return full.index_copy(0, self.relevance, self.weights)

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (n, num_columns) -> (n,), (n,)
        """Posterior mean and variance of ``f``, intercept and weights together."""
        phi = self.basis(x) - self.basis_mean
        variance = torch.linalg.vecdot(phi @ self.covariance, phi) + self.level_variance
        return phi @ self.weights + self.level, variance


def check_representable(
    covariance: Tensor, alpha: Tensor, noise_precision: float = 1.0, *, unit: float | None = None
) -> None:
    """Refuse a posterior whose variances or precisions leave the range of floating point.

    Args:
        covariance: Of the weights, ``(m, m)``.
        alpha: Prior precisions of the weights, ``(m,)``.
        noise_precision: That of the noise, of any dtype.
        unit: Standard deviation of the targets, if they have a unit.

    Raises:
        ValueError: One is infinite, or so close to 0 that it has lost digits.
    """
    squares = torch.cat([covariance.diagonal(), alpha])
    least = _least_square(covariance.dtype)
    fits = ((squares >= least) & (squares <= 1 / least)).all()  # NaN does not
    least = _least_square(torch.float64)  # which a Python float is
    if bool(fits) and least <= noise_precision <= 1 / least:
        return
    if bool(fits):
        what = f"the precision of the noise, {noise_precision:g}, leaves the range of torch.float64"
    else:
        least, most = (float(extreme) for extreme in squares.aminmax())
        what = (
            f"variances and precisions of the weights, {least:g} to {most:g}, leave the range of "
            f"{covariance.dtype}"
        )
    where = "" if unit is None else f" (y has a standard deviation of {unit:g})"
    raise ValueError(
        f"x{' or y' if where else ''} is in units that are too large or too small: {what}{where}.\n"
        f"  Try rescaled x{' or y' if where else ''}."
    )


def _least_square(dtype: torch.dtype) -> float:
    """Of which sums of products, smaller still, have all their digits."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps
