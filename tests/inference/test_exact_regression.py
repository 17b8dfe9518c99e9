"""VD-ARD regression: the objective, its exact maximum, and what is refused."""

from __future__ import annotations

import math
from typing import get_args

import mpmath
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from scipy.linalg import hadamard
from sklearn.datasets import load_diabetes
from torch import Tensor

from bayes_svdo.distributions import AdditiveNoiseNormal, LogUniform
from bayes_svdo.inference.exact_regression import (
    VDARDRegression,
    fit_vdard_regression,
)
from bayes_svdo.inference.exact_regression_curves import (
    KL,
    kl_function,
    optimal_log_alpha,
)

KLS = get_args(KL)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]


def diabetes() -> tuple[Tensor, Tensor]:
    """The ten features and the target, each with mean 0 and standard deviation 1."""
    x, y = (torch.from_numpy(a).double() for a in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0, correction=0), (y - y.mean()) / y.std(correction=0)


def textbook_elbo(
    x: Tensor, y: Tensor, loc: Tensor, log_alpha: Tensor, beta: Tensor, kl: KL, kl_weight: float
) -> Tensor:
    """The ELBO without an intercept, written out for the kept weights."""
    kept = loc != 0
    loc, log_alpha, x = loc[kept], log_alpha[kept], x[:, kept]
    error = (y - x @ loc).square().sum()
    error = error + (x.square().sum(0) * log_alpha.exp() * loc.square()).sum()
    fit = 0.5 * len(y) * torch.log(beta / (2 * math.pi)) - 0.5 * beta * error
    return fit - kl_weight * kl_function(kl)(log_alpha).sum()


# The objective


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("kl_weight", [1.0, 2.5])
def test_elbo_is_the_textbook_formula_at_the_solution(kl: KL, kl_weight: float, problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y, kl=kl, kl_weight=kl_weight, fit_intercept=False)
    expected = textbook_elbo(x, y, fit.loc, fit.log_alpha, fit.beta, kl, kl_weight)
    assert torch.allclose(fit.elbo, expected, rtol=1e-13, atol=0)
    assert torch.allclose(fit.elbo_trace[-1], expected, rtol=1e-12, atol=0)  # from the table


def test_elbo_agrees_with_mpmath(problem) -> None:
    x, y = problem(num=30, dim=6)
    fit = fit_vdard_regression(x, y, fit_intercept=False)
    with mpmath.workdps(30):
        beta = mpmath.mpf(float(fit.beta))
        total = mpmath.mpf(15) * mpmath.log(beta / (2 * mpmath.pi))
        for row, target in zip(x.tolist(), y.tolist(), strict=True):
            mean = sum(mpmath.mpf(a) * b for a, b in zip(row, fit.loc.tolist(), strict=True))
            noise = sum(
                mpmath.mpf(a) ** 2 * b for a, b in zip(row, fit.sigma2.tolist(), strict=True)
            )
            total -= beta / 2 * ((target - mean) ** 2 + noise)
        for value in fit.log_alpha[fit.kept].tolist():
            u = 1 / (2 * mpmath.exp(mpmath.mpf(value)))
            total -= u * mpmath.hyp2f2(1, 1, mpmath.mpf(3) / 2, 2, -u)
        assert abs(float(fit.elbo - float(total))) < 1e-11


def test_elbo_with_an_intercept_is_that_of_the_limit_of_a_wide_prior(problem) -> None:
    """E_q log p(y | w), the intercept integrated out numerically, by Monte Carlo.

    5 standard errors: fails by chance once in 2e6 seeds, and this one is fixed.
    """
    x, y = problem(num=40, dim=6)
    fit = fit_vdard_regression(x, y)
    generator = torch.Generator().manual_seed(1)
    w = fit.loc + fit.sigma2.sqrt() * torch.randn(20_000, 6, generator=generator).double()
    width = 1e7
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(40, dtype=torch.float64), torch.eye(40).double() / fit.beta + width
    )
    draws = marginal.log_prob(y - w @ x.T) + 0.5 * math.log(2 * math.pi * width)
    kl = kl_function("exact")(fit.log_alpha[fit.kept]).sum()
    error = draws.std() / math.sqrt(len(draws))
    # The wide prior itself is off by about intercept² / (2 width).
    assert abs(float(draws.mean() - kl - fit.elbo)) < 5 * float(error) + 1e-5


