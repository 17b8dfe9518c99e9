from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from bayes_svdo.distributions import AdditiveNoiseNormal, LogUniform, kl_log_uniform

LOC = torch.tensor([[0.5, -2.0, 0.05], [1.0, 0.1, 3.0]], dtype=torch.float64)
LOG_SIGMA2 = torch.tensor([[-3.0, 0.0, -2.0], [1.0, -4.0, -1.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def empty_param_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def prior_alone(kl: str = "exact") -> None:
    pyro.sample("w", LogUniform(kl).expand([2, 3]).to_event(2))


def guide() -> None:
    pyro.sample("w", AdditiveNoiseNormal(LOC, LOG_SIGMA2).to_event(2))


# --- the density


def test_log_prob_is_minus_log_size_up_to_a_constant() -> None:
    w = torch.tensor([0.01, -0.3, 1.0, -50.0], dtype=torch.float64)
    log_p = LogUniform().log_prob(w)
    torch.testing.assert_close(log_p - log_p[2], -w.abs().log())


def test_log_prob_is_infinite_at_zero_as_the_density() -> None:
    assert LogUniform().log_prob(torch.tensor(0.0)) == torch.inf


def test_log_prob_broadcasts_with_the_batch_shape() -> None:
    prior = LogUniform().expand([2, 3])
    assert prior.log_prob(torch.ones(4, 2, 3)).shape == (4, 2, 3)
    assert prior.log_prob(torch.ones(3)).shape == (2, 3)
    assert prior.to_event(2).log_prob(torch.ones(4, 2, 3)).shape == (4,)


@pytest.mark.parametrize("log_sigma2", [-4.0, -1.0, 2.0])
def test_monte_carlo_kl_of_the_density_is_the_exact_kl(log_sigma2: float) -> None:
    """E_q[log q - log p]; 5 standard errors, 3 cases: 1 failure in 6e5 seeds."""
    torch.manual_seed(3)
    q = AdditiveNoiseNormal(torch.tensor(0.7, dtype=torch.float64), log_sigma2)
    w = q.sample([1_000_000])
    draws = q.log_prob(w) - LogUniform().log_prob(w)
    exact = kl_divergence(q, LogUniform("exact"))
    assert abs(draws.mean() - exact) < 5 * draws.std() / 1000


def test_values_are_validated_when_asked() -> None:
    with pytest.raises(ValueError, match=r"within the support"):
        LogUniform(validate_args=True).log_prob(torch.tensor([1.0, torch.nan]))
    assert LogUniform(validate_args=False).log_prob(torch.tensor([torch.nan])).isnan().all()


def test_support_is_the_real_line() -> None:
    assert LogUniform.support is constraints.real
    assert not LogUniform().has_rsample


# --- the choice of the KL


@pytest.mark.parametrize("kl", ["exact", "molchanov2017", "poster2016", "kingma2015"])
def test_kl_names_the_divergence_used(kl: str) -> None:
    q = AdditiveNoiseNormal(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0]))
    expected = kl_log_uniform(q.log_alpha, kl)
    assert torch.equal(kl_divergence(q, LogUniform(kl)), expected)
    assert torch.equal(kl_divergence(q, LogUniform(kl).expand([2])), expected)
    assert LogUniform(kl).expand([2]).kl == kl


def test_kingma_raises_above_alpha_one_unless_told_to_extrapolate() -> None:
    q = AdditiveNoiseNormal(torch.tensor([1.0, 2.0]), 1.0)
    with pytest.raises(ValueError, match=r"alpha <= 1.*1 of 2"):
        kl_divergence(q, LogUniform("kingma2015"))
    prior = LogUniform("kingma2015", extrapolate=True).expand([2])
    assert prior.extrapolate
    assert kl_divergence(q, prior).isfinite().all()


def test_unknown_kl_is_refused_when_the_prior_is_made() -> None:
    with pytest.raises(ValueError, match=r'"molchanov17"\. Did you mean "molchanov2017"\?'):
        LogUniform("molchanov17")


def test_repr_says_what_it_is() -> None:
    assert repr(LogUniform()) == 'LogUniform("molchanov2017")'
    assert (
        repr(LogUniform("kingma2015", extrapolate=True).expand([2, 3]))
        == 'LogUniform("kingma2015", extrapolate=True, batch_shape=(2, 3))'
    )


# --- in Pyro


@pytest.mark.parametrize("kl", ["exact", "molchanov2017", "poster2016"])
def test_stock_mean_field_elbo_takes_the_analytic_kl(kl: str) -> None:
    loss = TraceMeanField_ELBO().differentiable_loss(lambda: prior_alone(kl), guide)
    q = AdditiveNoiseNormal(LOC, LOG_SIGMA2)
    torch.testing.assert_close(loss, kl_divergence(q, LogUniform(kl)).sum())


def test_stock_elbo_agrees_in_the_mean_with_the_exact_kl() -> None:
    """Monte Carlo over 2,000 draws of 6 weights; 5 standard errors: 1 failure in 2e6 seeds."""
    torch.manual_seed(5)
    elbo = Trace_ELBO()
    with torch.no_grad():
        losses = torch.stack([elbo.differentiable_loss(prior_alone, guide) for _ in range(2000)])
    exact = TraceMeanField_ELBO().loss(prior_alone, guide)
    assert abs(losses.mean() - exact) < 5 * losses.std() / 2000**0.5


def test_a_model_is_fitted_by_stock_svi() -> None:
    """Two true weights of ten: they keep a small alpha, the others lose themselves in noise."""
    pyro.set_rng_seed(0)
    x = torch.randn(200, 10)
    y = x[:, :2] @ torch.tensor([2.0, -1.0]) + 0.1 * torch.randn(200)

    def model() -> None:
        w = pyro.sample("w", LogUniform().expand([10]).to_event(1))
        with pyro.plate("data", 200):
            pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)

    def posterior() -> AdditiveNoiseNormal:
        loc = pyro.param("loc", torch.full((10,), 0.1))
        return AdditiveNoiseNormal(loc, pyro.param("log_sigma2", torch.full((10,), -6.0)))

    svi = SVI(
        model,
        lambda: pyro.sample("w", posterior().to_event(1)),
        pyro.optim.Adam({"lr": 0.02}),
        TraceMeanField_ELBO(),
    )
    for _ in range(1000):
        svi.step()
    log_alpha = posterior().log_alpha.detach()
    assert (log_alpha[:2] < -6).all()
    assert (log_alpha[2:] > log_alpha[:2].max() + 4).all()


