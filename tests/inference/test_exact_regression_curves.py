"""The one-weight problem beside mpmath, SciPy and a fine grid; the tables beside the functions."""

from __future__ import annotations

import math
from typing import get_args

import mpmath
import pytest
import torch
from scipy.optimize import brentq

from bayes_svdo.distributions import kl_empirical_bayes, kl_log_uniform
from bayes_svdo.inference.exact_regression_curves import (
    KL,
    kl_function,
    optimal_log_alpha,
    tabulate,
)

pytestmark = pytest.mark.usefixtures("torch_arrays")

KLS = get_args(KL)
CPU = torch.device("cpu")


def mpmath_relevance(log_alpha: float) -> mpmath.mpf:
    """Psi(alpha) of the exact KL in 50 digits: D(u) (2u² + 1)² / u at u = 1/sqrt(2 alpha)."""
    with mpmath.workdps(50):
        u = 1 / mpmath.sqrt(2 * mpmath.exp(mpmath.mpf(log_alpha)))
        # Dawson's function
        dawson = mpmath.sqrt(mpmath.pi) / 2 * mpmath.exp(-(u**2)) * mpmath.erfi(u)
        return dawson * (2 * u * u + 1) ** 2 / u


@pytest.mark.parametrize("log_alpha", [-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0])
def test_optimal_log_alpha_inverts_the_stationarity_condition_in_high_precision(
    log_alpha: float,
) -> None:
    relevance = torch.tensor(float(mpmath_relevance(log_alpha)), dtype=torch.float64)
    # One rounding of the relevance moves alpha by a relative eps * alpha.
    tolerance = 1e-13 + 4e-16 * math.exp(log_alpha) * 4
    assert abs(float(optimal_log_alpha(relevance)) - log_alpha) < tolerance


@pytest.mark.parametrize("kl", KLS)
def test_required_relevance_falls_strictly_to_one(kl: KL) -> None:
    """The theorem behind the pruning rule, on a grid; log Psi is exact to 1e-12 there."""
    log_alpha = torch.linspace(-25, 11, 40_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kl_function(kl)(log_alpha).sum(), log_alpha)
    alpha = log_alpha.detach().exp()
    psi = -2 * slope * (1 + alpha).square() / alpha
    assert (psi.log().diff() < 0).all()
    assert (psi > 1).all()
    assert psi[-1] < 1.01


def test_scaled_excess_of_the_exact_kl_stays_between_its_bounds() -> None:
    log_alpha = torch.linspace(-8, 10, 60, dtype=torch.float64)
    psi = [float(mpmath_relevance(float(v)) - 1) for v in log_alpha]
    scaled = torch.tensor(psi, dtype=torch.float64) * log_alpha.exp()
    assert scaled.min() > 1
    assert scaled.max() < 1.9287


@pytest.mark.parametrize("kl", KLS)
def test_optimal_log_alpha_is_the_best_of_a_fine_grid(kl: KL) -> None:
    relevance = torch.tensor([1.02, 1.3, 2.0, 4.0, 25.0, 1e4], dtype=torch.float64)
    grid = torch.linspace(-14, 12, 200_001, dtype=torch.float64)
    values = 0.5 * relevance[:, None] / (1 + grid.exp()) - kl_function(kl)(grid)
    best = optimal_log_alpha(relevance, kl)
    at_best = 0.5 * relevance / (1 + best.exp()) - kl_function(kl)(best)
    assert (at_best >= values.amax(-1)).all()
    assert torch.allclose(best, grid[values.argmax(-1)], atol=3e-4)  # two grid steps


def test_optimal_log_alpha_prunes_up_to_one_and_keeps_nan() -> None:
    relevance = torch.tensor([0.0, 0.5, 1.0, math.nan, math.inf], dtype=torch.float64)
    log_alpha = optimal_log_alpha(relevance)
    assert log_alpha[:3].tolist() == [math.inf] * 3
    assert log_alpha[3].isnan()
    assert log_alpha[4] == -math.inf


def test_optimal_alpha_under_empirical_bayes_is_the_nonnegative_garrote() -> None:
    relevance = torch.logspace(0.001, 6, 200, dtype=torch.float64)
    shrinkage = 1 / (1 + optimal_log_alpha(relevance, "empirical_bayes").exp())
    assert torch.allclose(shrinkage, 1 - 1 / relevance, rtol=1e-11, atol=0)


