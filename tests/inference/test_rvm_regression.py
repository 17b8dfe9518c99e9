"""Relevance vector regression: its evidence, its predictions, and data at the edge."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import null_space
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bayes_svdo.inference.rvm_regression import NoiseBoundWarning, fit_rvm_regression

METHODS = ("fast", "mackay", "em")


def sparse_data(n: int = 80, d: int = 12, seed: int = 0, noise: float = 0.5):
    """Three of ``d`` correlated features matter; offset inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    x[:, 1:] += 0.5 * x[:, :-1]
    y = 2 * x[:, 0] - 1.5 * x[:, 4] + x[:, 8] + 5.0
    return x + 1.0, y + noise * torch.randn(n, dtype=torch.float64, generator=generator)


def sinc_data(n: int = 100, seed: int = 0, noise: float = 0.1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, dtype=torch.float64, generator=generator) * 20 - 10
    y = torch.sinc(x[:, 0] / torch.pi)
    y = y + noise * torch.randn(n, dtype=torch.float64, generator=generator)
    return x.to(dtype), y.to(dtype)


def log_density(x: Tensor, y: Tensor, found, phi: Tensor) -> float:
    """Log marginal likelihood from the covariance of the targets.

    With an intercept of density 1 the targets' contrasts are what is left to be explained:
    integrating it out gives their density over sqrt(n).
    """
    n = len(y)
    covariance = np.eye(n) / found.beta + (phi / found.alpha).numpy() @ phi.numpy().T
    if not found.fit_intercept:
        return float(multivariate_normal.logpdf(y.numpy(), cov=covariance))
    contrasts = null_space(np.ones((1, n)))
    covariance = contrasts.T @ covariance @ contrasts
    density = multivariate_normal.logpdf(contrasts.T @ y.numpy(), cov=covariance)
    return float(density) - 0.5 * math.log(n)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_log_evidence_is_the_log_density_of_the_targets(method, fit_intercept):
    x, y = sparse_data()
    found = fit_rvm_regression(x, y, method=method, fit_intercept=fit_intercept)
    expected = log_density(x, y, found, x[:, found.relevance])
    assert float(found.log_evidence[-1]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_log_evidence_of_a_kernel_machine_is_the_log_density_of_the_targets(fit_intercept):
    x, y = sinc_data()
    found = fit_rvm_regression(x, y, kernel="rbf", gamma=0.2, fit_intercept=fit_intercept)
    expected = log_density(x, y, found, found.basis(x))
    assert float(found.log_evidence[-1]) == pytest.approx(expected, abs=1e-6)


def test_flat_intercept_is_the_limit_of_a_wide_one():
    """A prior of variance v in the intercept has density 1 / sqrt(2 pi v) where it matters."""
    x, y = sparse_data()
    found = fit_rvm_regression(x, y)
    phi, variance = x[:, found.relevance].numpy(), 1e6
    covariance = np.eye(len(y)) / found.beta + (phi / found.alpha.numpy()) @ phi.T + variance
    wide = multivariate_normal.logpdf(y.numpy(), cov=covariance)
    flat = wide + 0.5 * math.log(2 * math.pi * variance)
    assert float(found.log_evidence[-1]) == pytest.approx(flat, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_noise_and_precisions_are_at_their_fixed_point(method):
    """Tipping (2001), eq. 16 and 18, with the intercept's degree of freedom."""
    x, y = sparse_data()
    found = fit_rvm_regression(x, y, method=method, tol=1e-6, max_iter=20_000)
    determined = 1 - found.alpha * found.covariance.diagonal()
    # Within what an evidence exact to about 1e-6 leaves open.
    torch.testing.assert_close(found.alpha, determined / found.weights**2, rtol=2e-2, atol=0)
    residual = float((y - found.predict(x)).square().sum())
    expected = (len(y) - 1 - float(determined.sum())) / residual
    assert found.beta == pytest.approx(expected, rel=1e-3)


def test_em_raises_the_evidence_with_every_update():
    x, y = sparse_data()
    trace = fit_rvm_regression(x, y, method="em", tol=1e-5, max_iter=20_000).log_evidence
    assert len(trace) > 20
    assert (trace.diff() >= -1e-9).all()  # rounding of an evidence of size 100


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_search_raises_the_evidence_in_every_round(seed):
    x, y = sinc_data(seed=seed)
    trace = fit_rvm_regression(x, y, kernel="rbf").log_evidence
    assert (trace.diff() >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_methods_agree_where_there_is_one_maximum(seed):
    x, y = sparse_data(n=200, seed=seed)
    fast, mackay, em = (
        fit_rvm_regression(x, y, method=m, tol=1e-5, max_iter=20_000) for m in METHODS
    )
    for other in (mackay, em):
        assert float(other.log_evidence[-1]) == pytest.approx(
            float(fast.log_evidence[-1]), abs=1e-2
        )
        torch.testing.assert_close(other.coefficients, fast.coefficients, atol=2e-3, rtol=0)


# Units.


@pytest.mark.parametrize(
    ("kernel", "scale_x", "scale_y"),
    [("linear", 1000.0, 100.0), ("linear", 1e-6, 1e9), ("rbf", 1000.0, 100.0), ("rbf", 1e-6, 1.0)],
)
def test_scaling_the_data_scales_the_result_and_nothing_else(kernel, scale_x, scale_y):
    x, y = sparse_data()
    found = fit_rvm_regression(x, y, kernel=kernel)
    scaled = fit_rvm_regression(x * scale_x, y * scale_y, kernel=kernel)
    assert torch.equal(scaled.relevance, found.relevance)
    unit = scale_y / scale_x if kernel == "linear" else scale_y
    # Rounding differs, and the search stops where 1e-9 nats are left: 3e-5 in a log precision.
    torch.testing.assert_close(scaled.weights / unit, found.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.alpha * unit**2, found.alpha, rtol=1e-3, atol=0)
    assert scaled.beta * scale_y**2 == pytest.approx(found.beta, rel=1e-4)
    mean, std = found.predict(x, return_std=True)
    scaled_mean, scaled_std = scaled.predict(x * scale_x, return_std=True)
    torch.testing.assert_close(scaled_mean / scale_y, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled_std / scale_y, std, rtol=1e-4, atol=0)
    expected = float(found.log_evidence[-1]) - (len(y) - 1) * math.log(scale_y)
    assert float(scaled.log_evidence[-1]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_an_intercept_takes_up_any_shift(kernel):
    x, y = sparse_data()
    found = fit_rvm_regression(x, y, kernel=kernel)
    shifted = fit_rvm_regression(x + 1e4, y - 1e4, kernel=kernel)
    assert torch.equal(shifted.relevance, found.relevance)
    torch.testing.assert_close(shifted.weights, found.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shifted.predict(x + 1e4) + 1e4, found.predict(x))


# Predictions.


def test_predictive_variance_is_of_noise_weights_and_intercept():
    x, y = sparse_data()
    found = fit_rvm_regression(x, y)
    phi = torch.cat([torch.ones(len(x), 1).double(), x[:, found.relevance]], 1)
    prior = torch.cat([torch.zeros(1).double(), found.alpha])
    covariance = torch.linalg.inv(found.beta * phi.T @ phi + torch.diag(prior))
    expected = ((phi @ covariance * phi).sum(1) + 1 / found.beta).sqrt()
    mean, std = found.predict(x, return_std=True)
    torch.testing.assert_close(std, expected)
    torch.testing.assert_close(mean, found.predict(x))


def test_predictive_intervals_cover():
    """Mean coverage of 90 % intervals over 40 data sets of 25 new targets each.

    One data set's coverage has a standard deviation of about 0.07, so 0.07 is 6 standard errors of
    the mean: false alarms are below 1e-8, but for the bias of noise that is fitted (under 0.02).
    """
    inside = []
    for seed in range(40):
        x, y = sparse_data(n=85, seed=seed)
        found = fit_rvm_regression(x[:60], y[:60])
        mean, std = found.predict(x[60:], return_std=True)
        inside.append(float(((y[60:] - mean).abs() < 1.645 * std).double().mean()))
    assert abs(np.mean(inside) - 0.9) < 0.07


@pytest.mark.parametrize("settings", [{"kernel": "rbf", "gamma": 0.2}, {"kernel": "poly"}])
def test_a_precomputed_kernel_gives_the_same_machine(settings):
    x, y = sinc_data()
    new = torch.linspace(-9, 9, 7, dtype=torch.float64).unsqueeze(1)
    by_name = fit_rvm_regression(x / 10, y, **settings)
    evaluate = by_name.basis.evaluate
    precomputed = fit_rvm_regression(evaluate(x / 10, x / 10), y, kernel="precomputed")
    assert torch.equal(precomputed.relevance, by_name.relevance)
    torch.testing.assert_close(
        precomputed.predict(evaluate(new / 10, x / 10)), by_name.predict(new / 10)
    )


def test_a_kernel_not_kept_in_memory_gives_the_same_machine():
    x, y = sinc_data()
    kept = fit_rvm_regression(x, y, kernel="rbf")
    again = fit_rvm_regression(x, y, kernel="rbf", max_kernel_bytes=0)
    assert torch.equal(again.relevance, kept.relevance)
    torch.testing.assert_close(again.weights, kept.weights)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_float32_stays_float32_and_agrees(kernel):
    x, y = sinc_data() if kernel == "rbf" else sparse_data()
    double = fit_rvm_regression(x, y, kernel=kernel)
    single = fit_rvm_regression(x.float(), y.float(), kernel=kernel)
    for name in ("weights", "covariance", "alpha", "basis_mean", "level", "level_variance"):
        assert getattr(single, name).dtype == torch.float32
    assert float(single.log_evidence[-1]) == pytest.approx(float(double.log_evidence[-1]), abs=1.0)
    mean, std = single.predict(x.float(), return_std=True)
    assert mean.dtype == std.dtype == torch.float32
    assert (mean.double() - double.predict(x)).abs().max() < 0.2 * double.beta**-0.5


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cuda_agrees_with_cpu(kernel, method):
    x, y = sparse_data()
    cpu = fit_rvm_regression(x, y, kernel=kernel, method=method)
    cuda = fit_rvm_regression(x.cuda(), y.cuda(), kernel=kernel, method=method)
    assert cuda.weights.is_cuda
    assert cuda.relevance.is_cuda
    mean, std = cuda.predict(x.cuda(), return_std=True)
    expected_mean, expected_std = cpu.predict(x, return_std=True)
    torch.testing.assert_close(mean.cpu(), expected_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(std.cpu(), expected_std, rtol=1e-3, atol=1e-3)


# Data at the edge.


@pytest.mark.parametrize("seed", range(5))
def test_more_features_than_data_is_reported(seed):
    """With as many basis functions as data the evidence has no upper bound in beta."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 100, dtype=torch.float64, generator=generator)
    y = x[:, :5].sum(1) + torch.randn(50, dtype=torch.float64, generator=generator)
    with pytest.warns(NoiseBoundWarning, match=r"of 100 basis functions fit 50 data.*fixed beta"):
        found = fit_rvm_regression(x, y)
    assert found.noise_at_bound
    assert found.beta <= 1.0001e6 / float(y.var(correction=0))
    fixed = fit_rvm_regression(x, y, beta=1.0)  # the remedy
    assert not fixed.noise_at_bound
    assert fixed.beta == 1.0
    assert len(fixed.weights) < 50


def test_targets_without_noise_are_reported_and_fitted():
    x, y = sparse_data(noise=0.0)
    with pytest.warns(NoiseBoundWarning, match="min_noise = 0.001 of the standard deviation"):
        found = fit_rvm_regression(x, y)
    assert found.relevance.tolist() == [0, 4, 8]
    torch.testing.assert_close(found.predict(x), y, rtol=1e-6, atol=1e-6)


def test_min_noise_is_the_bound_on_the_noise():
    x, y = sparse_data(noise=0.0)
    with pytest.warns(NoiseBoundWarning, match="min_noise = 0.01"):
        found = fit_rvm_regression(x, y, min_noise=0.01)
    assert found.beta**-0.5 == pytest.approx(0.01 * float(y.std(correction=0)))


def test_a_constant_feature_is_left_to_the_intercept():
    x, y = sparse_data()
    with_constant = torch.cat([torch.full((80, 1), 0.1, dtype=x.dtype), x], 1)
    found = fit_rvm_regression(with_constant, y)
    assert torch.equal(found.relevance - 1, fit_rvm_regression(x, y).relevance)


@pytest.mark.parametrize("method", METHODS)
def test_only_constant_features_leave_the_mean(method):
    _, y = sparse_data()
    found = fit_rvm_regression(torch.ones(80, 3, dtype=y.dtype), y, method=method)
    assert len(found.weights) == 0
    mean, std = found.predict(torch.zeros(2, 3, dtype=y.dtype), return_std=True)
    torch.testing.assert_close(mean, y.mean().expand(2))
    # The unbiased variance, and that of the mean.
    torch.testing.assert_close(std, (y.var() * (1 + 1 / 80)).sqrt().expand(2))


def test_one_of_two_equal_columns_is_enough():
    x, y = sparse_data()
    found = fit_rvm_regression(torch.cat([x, 3 - 2 * x], 1), y)
    once = fit_rvm_regression(x, y)
    assert torch.equal((found.relevance % 12).sort().values, once.relevance)
    torch.testing.assert_close(
        found.predict(torch.cat([x, 3 - 2 * x], 1)), once.predict(x), rtol=1e-3, atol=1e-3
    )


def test_a_constant_target_is_its_own_answer():
    x, _ = sparse_data()
    with pytest.warns(NoiseBoundWarning, match=r"y is constant \(3.3\)"):
        found = fit_rvm_regression(x, torch.full((80,), 3.3, dtype=x.dtype))
    mean, std = found.predict(x[:5], return_std=True)
    torch.testing.assert_close(mean, torch.full((5,), 3.3, dtype=x.dtype))
    assert (std == 0).all()
    assert len(found.weights) == 0
    assert found.beta == math.inf


def test_a_constant_target_with_known_noise_has_an_uncertain_level():
    x, _ = sparse_data()
    found = fit_rvm_regression(x, torch.full((80,), 3.3, dtype=x.dtype), beta=4.0)
    _, std = found.predict(x[:1], return_std=True)
    assert float(std) == pytest.approx(0.5 * math.sqrt(1 + 1 / 80))


def test_two_samples_can_be_fitted():
    x, y = sparse_data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseBoundWarning)  # a line through two points is exact
        found = fit_rvm_regression(x[:2], y[:2])
    assert found.predict(x).isfinite().all()


def test_targets_unrelated_to_the_inputs_keep_few_weights():
    """A feature of no worth enters when its squared z score exceeds 1: a chance of 0.317.

    Of 20 x 50 features 317 +- 15 would, if they were orthogonal; 420 is 7 standard errors.
    """
    kept = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 50, dtype=torch.float64, generator=generator)
        y = torch.randn(400, dtype=torch.float64, generator=generator)
        kept += len(fit_rvm_regression(x, y).weights)
    assert 200 < kept < 420


def test_inputs_of_any_layout_will_do():
    x, y = sparse_data()
    found = fit_rvm_regression(x, y)
    strided = torch.stack([x, x], 2)[:, :, 0]
    assert not strided.is_contiguous()
    again = fit_rvm_regression(strided, torch.stack([y, y], 1)[:, 0])
    torch.testing.assert_close(again.coefficients, found.coefficients)


def test_the_caller_keeps_his_data():
    x, y = sparse_data()
    x_before, y_before = x.clone(), y.clone()
    for kernel in ("linear", "rbf"):
        fit_rvm_regression(x, y, kernel=kernel)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)


def test_too_few_rounds_are_reported():
    x, y = sinc_data()
    with pytest.warns(ConvergenceWarning, match=r"max_iter = 2 rounds.*still rising"):
        found = fit_rvm_regression(x, y, kernel="rbf", max_iter=2)
    assert not found.converged
    assert found.n_iter == 2


def test_warnings_point_to_the_caller():
    x, y = sparse_data(noise=0.0)
    with pytest.warns(NoiseBoundWarning) as caught:
        fit_rvm_regression(x, y)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "slow"}, r"method must be one of \('fast', 'mackay', 'em'\), got 'slow'"),
        ({"beta": 0.0}, r"beta, a noise precision, must be positive and finite, got 0.0"),
        ({"beta": math.nan}, r"beta.*got nan"),
        ({"min_noise": 0.0}, r"min_noise.*in \[1e-05, 1\) for torch.float64, got 0.0"),
        ({"min_noise": 1.0}, r"min_noise.*got 1.0"),
        ({"tol": 0.0}, r"tol must be positive and finite, in nats, got 0.0"),
        ({"max_iter": 0}, r"max_iter must be an integer of at least 1, but is 0"),
        ({"max_iter": 2.5}, r"max_iter must be an integer.*but is 2.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        fit_rvm_regression(*sparse_data(), **settings)


def test_targets_of_another_type_are_refused():
    x, y = sparse_data()
    with pytest.raises(TypeError, match=r"(?s)x is torch.float64 but y is torch.float32.*y.to"):
        fit_rvm_regression(x, y.float())


@pytest.mark.parametrize("unit", [1e-144, 1e-100, 1e100, 1e144])
@pytest.mark.parametrize("method", ["fast", "mackay"])
def test_the_unit_of_the_target_does_not_matter_over_the_whole_range(unit, method):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    y = 2 * x[:, 0] - x[:, 1] + 0.5 * torch.randn(60, dtype=torch.float64, generator=generator) + 1
    plain = fit_rvm_regression(x, y, method=method)
    scaled = fit_rvm_regression(x, y * unit, method=method)
    assert torch.equal(scaled.relevance, plain.relevance)
    torch.testing.assert_close(scaled.weights / unit, plain.weights, rtol=1e-6, atol=0)
    for found, expected in zip(
        scaled.predict(x, return_std=True), plain.predict(x, return_std=True), strict=True
    ):
        torch.testing.assert_close(found / unit, expected, rtol=1e-6, atol=1e-7)
    assert scaled.beta * unit * unit == pytest.approx(plain.beta, rel=1e-6)
    shift = len(y) * math.log(unit) - math.log(unit)
    assert scaled.log_evidence[-1] + shift == pytest.approx(float(plain.log_evidence[-1]), abs=0.1)


@pytest.mark.parametrize("unit", [5e-324, 1e-320, 1e-200, 1e-154, 1e154, 1e200, 1e308])
def test_units_whose_square_is_out_of_range_are_an_error_and_no_constant(unit):
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    y = (x[:, 0] + 0.1 * torch.sin(40 * x[:, 0])) * (1 if unit > 1e-300 else 100) * unit
    with pytest.raises(
        ValueError, match=r"(?s)x or y is in units .*y has a standard deviation of "
    ):
        fit_rvm_regression(x, y)


def test_a_target_in_float32_has_its_own_range():
    x = torch.linspace(-1, 1, 20)[:, None]
    y = x[:, 0] + 0.1 * torch.sin(40 * x[:, 0])
    plain, scaled = fit_rvm_regression(x, y), fit_rvm_regression(x, y * 1e12)
    torch.testing.assert_close(scaled.weights / 1e12, plain.weights, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"leave the range of torch.float32"):
        fit_rvm_regression(x, y * 1e30)


def test_inputs_in_extreme_units_are_not_blamed_on_the_target():
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    y = x[:, 0] + 0.1 * torch.sin(40 * x[:, 0])
    with pytest.raises(ValueError, match=r"^x or y is in units .* of the weights, \S+ to "):
        fit_rvm_regression(1e150 * x, y)


@pytest.mark.parametrize("unit", [1e6, 1e8, 1e140, 1e160])
def test_a_known_noise_below_rounding_is_refused(unit):
    """The fit would lose its basis functions without a word, up to the last."""
    x = torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x[:, 0])
    with pytest.raises(ValueError, match=r"(?s)^beta=1 is a noise of .* standard deviation of y"):
        fit_rvm_regression(x, y * unit, kernel="rbf", beta=1.0)
    assert len(fit_rvm_regression(x, y * 1e4, kernel="rbf", beta=1.0).weights)


def test_a_constant_target_of_any_size_is_constant():
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    for value in (1e-300, 1e300, -1e308):
        with pytest.warns(NoiseBoundWarning, match="y is constant"):
            found = fit_rvm_regression(x, torch.full_like(x[:, 0], value))
        assert float(found.level) == value
    known = fit_rvm_regression(x, torch.full_like(x[:, 0], 1e100), beta=4.0)
    assert not len(known.weights)
    assert known.beta == 4.0