def test_a_plate_expands_the_prior() -> None:
    def model() -> Tensor:
        with pyro.plate("weights", 4):
            return pyro.sample("w", LogUniform("exact"))

    trace = poutine.trace(poutine.condition(model, {"w": torch.ones(4)})).get_trace()
    fn = trace.nodes["w"]["fn"]
    assert isinstance(fn, LogUniform)
    assert fn.kl == "exact"
    assert fn.batch_shape == (4,)
    assert trace.log_prob_sum().isfinite()


def test_an_unguided_model_says_what_to_do() -> None:
    with pytest.raises(NotImplementedError, match=r"(?s)improper.*guide.*condition"):
        poutine.trace(prior_alone).get_trace()


def test_autonormal_scores_the_density_once_it_knows_where_to_start() -> None:
    """It hands Pyro a Delta, so its KL is by Monte Carlo: 5 standard errors, 1 failure in 2e6."""
    torch.manual_seed(5)
    auto = AutoNormal(prior_alone, init_loc_fn=init_to_value(values={"w": LOC}), init_scale=0.2)
    elbo = TraceMeanField_ELBO()
    with torch.no_grad():
        losses = torch.stack([elbo.differentiable_loss(prior_alone, auto) for _ in range(1000)])
    exact = kl_divergence(dist.Normal(LOC, 0.2), LogUniform("exact")).sum()
    assert abs(losses.mean() - exact) < 5 * losses.std() / 1000**0.5


def test_scale_and_mask_apply_to_the_kl() -> None:
    q = AdditiveNoiseNormal(LOC, LOG_SIGMA2)
    mask = torch.tensor([[True, False, True], [False, True, True]])

    def masked(fn: dist.Distribution) -> None:
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with poutine.scale(scale=0.5), poutine.mask(mask=mask), rows, columns:
            pyro.sample("w", fn)

    loss = TraceMeanField_ELBO().differentiable_loss(
        lambda: masked(LogUniform()), lambda: masked(q)
    )
    torch.testing.assert_close(loss, 0.5 * kl_divergence(q, LogUniform())[mask].sum())
