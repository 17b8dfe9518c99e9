"""What is refused, what is degenerate, and natural units."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from bayes_svdo.inference.exact_regression import (
    DegenerateObjectiveError,
    fit_vdard_regression,
)
from bayes_svdo.inference.exact_regression_data import (
    check_beside,
    check_constant,
    checked_data,
    checked_inputs,
    given_precision,
    kl_weight_of,
    natural_units,
    start_names,
)


def test_the_units_of_the_data_do_not_matter(problem) -> None:
    x, y = problem(num=100, dim=30)
    scale = torch.logspace(-8, 8, 30, dtype=torch.float64)
    fit = fit_vdard_regression(x, y)
    other = fit_vdard_regression(x * scale * 1000 + 5.0, y * 100 - 7.0)
    assert torch.equal(fit.kept, other.kept)
    # The offset of 5 costs up to 5 / (1e-8 * 1000) = 5e5 roundings in the smallest column.
    assert torch.allclose(other.loc * scale * 10, fit.loc, rtol=1e-8, atol=1e-9)
    assert torch.allclose(other.log_alpha[fit.kept], fit.log_alpha[fit.kept], atol=1e-6)
    assert torch.allclose(other.relevance, fit.relevance, atol=1e-6)
    assert torch.allclose(other.beta * 1e4, fit.beta)
    assert torch.allclose(other.elbo + 99 * math.log(100), fit.elbo)


def test_extreme_units_neither_overflow_nor_underflow(problem) -> None:
    x, y = problem()
    fit = fit_vdard_regression(x, y)
    other = fit_vdard_regression(x * 1e150, y * 1e-150)
    assert torch.allclose(other.loc * 1e300, fit.loc)
    with pytest.raises(ValueError, match="overflow; rescale"):
        fit_vdard_regression(x * 1e-200, y * 1e200)


@pytest.mark.parametrize("unit", [1e-200, 1e-160, 1e160, 1e200])
def test_the_predictive_deviation_needs_no_squares_of_units(unit: float, problem) -> None:
    x, y = problem()
    fit, other = fit_vdard_regression(x, y), fit_vdard_regression(x * unit, y)
    assert torch.allclose(other.sigma * unit, fit.sigma)
    for found, expected in zip(
        other.predict(x * unit, return_std=True), fit.predict(x, return_std=True), strict=True
    ):
        assert torch.allclose(found, expected)


def test_integers_are_real_numbers(problem) -> None:
    x, y = (10 * v for v in problem())
    fit = fit_vdard_regression(x.round().long(), y.round().long())
    exact = fit_vdard_regression(x.round(), y.round())
    assert torch.equal(fit.loc, exact.loc)


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("aic", 2.0),
        ("BIC", math.log(80)),
        ("5%", stats.chi2.ppf(0.95, 1)),
        ("0.1 %", stats.chi2.ppf(0.999, 1)),
        (3, 3.0),
    ],
)
def test_kl_weight_by_name_is_a_chi_square_threshold(
    name: float | str, threshold: float, problem
) -> None:
    fit = fit_vdard_regression(*problem(), kl_weight=name)
    assert abs(fit.kl_weight - threshold) < 1e-12 * threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": "hinton"}, r"kl must be one of 'exact'.*got 'hinton'"),
        ({"kl": "kingma2015"}, "alpha <= 1 only"),
        ({"kl_weight": 0.0}, "kl_weight must be positive and finite, got 0.0"),
        ({"kl_weight": math.inf}, "kl_weight must be positive and finite"),
        ({"kl_weight": "cic"}, r"kl_weight must be .*got 'cic'"),
        ({"kl_weight": "x%"}, r"kl_weight must be .*got 'x%'"),
        ({"kl_weight": "200%"}, r"kl_weight must be .*got '200%'"),
        ({"kl_weight": "1e-20%"}, "kl_weight must be positive and finite, got '1e-20%', which is"),
        ({"method": "newton"}, 'method must be "joint" or "alternating", got \'newton\''),
        ({"starts": ()}, r"starts must be a tuple of .*got \(\)"),
        ({"starts": "zero"}, "starts must be a tuple of .*got 'zero'"),
        ({"starts": ("one",)}, "starts must be a tuple of"),
        ({"starts": ("zero",), "method": "alternating"}, "can never leave"),
        ({"noise_precision": -1.0}, "noise_precision must be positive and finite, got -1.0"),
        ({"noise_precision": torch.ones(3)}, r"noise_precision has shape \(3,\)"),
        ({"min_noise": 1.0}, r"min_noise must be in \[0, 1\), got 1.0"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"tol": 0.0}, "tol must be positive, got 0.0"),
        ({"dtype": torch.float16}, "dtype must be torch.float64 or torch.float32"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, object], message: str, problem) -> None:
    with pytest.raises(ValueError, match=message):
        fit_vdard_regression(*problem(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x[:, 0], y), ValueError, r"x must have shape .*\(80,\)"),
        (lambda x, y: (x, y[:50]), ValueError, r"got \(80, 12\) and \(50,\)"),
        (lambda x, y: (x[:0], y[:0]), ValueError, r"at least one observation.*\(0, 12\)"),
        (lambda x, y: (x[:1], y[:1]), ValueError, "n_samples = 1"),
        (lambda x, y: (x * math.nan, y), ValueError, r"x contains NaN or infinity \(960 of 960"),
        (lambda x, y: (x, y / 0), ValueError, r"y contains NaN or infinity \(80 of 80"),
        (
            lambda x, y: (x, y.numpy()),
            TypeError,
            r"(?s)y must be a torch.Tensor, got ndarray.*Try torch\.as_tensor\(y\)",
        ),
        (
            lambda x, y: (x.to_sparse(), y),
            TypeError,
            r"(?s)x must be a dense tensor .*sparse_coo.*Try x\.to_dense\(\)",
        ),
        (
            lambda x, y: (x, y + 0j),
            TypeError,
            r"(?s)y must be a dense tensor of real .*complex128.*Try y\.real",
        ),
        (lambda x, y: (x.expand(2, 80, 12), y.expand(3, 80)), ValueError, "do not broadcast"),
        (lambda x, y: (x.expand(0, 80, 12), y), ValueError, "no problem to fit"),
        (lambda x, y: (x.to("meta"), y), TypeError, "x is on meta but y is on cpu"),
    ],
)
def test_bad_data_are_named(change, error, message, problem) -> None:
    with pytest.raises(error, match=message):
        fit_vdard_regression(*change(*problem()))


def test_a_constant_target_needs_a_known_noise(problem) -> None:
    x, y = problem()
    y = torch.full_like(y, 0.1)  # not representable: its mean is off by a rounding
    with pytest.raises(DegenerateObjectiveError, match=r"(?s)y is constant.*Pass noise_precision"):
        fit_vdard_regression(x, y)
    fit = fit_vdard_regression(x, y, noise_precision=4.0)
    assert not fit.kept.any()
    assert torch.allclose(fit.predict(x), y)


def test_natural_units_are_the_regression_in_other_words(problem) -> None:
    """Unit norms in as few rows as can be, with the same inner products."""
    x, y = problem(num=100, dim=7)
    units = natural_units(x[None], y[None], True)
    assert units.x.shape == (1, 8, 7)
    one = torch.ones(7, dtype=torch.float64)
    assert torch.allclose(units.x[0].norm(dim=0), one)
    assert torch.allclose(units.y.norm(dim=-1), one[:1])
    centred = torch.cat((x - x.mean(0), (y - y.mean())[:, None]), 1)
    back = torch.cat((units.x * units.x_scale, (units.y * units.y_scale)[..., None]), -1)[0]
    assert torch.allclose(back.T @ back, centred.T @ centred)
    assert torch.allclose(units.x_mean[0], x.mean(0))


def test_natural_units_do_not_know_the_units_of_the_data(problem) -> None:
    x, y = problem(num=10, dim=12)
    scale = torch.logspace(-100, 100, 12, dtype=torch.float64)
    units = natural_units(x[None], y[None], False)
    other = natural_units((x * scale)[None], 1e9 * y[None], False)
    assert torch.allclose(other.x, units.x)
    assert torch.allclose(other.y, units.y)
    assert torch.allclose(other.x_scale, units.x_scale * scale)
    assert torch.allclose(other.y_scale, units.y_scale * 1e9)


@pytest.mark.parametrize("noise", [0.2, 1e-6])  # by the Gram matrix, and close to the span: by QR
def test_rotated_data_have_the_same_products_and_fit(noise: float, problem) -> None:
    x, y = problem(num=300, dim=20, noise=noise)
    units = natural_units(3e4 * x[None], y[None], True)
    assert (units.least_squares is not None) == (noise == 0.2)
    assert units.x.shape == (1, 21, 20)
    columns = torch.cat((x, y[:, None]), 1)
    columns = columns - columns.mean(0)
    columns = columns / columns.norm(dim=0)
    rotated = torch.cat((units.x[0], units.y[0, :, None]), 1)
    assert torch.allclose(rotated.T @ rotated, columns.T @ columns, rtol=0, atol=1e-14)
    assert torch.allclose(units.x_scale[0], 3e4 * (x - x.mean(0)).norm(dim=0), rtol=1e-14)
    loc, left = (
        torch.linalg.lstsq(a[..., :-1], a[..., -1:]).solution[:, 0] for a in (rotated, columns)
    )
    assert torch.allclose(loc, left, rtol=1e-12, atol=1e-14)
    error = (rotated[:, -1] - rotated[:, :-1] @ loc).norm()
    assert torch.allclose(error, (columns[:, -1] - columns[:, :-1] @ left).norm(), rtol=1e-11)
    if units.least_squares is not None:
        assert torch.allclose(units.least_squares[0], left, rtol=1e-12, atol=1e-14)


def test_constant_columns_become_zero_and_constant_targets_are_found(problem) -> None:
    x, y = problem()
    x[:, 4] = 0.1
    units = natural_units(x[None], torch.full_like(y, 0.3)[None], True)
    assert (units.x[..., 4] == 0).all()
    assert units.x_scale[0, 4] == 1
    assert units.constant.tolist() == [True]
    with pytest.raises(DegenerateObjectiveError, match="y is constant, so"):
        check_constant(units)


def test_without_features_there_is_one_that_is_zero(problem) -> None:
    _, y = problem()
    units = natural_units(torch.zeros(1, 80, 0, dtype=torch.float64), y[None], True)
    assert units.x.shape[-1] == 1
    assert (units.x == 0).all()


def test_a_known_precision_is_put_in_natural_units() -> None:
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert given_precision(None, torch.Size((1, 2)), scale) is None
    found = given_precision(5.0, torch.Size((1, 2)), scale)
    assert found is not None
    assert found.tolist() == [[20.0], [45.0]]


def test_inputs_share_their_leading_dimensions() -> None:
    x, y = checked_data(torch.ones(3, 1, 5, 2), torch.ones(4, 5).int(), torch.float64)
    assert x.shape == (1, 3, 4, 5, 2)
    assert y.shape == (1, 3, 4, 5)
    assert y.dtype == torch.float64
    with pytest.raises(ValueError, match=r"observations, 2\).*\(5,\)"):
        checked_inputs(torch.ones(5), 2, torch.float64)
    with pytest.raises(TypeError, match=r"(?s)x must be a torch\.Tensor, got list.*as_tensor\(x\)"):
        checked_inputs([1.0], 1, torch.float64)
    with pytest.raises(TypeError, match=r"(?s)x must be a dense tensor .*Try x\.to_dense\(\)"):
        checked_inputs(torch.ones(5, 2).to_sparse(), 2, torch.float64)
    with pytest.raises(TypeError, match=r"x must be a dense tensor of real numbers.*complex64"):
        checked_inputs(torch.ones(5, 2) + 0j, 2, torch.float64)
    with pytest.raises(ValueError, match=r"x contains NaN or infinity"):
        checked_inputs(torch.tensor([[math.nan]]), 1, torch.float64)


def test_starts_follow_from_what_there_is_to_fit() -> None:
    assert start_names(None, "joint", 5, 20) == ("zero", "ols")
    assert start_names(None, "joint", 20, 20) == ("zero",)
    assert start_names(None, "alternating", 5, 20) == ("ols",)
    assert start_names(None, "alternating", 20, 20) == ("ridge",)
    with pytest.raises(ValueError, match="fits 20 features to 20 degrees of freedom"):
        start_names(("ols",), "joint", 20, 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_noise", "0"),
        ("min_noise", True),
        ("max_iter", 1.5),
        ("tol", "1"),
        ("fit_intercept", "no"),
        ("fit_intercept", None),
        ("noise_precision", "a"),
        ("noise_precision", True),
        ("noise_precision", 1j),
        ("starts", 3),
        ("kl", ["exact"]),
    ],
)
def test_options_of_the_wrong_type_are_named(name: str, value: object, problem) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be .*got {re.escape(repr(value))}"):
        fit_vdard_regression(*problem(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kl_weight must be"):
        kl_weight_of(None, 10)  # type: ignore[arg-type]


def test_bic_of_one_observation_is_no_threshold() -> None:
    x, y = torch.ones(1, 1), torch.ones(1)
    with pytest.raises(ValueError, match="got 'bic', which is 0 for n_samples = 1"):
        fit_vdard_regression(x, y, kl_weight="bic", fit_intercept=False, noise_precision=1.0)


def test_a_switch_is_true_or_false_in_any_library(problem) -> None:
    expected = fit_vdard_regression(*problem(), fit_intercept=False)
    for no in (np.False_, 0):
        fit = fit_vdard_regression(*problem(), fit_intercept=no)  # type: ignore[arg-type]
        assert fit.fit_intercept is False
        assert torch.equal(fit.loc, expected.loc)


def test_inputs_are_for_the_problems_that_were_fitted(problem) -> None:
    x, y = problem(num=20, dim=6)
    found = fit_vdard_regression(x, torch.stack((y, 2 * y)))
    assert found.predict(x).shape == (2, 20)
    assert found.predict(x.expand(5, 1, 20, 6)).shape == (5, 2, 20)
    words = r"x has shape \(3, 20, 6\), whose leading dimensions \(3,\) .* with \(2,\), those of"
    for return_std in (False, True):
        with pytest.raises(ValueError, match=words):
            found.predict(x.expand(3, 20, 6), return_std=return_std)
    with pytest.raises(ValueError, match=r"(?s)x is on meta but the fit is on cpu.*x.to\('cpu'\)"):
        check_beside(torch.empty(20, 6, device="meta"), found.loc)


@pytest.mark.parametrize("unit", [1e-200, 1e-160, 1e160, 1e200])
def test_units_of_the_target_without_a_square_are_refused(unit: float, problem) -> None:
    x, y = problem()
    words = r"(?s)the precision of the noise is \S+, which .*y, whose norm .*Try rescaled y"
    with pytest.raises(ValueError, match=words):
        fit_vdard_regression(x, unit * y)
    with pytest.raises(ValueError, match=r"^noise_precision times the sum of squares of y is"):
        fit_vdard_regression(x, unit * y, noise_precision=1.0)
    with pytest.raises(ValueError, match=r"of y is \S+ in problem\(s\) 1, which"):
        fit_vdard_regression(x, torch.stack((y, unit * y)), noise_precision=1.0)
    near = 1e140 if unit > 1 else 1e-140
    found, plain = fit_vdard_regression(x, near * y), fit_vdard_regression(x, y)
    assert torch.allclose(found.loc / near, plain.loc)
    mean, std = plain.predict(x, return_std=True)
    scaled = found.predict(x, return_std=True)
    assert torch.allclose(scaled[0] / near, mean)
    assert torch.allclose(scaled[1] / near, std)


def test_a_known_precision_is_taken_to_all_its_digits(problem) -> None:
    x, y = problem()
    one, other = (
        fit_vdard_regression(x, y, noise_precision=given)
        for given in (0.1, torch.tensor(0.1, dtype=torch.float64))
    )
    assert float(one.elbo) == float(other.elbo)
    found = fit_vdard_regression(x, 1e-21 * y, noise_precision=1e44)  # more than float32 holds
    plain = fit_vdard_regression(x, y, noise_precision=100.0)
    assert torch.allclose(found.loc * 1e21, plain.loc, rtol=1e-6)
