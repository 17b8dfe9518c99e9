"""Model, guide and ELBO as one module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, TraceAnalyticKL_ELBO
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.models import Categorical


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_the_elbos_with_both_kl_weights(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=dtype), torch.arange(20) % 2
    model = BayesianNetwork(nn.Linear(3, 2).to(dtype), Categorical(), num_data=100)
    guide = AdditiveNoiseGuide(model)
    elbo = TraceAnalyticKL_ELBO(kl_weight=0.5)
    with local_parameters():
        objective = Objective(model, guide, elbo)
        torch.manual_seed(1)
        value = objective(torch.tensor(0.2, dtype=torch.float64), x, y)
        torch.manual_seed(1)
        terms = elbo.terms(model, guide, x, y)
    assert value.loss.dtype == dtype
    torch.testing.assert_close(value.loss, terms.loss(0.1))
    assert (objective.observed, objective.latent) == (list(terms.observed), list(terms.kl))
    torch.testing.assert_close(value.terms, torch.stack([terms.nll, terms.total_kl()]).detach())
    assert not value.terms.requires_grad
    assert value.score == (terms.output.argmax(-1) == y).sum()
