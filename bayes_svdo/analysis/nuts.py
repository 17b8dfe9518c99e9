"""The exact posterior of a small model under a proper prior, by Pyro's NUTS.

Under the log-uniform prior there is no posterior to compare ``q`` with: it has infinite mass at 0,
where the likelihood is positive (Hron, Matthews & Ghahramani (2018),
https://arxiv.org/abs/1807.01969). Under a truncated version there is one, and for a model of a few
weights the No-U-Turn sampler (Hoffman & Gelman (2014), https://arxiv.org/abs/1111.4246) draws from
it. What it says depends on where the prior is cut.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import biject_to

from bayes_svdo.analysis.draws import DrawnData, SiteDraws
from bayes_svdo.analysis.figures import Array, check_posterior
from bayes_svdo.analysis.psis import _log_density
from bayes_svdo.analysis.to_arviz import import_arviz
from bayes_svdo.distributions import TruncatedLogUniform
from bayes_svdo.inference.arguments import check_count, check_rate, check_seed
from bayes_svdo.inference.posterior import Posterior, _evaluating, local_parameters
from bayes_svdo.inference.surroundings import random_state
from bayes_svdo.models import BayesianNetwork
from bayes_svdo.models.bayesian_network import _moved

_FARTHEST_START = 2.0  # as in Stan, from 0, in unconstrained coordinates
_WORST_RHAT = 1.05
_LEAST_DRAWS = 20  # for R-hat
_CPU = torch.device("cpu")


class NutsWarning(UserWarning):
    """The draws may not be those of the posterior."""


@dataclass(frozen=True, eq=False)
class NutsPosterior:
    """Draws from the posterior under a proper prior, and whether they can be relied upon.

    Attributes:
        weights: By site, shape ``(chains * draws, *weight)``, chain after chain, float64.
        rhat: Rank-normalised split R-hat of every weight (Vehtari et al. (2021),
            https://doi.org/10.1214/20-BA1221), in the shape of the weight. Near 1 where the chains
            agree.
        ess: Bulk effective sample size of every weight.
        divergences: Draws after warm-up at which the integrator failed; their neighbourhood is
            missing from ``weights``.
        chains: Number of chains.
        prior: What was put on every weight.
    """

    weights: dict[str, Array]
    rhat: dict[str, Array]
    ess: dict[str, Array]
    divergences: int
    chains: int
    prior: Any

    def __len__(self) -> int:
        return len(next(iter(self.weights.values())))

    @property
    def worst_rhat(self) -> float:
        """The largest R-hat; NaN if one is."""
        return float(np.max([np.max(value) for value in self.rhat.values()]))

    @property
    def least_ess(self) -> float:
        """The smallest effective sample size."""
        return float(np.min([np.min(value) for value in self.ess.values()]))

    @property
    def trouble(self) -> str:
        """What is wrong with the draws, in words; empty if nothing is known to be."""
        found = []
        if self.divergences:
            found.append(f"{self.divergences} of {len(self)} draws diverged")
        if not self.worst_rhat <= _WORST_RHAT:  # NaN is no good either
            found.append(f"R-hat is {self.worst_rhat:.3f} (above {_WORST_RHAT})")
        return " and ".join(found)

    def __repr__(self) -> str:
        return (
            f"NutsPosterior({', '.join(self.weights)}; {self.chains} chains, {len(self)} draws, "
            f"worst R-hat {self.worst_rhat:.3f}, least ESS {self.least_ess:.0f}, "
            f"{self.divergences} divergences; prior {self.prior})"
        )


def nuts_posterior(
    posterior: Posterior,
    x: Any,
    y: Any,
    draws: int = 1000,
    *,
    prior: TorchDistributionMixin,
    warmup: int | None = None,
    chains: int = 2,
    seed: int | None = None,
    target_accept: float = 0.9,
    max_weights: int = 200,
) -> NutsPosterior:
    """Draw the weights of a posterior's model from their posterior under a proper prior.

    The model is that of ``posterior``, its prior replaced; of ``q`` nothing is used. Point
    estimates (biases, a learned noise scale) are held where they are, as in
    :func:`~bayes_svdo.analysis.psis_khat`, and the network is in evaluation mode. All data are used
    at every step, in float64 on the CPU, chain after chain. Chains start at random, within 2 of 0
    in unconstrained coordinates: where they agree, R-hat has had something to compare.

    The coordinates for :class:`~bayes_svdo.distributions.TruncatedLogUniform` are standard normal
    under the prior; for another prior they are those of ``torch.distributions.biject_to`` its
    support.

    Args:
        posterior: Of a :class:`~bayes_svdo.models.BayesianNetwork`.
        x: All inputs of the training set, shape ``(N, ...)``, or a tuple of such.
        y: Their targets, shape ``(N, ...)``.
        draws: Kept of each chain, at least 20.
        prior: A proper prior, a distribution over one weight.
        warmup: Steps of each chain before the first draw that is kept, in which step size and mass
            matrix are found; ``draws`` if None.
        chains: One chain is compared with itself, its first half with its second.
        seed: Makes the run reproducible and leaves the global random state as it was. None
            continues the global stream.
        target_accept: Acceptance probability that the step size aims at, below 1; raise it against
            divergences.
        max_weights: Refuse a model of more weights, for which this would take hours.

    Returns:
        The draws. What is wrong with them is a :class:`NutsWarning`, too.

    Raises:
        TypeError: The model is no ``BayesianNetwork``, ``prior`` no distribution, or ``y`` is None.
        ValueError: ``prior`` is improper, the model has more than ``max_weights`` weights, a number
            is out of range, ``x`` and ``y`` do not fit, or the density at a start is not finite.
    """
    check_posterior(posterior, "nuts_posterior")
    draws = check_count("draws", draws, _LEAST_DRAWS)
    warmup = draws if warmup is None else check_count("warmup", warmup)
    chains, max_weights = check_count("chains", chains), check_count("max_weights", max_weights)
    seed = check_seed(seed)
    if check_rate("target_accept", target_accept) >= 1:
        raise ValueError(f"target_accept must lie in (0, 1), but is {target_accept}.")
    if not isinstance(prior, TorchDistributionMixin):
        raise TypeError(f"prior must be a distribution over one weight, but is {prior!r}.")
    _log_density(prior)
    if y is None:
        raise TypeError("y must be a tensor or an array of the targets, but is None.")
    posterior._network("nuts_posterior")
    sites = SiteDraws.of(posterior, math.inf, surviving_only=False)
    number = sum(map(len, sites))
    if number > max_weights:
        raise ValueError(
            f"the model has {number:,} weights, but max_weights is {max_weights}: NUTS is for "
            "small models.\n  Try max_weights with patience, or posterior.predictive(x) and its "
            "calibration on data."
        )
    data = DrawnData.of(posterior, sites, x, y, "nuts_posterior")
    target = _Target(data, sites, prior)
    with random_state(seed, _CPU), local_parameters(), _evaluating(target.network):
        runs = [_chain(target, number, draws, warmup, target_accept) for _ in range(chains)]
    kept = torch.cat([run[0] for run in runs])
    found = _result(target, kept, sum(run[1] for run in runs), chains)
    if found.trouble:
        warnings.warn(
            f"{found.trouble}: the draws may not be those of the posterior.\n"
            "  Try more warmup and draws, or target_accept nearer to 1.",
            NutsWarning,
            stacklevel=2,
        )
    return found


class _Target:
    """The negative log posterior of all weights, in unconstrained coordinates."""

    def __init__(self, data: DrawnData, sites: tuple[SiteDraws, ...], prior: Any) -> None:
        network: BayesianNetwork = deepcopy(data.posterior._network("nuts_posterior"))
        self.network = network.to(_CPU, torch.float64)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        self.x = tuple(_double(value) for value in data.x)
        assert data.y is not None
        self.y = _double(data.y)
        self.shapes = {site.name: site.shape for site in sites}
        self.prior = prior
        self.coordinates = _coordinates(prior)

    def __call__(self, z: Tensor) -> Tensor:  # (n,) -> ()
        """The potential energy, for Pyro."""
        weights, log_prior = self.coordinates(z)
        output = self.network.output(self.by_site(weights), self.x)
        return -log_prior - self.network.likelihood.distribution(output).log_prob(self.y).sum()

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:  # (..., n) -> (..., *weight)
        """Weights under the names and in the shapes of their sites."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = flat.split(sizes, -1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


_Coordinates = Callable[[Tensor], tuple[Tensor, Tensor]]


def _coordinates(prior: Any) -> _Coordinates:
    """From unconstrained coordinates to weights, and the log density of the former; summed."""
    prior = _moved(prior, _double)
    if isinstance(prior, TruncatedLogUniform):
        width, (transform,) = prior.log_range, prior.transforms

        def whitened(z: Tensor) -> tuple[Tensor, Tensor]:
            # The uniform u as a function of a standard normal: no walls where its range ends.
            u = width * torch.erf(z * math.sqrt(0.5))
            return transform(u), -0.5 * z.square().sum(-1)

        return whitened

    to_support = biject_to(prior.support)

    def unbounded(z: Tensor) -> tuple[Tensor, Tensor]:
        w = to_support(z)
        density = prior.log_prob(w) + to_support.log_abs_det_jacobian(z, w)
        return w, density.sum(-1)

    return unbounded


def _chain(
    target: _Target, number: int, draws: int, warmup: int, target_accept: float
) -> tuple[Tensor, int]:
    """Weights of one chain, shape ``(draws, number)``, and how many of them diverged."""
    start = torch.empty(number, dtype=torch.float64).uniform_(-_FARTHEST_START, _FARTHEST_START)
    energy = target(start)
    if not energy.isfinite():
        raise ValueError(
            f"the log density of the model under {target.prior} is {-float(energy)} at a random "
            "start: check x, y and the prior's support."
        )
    kernel = NUTS(potential_fn=lambda z: target(z["z"]), target_accept_prob=target_accept)
    mcmc = MCMC(
        kernel,
        num_samples=draws,
        warmup_steps=warmup,
        initial_params={"z": start},
        disable_progbar=True,
    )
    mcmc.run()
    z = mcmc.get_samples()["z"]
    with torch.no_grad():
        weights = target.coordinates(z)[0]
    return weights, len(mcmc.diagnostics()["divergences"]["chain 0"])


def _result(target: _Target, kept: Tensor, divergences: int, chains: int) -> NutsPosterior:
    az = import_arviz()
    compared = max(chains, 2)  # one chain with itself, a last odd draw left out
    split = np.asarray(kept[: len(kept) // compared * compared].numpy())
    split = split.reshape(compared, -1, kept.shape[1])
    each = [split[..., index] for index in range(kept.shape[1])]
    with np.errstate(all="ignore"):  # a chain that never moved has R-hat NaN
        rhat = torch.tensor([float(az.rhat(weight)) for weight in each])
        ess = torch.tensor([float(az.ess(weight)) for weight in each])

    def arrays(flat: Tensor) -> dict[str, Array]:
        return {k: np.asarray(v.double().numpy()) for k, v in target.by_site(flat).items()}

    return NutsPosterior(arrays(kept), arrays(rhat), arrays(ess), divergences, chains, target.prior)


def _double(value: Tensor) -> Tensor:
    value = value.to(_CPU)
    return value.double() if value.is_floating_point() else value
