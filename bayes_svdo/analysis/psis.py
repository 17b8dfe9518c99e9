"""How far a guide is from the posterior under a proper prior: Pareto-smoothed importance sampling.

``k`` is the shape of the generalised Pareto distribution fitted to the largest importance ratios
``p(y | x, w) p(w) / q(w)`` of draws ``w`` from ``q`` (Vehtari et al. (2024),
https://arxiv.org/abs/1507.02646; for variational inference Yao et al. (2018),
https://arxiv.org/abs/1802.02538). Below 0.5 ``q`` can stand in for the posterior, above 0.7 it
cannot, not even reweighted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayes_svdo.analysis.draws import DrawnData, SiteDraws
from bayes_svdo.analysis.figures import check_posterior
from bayes_svdo.analysis.to_arviz import import_arviz
from bayes_svdo.distributions.scale_free import ScaleFreePrior
from bayes_svdo.inference.arguments import check_count, check_seed
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.inference.surroundings import random_state

LogDensity = Callable[[dict[str, Tensor]], Tensor]

_LEAST_DRAWS = 100  # of which PSIS takes a fifth for the tail


@torch.no_grad()
def psis_khat(
    posterior: Posterior,
    x: Any,
    y: Any,
    draws: int = 1000,
    *,
    prior: TorchDistributionMixin | LogDensity,
    seed: int | None = None,
    batch_size: int = 1000,
) -> float:
    """Pareto k of the guide as a proposal for the posterior under a proper prior.

    Point estimates (biases, a learned noise scale) are held where they are. For models of a few
    dozen weights: ``k`` grows with their number, however good each marginal is. All draws are in
    memory at once.

    Args:
        posterior: Of a :class:`~bayes_svdo.models.BayesianNetwork`, no weight of which was pruned
            while training.
        x: All inputs of the training set, shape ``(N, ...)``, or a tuple of such.
        y: Their targets, shape ``(N, ...)``.
        draws: At least 100.
        prior: A proper prior: a distribution over one weight, or the log density of all of them, a
            function from float64 weights of shape ``(draws, *weight)`` by site to shape
            ``(draws,)``. It may be unnormalised, and -inf outside of its support.
        seed: For the draws; None to go on with torch's global generators.
        batch_size: Inputs taken at a time.

    Returns:
        ``k``; inf if no draw lies in the support of the prior.

    Raises:
        TypeError: The model is no ``BayesianNetwork``, ``prior`` is none of these, or ``x`` or
            ``y`` is no tensor or array.
        ValueError: ``prior`` is improper or gives log densities of the wrong shape, NaN or +inf,
            ``q`` has point masses, or ``x`` and ``y`` do not fit.
    """
    check_posterior(posterior, "psis_khat")
    draws = check_count("draws", draws, _LEAST_DRAWS)
    batch_size = check_count("batch_size", batch_size)
    seed = check_seed(seed)
    log_density = _log_density(prior)
    if y is None:
        raise TypeError("y must be a tensor or an array of the targets, but is None.")
    posterior._network("psis_khat")
    sites = SiteDraws.of(posterior, math.inf, surviving_only=False)
    for site in sites:
        if not site.sigma.all():
            raise ValueError(
                f'at site "{site.name}", {int((site.sigma == 0).sum())} weights were pruned while '
                "training: there q is a point mass, and has no density."
            )
    data = DrawnData.of(posterior, sites, x, y, "psis_khat")
    with random_state(seed, posterior.device):
        drawn = {site.name: site.draw_into_memory(draws) for site in sites}
        scores = data.predict(sites, drawn, draws, batch_size).log_likelihood
    assert scores is not None
    weights = {site.name: torch.from_numpy(drawn[site.name]).double() for site in sites}
    log_q = torch.stack([_log_q(site, weights[site.name]) for site in sites]).sum(0)
    shaped = {site.name: weights[site.name].reshape(-1, *site.shape) for site in sites}
    log_prior = torch.as_tensor(log_density(shaped)).double()
    if log_prior.shape != (draws,) or log_prior.isnan().any() or log_prior.isposinf().any():
        raise ValueError(
            f"prior must give {draws} log densities, finite or -inf, but gave "
            f"{log_prior.numel()} of shape {tuple(log_prior.shape)}, "
            f"{int(log_prior.isnan().sum())} NaN and {int(log_prior.isposinf().sum())} +inf."
        )
    return _khat(scores.sum(1) + (log_prior - log_q).numpy())


def _log_density(prior: TorchDistributionMixin | LogDensity) -> LogDensity:
    if isinstance(prior, ScaleFreePrior):
        raise ValueError(
            f"prior must be proper, but {type(prior).__name__} is not: there is no posterior to "
            "compare q with.\n  Try a truncated version of it, or a Normal."
        )
    if isinstance(prior, TorchDistributionMixin):
        return _Independent(prior)
    if not callable(prior):
        raise TypeError(
            "prior must be a distribution over one weight, or a function that gives the log "
            f"density of all of them, but is {prior!r}."
        )
    return prior


class _Independent:
    """Log density of independent weights, -inf outside of the support."""

    def __init__(self, prior: Any) -> None:
        if prior.batch_shape or prior.event_shape:
            raise ValueError(
                "prior must be a distribution over one weight, but has batch shape "
                f"{tuple(prior.batch_shape)} and event shape {tuple(prior.event_shape)}."
            )
        self.prior = copy(prior)
        self.prior._validate_args = False

    def __call__(self, weights: dict[str, Tensor]) -> Tensor:
        terms = [
            self.prior.log_prob(value)
            .masked_fill(~self.prior.support.check(value), -math.inf)
            .flatten(1)
            .sum(1)
            for value in weights.values()
        ]
        return torch.stack(terms).sum(0)


def _log_q(site: SiteDraws, values: Tensor) -> Tensor:  # (draws, n) -> (draws,)
    loc, sigma = site.loc.double().cpu(), site.sigma.double().cpu()
    z = (values - loc) / sigma
    return (-0.5 * z.square() - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(1)


def _khat(log_ratios: NDArray[np.float64]) -> float:
    largest = log_ratios.max()
    if largest == -math.inf:
        return math.inf
    if (log_ratios == largest).all():
        return 0.0  # q is the posterior; ArviZ finds no tail, and says inf
    log_ratios = log_ratios - largest
    az = import_arviz()
    if int(az.__version__.split(".")[0]) < 1:
        _, k = az.psislw(log_ratios)
    else:  # takes log likelihoods, whose negatives are the log ratios of leaving points out
        _, k = import_module("arviz_stats.base").array_stats.psislw(-log_ratios)
    return float(k)
