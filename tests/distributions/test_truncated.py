from __future__ import annotations

import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.reparam import TransformReparam
from torch import Tensor, nn

from bayes_svdo.distributions import TruncatedLogUniform
from bayes_svdo.distributions.truncated import SignedExpm1
from bayes_svdo.inference import AdditiveNoiseGuide
from bayes_svdo.models import BayesianNetwork, Gaussian

LOW, HIGH = 0.02, 5.0


def prior(low: float = LOW, high: float = HIGH) -> TruncatedLogUniform:
    return TruncatedLogUniform(torch.tensor(low, dtype=torch.float64), high)


def moment(integrand, low: float = LOW, high: float = HIGH) -> float:
    """``E integrand(w)`` by quadrature of ``1 / (|w| + low)``, normalised by itself."""
    ends = [-high, -low, 0, low, high]
    density = mpmath.quad(lambda w: 1 / (abs(w) + low), ends)
    return float(mpmath.quad(lambda w: integrand(w) / (abs(w) + low), ends) / density)


# --- the density


@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (1e-6, 1e3), (1.0, 1.001)])
def test_the_density_is_that_of_the_log_uniform_levelled_off(low: float, high: float) -> None:
    points = np.array([0.0, 0.3 * low, -low, -0.9 * high, high])
    total = float(mpmath.quad(lambda w: 1 / (abs(w) + low), [-high, -low, 0, low, high]))
    expected = -np.log(total * (np.abs(points) + low))
    got = prior(low, high).log_prob(torch.from_numpy(points))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


def test_far_above_low_it_is_the_log_uniform_prior() -> None:
    w = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)
    log_p = prior(1e-9).log_prob(w)
    torch.testing.assert_close(log_p - log_p[1], -w.abs().log(), atol=1e-8, rtol=0)


def test_outside_there_is_nothing() -> None:
    outside = torch.tensor([-HIGH - 1e-6, HIGH + 1e-6], dtype=torch.float64)
    unchecked = TruncatedLogUniform(
        torch.tensor(LOW, dtype=torch.float64), HIGH, validate_args=False
    )
    assert (unchecked.log_prob(outside) == -math.inf).all()
    assert unchecked.cdf(outside).tolist() == [0.0, 1.0]
    for function in (prior().log_prob, prior().cdf):
        with pytest.raises(ValueError, match="within the support"):
            function(outside)


@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (1e-4, 100.0), (1.0, 1.5)])
def test_moments_and_entropy_are_those_of_quadrature(low: float, high: float) -> None:
    p = prior(low, high)
    assert float(p.variance) == pytest.approx(moment(lambda w: w * w, low, high), rel=1e-9)
    assert float(p.mean) == float(p.mode) == 0.0
    log_total = math.log(mpmath.quad(lambda w: 1 / (abs(w) + low), [-high, -low, 0, low, high]))
    entropy = moment(lambda w: mpmath.log(abs(w) + low) + log_total, low, high)
    assert float(p.entropy()) == pytest.approx(entropy, rel=1e-9)


def test_the_cdf_is_the_integral_of_the_density() -> None:
    for w in (-4.0, -0.01, 0.0, 0.5, 5.0):
        ends = sorted({-HIGH, *(e for e in (-LOW, 0.0, LOW) if e < w), w})
        mass = mpmath.quad(lambda v: float(prior().log_prob(torch.tensor(float(v))).exp()), ends)
        got = float(prior().cdf(torch.tensor(w, dtype=torch.float64)))
        assert got == pytest.approx(float(mass), abs=1e-6)


def test_quantiles_invert_the_cdf() -> None:
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    w = prior().icdf(q)
    torch.testing.assert_close(prior().cdf(w), q)
    torch.testing.assert_close(w[[0, 50, 100]], torch.tensor([-HIGH, 0.0, HIGH]).double())


# --- draws


def test_draws_have_the_distribution() -> None:
    """Kolmogorov-Smirnov: fails by chance for 1 seed of 1,000."""
    torch.manual_seed(0)
    draws = prior().sample([20_000]).numpy()
    cdf = lambda w: prior().cdf(torch.from_numpy(w)).numpy()  # noqa: E731
    assert scipy.stats.kstest(draws, cdf).pvalue > 1e-3
    wrong = lambda w: prior(1.5 * LOW).cdf(torch.from_numpy(w)).numpy()  # noqa: E731
    assert scipy.stats.kstest(draws, wrong).pvalue < 1e-3


def test_draws_in_single_precision_stay_in_the_support() -> None:
    torch.manual_seed(0)
    p = TruncatedLogUniform(1e-5, 1e3)
    draws = p.sample([100_000])
    assert draws.dtype == torch.float32
    assert p.support.check(draws).all()
    assert p.support.check(p.icdf(torch.tensor([0.0, 1.0]))).all()


