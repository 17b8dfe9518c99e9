from __future__ import annotations

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import kl_divergence

from bayes_svdo.distributions import AdditiveNoiseNormal, EmpiricalBayes, LogUniform, log_alpha
from bayes_svdo.distributions.scale_free import ScaleFreePrior

PRIORS = [LogUniform(), LogUniform("exact"), LogUniform("poster2016"), EmpiricalBayes()]
LOC = torch.tensor([[1.0, -0.2, 0.0], [3.0, 1e-3, 0.5]])
LOG_SIGMA2 = torch.tensor([-1.0, -3.0, 0.5])

every_prior = pytest.mark.parametrize("prior", PRIORS, ids=repr)


def posteriors() -> list[torch.distributions.Distribution]:
    scale = (LOG_SIGMA2 / 2).exp()
    return [
        AdditiveNoiseNormal(LOC, LOG_SIGMA2),
        dist.Normal(LOC, scale),
        torch.distributions.Normal(LOC, scale),
    ]


@every_prior
@pytest.mark.parametrize("index", range(3), ids=["additive", "pyro", "torch"])
def test_kl_divergence_is_the_elementwise_kl(prior: ScaleFreePrior, index: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when two rules are equally specific
        kl = kl_divergence(posteriors()[index], prior)
    assert kl.shape == (2, 3)
    torch.testing.assert_close(kl, prior.kl_from(log_alpha(LOC, LOG_SIGMA2)))


@every_prior
@pytest.mark.parametrize("index", range(3), ids=["additive", "pyro", "torch"])
@pytest.mark.parametrize("event_dims", [1, 2])
def test_kl_divergence_sums_over_event_dimensions(
    prior: ScaleFreePrior, index: int, event_dims: int
) -> None:
    q = posteriors()[index]
    kl = kl_divergence(dist.Independent(q, event_dims), prior.expand([2, 3]).to_event(event_dims))
    expected = kl_divergence(q, prior).sum(tuple(range(-event_dims, 0)))
    assert kl.shape == (2, 3)[: 2 - event_dims]
    torch.testing.assert_close(kl, expected)


@every_prior
def test_kl_divergence_has_the_shape_both_broadcast_to(prior: ScaleFreePrior) -> None:
    q = AdditiveNoiseNormal(torch.ones(3), -1.0)
    assert kl_divergence(q, prior.expand([4, 1, 3])).shape == (4, 1, 3)
    assert kl_divergence(q.expand([2, 3]), prior.expand([3])).shape == (2, 3)
    assert kl_divergence(AdditiveNoiseNormal(1.0, -1.0), prior).shape == ()
    with pytest.raises(RuntimeError, match=r"(?i)broadcast|shape mismatch"):
        kl_divergence(q, prior.expand([4]))


@every_prior
def test_kl_divergence_differentiates_to_both_parameters(prior: ScaleFreePrior) -> None:
    loc = torch.tensor([0.0, 0.3, -2.0], dtype=torch.float64, requires_grad=True)
    log_sigma2 = torch.tensor([-9.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)

    def divergence(loc: Tensor, log_sigma2: Tensor) -> Tensor:
        return kl_divergence(AdditiveNoiseNormal(loc, log_sigma2), prior)

    kl = divergence(loc, log_sigma2).sum()
    gradients = torch.autograd.grad(kl, (loc, log_sigma2))
    assert gradients[0][0] == 0
    assert all(g.isfinite().all() for g in gradients)
    assert torch.autograd.gradcheck(
        divergence, (loc.detach()[1:].requires_grad_(), log_sigma2.detach()[1:].requires_grad_())
    )


@every_prior
def test_expand_keeps_class_and_settings(prior: ScaleFreePrior) -> None:
    new = prior.expand([5, 1]).expand_by([2])
    assert type(new) is type(prior)
    assert new.batch_shape == (2, 5, 1)
    assert new.event_shape == ()
    assert prior.batch_shape == ()
    q = AdditiveNoiseNormal(torch.ones(2, 5, 1), -1.0)
    torch.testing.assert_close(kl_divergence(q, new), kl_divergence(q, prior))
    event = new.to_event(2)
    assert event.batch_shape == (2,)
    assert event.event_shape == (5, 1)


@every_prior
@pytest.mark.parametrize("shape", [(4,), (3, 4), (5,), ()])
def test_expand_to_a_shape_that_does_not_broadcast_is_refused(
    prior: ScaleFreePrior, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"batch shape \(2, 3\) cannot be expanded to \("):
        prior.expand([2, 3]).expand(shape)


@every_prior
@pytest.mark.parametrize("method", ["sample", "rsample", "__call__"])
def test_sampling_says_why_not_and_what_to_do(prior: ScaleFreePrior, method: str) -> None:
    reason = "improper" if isinstance(prior, LogUniform) else r"variance is loc² \+ sigma²"
    with pytest.raises(
        NotImplementedError, match=rf"(?s){type(prior).__name__} cannot be sampled: .*{reason}"
    ) as error:
        getattr(prior, method)(torch.Size([2]))
    assert "guide" in str(error.value)
    assert "condition" in str(error.value)


@every_prior
@pytest.mark.parametrize("moment", ["mean", "variance", "stddev"])
def test_moments_are_refused(prior: ScaleFreePrior, moment: str) -> None:
    with pytest.raises(NotImplementedError, match=r"has no (mean|variance)"):
        getattr(prior, moment)


@every_prior
def test_copies_and_pickles(prior: ScaleFreePrior) -> None:
    for new in (copy.deepcopy(prior.expand([3])), pickle.loads(pickle.dumps(prior.expand([3])))):
        assert repr(new) == repr(prior.expand([3]))


@every_prior
@pytest.mark.parametrize("validate_args", [True, False])
def test_validate_args_survives_expansion(prior: ScaleFreePrior, validate_args: bool) -> None:
    new = type(prior)(validate_args=validate_args).expand([2])
    assert new._validate_args is validate_args


def test_a_prior_of_ones_own_is_one_method() -> None:
    class Flat(ScaleFreePrior):
        why_no_sample = "it is flat"

        def kl_from(self, log_alpha: Tensor) -> Tensor:
            return -0.5 * log_alpha

    q = AdditiveNoiseNormal(torch.ones(3), 2.0)
    torch.testing.assert_close(kl_divergence(q, Flat().expand([3])), -torch.ones(3))


def test_a_prior_without_its_kl_says_so() -> None:
    class Unfinished(ScaleFreePrior):
        why_no_sample = "it is unfinished"

    with pytest.raises(NotImplementedError, match=r"Unfinished must define kl_from"):
        kl_divergence(AdditiveNoiseNormal(1.0, 2.0), Unfinished())


def test_pyros_own_guides_start_from_given_values() -> None:
    """A draw of the prior, from which they start else, is refused with the way to say so."""

    def model() -> None:
        pyro.sample("w", LogUniform().expand([3]).to_event(1))

    with pytest.raises(NotImplementedError, match="init_loc_fn=init_to_value"):
        AutoNormal(model)()
    values = {"w": torch.ones(3)}
    assert AutoNormal(model, init_loc_fn=init_to_value(values=values))()["w"].shape == (3,)
