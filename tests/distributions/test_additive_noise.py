from __future__ import annotations

import copy
import math
from unittest import mock

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from bayes_svdo.distributions import AdditiveNoiseNormal, LogUniform, log_alpha

LOC = torch.tensor([[0.5, -2.0, 0.0], [1.0, 0.1, 3.0]], dtype=torch.float64)
LOG_SIGMA2 = torch.tensor([-3.0, 0.0, 1.0], dtype=torch.float64)


@pytest.fixture
def q() -> AdditiveNoiseNormal:
    return AdditiveNoiseNormal(LOC, LOG_SIGMA2)


@pytest.fixture
def normal() -> dist.Normal:
    return dist.Normal(LOC, (LOG_SIGMA2 / 2).exp())


@pytest.mark.parametrize(
    "property_", ["mean", "mode", "stddev", "variance", "scale", "batch_shape"]
)
def test_properties_are_those_of_the_normal(
    q: AdditiveNoiseNormal, normal: dist.Normal, property_: str
) -> None:
    torch.testing.assert_close(getattr(q, property_), getattr(normal, property_))


def test_log_prob_entropy_and_quantiles_are_those_of_the_normal(
    q: AdditiveNoiseNormal, normal: dist.Normal
) -> None:
    w = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(q.log_prob(w), normal.log_prob(w))
    torch.testing.assert_close(q.entropy(), normal.entropy())
    torch.testing.assert_close(q.cdf(w), normal.cdf(w))
    torch.testing.assert_close(q.icdf(torch.tensor(0.3)), normal.icdf(torch.tensor(0.3)))


def test_kl_to_a_proper_prior_is_that_of_the_normal(
    q: AdditiveNoiseNormal, normal: dist.Normal
) -> None:
    for prior in (dist.Normal(0.0, 2.0), dist.Laplace(0.0, 1.0)):
        torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(normal, prior))
        torch.testing.assert_close(
            kl_divergence(dist.Normal(LOC, 0.5), q), kl_divergence(dist.Normal(LOC, 0.5), normal)
        )


def test_log_alpha_is_the_one_definition(q: AdditiveNoiseNormal) -> None:
    assert torch.equal(q.log_alpha, log_alpha(*torch.broadcast_tensors(LOC, LOG_SIGMA2)))
    assert q.log_alpha.isfinite().all()  # with a weight of exactly zero


def test_snr_is_size_over_standard_deviation(q: AdditiveNoiseNormal) -> None:
    torch.testing.assert_close(q.snr, LOC.abs() / q.stddev)
    assert q.snr[0, 2] == 0
    torch.testing.assert_close(q.snr[1], (-q.log_alpha[1] / 2).exp())


@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_draws_have_the_moments(q: AdditiveNoiseNormal, method: str) -> None:
    """5 standard errors on 6 means and 6 variances: fails for 1 seed in 1.4e5."""
    torch.manual_seed(11)
    n = 200_000
    draws = getattr(q, method)([n])
    assert draws.shape == (n, 2, 3)
    assert ((draws.mean(0) - q.mean).abs() < 5 * q.stddev / n**0.5).all()
    assert ((draws.var(0) / q.variance - 1).abs() < 5 * (2 / n) ** 0.5).all()


def test_draws_are_differentiable_in_both_parameters() -> None:
    loc = LOC.clone().requires_grad_()
    log_sigma2 = LOG_SIGMA2.clone().requires_grad_()
    torch.manual_seed(0)
    draw = AdditiveNoiseNormal(loc, log_sigma2).rsample()
    draw.sum().backward()
    torch.testing.assert_close(loc.grad, torch.ones_like(LOC))
    noise = (draw.detach() - LOC) / 2  # dw/dlog_sigma2 = sigma eps / 2
    torch.testing.assert_close(log_sigma2.grad, noise.sum(0))


def test_standard_deviation_is_not_computed_until_asked_for() -> None:
    with mock.patch.object(AdditiveNoiseNormal, "scale", new_callable=mock.PropertyMock) as scale:
        q = AdditiveNoiseNormal(LOC, LOG_SIGMA2, validate_args=True)
        assert q.expand([4, 2, 3]).to_event(2).batch_shape == (4,)
        assert q.log_alpha.shape == q.entropy().shape == q.log_prob(LOC).shape
        assert kl_divergence(q, LogUniform()).shape == (2, 3)
        repr(q)
    scale.assert_not_called()


def test_expand_keeps_the_class_and_copies_nothing(q: AdditiveNoiseNormal) -> None:
    new = q.expand([5, 2, 3])
    assert type(new) is AdditiveNoiseNormal
    assert new.batch_shape == new.log_alpha.shape == new.rsample().shape == (5, 2, 3)
    assert new.loc.data_ptr() == LOC.data_ptr()
    assert q.expand_by([4]).batch_shape == (4, 2, 3)
    event = q.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((2,), (3,))
    assert isinstance(event.expand([7, 2]).base_dist, AdditiveNoiseNormal)


def test_subclass_with_its_own_constructor_must_define_expand() -> None:
    class Child(AdditiveNoiseNormal):
        def __init__(self) -> None:
            super().__init__(0.0, 0.0)

    with pytest.raises(NotImplementedError, match=r"Child.*expand"):
        Child().expand([2])


def test_numbers_and_tensors_mix() -> None:
    assert AdditiveNoiseNormal(0.0, -1.0).batch_shape == ()
    assert AdditiveNoiseNormal(torch.zeros(3), -1.0).log_sigma2.shape == (3,)
    assert AdditiveNoiseNormal(torch.zeros(3, 1), torch.zeros(2)).batch_shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    q = AdditiveNoiseNormal(LOC.to(dtype), LOG_SIGMA2.to(dtype))
    for value in (q.rsample(), q.sample(), q.log_alpha, q.scale, q.entropy(), q.log_prob(LOC[0])):
        assert value.isfinite().all()
    assert q.rsample().dtype == q.log_alpha.dtype == dtype


def test_extreme_variances_keep_log_prob_finite() -> None:
    """log_sigma2 = ±100: the variance squared leaves float32, the log density does not."""
    q = AdditiveNoiseNormal(torch.zeros(2), torch.tensor([-100.0, 100.0]))
    expected = -0.5 * (q.log_sigma2 + math.log(2 * math.pi))
    torch.testing.assert_close(q.log_prob(torch.zeros(2)), expected)


@pytest.mark.parametrize("name", ["loc", "log_sigma2"])
def test_nan_parameters_are_refused_by_name(name: str) -> None:
    arguments = {"loc": torch.zeros(2), "log_sigma2": torch.zeros(2)}
    arguments[name] = torch.tensor([0.0, torch.nan])
    with pytest.raises(ValueError, match=rf"Expected parameter {name} .*Real\(\)"):
        AdditiveNoiseNormal(**arguments, validate_args=True)
    AdditiveNoiseNormal(**arguments, validate_args=False)


def test_values_are_validated_when_asked_also_after_expand() -> None:
    nan = torch.full((3,), torch.nan)
    with pytest.raises(ValueError, match=r"within the support"):
        AdditiveNoiseNormal(0.0, 0.0, validate_args=True).expand([3]).log_prob(nan)
    quiet = AdditiveNoiseNormal(0.0, 0.0, validate_args=False).expand([3])
    assert quiet.log_prob(nan).isnan().all()


def test_repr_and_copy_show_the_parameters(q: AdditiveNoiseNormal) -> None:
    assert "loc" in repr(q)
    assert "log_sigma2" in repr(q)
    assert torch.equal(copy.deepcopy(q).log_alpha, q.log_alpha)