@pytest.mark.parametrize("kl", KLS)
def test_solution_is_stationary_in_everything_that_is_kept(kl: KL, problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y, kl=kl, fit_intercept=False)
    assert 3 <= int(fit.kept.sum()) < 12
    loc, log_alpha, log_beta = (
        v.clone().requires_grad_() for v in (fit.loc, fit.log_alpha, fit.beta.log())
    )
    elbo = textbook_elbo(x, y, loc, log_alpha, log_beta.exp(), kl, 1.0)
    loc_slope, alpha_slope, beta_slope = torch.autograd.grad(elbo, (loc, log_alpha, log_beta))
    # The curvature in log_alpha of a weight that is barely kept is small; the slope must be too.
    assert (loc_slope * fit.sigma2.sqrt()).abs().max() < 1e-8
    assert alpha_slope[fit.kept].abs().max() < 1e-6
    assert beta_slope.abs() < 1e-8


def test_no_single_weight_can_do_better(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y, fit_intercept=False)
    for d in range(x.shape[1]):
        for change in torch.linspace(-0.5, 0.5, 11, dtype=torch.float64):
            for log_alpha in (-6.0, -3.0, -1.0, 1.0, 3.0):
                loc, other = fit.loc.clone(), fit.log_alpha.clone()
                loc[d] += change
                other[d] = log_alpha
                value = textbook_elbo(x, y, loc, other, fit.beta, "exact", 1.0)
                assert value <= fit.elbo + 1e-9


@pytest.mark.parametrize("kl_weight", [1.0, 2.0, "bic"])
@pytest.mark.parametrize("kl", KLS)
def test_a_weight_is_kept_if_and_only_if_its_relevance_exceeds_the_kl_weight(
    kl: KL, kl_weight: float | str, problem
) -> None:
    x, y = problem(num=120, dim=40, seed=3)
    fit = fit_vdard_regression(x, y, kl=kl, kl_weight=kl_weight)
    assert torch.equal(fit.kept, fit.relevance > fit.kl_weight)
    assert 0 < int(fit.kept.sum()) < 40
    assert (fit.loc[~fit.kept] == 0).all()
    assert (fit.sigma2[~fit.kept] == 0).all()
    # And it has the alpha of its relevance. Shrinkage: alpha itself is loose at the threshold.
    expected = optimal_log_alpha(fit.relevance / fit.kl_weight, kl)
    assert torch.allclose(1 / (1 + fit.log_alpha.exp()), 1 / (1 + expected.exp()), atol=1e-6)


def test_relevance_is_the_squared_z_score_against_the_partial_residual(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y)
    x, y = x - x.mean(0), y - y.mean()
    for d in range(x.shape[1]):
        rest = fit.loc.clone()
        rest[d] = 0
        slope = x[:, d] @ (y - x @ rest) / x[:, d].square().sum()
        z2 = slope.square() * x[:, d].square().sum() * fit.beta
        assert torch.allclose(fit.relevance[d], z2, rtol=1e-9, atol=1e-12)


def test_orthogonal_design_shrinks_by_the_published_table() -> None:
    z2 = torch.tensor([0.9, 1.1, 1.5, 2.0, 4.0, 9.0, 25.0], dtype=torch.float64)
    exact = [0.0, 0.056, 0.221, 0.353, 0.609, 0.828, 0.956]
    empirical_bayes = [0.0, 0.091, 0.333, 0.5, 0.75, 0.889, 0.96]
    x = torch.linalg.qr(torch.randn(50, 7, dtype=torch.float64))[0] * 3.0
    least_squares = z2.sqrt() / 3.0  # with noise of precision 1
    y = x @ least_squares
    for kl, table in (("exact", exact), ("empirical_bayes", empirical_bayes)):
        fit = fit_vdard_regression(x, y, kl=kl, noise_precision=1.0, fit_intercept=False)
        assert torch.allclose(fit.relevance, z2)
        shrinkage = fit.loc / least_squares
        # The table has three digits.
        assert (shrinkage - torch.tensor(table).double()).abs().max() < 6e-4
        assert torch.allclose(shrinkage, 1 / (1 + fit.log_alpha.exp()), atol=1e-12)


