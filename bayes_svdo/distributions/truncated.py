"""A proper version of the log-uniform prior: one that has a posterior to compare q with."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from pyro.distributions import Uniform
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints
from torch.distributions.utils import broadcast_all

from bayes_svdo.distributions.scale_free import Shape


class TruncatedLogUniform(TransformedDistribution, TorchDistributionMixin):
    """``p(w) = 1 / (2 U (|w| + low))`` for ``|w| <= high``, with ``U = log(1 + high / low)``.

    Between ``low`` and ``high`` that is the log-uniform prior p(|w|) ∝ 1/|w|. Below ``low`` it is
    flat instead of infinite, and nothing lies above ``high``, so it is a density, and a posterior
    exists. A cut that left a hole around 0 would keep the signs apart; here
    ``u = sign(w) log(1 + |w| / low)`` is uniform on ``[-U, U]``, through 0. In ``u`` Hamiltonian
    Monte Carlo moves well; in ``w`` the peak at 0 is too narrow for it. That is
    ``poutine.reparam(model, {"w": TransformReparam()})`` for a model of yours, and what
    :func:`~bayes_svdo.analysis.nuts_posterior` does.

    Posteriors under it depend on ``low`` and ``high``: as ``low`` goes to 0 or ``high`` to infinity
    the mass within any fixed distance of 0 goes to 1 (theirs as well as the prior's). Its support
    is bounded, so a Gaussian has no KL to it, and ``AdditiveNoiseGuide`` refuses it.

    Args:
        low: Where the log-uniform density levels off, in the units of the weight; positive.
        high: Largest size of a weight, above ``low``; broadcast with it.
        validate_args: Check arguments and values; Pyro's default if None.

    Raises:
        ValueError: ``low`` or ``high`` is not positive, or ``low`` is not below ``high``.

    >>> TruncatedLogUniform(0.01, 10.0).cdf(torch.tensor([-10.0, 0.0, 10.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    arg_constraints = {"low": constraints.positive, "high": constraints.positive}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, low: Tensor | float, high: Tensor | float, validate_args: bool | None = None
    ) -> None:
        self.low, self.high = broadcast_all(low, high)
        # TransformedDistribution's own __init__ would keep transforms that share tensors with us,
        # and that would stay behind when the prior moves to another device.
        Distribution.__init__(self, self.low.shape, validate_args=validate_args)
        if self._validate_args and not (self.low < self.high).all():
            raise ValueError(
                f"low must be below high, but low is {low} and high is {high}.\n"
                "  Try low at the size of a weight that no longer matters, high at the largest."
            )

    @property
    def log_range(self) -> Tensor:  # (*batch)
        """``U = log(1 + high / low)``: in nats, half the range of ``u``."""
        return torch.log1p(self.high / self.low)

    @property
    def base_dist(self) -> Distribution:  # type: ignore[override]
        """Of ``u``: uniform on ``[-U, U]``."""
        width = self.log_range
        base: Distribution = Uniform(-width, width, validate_args=False)
        return base

    @property
    def transforms(self) -> list[Transform]:  # type: ignore[override]
        """From ``u`` to ``w``."""
        return [SignedExpm1(self.low)]

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """``[-high, high]``."""
        return constraints.interval(-self.high, self.high)

    @property
    def mean(self) -> Tensor:  # (*batch)
        """0."""
        return torch.zeros_like(self.low)

    @property
    def mode(self) -> Tensor:  # (*batch)
        """0, where the density is ``1 / (2 U low)``."""
        return torch.zeros_like(self.low)

    @property
    def variance(self) -> Tensor:  # (*batch)
        """``low² + high (high/2 - low) / U``."""
        return self.low.square() + self.high * (0.5 * self.high - self.low) / self.log_range

    def entropy(self) -> Tensor:  # (*batch)
        """``log(2 U low) + U/2`` nats: the negative mean of :meth:`log_prob`."""
        width = self.log_range
        return (2 * width * self.low).log() + 0.5 * width

    def log_prob(self, value: Tensor) -> Tensor:  # broadcasts with batch
        """Log density; -inf outside of ``[-high, high]``."""
        if self._validate_args:
            self._validate_sample(value)
        size = value.abs()
        log_p = -(size + self.low).log() - self.log_range.log() - math.log(2)
        return log_p.masked_fill(size > self.high, -math.inf)

    def cdf(self, value: Tensor) -> Tensor:  # broadcasts with batch
        """Probability of a weight up to ``value``."""
        if self._validate_args:
            self._validate_sample(value)
        u: Tensor = self.transforms[0].inv(value)
        return (0.5 + 0.5 * u / self.log_range).clamp(0.0, 1.0)

    def icdf(self, value: Tensor) -> Tensor:  # broadcasts with batch
        """The weight up to which there is probability ``value``, in [0, 1]."""
        return self._from_uniform(2 * value - 1)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:  # (*sample_shape, *batch)
        """Exact draws, differentiable in ``low`` and ``high``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        part = torch.rand(shape, dtype=self.low.dtype, device=self.low.device)
        return self._from_uniform(2 * part - 1)

    def sample(self, sample_shape: Shape = ()) -> Tensor:  # (*sample_shape, *batch)
        """Exact draws."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def _from_uniform(self, part: Tensor) -> Tensor:
        value: Tensor = self.transforms[0](part * self.log_range)
        return torch.maximum(torch.minimum(value, self.high), -self.high)  # rounding

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution with its batch shape expanded; a view, nothing is copied."""
        new: Self = self._get_checked_instance(TruncatedLogUniform, _instance)
        new.low, new.high = self.low.expand(batch_shape), self.high.expand(batch_shape)
        Distribution.__init__(new, new.low.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        if self.low.numel() != 1:
            return f"TruncatedLogUniform(batch_shape={tuple(self.batch_shape)})"
        ends = f"{float(self.low):g}, {float(self.high):g}"
        shape = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"TruncatedLogUniform({ends}{shape})"


class SignedExpm1(Transform):
    """``w = sign(u) low (exp(|u|) - 1)``: linear in ``u`` near 0, exponential far from it."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, low: Tensor) -> None:
        super().__init__()
        self.low = low

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SignedExpm1) and torch.equal(self.low, other.low)

    def _call(self, u: Tensor) -> Tensor:
        # Not sign(u) * expm1(|u|), whose gradient at 0 is 0 for autograd.
        return 2 * self.low * (0.5 * u.abs()).exp() * (0.5 * u).sinh()

    def _inverse(self, w: Tensor) -> Tensor:
        return w.sign() * torch.log1p(w.abs() / self.low)

    def log_abs_det_jacobian(self, u: Tensor, w: Tensor) -> Tensor:
        """``log(low) + |u|``."""
        return self.low.log() + u.abs()
