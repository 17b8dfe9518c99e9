"""``TraceMeanField_ELBO`` that draws and scores only what it needs.

Pyro's own objective evaluates ``log_prob`` at every latent site and draws every weight. Where the
KL of a site is analytic neither is needed: this one scores observed sites and analytic KLs only,
and lets linear operations draw their output instead of their weights (local reparameterization).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils._pytree import tree_leaves

from bayes_svdo._names import closest
from bayes_svdo.distributions.undrawn import LocalReparameterization, Reuse, WeightReused
from bayes_svdo.inference.arguments import check_count, check_weight
from bayes_svdo.inference.surroundings import random_numbers_kept
from bayes_svdo.models.bayesian_network import BayesianNetwork, noisy_outputs


class ELBOTerms(NamedTuple):
    """The objective, taken apart; every tensor is scalar, in nats, and carries its gradient.

    Attributes:
        observed: Expected negative log likelihood of each observed site, by name, of all
            ``num_data`` points.
        kl: ``KL[q‖p]`` of each latent site, by name, before ``kl_weight``.
        output: What the model returned.
    """

    observed: dict[str, Tensor]
    kl: dict[str, Tensor]
    output: Any

    @property
    def nll(self) -> Tensor:
        """Negative log likelihood, sum over the observed sites."""
        return _sum(self.observed, like=self.kl)

    def total_kl(self) -> Tensor:
        """Sum over the latent sites."""
        return _sum(self.kl, like=self.observed)

    def loss(self, kl_weight: float | Tensor = 1.0) -> Tensor:
        """``nll + kl_weight * KL``: the negative ELBO at ``kl_weight=1``."""
        return self.nll + kl_weight * self.total_kl()


class TraceAnalyticKL_ELBO(TraceMeanField_ELBO):
    """Negative ELBO with analytic KLs and local reparameterization.

    Equal to ``pyro.infer.TraceMeanField_ELBO`` for the same draws. Like it, it falls back to
    ``log q - log p`` at the draw for sites whose KL is not registered.

    Under local reparameterization it has less noise and takes less work, and is equal to it in
    expectation where a weight meets each data point once, as in dense layers. Where a weight meets
    a data point several times (the positions of a convolution, the words of an embedding, the
    tokens of a linear layer) each of them gets noise of its own, by the convention of Molchanov et
    al. (2017): the dependence between them is dropped, and the expected negative log likelihood is
    another one, lower where the network averages over them. ``local_reparameterization=False``, or
    ``drawn`` for such sites, gives the objective of the posterior itself.

    A weight that turns out to be used more than once is drawn from then on; its pass is started
    again, once (see :class:`~bayes_svdo.distributions.undrawn.WeightReused`).

    Args:
        kl_weight: Scales prior and posterior terms of every latent site alike, analytic or not; a
            number or a scalar tensor, which may be changed between steps (KL warm-up).
        local_reparameterization: Whether linear operations draw their output instead of weights.
        reuse: See :class:`~bayes_svdo.distributions.UndrawnSample`.
        drawn: Names of sites whose weights are drawn all the same; ``method="local"`` of the
            predictive distribution of a posterior that ``fit`` finds draws them, too.
        **kwargs: As for ``TraceMeanField_ELBO`` (``num_particles``, ``vectorize_particles``, ...).

    Raises:
        TypeError: ``kl_weight`` is neither a number nor a scalar tensor.
        ValueError: ``kl_weight`` is negative or not finite, or ``num_particles`` is below 1; or,
            when it is evaluated, the guide has no site of a name in ``drawn``.

    Example::

        elbo = TraceAnalyticKL_ELBO()
        SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x, y)
        terms = elbo.terms(model, guide, x, y)     # terms.nll, terms.kl["fc1.weight"]
    """

    def __init__(
        self,
        kl_weight: float | Tensor = 1.0,
        *,
        local_reparameterization: bool = True,
        reuse: Reuse = "draw",
        drawn: str | Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        check_count("num_particles", kwargs.get("num_particles", 1))
        super().__init__(**kwargs)
        check_weight("kl_weight", kl_weight)
        self.kl_weight = kl_weight
        self.local_reparameterization = local_reparameterization
        self.reuse = reuse
        self.drawn = frozenset([drawn] if isinstance(drawn, str) else drawn)
        self._reused: set[str] = set()
        self._loops_particles = False

    def forget_reuse(self) -> None:
        """Forget which weights were found to be used more than once."""
        self._reused.clear()
        self._loops_particles = False

    def terms(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> ELBOTerms:
        """One estimate of the objective's terms, averaged over ``num_particles``."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        if vectorized:
            if self.max_plate_nesting == float("inf"):
                with random_numbers_kept(_device_of((args, kwargs))):
                    self._guess_max_plate_nesting(model, guide, args, kwargs)
            terms = self._noisy_particles(model, guide, args, kwargs)
            if terms is not None:
                return terms
            model = self._vectorized_num_particles(model)
            guide = self._vectorized_num_particles(guide)
        runs = 1 if vectorized else self.num_particles
        particles = [self._particle(model, guide, args, kwargs) for _ in range(runs)]
        if self.num_particles == 1:
            return particles[0]
        return ELBOTerms(
            self._mean([particle.observed for particle in particles]),
            self._mean([particle.kl for particle in particles]),
            particles[-1].output,
        )

    def _noisy_particles(self, model: Any, guide: Any, args: Any, kwargs: Any) -> ELBOTerms | None:
        """Particles of a network none of whose weights is drawn: the KL is that of one.

        None where there are others, or where ``torch.vmap`` does not take the network: recurrent
        layers, batch normalisation in training.
        """
        if (
            not isinstance(model, BayesianNetwork)
            or not self.local_reparameterization
            or self.drawn
            or self._reused
            or self._loops_particles
        ):
            return None
        nesting = int(self.max_plate_nesting) - 1  # without the plate of particles, to their right
        places = [self.num_particles, *[1] * (nesting - 1)]
        try:
            with warnings.catch_warnings(), noisy_outputs(*places):
                warnings.simplefilter("error")  # of operations that vmap loops over
                traces = self._get_trace(model, guide, args, kwargs)
        except WeightReused as error:
            self._reused.add(error.name)
            return None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever it is, a loop shows whether the network can be called
            self._loops_particles = True
            return None
        terms = self._score(*traces, nesting)
        observed = {name: nll / self.num_particles for name, nll in terms.observed.items()}
        return terms._replace(observed=observed)

    def _mean(self, particles: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        # A vectorised run sums over its particles, so dividing by their number serves both.
        return {
            name: torch.stack([particle[name] for particle in particles]).sum() / self.num_particles
            for name in particles[0]
        }

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO estimate, in nats."""
        with torch.no_grad():
            loss = self.terms(model, guide, *args, **kwargs).loss(self.kl_weight)
        warn_if_nan(loss, "loss")
        return float(loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative ELBO estimate as a tensor to call ``backward`` on."""
        return self.terms(model, guide, *args, **kwargs).loss(self.kl_weight)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO estimate; its gradient is added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return float(loss.detach())

    def _particle(self, model: Any, guide: Any, args: Any, kwargs: Any) -> ELBOTerms:
        while True:
            try:
                traces = self._get_trace(model, guide, args, kwargs)
                return self._score(*traces, self.max_plate_nesting)
            except WeightReused as error:
                self._reused.add(error.name)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.local_reparameterization:
            guide = LocalReparameterization(self.drawn | self._reused, self.reuse)(guide)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        self._check_drawn(guide_trace)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    def _check_drawn(self, guide_trace: Any) -> None:
        for name in sorted(self.drawn - guide_trace.nodes.keys()):
            sites = guide_trace.stochastic_nodes
            raise ValueError(
                f'drawn names "{name}", which is no site of the guide.{closest(name, sites)} Its '
                f"sites: {', '.join(sites)}."
            )

    def _score(self, model_trace: Any, guide_trace: Any, nesting: float) -> ELBOTerms:
        observed, kl = {}, {}
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                observed[name] = -_log_prob_sum(site, nesting)
            elif name not in guide_trace.nodes:
                raise ValueError(f'the model samples site "{name}", but the guide does not.')
            else:
                kl[name] = self._kl(name, guide_trace.nodes[name], site, nesting)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                if not site["infer"].get("is_auxiliary"):
                    raise ValueError(
                        f'the guide samples site "{name}", but the model does not.\n  Try '
                        'infer={"is_auxiliary": True}, if the guide alone needs it.'
                    )
                _check_reparameterized(name, site)
                kl[name] = _log_prob_sum(site, nesting)
        return ELBOTerms(observed, kl, model_trace.nodes["_RETURN"]["value"])

    def _kl(self, name: str, guide_site: Any, model_site: Any, nesting: float) -> Tensor:
        _check_reparameterized(name, guide_site)
        try:
            kl = kl_divergence(guide_site["fn"], model_site["fn"])
        except NotImplementedError:
            return _log_prob_sum(guide_site, nesting) - _log_prob_sum(model_site, nesting)
        if kl.shape != guide_site["fn"].batch_shape:
            raise ValueError(
                f'at site "{name}", the guide has batch shape '
                f"{tuple(guide_site['fn'].batch_shape)} but the KL has {tuple(kl.shape)}: the "
                f"model's batch shape is {tuple(model_site['fn'].batch_shape)}."
            )
        total: Tensor = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()
        return total


def _device_of(values: Any) -> torch.device:
    found = [leaf.device for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return next((device for device in found if device.type != "cpu"), torch.device("cpu"))


def _sum(terms: dict[str, Tensor], like: dict[str, Tensor]) -> Tensor:
    if terms:
        return torch.stack(list(terms.values())).sum()
    return torch.zeros_like(next(iter(like.values()), torch.zeros(())))


def _check_reparameterized(name: str, site: Any) -> None:
    if not site["fn"].has_rsample:
        raise NotImplementedError(
            f'at site "{name}", the guide draws from {site["fn"]}, which is not reparameterized: '
            "the gradient of the draw would be missing.\n  Try pyro.infer.Trace_ELBO."
        )


def _log_prob_sum(site: Any, max_plate_nesting: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if is_validation_enabled():
        scored: Any = {**site, "log_prob": log_prob}
        check_site_shape(scored, max_plate_nesting)
    total: Tensor = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
    return total