# The ascent


@pytest.mark.parametrize("method", ["joint", "alternating"])
@pytest.mark.parametrize("kl", KLS)
def test_the_elbo_never_falls(kl: KL, method: str, problem) -> None:
    pairs = [problem(60, 20, seed, correlation) for seed in range(4) for correlation in (0.0, 0.9)]
    x, y = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    fit = fit_vdard_regression(x, y, kl=kl, method=method, max_iter=200)  # type: ignore[arg-type]
    # Rounding of a sum of squares over 60 values, times N/2.
    assert fit.elbo_trace.diff().min() > -1e-11
    assert (fit.elbo_trace[:, -1] > fit.elbo_trace[:, 0]).all()
    # An iteration gains at least half of what the best single move promises; at the first, that is
    # the feature most correlated with y, in closed form.
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    r2 = (x * y[..., None]).sum(1).square() / x.square().sum(1) / y.square().sum(1)[:, None]
    z2 = 59 * r2.amax(1)
    log_alpha = optimal_log_alpha(z2, kl)
    gain = 0.5 * z2 / (1 + log_alpha.exp()) - kl_function(kl)(log_alpha)
    without = 29.5 * (torch.log(59 / (2 * math.pi * y.square().sum(1))) - 1) - 0.5 * math.log(60)
    assert (fit.elbo >= without + 0.5 * gain).all()
    assert gain.min() > 1


def test_diabetes_reaches_the_known_optima() -> None:
    """The values of an independent coordinate ascent, from its best start."""
    x, y = diabetes()
    for kl_weight, elbo, kept in ((1.0, -484.562, 6), (2.0, -495.550, 6), ("bic", -521.000, 4)):
        fit = fit_vdard_regression(x, y, kl_weight=kl_weight, fit_intercept=False)
        assert abs(float(fit.elbo) - elbo) < 6e-4
        assert int(fit.kept.sum()) == kept


def test_starts_can_end_in_different_optima_and_the_best_is_kept(problem) -> None:
    x, y = problem(num=100, dim=40, correlation=0.97)
    fit = fit_vdard_regression(x, y, starts=("ols", "zero", "ridge"))
    assert fit.starts == ("ols", "zero", "ridge")
    assert fit.start_elbo[0] < fit.start_elbo[1] - 0.5
    assert fit.elbo == fit.start_elbo.max()
    assert int(fit.start) == int(fit.start_elbo.argmax())
    alone = fit_vdard_regression(x, y, starts=("zero",))
    assert torch.allclose(alone.loc, fit.loc, atol=1e-6)
    worse = fit_vdard_regression(x, y, starts=("ols",))
    assert torch.allclose(worse.elbo, fit.start_elbo[0])


def test_small_correlations_that_add_up_can_keep_starts_apart() -> None:
    """One feature is nearly the sum of 25, of which none correlates with it by more than 0.22."""
    generator = torch.Generator().manual_seed(98)
    parts = torch.randn(8000, 25, generator=generator, dtype=torch.float64)
    total = parts.sum(1) / 5
    noisy = total + 0.3 * torch.randn(8000, generator=generator, dtype=torch.float64)
    x = torch.cat((parts, noisy[:, None]), 1)
    y = total + torch.randn(8000, generator=generator, dtype=torch.float64)
    assert (torch.corrcoef(x.T) - torch.eye(26)).abs().max() < 0.25
    fit = fit_vdard_regression(x, y, kl_weight="bic")
    assert fit.starts == ("zero", "ols")
    assert fit.start_elbo[0] > fit.start_elbo[1] + 200
    assert int(fit.kept.sum()) == 3