def test_draws_move_with_the_ends() -> None:
    """dw/dlow and dw/dhigh of a draw, at fixed noise, by central differences."""
    low = torch.tensor(LOW, dtype=torch.float64, requires_grad=True)
    high = torch.tensor(HIGH, dtype=torch.float64, requires_grad=True)

    def draw(low: Tensor, high: Tensor) -> Tensor:
        torch.manual_seed(3)
        return TruncatedLogUniform(low, high, validate_args=False).rsample([5])

    assert torch.autograd.gradcheck(draw, (low, high))
    assert not TruncatedLogUniform(low, high).sample().requires_grad


# --- conventions


def test_shapes_are_those_of_a_pyro_distribution() -> None:
    p = TruncatedLogUniform(torch.tensor([0.1, 0.2, 0.3]), 1.0)
    assert p.batch_shape == (3,)
    assert p.event_shape == ()
    wide = p.expand([2, 3])
    assert wide.sample([4]).shape == (4, 2, 3)
    assert wide.log_prob(torch.zeros(3)).shape == (2, 3)
    assert wide.variance.shape == wide.entropy().shape == (2, 3)
    event = wide.to_event(2)
    assert event.log_prob(event.sample([4])).shape == (4,)
    torch.testing.assert_close(wide.log_prob(torch.zeros(2, 3))[1], p.log_prob(torch.zeros(3)))
    assert p.expand_by([5]).batch_shape == (5, 3)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="low"):
        TruncatedLogUniform(-1.0, 1.0, validate_args=True)
    with pytest.raises(ValueError, match=r"low must be below high, but low is 2.0 and high is 1"):
        TruncatedLogUniform(2.0, 1.0, validate_args=True)
    assert not TruncatedLogUniform(0.1, 1.0, validate_args=False).expand([2])._validate_args


def test_repr_says_what_it_is() -> None:
    assert repr(TruncatedLogUniform(0.01, 10.0)) == "TruncatedLogUniform(0.01, 10)"
    wide = TruncatedLogUniform(0.01, 10.0).expand([2, 3])
    assert repr(wide) == "TruncatedLogUniform(batch_shape=(2, 3))"
    assert repr(TruncatedLogUniform(0.01, 10.0).expand([1])).endswith("10, batch_shape=(1,))")


def test_the_transform_and_its_inverse_and_slope() -> None:
    transform = SignedExpm1(torch.tensor(LOW, dtype=torch.float64))
    u = torch.tensor([-6.0, -0.1, 0.0, 1e-9, 3.0], dtype=torch.float64, requires_grad=True)
    w = transform(u)
    torch.testing.assert_close(transform.inv(w), u)
    (slope,) = torch.autograd.grad(w.sum(), u)  # at 0, too
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, w), slope.log())
    assert transform == SignedExpm1(torch.tensor(LOW, dtype=torch.float64))
    assert transform != SignedExpm1(torch.tensor(1.0))
    assert transform != dist.transforms.identity_transform


def test_what_is_scored_through_the_transform_is_the_density() -> None:
    p = prior()
    u = p.base_dist.sample([10])
    (transform,) = p.transforms
    w = transform(u)
    through = p.base_dist.log_prob(u) - transform.log_abs_det_jacobian(u, w)
    torch.testing.assert_close(p.log_prob(w), through)


# --- in Pyro


def test_pyro_reparameterises_it() -> None:
    def model() -> Tensor:
        return pyro.sample("w", prior().expand([4]).to_event(1))

    trace = poutine.trace(poutine.reparam(model, {"w": TransformReparam()})).get_trace()
    base, value = trace.nodes["w_base"]["value"], trace.nodes["w"]["value"]
    torch.testing.assert_close(value, prior().transforms[0](base))
    assert trace.nodes["w_base"]["fn"].base_dist.high[0] == float(prior().log_range)


def test_a_network_takes_it_for_prior_and_draws_from_it() -> None:
    torch.manual_seed(0)
    model = BayesianNetwork(
        nn.Linear(3, 2), Gaussian(), 10, prior=TruncatedLogUniform(LOW, HIGH)
    ).double()
    assert model.prior.low.dtype == torch.float64  # it moves with the network
    assert model.prior.transforms[0].low.dtype == torch.float64
    draws = Predictive(model, num_samples=50)(torch.zeros(1, 3, dtype=torch.float64))
    assert draws["weight"].squeeze().shape == (50, 2, 3)
    assert draws["weight"].abs().max() <= HIGH
    with pytest.raises(NotImplementedError, match="needs a prior with real support"):
        AdditiveNoiseGuide(model)
