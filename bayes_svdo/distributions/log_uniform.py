"""The log-uniform prior, the one that prunes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_svdo.distributions.kl import Approximation, check_approximation, kl_log_uniform
from bayes_svdo.distributions.scale_free import ScaleFreePrior

# So that log q - log p has the mean of the exact KL, which tends to 0 for alpha -> inf:
# log(2 pi e)/2 + (Euler's constant + log 2)/2.
_NORMALISATION = 0.5 * math.log(2 * math.pi * math.e) + 0.63518142273073908501


class LogUniform(ScaleFreePrior):
    """The improper prior ``p(|w|) ∝ 1/|w|``: uniform in ``log|w|``, with either sign.

    No scale of weights is preferred, and the divergence from a Gaussian N(loc, sigma²) depends on
    ``alpha = sigma²/loc²`` alone; it falls as alpha grows, so a weight that the data do not need
    drowns in noise and can be pruned (Kingma et al., 2015; Molchanov et al., 2017). It is not
    normalisable, and neither is the posterior (Hron, Matthews & Ghahramani, 2018): the objective
    is a regulariser, and no evidence to compare models by.

    Args:
        kl: Which KL stands for the pair, ``"molchanov2017"``, ``"exact"``, ``"poster2016"`` or
            ``"kingma2015"``; see :func:`~bayes_svdo.distributions.kl_log_uniform`.
        extrapolate: Let ``"kingma2015"`` be used for alpha > 1.
        validate_args: Check the values that are scored; Pyro's default if None.

    Raises:
        ValueError: Unknown ``kl``.

    >>> LogUniform().expand([3]).to_event(1).event_shape
    torch.Size([3])
    """

    why_no_sample = "it is improper, ∫ dw/|w| diverges at 0 and at infinity"

    def __init__(
        self,
        kl: Approximation = "molchanov2017",
        *,
        extrapolate: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        check_approximation(kl)
        self.kl: Approximation = kl
        self.extrapolate = extrapolate
        super().__init__(validate_args=validate_args)

    def kl_from(self, log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
        """KL(N(loc, alpha loc²) || self) in nats, elementwise."""
        return kl_log_uniform(log_alpha, self.kl, extrapolate=self.extrapolate)

    def log_prob(self, value: Tensor) -> Tensor:  # broadcasts with batch
        """``-log|w|`` plus the constant with which E_q[log q - log p] is the exact KL.

        It is inf at ``w = 0``, where the density is.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_p = -value.abs().log() - _NORMALISATION
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return log_p.expand(shape)

    def __repr__(self) -> str:
        parts = [f'"{self.kl}"']
        if self.extrapolate:
            parts.append("extrapolate=True")
        if self.batch_shape:
            parts.append(f"batch_shape={tuple(self.batch_shape)}")
        return f"LogUniform({', '.join(parts)})"