def test_orthogonal_columns_can_keep_starts_apart_too() -> None:
    """Many equal weights, or much noise: both are maxima, as the noise is learned with them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.from_numpy(hadamard(32)[:, 1:25]).double()
    noise = torch.randn(32, generator=generator, dtype=torch.float64)
    apart = 0
    for weight in torch.linspace(0.2, 2.0, 19).tolist():
        fit = fit_vdard_regression(x, weight * x.sum(1) + noise)
        assert fit.elbo == fit.start_elbo.max()
        apart += bool(fit.start_elbo[0] > fit.start_elbo[1] + 1)
    assert apart > 0


def test_strong_correlation_does_not_slow_the_joint_ascent(problem) -> None:
    x, y = problem(num=150, dim=100, correlation=0.97)
    fit = fit_vdard_regression(x, y)
    assert fit.converged
    assert fit.n_iter < 40


def test_max_iter_is_reported(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y, max_iter=1)
    assert not fit.converged
    assert fit.n_iter == 1
    assert fit.elbo_trace.shape == (2,)


def test_more_features_than_observations() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 300, generator=generator, dtype=torch.float64)
    y = 2 * x[:, 0] - x[:, 7] + 0.3 * torch.randn(100, generator=generator, dtype=torch.float64)
    fit = fit_vdard_regression(x, y, kl_weight=10.0)
    assert fit.converged
    assert fit.kept[[0, 7]].all()
    assert int(fit.kept.sum()) <= 5  # z² > 10 for one pure-noise feature in 640
    assert torch.allclose(fit.loc[[0, 7]], torch.tensor([2.0, -1.0]).double(), atol=0.15)


# Invariances


def test_rows_and_columns_may_be_permuted(problem) -> None:
    x, y = problem(num=60, dim=20)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(60, generator=generator), torch.randperm(20, generator=generator)
    fit = fit_vdard_regression(x, y)
    other = fit_vdard_regression(x[rows][:, columns], y[rows])
    assert torch.allclose(other.loc, fit.loc[columns], atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_the_problems_one_by_one(device: str, problem) -> None:
    pairs = [problem(num=50, dim=15, seed=seed, correlation=0.1 * seed) for seed in range(8)]
    x = torch.stack([a for a, _ in pairs]).view(2, 4, 50, 15).to(device)
    y = torch.stack([b for _, b in pairs]).view(2, 4, 50).to(device)
    batch = fit_vdard_regression(x, y)
    assert batch.loc.device.type == device
    assert batch.loc.shape == (2, 4, 15)
    assert batch.beta.shape == batch.n_iter.shape == (2, 4)
    for i in range(2):
        for j in range(4):
            fit = fit_vdard_regression(*pairs[4 * i + j])
            assert torch.allclose(batch.loc[i, j].cpu(), fit.loc, atol=1e-7)
            assert torch.allclose(batch.elbo[i, j].cpu(), fit.elbo)
            assert batch.converged[i, j]
            mean, std = batch.predict(x, return_std=True)
            alone = fit.predict(x[i, j].cpu(), return_std=True)
            assert torch.allclose(mean[i, j].cpu(), alone[0], atol=1e-6)
            assert torch.allclose(std[i, j].cpu(), alone[1], atol=1e-6)


def test_one_design_serves_many_targets(problem) -> None:
    x, y = problem()
    many = fit_vdard_regression(x, torch.stack((y, -y, 3 * y + 1)))
    one = fit_vdard_regression(x, y)
    assert many.loc.shape == (3, 12)
    assert torch.allclose(many.loc, torch.stack((one.loc, -one.loc, 3 * one.loc)), atol=1e-8)


def test_float32_agrees_to_its_precision(problem) -> None:
    x, y = problem(num=100, dim=20)
    fit = fit_vdard_regression(x.float(), y.float(), dtype=torch.float32, kl_weight="bic")
    exact = fit_vdard_regression(x, y, kl_weight="bic")
    assert fit.loc.dtype == torch.float32
    assert torch.equal(fit.kept, exact.kept)
    assert torch.allclose(fit.loc.double(), exact.loc, atol=1e-4)


def test_results_can_go_on_with_autograd_and_inputs_are_left_alone(problem) -> None:
    x, y = problem()
    x_before, y_before = x.clone(), y.clone()
    fit = fit_vdard_regression(x.requires_grad_(), y)
    assert not fit.loc.requires_grad
    tensors = [value for value in vars(fit).values() if isinstance(value, torch.Tensor)]
    assert not any(value.is_inference() for value in tensors)
    (fit.loc.clone().requires_grad_() ** 2).sum().backward()
    assert torch.equal(x.detach(), x_before)
    assert torch.equal(y, y_before)
    transposed = fit_vdard_regression(x.detach().T.contiguous().T, y)
    assert torch.allclose(transposed.loc, fit.loc, atol=1e-12)


# Prediction


def test_prediction_has_the_moments_of_the_posterior(problem) -> None:
    """Against draws of weights, intercept and noise; 5 standard errors, fixed seed."""
    x, y = problem(num=30, dim=6, noise=1.5)
    fit = fit_vdard_regression(x, y)
    new = torch.full((2, 6), 2.0, dtype=torch.float64)
    new[1] = x.mean(0)
    mean, std = fit.predict(new, return_std=True)
    generator = torch.Generator().manual_seed(0)
    num = 200_000

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = fit.loc + fit.sigma2.sqrt() * normal(num, 6)
    intercept = y.mean() - w @ x.mean(0) + normal(num) / (30 * fit.beta).sqrt()
    draws = w @ new.T + intercept[:, None] + normal(num, 2) / fit.beta.sqrt()
    assert (draws.mean(0) - mean).abs().max() < 5 * std.max() / math.sqrt(num)
    # The relative standard error of a variance of Gaussian draws is sqrt(2 / num).
    assert (draws.var(0) / std.square() - 1).abs().max() < 5 * math.sqrt(2 / num)
    assert torch.equal(fit.predict(new), mean)


def test_without_an_intercept_the_prediction_goes_through_zero(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y, fit_intercept=False)
    mean, std = fit.predict(torch.zeros(1, 12, dtype=torch.float64), return_std=True)
    assert mean == 0
    assert torch.allclose(std, fit.beta.rsqrt())


def test_prediction_refuses_another_number_of_features(problem) -> None:
    fit = fit_vdard_regression(*problem())
    with pytest.raises(ValueError, match=r"observations, 12\).*\(80, 11\)"):
        fit.predict(torch.zeros(80, 11))


# Options


def test_the_kl_weight_sets_the_share_of_noise_that_is_kept() -> None:
    """In an orthogonal design with known noise a pure-noise weight survives as often as chi-square
    exceeds the threshold; 5 standard errors of a binomial of 4000, fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(100, 50, generator=generator, dtype=torch.float64))[0]
    y = torch.randn(80, 100, generator=generator, dtype=torch.float64)
    for kl_weight, share in ((1.0, 0.3173), ("aic", 0.1573), ("5%", 0.05)):
        fit = fit_vdard_regression(
            x, y, kl_weight=kl_weight, noise_precision=1.0, fit_intercept=False
        )
        observed = float(fit.kept.double().mean())
        assert abs(observed - share) < 5 * math.sqrt(share * (1 - share) / 4000)


