"""What the priors of this folder share: they are known by their KL from a Gaussian."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints
from torch.distributions.kl import register_kl

from bayes_svdo.distributions.kl import log_alpha

Shape = torch.Size | list[int] | tuple[int, ...]


class ScaleFreePrior(TorchDistribution):
    """Abstract prior of a real weight whose KL from N(loc, sigma²) depends on alpha alone.

    A subclass says what the KL is (:meth:`kl_from`) and why the prior cannot be sampled
    (``why_no_sample``). Shapes, expansion and the entry in ``torch.distributions.kl_divergence``
    are here, so that a new prior is one method. The batch shape is ``()`` until expanded.
    """

    arg_constraints = {}  # noqa: RUF012  (an instance attribute in torch's annotations)
    support = constraints.real
    has_rsample = False
    why_no_sample: ClassVar[str]

    def __init__(self, *, validate_args: bool | None = None) -> None:
        super().__init__(torch.Size(), torch.Size(), validate_args=validate_args)

    def kl_from(self, log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
        """KL(N(loc, alpha loc²) || self) in nats, elementwise."""
        raise NotImplementedError(f"{type(self).__name__} must define kl_from(log_alpha).")

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same prior, with its settings, for weights of shape ``batch_shape``.

        Raises:
            ValueError: The present batch shape does not broadcast to ``batch_shape``.
        """
        batch_shape = torch.Size(batch_shape)
        if not _broadcasts_to(self.batch_shape, batch_shape):
            raise ValueError(
                f"{type(self).__name__} of batch shape {tuple(self.batch_shape)} cannot be "
                f"expanded to {tuple(batch_shape)}: the shapes do not broadcast."
            )
        new: Self = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = batch_shape
        return new

    def sample(self, sample_shape: Shape = ()) -> NoReturn:
        """Not possible; the error says why and what to do."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be sampled: {self.why_no_sample}.\n"
            "  Give the site its value by a guide (as SVI does) or by poutine.condition, or use a "
            "proper prior such as Normal. Pyro's autoguides start from a draw of the prior unless "
            "told: AutoNormal(model, init_loc_fn=init_to_value(values={...}))."
        )

    def rsample(self, sample_shape: Shape = ()) -> NoReturn:
        """Not possible; see :meth:`sample`."""
        self.sample(sample_shape)

    @property
    def mean(self) -> NoReturn:
        """Not defined."""
        raise NotImplementedError(f"{type(self).__name__} has no mean: {self.why_no_sample}.")

    @property
    def variance(self) -> NoReturn:
        """Not defined."""
        raise NotImplementedError(f"{type(self).__name__} has no variance: {self.why_no_sample}.")


def kl_to_prior(log_alpha: Tensor, prior: ScaleFreePrior) -> Tensor:
    """KL per weight, in the shape that those of ``log_alpha`` and ``prior`` broadcast to."""
    kl = prior.kl_from(log_alpha)
    if kl.shape == prior.batch_shape:  # as it is in every step
        return kl
    return kl.expand(torch.broadcast_shapes(kl.shape, prior.batch_shape))


def _kl_normal(q: Normal, p: ScaleFreePrior) -> Tensor:
    return kl_to_prior(log_alpha(q.loc, 2 * q.scale.log()), p)


register_kl(Normal, ScaleFreePrior)(_kl_normal)


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    trailing = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in trailing)
