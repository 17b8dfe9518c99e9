from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayes_svdo.distributions import AdditiveNoiseNormal, WeightReused
from bayes_svdo.distributions.draw import Draw, check_reuse


def make(log_sigma2: float = -1.0, reuse: str = "draw", dtype: torch.dtype = torch.float64) -> Draw:
    torch.manual_seed(3)
    loc = torch.randn(2000, dtype=dtype, requires_grad=True)
    log = torch.full((2000,), log_sigma2, dtype=dtype, requires_grad=True)
    return Draw("w", AdditiveNoiseNormal(loc, log), reuse)  # type: ignore[arg-type]


def test_it_is_made_once() -> None:
    draw = make()
    assert draw.value is None
    value = draw.draw()
    assert draw.draw() is value


def test_it_has_the_moments_of_the_posterior() -> None:
    """6 standard errors of 2,000 values: fails by chance once in 5e8 runs."""
    draw = make()
    z = ((draw.draw() - draw.q.loc) * math.exp(0.5)).detach()
    assert abs(float(z.mean())) < 6 / 2000**0.5
    assert abs(float(z.var()) - 1) < 6 * (2 / 2000) ** 0.5


def test_its_gradients_are_those_of_reparameterization() -> None:
    draw = make()
    value = draw.draw()
    value.sum().backward()
    loc, log_sigma2 = draw.q.loc, draw.q.log_sigma2
    assert loc.grad is not None
    assert log_sigma2.grad is not None
    assert torch.equal(loc.grad, torch.ones_like(loc))
    torch.testing.assert_close(log_sigma2.grad, ((value - loc) / 2).detach())


def test_the_moments_are_handed_out_once() -> None:
    draw = make(log_sigma2=-3.0)
    mean, variance = draw.claim_moments()
    assert mean is draw.q.loc
    torch.testing.assert_close(variance, draw.q.variance)
    for again in (draw.claim_moments, draw.draw):
        with pytest.raises(WeightReused, match='site "w" is used more than once in one forward'):
            again()


def test_independent_reuse_hands_them_out_again() -> None:
    draw = make(reuse="independent")
    draw.claim_moments()
    draw.claim_moments()
    assert draw.draw() is draw.draw()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_sigma2", [40.0, 60.0, 1000.0, math.inf])
def test_a_huge_variance_is_bounded_and_its_gradient_is_not_dead(
    log_sigma2: float, dtype: torch.dtype
) -> None:
    draw = make(log_sigma2=log_sigma2, dtype=dtype)
    _, variance = draw.claim_moments()
    torch.testing.assert_close(variance, torch.full_like(variance, math.exp(40.0)))
    variance.sum().backward()
    gradient = draw.q.log_sigma2.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full_like(gradient, math.exp(40.0)))
    sigma = (make(log_sigma2, dtype=dtype).draw() - draw.q.loc).detach().std()
    assert abs(float(sigma) / math.exp(20.0) - 1) < 6 * (0.5 / 2000) ** 0.5


@pytest.mark.parametrize("log_sigma2", [-80.0, -104.0, -300.0])
def test_a_variance_that_underflows_has_finite_gradients(log_sigma2: float) -> None:
    """In float32 exp(-104) is zero, and the root of zero has no slope."""
    draw = make(log_sigma2=log_sigma2, dtype=torch.float32)
    value = draw.draw()
    value.sum().backward()
    torch.testing.assert_close(value, draw.q.loc)
    gradient = draw.q.log_sigma2.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert ((gradient != 0).all()) == (log_sigma2 > -170)  # sigma, not sigma², is what underflows


def test_nan_is_not_hidden() -> None:
    q = AdditiveNoiseNormal(torch.zeros(3), torch.full((3,), math.nan), validate_args=False)
    assert Draw("w", q, "draw").draw().isnan().all()


def test_a_draw_made_with_gradients_is_not_given_away_without() -> None:
    draw = make()
    for made in (False, True):
        if made:
            draw.draw()
        with torch.no_grad():
            for use in (draw.draw, draw.claim_moments):
                with pytest.raises(WeightReused, match=r'"w" is used inside torch\.no_grad'):
                    use()
    with torch.no_grad():
        value: Tensor = make().draw()
    assert not value.requires_grad


def test_half_precision_draws_in_half_from_a_variance_in_float32() -> None:
    draw = make(log_sigma2=-20.0, dtype=torch.float16)
    _, variance = draw.claim_moments()
    assert variance.dtype == torch.float32
    assert (variance > 0).all()
    assert make(dtype=torch.bfloat16).draw().dtype == torch.bfloat16


def test_the_error_tells_what_to_do() -> None:
    error = WeightReused("fc1.weight")
    assert error.name == "fc1.weight"
    assert 'site "fc1.weight"' in str(error)
    assert 'Try LocalReparameterization(drawn={"fc1.weight"})' in str(error)
    # Pyro replaces errors of these kinds by new ones that do not know the name.
    assert not isinstance(error, (RuntimeError, ValueError))


def test_reuse_is_checked() -> None:
    assert check_reuse("draw") == "draw"
    with pytest.raises(ValueError, match='reuse must be "draw" or "independent", but is \'both\''):
        make(reuse="both")


@pytest.fixture(params=["this torch", "torch before 2.8"])
def hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "this torch":
        monkeypatch.setattr("bayes_svdo.distributions.draw._top_hooks", None)


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_is_refused_by_name(use_reentrant: bool) -> None:
    """It would run again in the backward pass, with whatever weights are in place by then."""
    draw, x = make(), torch.randn(2000, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r'site "w" is used inside of torch.utils.check'):
        checkpoint(lambda x: x * draw.draw(), x, use_reentrant=use_reentrant)


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_without_gradients_is_welcome(use_reentrant: bool) -> None:
    with torch.no_grad():
        draw, x = make(), torch.randn(2000, dtype=torch.float64, requires_grad=True)
        value = checkpoint(lambda x: x * draw.draw(), x, use_reentrant=use_reentrant)
        assert torch.equal(value, x * draw.draw())


@pytest.mark.usefixtures("hooks")
def test_other_hooks_on_saved_tensors_are_welcome() -> None:
    draw = make()
    with torch.autograd.graph.save_on_cpu():
        draw.draw().square().sum().backward()
    assert draw.q.loc.grad is not None