@pytest.mark.parametrize("kl", KLS)
def test_tables_agree_with_the_functions_they_stand_for(kl: KL) -> None:
    curves = tabulate(kl, torch.float64, torch.device("cpu"))
    log_alpha = torch.linspace(-60, 39, 9999, dtype=torch.float64)
    assert (curves.kl(log_alpha) - kl_function(kl)(log_alpha)).abs().max() < 2e-13
    relevance = torch.logspace(0.01, 12, 2000, dtype=torch.float64)
    newton = optimal_log_alpha(relevance, kl)
    assert (curves.optimal_log_alpha(relevance - 1) - newton).abs().max() < 1e-10
    assert curves.kl(torch.tensor([math.inf], dtype=torch.float64)) < 1e-16


@pytest.mark.parametrize("kl", KLS)
def test_alpha_given_loc_maximises_and_is_finite_for_every_loc_but_zero(kl: KL) -> None:
    curves = tabulate(kl, torch.float64, torch.device("cpu"))
    energy = torch.logspace(-9, 9, 50, dtype=torch.float64)
    log_alpha = curves.log_alpha_given_loc(energy).requires_grad_()
    value = -energy * log_alpha.exp() - kl_function(kl)(log_alpha)
    (slope,) = torch.autograd.grad(value.sum(), log_alpha)
    # Relative to the two terms that cancel.
    assert (slope.abs() <= 1e-9 * energy * log_alpha.exp()).all()
    assert curves.log_alpha_given_loc(torch.zeros(1, dtype=torch.float64)) == math.inf


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("relevance", [1.3, 4.0, 90.0])
def test_optimal_log_alpha_is_scipys_root_of_the_slope(kl: KL, relevance: float) -> None:
    def slope(value: float) -> float:
        log_alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        gain = 0.5 * relevance / (1 + log_alpha.exp()) - kl_function(kl)(log_alpha)
        return float(torch.autograd.grad(gain, log_alpha)[0])

    found = optimal_log_alpha(torch.tensor(relevance, dtype=torch.float64), kl)
    assert float(found) == pytest.approx(brentq(slope, -12, 6, xtol=1e-13), abs=1e-10)


@pytest.mark.parametrize("kl", KLS)
def test_slopes_of_the_tables_are_those_of_autograd(kl: KL) -> None:
    curves = tabulate(kl, torch.float64, CPU)
    log_alpha = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kl_function(kl)(log_alpha).sum(), log_alpha, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), log_alpha)
    kl, negative = curves.kl_pieces(log_alpha.detach())
    assert (kl.value() == curves.kl(log_alpha.detach())).all()
    h, h_slope = negative.value(), negative.slope() / curves.kl.width
    assert (h + slope.detach()).abs().max() < 1e-12
    assert (h_slope + curvature).abs().max() < 1e-7  # the derivative of a cubic: one order less


@pytest.mark.parametrize("kl", KLS)
def test_beyond_the_tables_the_kl_is_a_line_and_then_nothing(kl: KL) -> None:
    curves = tabulate(kl, torch.float64, CPU)
    low = torch.tensor([-50.0, -60.0], dtype=torch.float64)
    high = torch.tensor([45.0, 1e6, math.inf], dtype=torch.float64)
    # Half a nat per unit of log_alpha, where the posterior has forgotten the prior.
    assert float(curves.kl(low).diff()) == pytest.approx(5.0, rel=1e-12)
    assert (curves.kl(high).abs() < 1e-16).all()
    negative = curves.kl_pieces(torch.cat((low, high)))[1]
    value, slope = negative.value(), negative.slope()
    assert torch.allclose(value[:2], torch.tensor(0.5, dtype=torch.float64), atol=1e-12)
    assert (value[2:].abs() < 1e-16).all()
    assert (slope == 0).all()


def test_tables_in_float32_are_those_of_float64() -> None:
    single, double = (tabulate("exact", dtype, CPU) for dtype in (torch.float32, torch.float64))
    log_alpha = torch.linspace(-20, 20, 999, dtype=torch.float64)
    assert (single.kl(log_alpha.float()).double() - double.kl(log_alpha)).abs().max() < 1e-5
    assert single.kl(torch.tensor([math.inf])).abs() < 1e-6


def test_kls_go_by_name() -> None:
    log_alpha = torch.linspace(-5, 5, 11, dtype=torch.float64)
    assert torch.equal(kl_function("empirical_bayes")(log_alpha), kl_empirical_bayes(log_alpha))
    for kl in ("exact", "molchanov2017", "poster2016"):
        assert torch.equal(kl_function(kl)(log_alpha), kl_log_uniform(log_alpha, kl))
    with pytest.raises(ValueError, match=r"kl must be one of 'exact'.*got 'hinton'"):
        kl_function("hinton")
    with pytest.raises(ValueError, match="alpha <= 1 only"):
        kl_function("kingma2015")
