"""A posterior of which most weights are pruned, at the cost of those that are left.

A unit that has lost all its weights leaves a whole row of zeros in one matrix and a column in the
next, and a dead pixel a column. What remains is a small block; KL and linear maps need no more.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from bayes_svdo.distributions.additive_noise import AdditiveNoiseNormal
from bayes_svdo.distributions.kl import log_alpha
from bayes_svdo.distributions.scale_free import ScaleFreePrior, kl_to_prior

# A pruned weight is a point mass at zero. As a Gaussian: loc = 0 and sigma = e^-30, whose
# log_alpha (27 in float32) is so large that KL and gradient vanish.
PRUNED_LOG_SIGMA2 = -60.0


class Block(NamedTuple):
    """Rows and columns of a matrix, outside of which no weight is kept.

    Attributes:
        rows: Indices of rows, shape ``(R,)``.
        columns: Indices of columns, shape ``(C,)``.
    """

    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(keep: Tensor) -> Block:
        """The smallest block of a boolean mask of shape ``(out, in)``."""
        return Block(keep.any(1).nonzero().flatten(), keep.any(0).nonzero().flatten())

    def numel(self) -> int:
        """Number of its entries."""
        return len(self.rows) * len(self.columns)

    def gather(self, values: Tensor) -> Tensor:
        """The block of a matrix."""
        return values.index_select(0, self.rows).index_select(1, self.columns)

    def scatter(self, values: Tensor, shape: torch.Size, pruned: float) -> Tensor:
        """The matrix of a block, ``pruned`` outside of it."""
        everywhere = values.new_full(shape, pruned)
        return everywhere.index_put((self.rows[:, None], self.columns), values)


class PrunedAdditiveNoiseNormal(AdditiveNoiseNormal):
    """``AdditiveNoiseNormal`` over a matrix, its pruned weights point masses at zero.

    Args:
        loc: Means, shape ``(out, in)``; those of pruned weights are not used.
        log_sigma2: Log variances of the same shape; likewise.
        keep: Which weights are kept, of the same shape.
        block: Where those lie.
        validate_args: Check that the kept ones are real.
    """

    def __init__(
        self,
        loc: Tensor,
        log_sigma2: Tensor,
        keep: Tensor,
        block: Block,
        validate_args: bool | None = None,
    ) -> None:
        self.block, self.block_keep = block, block.gather(keep)
        self.block_loc = block.gather(loc).where(self.block_keep, 0.0)
        self.block_log_sigma2 = block.gather(log_sigma2).where(self.block_keep, PRUNED_LOG_SIGMA2)
        super(torch.distributions.Normal, self).__init__(loc.shape, validate_args=validate_args)

    def like(self) -> Tensor:  # (out, in)
        """A tensor of the shape, dtype and device of a draw; its values mean nothing."""
        return self.block_loc.new_empty(1).expand(self.batch_shape)

    @functools.cached_property
    def loc(self) -> Tensor:  # type: ignore[override]  # (out, in)
        """Means, zero where pruned."""
        return self.block.scatter(self.block_loc, self.batch_shape, 0.0)

    @functools.cached_property
    def log_sigma2(self) -> Tensor:  # type: ignore[override]  # (out, in)
        """Log variances, so low where pruned that nothing is left of the noise."""
        return self.block.scatter(self.block_log_sigma2, self.batch_shape, PRUNED_LOG_SIGMA2)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> AdditiveNoiseNormal:
        """An ordinary ``AdditiveNoiseNormal`` of the batch shape, or itself if it has it."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return AdditiveNoiseNormal(self.loc, self.log_sigma2, validate_args=False).expand(
            batch_shape
        )


def _kl_pruned(q: PrunedAdditiveNoiseNormal, p: ScaleFreePrior) -> Tensor:
    if p.batch_shape not in (torch.Size(), q.batch_shape):
        return kl_to_prior(q.log_alpha, p)
    kl = p.kl_from(log_alpha(q.block_loc, q.block_log_sigma2)).where(q.block_keep, 0.0)
    return q.block.scatter(kl, q.batch_shape, 0.0)


register_kl(PrunedAdditiveNoiseNormal, ScaleFreePrior)(_kl_pruned)
