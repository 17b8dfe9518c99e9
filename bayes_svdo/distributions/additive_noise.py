"""The posterior of a weight under additive Gaussian noise."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.distributions.utils import broadcast_all

from bayes_svdo.distributions.kl import log_alpha
from bayes_svdo.distributions.scale_free import ScaleFreePrior, Shape, kl_to_prior


class AdditiveNoiseNormal(Normal):
    """``q(w) = N(loc, exp(log_sigma2))``, a Normal that knows its ``log_alpha``.

    It is learned in (loc, log_sigma2) rather than in (loc, log_alpha) because the gradient of
    ``loc`` is then free of the noise that multiplies it (Molchanov, Ashukha & Vetrov, 2017, sec.
    4.1). ``scale`` is computed only when asked for: the KL and local reparameterization need
    ``loc`` and ``log_sigma2`` alone.

    Args:
        loc: Mean, a number or a tensor of any shape.
        log_sigma2: Log variance, broadcastable with ``loc``.
        validate_args: Check that both are real (no NaN); Pyro's default if None.
    """

    arg_constraints = {"loc": constraints.real, "log_sigma2": constraints.real}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor | float,
        log_sigma2: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.log_sigma2 = broadcast_all(loc, log_sigma2)
        # Normal's own __init__ would ask for the scale.
        super(torch.distributions.Normal, self).__init__(
            self.loc.size(), validate_args=validate_args
        )

    def like(self) -> Tensor:  # (*batch)
        """A tensor of the shape, dtype and device of a draw; its values mean nothing."""
        return self.loc

    @property
    def log_alpha(self) -> Tensor:  # (*batch)
        """``log(sigma² / loc²)``, finite for ``loc = 0``."""
        return log_alpha(self.loc, self.log_sigma2)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # (*batch)
        """Standard deviation."""
        return (0.5 * self.log_sigma2).exp()

    @property
    def variance(self) -> Tensor:  # (*batch)
        """``exp(log_sigma2)``."""
        return self.log_sigma2.exp()

    @property
    def snr(self) -> Tensor:  # (*batch)
        """Signal-to-noise ratio ``|loc| / sigma``."""
        return self.loc.abs() * (-0.5 * self.log_sigma2).exp()

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution with its batch shape expanded; a view, nothing is copied."""
        new: Self = self._get_checked_instance(AdditiveNoiseNormal, _instance)
        new.loc, new.log_sigma2 = self.loc.expand(batch_shape), self.log_sigma2.expand(batch_shape)
        super(torch.distributions.Normal, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:  # broadcasts with batch
        """Log density; the log variance is used as it is, never through ``scale``."""
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) * (-0.5 * self.log_sigma2).exp()
        return -0.5 * (z * z + self.log_sigma2 + math.log(2 * math.pi))

    def entropy(self) -> Tensor:  # (*batch)
        """``(1 + log(2 pi) + log_sigma2) / 2`` nats."""
        return 0.5 * (self.log_sigma2 + (1 + math.log(2 * math.pi)))


def _kl_additive_noise(q: AdditiveNoiseNormal, p: ScaleFreePrior) -> Tensor:
    return kl_to_prior(q.log_alpha, p)


register_kl(AdditiveNoiseNormal, ScaleFreePrior)(_kl_additive_noise)