def test_a_known_noise_precision_is_used(problem) -> None:
    x, y = problem()
    free = fit_vdard_regression(x, y)
    given = fit_vdard_regression(x, y, noise_precision=free.beta)
    assert torch.allclose(given.loc, free.loc, atol=1e-6)
    assert torch.allclose(given.beta, free.beta)
    # With very noisy data nothing is relevant.
    assert not fit_vdard_regression(x, y, noise_precision=1e-4).kept.any()


def test_molchanovs_approximation_finds_nearly_the_same_regression(problem) -> None:
    x, y = problem(num=200, dim=30)
    exact = fit_vdard_regression(x, y, kl_weight="bic")
    for kl in ("molchanov2017", "poster2016"):
        fit = fit_vdard_regression(x, y, kl=kl, kl_weight="bic")  # type: ignore[arg-type]
        assert torch.equal(fit.kept, exact.kept)
        assert torch.allclose(fit.loc, exact.loc, atol=5e-3)
        # The KL is wrong by at most 0.013 nats per weight.
        assert abs(float(fit.elbo - exact.elbo)) < 0.013 * fit.kl_weight * int(fit.kept.sum())


# Degenerate data


def test_constant_features_and_copies_are_pruned(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y)
    extra = torch.cat((x, torch.full((80, 1), 0.1).double(), x[:, :1], -2 * x[:, 3:4]), -1)
    other = fit_vdard_regression(extra, y)
    assert not other.kept[12]
    assert other.relevance[12] == 0
    assert int(other.kept.sum()) == int(fit.kept.sum())  # one of each pair of equals
    assert torch.allclose(other.elbo, fit.elbo)
    assert torch.allclose(other.predict(extra), fit.predict(x), atol=1e-6)
    # Without an intercept a constant column is a feature like any other.
    without = fit_vdard_regression(extra, y, fit_intercept=False)
    assert without.kept[12]


