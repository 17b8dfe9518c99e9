"""Model, guide and ELBO as one module: what a training step evaluates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayes_svdo.inference.elbo import TraceAnalyticKL_ELBO
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.surroundings import pyro_checks, random_numbers_kept
from bayes_svdo.models import BayesianNetwork


class ObjectiveValue(NamedTuple):
    """One estimate of the objective.

    Attributes:
        loss: Negative log likelihood plus weighted KL, nats, times the objective's scale; carries
            the gradient.
        terms: Negative log likelihood of each observed site, then KL of each latent one, nats.
        score: Sum over the batch of the likelihood's score (right answers, squared errors); 0 for
            a model written by hand.
    """

    loss: Tensor
    terms: Tensor
    score: Tensor


class Objective(nn.Module):
    """The objective of a model and a guide.

    Args:
        model: A :class:`~bayes_svdo.models.BayesianNetwork` or a Pyro model.
        guide: Its guide.
        elbo: How it is estimated.
        scale: What the loss is multiplied by, for example ``1 / num_data``; the terms are not.

    Attributes:
        data_weight: What the negative log likelihoods are multiplied by; None is 1.
        observed: Names of the observed sites, in the order of the terms; empty before a first call.
        latent: Names of the latent sites; likewise.
    """

    def __init__(
        self,
        model: Any,
        guide: AdditiveNoiseGuide,
        elbo: TraceAnalyticKL_ELBO,
        scale: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.guide, self.elbo, self.scale = model, guide, elbo, scale
        self.data_weight: Tensor | None = None
        self.observed: list[str] = []
        self.latent: list[str] = []
        # What it learned of other models would change the random numbers of this run.
        elbo.forget_reuse()

    def forward(self, kl_weight: Tensor, *batch: Any) -> ObjectiveValue:
        """One estimate on a batch; the weight multiplies the ELBO's own ``kl_weight``."""
        terms = self.elbo.terms(self.model, self.guide, *batch)
        self.observed, self.latent = list(terms.observed), list(terms.kl)
        vector = torch.stack([*terms.observed.values(), *terms.kl.values()])
        count = len(self.observed)
        if self.data_weight is not None:
            weighted = vector[:count] * self.data_weight.to(vector.dtype)
            vector = torch.cat([weighted, vector[count:]])
        weight = (kl_weight * self.elbo.kl_weight).to(vector.dtype)
        loss = vector[:count].sum() + weight * vector[count:].sum()
        scale = self.scale.to(loss.dtype) if isinstance(self.scale, Tensor) else self.scale
        return ObjectiveValue(
            scale * loss, vector.detach(), self._score(terms.output, vector, *batch)
        )

    def preview(self, *batch: Any) -> ObjectiveValue:
        """One estimate at full weight; random numbers, buffers and ELBO stay as they were."""
        weight = torch.ones((), dtype=torch.float64, device=next(self.parameters()).device)
        buffers = {name: value.clone() for name, value in self.named_buffers()}
        with random_numbers_kept(weight.device), pyro_checks(structure=False):
            value: ObjectiveValue = functional_call(self, buffers, (weight, *batch))
        self.elbo.forget_reuse()
        return value

    def _score(self, output: Any, like: Tensor, *batch: Any) -> Tensor:
        if not isinstance(self.model, BayesianNetwork):
            return like.new_zeros(())
        output = output.detach()
        if self.elbo.vectorize_particles and self.elbo.num_particles > 1:
            output = output.mean(0)
        return self.model.likelihood.score(output, batch[1]).sum()
