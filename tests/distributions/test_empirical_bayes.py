from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from scipy.optimize import minimize_scalar
from torch.distributions import kl_divergence

from bayes_svdo.distributions import AdditiveNoiseNormal, EmpiricalBayes, kl_empirical_bayes

LOC = torch.tensor([0.0, 0.3, -2.0], dtype=torch.float64)
LOG_SIGMA2 = torch.tensor([-1.0, -2.0, 1.0], dtype=torch.float64)


def test_kl_is_to_the_gaussian_with_the_optimal_variance() -> None:
    q = AdditiveNoiseNormal(LOC, LOG_SIGMA2)
    optimal = dist.Normal(torch.zeros(3).double(), (LOC**2 + LOG_SIGMA2.exp()).sqrt())
    torch.testing.assert_close(kl_divergence(q, EmpiricalBayes()), kl_divergence(q, optimal))


@pytest.mark.parametrize("index", [1, 2])
def test_kl_is_the_least_over_all_variances(index: int) -> None:
    q = AdditiveNoiseNormal(LOC[index], LOG_SIGMA2[index])

    def divergence(log_scale: float) -> float:
        prior = dist.Normal(torch.zeros(()).double(), torch.tensor(log_scale).double().exp())
        return kl_divergence(q, prior).item()

    found = minimize_scalar(divergence, bracket=(-1.0, 1.0), tol=1e-10)
    assert kl_divergence(q, EmpiricalBayes()).item() == pytest.approx(found.fun, rel=1e-9)


def test_kl_is_kl_empirical_bayes() -> None:
    q = AdditiveNoiseNormal(LOC, LOG_SIGMA2)
    assert torch.equal(kl_divergence(q, EmpiricalBayes()), kl_empirical_bayes(q.log_alpha))


def test_scoring_says_why_not_and_what_to_do() -> None:
    with pytest.raises(
        NotImplementedError, match=r"(?s)cannot score.*loc² \+ sigma².*kl_divergence"
    ):
        EmpiricalBayes().log_prob(torch.ones(2))


def test_stock_mean_field_elbo_scores_every_site_and_so_gets_that_error() -> None:
    def model() -> None:
        pyro.sample("w", EmpiricalBayes().expand([3]).to_event(1))

    def guide() -> None:
        pyro.sample("w", AdditiveNoiseNormal(LOC, LOG_SIGMA2).to_event(1))

    with pytest.raises(NotImplementedError, match=r"does not score the site"):
        TraceMeanField_ELBO().loss(model, guide)


def test_repr_says_what_it_is() -> None:
    assert repr(EmpiricalBayes()) == "EmpiricalBayes()"
    assert repr(EmpiricalBayes().expand([2, 3])) == "EmpiricalBayes(batch_shape=(2, 3))"
