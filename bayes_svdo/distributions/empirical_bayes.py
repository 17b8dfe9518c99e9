"""A proper alternative to the log-uniform prior: a Gaussian whose variance is optimised out."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from bayes_svdo.distributions.kl import kl_empirical_bayes
from bayes_svdo.distributions.scale_free import ScaleFreePrior


class EmpiricalBayes(ScaleFreePrior):
    """``p(w) = N(0, s²)`` per weight, with ``s² = loc² + sigma²``, the value that minimises the KL.

    The KL is then ``log(1 + 1/alpha)/2`` (Kharitonov, Molchanov & Vetrov, 2018). Every such prior
    is proper, so the objective bounds a marginal likelihood, maximised over the variances; a
    weight is irrelevant under the same condition as in a relevance vector machine. The variance
    belongs to the posterior, so the prior alone can be neither scored nor sampled.

    Args:
        validate_args: Accepted for Pyro's sake; there is nothing to check.

    >>> EmpiricalBayes().expand([3]).to_event(1).event_shape
    torch.Size([3])
    """

    why_no_sample = "its variance is loc² + sigma² of the posterior, which it does not know alone"

    def kl_from(self, log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
        """KL(N(loc, alpha loc²) || self) in nats, elementwise."""
        return kl_empirical_bayes(log_alpha)

    def log_prob(self, value: Tensor) -> NoReturn:
        """Not possible; the error says why and what to do."""
        raise NotImplementedError(
            f"EmpiricalBayes cannot score a weight: {self.why_no_sample}.\n"
            "  Use an objective that takes its analytic KL, torch.distributions.kl_divergence(q, "
            "EmpiricalBayes()), and does not score the site; or use LogUniform or Normal."
        )

    def __repr__(self) -> str:
        shape = f"batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"EmpiricalBayes({shape})"
