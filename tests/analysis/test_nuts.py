"""NUTS against closed forms and quadrature; the random tests own their failure rates."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayes_svdo import LogUniform
from bayes_svdo.analysis import NutsPosterior, NutsWarning, nuts, nuts_posterior
from bayes_svdo.distributions import TruncatedLogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Bernoulli, Gaussian, dense

NOISE = 0.5
PRIOR = TruncatedLogUniform(0.05, 5.0)


def linear(num_weights=2, num_data=20, weight=0.3, seed=0):
    """Two correlated inputs; q is unfitted, of which NUTS uses nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_data, num_weights, generator=generator)
    x[:, -1] += x[:, 0]
    y = weight * x.sum(1, keepdim=True)
    y += NOISE * torch.randn(y.shape, generator=generator)
    model = BayesianNetwork(nn.Linear(num_weights, 1, bias=False), Gaussian(NOISE), num_data)
    return Posterior(model, AdditiveNoiseGuide(model)), x, y


def within(drawn, expected, ess, sd, errors=5):
    """5 standard errors: 1 failure in 2e6 per number."""
    return (np.abs(drawn - expected) < errors * sd / np.sqrt(ess)).all()


def short(posterior, x, y, draws=20, **settings):
    """A chain of too few draws to be relied upon."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NutsWarning)
        return nuts_posterior(posterior, x, y, draws, warmup=30, chains=1, **settings)


def test_under_a_normal_prior_it_has_the_conjugate_posterior():
    posterior, x, y = linear()
    found = nuts_posterior(posterior, x, y, 250, warmup=150, prior=dist.Normal(0.0, 1.0), seed=0)
    precision = (x.double().T @ x.double()) / NOISE**2 + torch.eye(2)
    covariance = precision.inverse()
    mean = (covariance @ (x.double().T @ y.double()) / NOISE**2)[:, 0].numpy()
    sd = covariance.diag().sqrt().numpy()
    drawn = found.weights["weight"]
    assert drawn.shape == (500, 1, 2)
    assert drawn.dtype == np.float64
    ess = found.ess["weight"][0]
    assert (ess > 80).all()
    assert within(drawn.mean(0)[0], mean, ess, sd)
    # The variance of a Gaussian's sample variance is 2 sd^4 / n.
    assert within(drawn.var(0)[0], sd**2, 0.5 * ess, np.sqrt(2) * sd**2)
    correlation = float(covariance[0, 1]) / (sd[0] * sd[1])
    assert np.corrcoef(drawn[:, 0].T)[0, 1] == pytest.approx(correlation, abs=0.2)
    assert found.chains == 2
    assert found.divergences == 0
    assert found.worst_rhat < 1.05
    assert found.trouble == ""


def test_under_the_truncated_prior_it_has_the_posterior_of_quadrature():
    """A weight that may be 0: its marginal has a peak there and a shoulder at least squares."""
    posterior, x, y = linear(1, 10)
    y += (2.0 * NOISE / x.norm() - (x * y).sum() / x.square().sum()) * x  # 2 sds from 0
    found = nuts_posterior(posterior, x, y, 500, warmup=200, prior=PRIOR, seed=0)
    grid = torch.cat([-torch.logspace(-6, math.log10(5), 4000).flip(0),
                      torch.logspace(-6, math.log10(5), 4000)]).double()  # fmt: skip
    residual = y.double().T - grid[:, None] * x.double().T
    log_p = -0.5 * residual.square().sum(1) / NOISE**2 + PRIOR.log_prob(grid)
    density = (log_p - log_p.max()).exp()
    density /= torch.trapezoid(density, grid)

    def expected(values):
        return float(torch.trapezoid(values * density, grid))

    mean = expected(grid)
    sd = math.sqrt(expected((grid - mean) ** 2))
    drawn, ess = found.weights["weight"][:, 0, 0], float(found.ess["weight"][0, 0])
    assert within(drawn.mean(), mean, ess, sd)
    near = expected((grid.abs() < 0.05).double())
    assert 0.1 < near < 0.9
    assert within((np.abs(drawn) < 0.05).mean(), near, ess, math.sqrt(near * (1 - near)))
    fourth = expected((grid - mean) ** 4)
    assert within(drawn.var(), sd**2, ess, math.sqrt(fourth - sd**4))


def test_draws_do_not_leave_the_support():
    posterior, x, y = linear()
    for prior in (TruncatedLogUniform(0.01, 0.2), dist.Uniform(-0.2, 0.2)):
        found = short(posterior, x, y, prior=prior, seed=0)
        assert np.abs(found.weights["weight"]).max() <= 0.2


def test_a_prior_of_single_precision_serves_as_well():
    posterior, x, y = linear()
    double = TruncatedLogUniform(torch.tensor(0.125, dtype=torch.float64), 4.0)
    first, second = (
        short(posterior, x, y, prior=prior, seed=0)
        for prior in (TruncatedLogUniform(0.125, 4.0), double)
    )
    np.testing.assert_array_equal(first.weights["weight"], second.weights["weight"])


def test_biases_are_held_and_every_site_has_its_draws():
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    model = BayesianNetwork(dense((3, 2, 1)), Bernoulli(), 30)
    posterior = Posterior(model, AdditiveNoiseGuide(model))
    y = (x[:, :1] > 0).float()
    before = {name: value.clone() for name, value in posterior.model.state_dict().items()}
    found = short(posterior, x, y, draws=21, prior=dist.Normal(0.0, 1.0), seed=0)
    assert {name: v.shape for name, v in found.weights.items()} == {
        "fc1.weight": (21, 2, 3),
        "fc2.weight": (21, 1, 2),
    }
    assert found.rhat["fc1.weight"].shape == found.ess["fc1.weight"].shape == (2, 3)
    assert np.isfinite(found.rhat["fc2.weight"]).all()
    for name, value in posterior.model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


def test_a_seed_reproduces_it_and_nothing_around_changes():
    posterior, x, y = linear()
    prior = dist.Normal(0.0, 1.0)
    state = torch.get_rng_state()
    first, again = (short(posterior, x, y, prior=prior, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weights["weight"], again.weights["weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())
    other = short(posterior, x, y, prior=prior, seed=4)
    assert (other.weights["weight"] != first.weights["weight"]).any()


def test_chains_that_disagree_are_warned_of(monkeypatch):
    centres = iter([0.0, 5.0])

    def chain(target, number, draws, warmup, target_accept):
        return next(centres) + torch.randn(draws, number, dtype=torch.float64), 3

    monkeypatch.setattr(nuts, "_chain", chain)
    posterior, x, y = linear()
    with pytest.warns(NutsWarning, match=r"6 of 100 draws diverged and R-hat is [1-9].*\n  Try mo"):
        found = nuts_posterior(posterior, x, y, 50, prior=PRIOR, seed=0)
    assert found.divergences == 6
    assert found.worst_rhat > 1.5
    assert "6 divergences; prior TruncatedLogUniform(0.05, 5)" in repr(found)


def test_an_unknown_rhat_is_trouble():
    nan = {"w": np.array([np.nan])}
    found = NutsPosterior({"w": np.zeros((4, 1))}, nan, {"w": np.ones(1)}, 0, 1, PRIOR)
    assert found.trouble == "R-hat is nan (above 1.05)"
    assert found.least_ess == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prior": LogUniform()}, ValueError, "must be proper, but LogUniform is not"),
        ({"prior": 3.0}, TypeError, "prior must be a distribution over one weight, but is 3.0"),
        ({"prior": dist.Normal(torch.zeros(2), 1.0)}, ValueError, r"batch shape \(2,\)"),
        ({"draws": 5}, ValueError, "draws must be an integer of at least 20, but is 5"),
        ({"warmup": 0}, ValueError, "warmup must be an integer of at least 1"),
        ({"chains": 0}, ValueError, "chains must be an integer of at least 1"),
        ({"target_accept": 1.0}, ValueError, r"target_accept must lie in \(0, 1\), but is 1.0"),
        ({"seed": "a"}, ValueError, "seed must be an integer or None"),
        ({"max_weights": 1}, ValueError, r"the model has 2 weights, but max_weights is 1.*\n  Try"),
        ({"y": None}, TypeError, "y must be a tensor or an array"),
        ({"y": torch.zeros(3, 1)}, ValueError, "x has 20 data points, but y has 3"),
        (
            {"prior": dist.Normal(torch.tensor(math.nan), 1.0, validate_args=False)},
            ValueError,
            "is nan at a random start",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, error, message):
    posterior, x, y = linear()
    with pytest.raises(error, match=message):
        nuts_posterior(**{"posterior": posterior, "x": x, "y": y, "prior": PRIOR, **settings})


def test_hand_written_models_are_refused(hand_written):
    with pytest.raises(TypeError, match="nuts_posterior needs a BayesianNetwork"):
        nuts_posterior(hand_written, torch.zeros(1), torch.zeros(1), prior=PRIOR)
    with pytest.raises(TypeError, match="nuts_posterior needs a Posterior"):
        nuts_posterior(3, torch.zeros(1), torch.zeros(1), prior=PRIOR)
