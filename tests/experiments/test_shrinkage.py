"""The curves against what the estimators do, and the risk against its closed form."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.linear_model import Lasso

from bayes_svdo.experiments.shrinkage import LABELS, plot_shrinkage, shrinkage, shrinkage_factor
from bayes_svdo.inference.exact_regression import fit_vdard_regression
from bayes_svdo.inference.relevance_vector_machine import fit_rvm_regression

Z = np.array([0.3, -0.95, 1.05, -1.5, 2.0, 3.0, -6.0])
NUM_DATA = 64


@pytest.fixture(scope="module")
def orthogonal():
    """Columns with squared norm N, unit noise, and exactly the z-scores Z."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((NUM_DATA, len(Z) + 1)))
    x = q[:, :-1] * np.sqrt(NUM_DATA)
    y = x @ (Z / np.sqrt(NUM_DATA)) + 0.8 * q[:, -1] * np.sqrt(NUM_DATA)
    return torch.from_numpy(x), torch.from_numpy(y)


def shrunk(coefficients):
    return np.asarray(coefficients) * np.sqrt(NUM_DATA) / Z


@pytest.mark.parametrize(("kl", "method"), [("exact", "vd_ard"), ("empirical_bayes", "rvm")])
def test_the_curve_is_what_vd_ard_regression_does(orthogonal, kl, method):
    fit = fit_vdard_regression(*orthogonal, kl=kl, fit_intercept=False, noise_precision=1.0)
    np.testing.assert_allclose(shrunk(fit.loc), shrinkage_factor(Z, method), atol=1e-7)


def test_kl_weight_rescales_z(orthogonal):
    fit = fit_vdard_regression(*orthogonal, kl_weight=3.0, fit_intercept=False, noise_precision=1.0)
    expected = shrinkage_factor(Z / np.sqrt(3.0), "vd_ard")
    np.testing.assert_allclose(shrunk(fit.loc), expected, atol=1e-7)


def test_the_curve_is_what_the_relevance_vector_machine_does(orthogonal):
    fit = fit_rvm_regression(*orthogonal, fit_intercept=False, beta=1.0, tol=1e-8)
    np.testing.assert_allclose(shrunk(fit.coefficients), shrinkage_factor(Z, "rvm"), atol=1e-3)


def test_the_curve_is_what_l1_does(orthogonal):
    # The penalty of one standard error: scikit-learn divides the squared error by 2 N.
    lasso = Lasso(alpha=1 / np.sqrt(NUM_DATA), fit_intercept=False, tol=1e-12)
    lasso.fit(*(value.numpy() for value in orthogonal))
    np.testing.assert_allclose(shrunk(lasso.coef_), shrinkage_factor(Z, "l1"), atol=1e-7)


@pytest.mark.parametrize("method", LABELS)
def test_everything_up_to_one_standard_error_is_zero_and_nothing_beyond(method):
    below, above = np.linspace(-1, 1, 21), np.linspace(1.001, 50, 99)
    assert (shrinkage_factor(below, method) == 0).all()
    factor = shrinkage_factor(np.concatenate([above, -above]), method)
    assert ((factor > 0) & (factor < 1)).all()
    assert (np.diff(factor[:99]) > 0).all()


def test_log_alpha_is_the_noise_of_vd_ard_and_the_prior_precision_of_the_rvm():
    result = shrinkage()
    kept = result.z > 1
    np.testing.assert_allclose(
        1 / (1 + np.exp(result.log_alpha["vd_ard"][kept])), result.factor["vd_ard"][kept]
    )
    np.testing.assert_allclose(
        np.exp(result.log_alpha["rvm"][kept]), 1 / (result.z[kept] ** 2 - 1), rtol=1e-9
    )
    for log_alpha in result.log_alpha.values():
        assert np.isposinf(log_alpha[~kept]).all()
        assert log_alpha[kept].max() > 7  # as far as the figure goes


def test_vd_ard_pulls_like_l1_near_the_threshold_and_like_the_rvm_far_away():
    result = shrinkage(20.0, 2001)
    vd_ard, rvm, l1 = (result.pull(name) for name in ("vd_ard", "rvm", "l1"))
    kept = result.z > 1
    assert (vd_ard[kept] > rvm[kept]).all()
    assert (vd_ard[kept] < l1[kept]).all()
    near, far = np.searchsorted(result.z, [1.05, 20.0])
    assert vd_ard[near] == pytest.approx(l1[near], abs=0.03)
    assert rvm[near] < 0.96
    assert vd_ard[far] == pytest.approx(rvm[far], rel=0.01)


def test_the_risk_of_the_soft_threshold_is_its_closed_form():
    result = shrinkage()
    mu, phi, cdf = result.effect, stats.norm.pdf, stats.norm.cdf
    expected = (
        2
        + (mu**2 - 2) * (cdf(1 - mu) - cdf(-1 - mu))
        - (1 - mu) * phi(1 + mu)
        - (1 + mu) * phi(1 - mu)
    )
    np.testing.assert_allclose(result.risk["l1"], expected, atol=1e-6)


@pytest.mark.parametrize("method", ["vd_ard", "rvm"])
def test_the_risk_is_the_integral_over_estimates(method):
    result = shrinkage(4.0, 3)

    def integrand(z, mu):
        factor = float(shrinkage_factor(np.array([z]), method)[0])
        return (factor * z - mu) ** 2 * stats.norm.pdf(z - mu)

    for mu, risk in zip(result.effect, result.risk[method], strict=True):
        expected, _ = integrate.quad(
            integrand, mu - 9, mu + 9, args=(mu,), points=[-1, 1], limit=200, epsabs=1e-7
        )
        assert risk == pytest.approx(expected, abs=1e-5)


def test_rows_hold_the_curves_and_then_the_risks():
    result = shrinkage(4.0, 5)
    rows = result.rows()
    assert len(rows) == len(result.z) + 5
    assert rows[len(result.z) - 1] == {
        "z": 4.0,
        **{f"factor_{name}": result.factor[name][-1] for name in LABELS},
        **{f"log_alpha_{name}": result.log_alpha[name][-1] for name in ("vd_ard", "rvm")},
    }
    assert rows[-1] == {"effect": 4.0, **{f"risk_{n}": result.risk[n][-1] for n in LABELS}}


def test_the_figure_shows_the_curves():
    result = shrinkage(4.0, 41)
    factor, pull, log_alpha, risk = plot_shrinkage(result).axes
    for ax, values in (
        (factor, result.factor),
        (pull, {name: result.pull(name) for name in LABELS}),
        (log_alpha, result.log_alpha),
        (risk, result.risk),
    ):
        for line, curve in zip(ax.lines, values.values(), strict=False):
            np.testing.assert_array_equal(line.get_ydata(), curve)
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    legend = [text.get_text() for text in factor.figure.legends[0].get_texts()]
    assert legend == [*LABELS.values(), "least squares"]


def test_without_a_result_the_figure_computes_one():
    assert plot_shrinkage().axes[3].lines[0].get_xdata()[-1] == 5.0


@pytest.mark.parametrize("arguments", [(1.0, 5), (np.inf, 5), (np.nan, 5), (4.0, 1)])
def test_bad_ranges_are_refused(arguments):
    with pytest.raises(ValueError, match="high must be finite and above 1"):
        shrinkage(*arguments)