def test_no_feature_leaves_the_mean(problem) -> None:
    _, y = problem()
    fit = fit_vdard_regression(torch.zeros(80, 0, dtype=torch.float64), y)
    assert fit.loc.shape == fit.relevance.shape == (0,)
    assert torch.allclose(fit.intercept, y.mean())
    assert torch.allclose(fit.beta, 1 / y.var())
    mean, std = fit.predict(torch.zeros(3, 0, dtype=torch.float64), return_std=True)
    assert torch.allclose(mean, y.mean().expand(3))
    assert torch.allclose(std, (y.var() * (1 + 1 / 80)).sqrt().expand(3))


def test_one_observation_without_an_intercept_keeps_nothing(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x[:1], y[:1], fit_intercept=False, kl_weight=2.0)
    assert not fit.kept.any()
    assert torch.allclose(fit.beta, y[:1].square().reciprocal()[0])


# Agreement with stochastic variational inference


def test_svi_through_pyro_finds_the_same_optimum(problem) -> None:
    """Stock Pyro on the same model: the value of its ELBO at our solution, and its own solution.

    Monte Carlo at 5 standard errors, fixed seed; SVI with decaying steps stops within 0.1 nats.
    """
    x, y = problem(num=60, dim=6, noise=0.6)
    y = y - y.mean()
    exact = fit_vdard_regression(x, y, fit_intercept=False)

    def model() -> None:
        beta = pyro.param("log_beta", torch.zeros((), dtype=torch.float64)).exp()
        w = pyro.sample("w", LogUniform(kl="exact").expand([6]).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal(x @ w, beta.rsqrt()), obs=y)

    def guide() -> None:
        loc = pyro.param("loc", torch.full((6,), 0.1, dtype=torch.float64))
        log_sigma2 = pyro.param("log_sigma2", torch.full((6,), -6.0, dtype=torch.float64))
        pyro.sample("w", AdditiveNoiseNormal(loc, log_sigma2).to_event(1))

    def value_of(fit: VDARDRegression) -> Tensor:
        """Pyro's estimates of the ELBO at a solution; pruned weights are all but pruned."""
        pyro.clear_param_store()
        tiny = torch.full((6,), 1e-9, dtype=torch.float64)
        pyro.param("log_beta", fit.beta.log())
        pyro.param("loc", torch.where(fit.kept, fit.loc, tiny))
        pyro.param("log_sigma2", torch.where(fit.kept, fit.sigma2, 1e-8).log())
        elbo = TraceMeanField_ELBO()
        return torch.tensor([-elbo.loss(model, guide) for _ in range(200)])

    pyro.set_rng_seed(0)
    draws = value_of(exact)
    assert abs(float(draws.mean() - exact.elbo)) < 5 * float(draws.std()) / math.sqrt(200) + 1e-4

    pyro.clear_param_store()
    steps = 2400
    optimizer = ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps), "betas": (0.9, 0.999)})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    for _ in range(steps):
        svi.step()
    found = {name: pyro.param(name).detach() for name in ("loc", "log_sigma2", "log_beta")}
    log_alpha = found["log_sigma2"] - 2 * found["loc"].abs().log()
    elbo = textbook_elbo(x, y, found["loc"], log_alpha, found["log_beta"].exp(), "exact", 1.0)
    assert exact.elbo - 0.1 < elbo <= exact.elbo + 1e-9
    deviation = exact.sigma2.sqrt().clamp_min(0.01)
    assert ((found["loc"] - exact.loc).abs() < deviation).all()
    assert abs(float(found["log_beta"] - exact.beta.log())) < 0.05
    assert (log_alpha[~exact.kept] > 1).all()
    pyro.clear_param_store()
