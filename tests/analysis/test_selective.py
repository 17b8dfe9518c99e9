"""Whether uncertainty tells what to trust."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from bayes_svdo.analysis import ood_auroc, risk_coverage


def test_risk_coverage_by_hand():
    result = risk_coverage([0.3, 0.1, 0.4, 0.2], [1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(result.coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(result.risk, [0, 0, 1 / 3, 1 / 2])
    assert result.area == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert result.at(0.5) == 0
    assert result.at(0.51) == pytest.approx(1 / 3)
    assert result.at(1) == 0.5


def test_at_finds_tenths():
    result = risk_coverage(np.arange(10.0), np.arange(10.0))
    for tenth in range(1, 11):
        assert result.at(tenth / 10) == pytest.approx((tenth - 1) / 2)


def test_ties_stand_with_their_mean_in_any_order():
    """The curve is the mean over all orders of the predictions that are equally uncertain."""
    u, loss = np.array([0.1, 0.5, 0.5, 0.5]), np.array([0.0, 1.0, 0.0, 0.0])
    result = risk_coverage(u, loss)
    orders = [[0, 1, 2, 3], [0, 2, 1, 3], [0, 2, 3, 1]]
    curves = [loss[order].cumsum() / np.arange(1, 5) for order in orders]
    np.testing.assert_allclose(result.risk, np.mean(curves, axis=0))
    np.testing.assert_allclose(risk_coverage(u[::-1].copy(), loss[::-1].copy()).risk, result.risk)


def test_constant_uncertainty_selects_nothing():
    np.testing.assert_allclose(risk_coverage(np.ones(8), np.arange(8.0)).risk, 3.5)


def test_a_perfect_ranking_is_no_worse_than_any():
    rng = np.random.default_rng(0)
    loss = rng.exponential(size=200)
    best = risk_coverage(loss, loss)
    assert (np.diff(best.risk) >= -1e-12).all()
    for _ in range(20):
        assert best.area <= risk_coverage(rng.random(200), loss).area
    assert best.risk[-1] == pytest.approx(loss.mean())


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 5, 30), rng.integers(1, 7, 40)
    pairs = (outside[:, None] > inside).mean() + 0.5 * (outside[:, None] == inside).mean()
    assert ood_auroc(inside.astype(float), torch.as_tensor(outside)) == pytest.approx(pairs)


def test_auroc_of_gaussians():
    """Φ(d / sqrt 2), to 5 standard errors of about 0.5 / sqrt(n)."""
    rng = np.random.default_rng(0)
    result = ood_auroc(rng.normal(0, 1, 2000), rng.normal(1, 1, 2000))
    assert result == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=5 * 0.5 / math.sqrt(2000))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: risk_coverage([1.0, 2.0], [1.0]), "of one length, but have 2 and 1"),
        (lambda: risk_coverage([[1.0, 2.0]], [1.0]), r"uncertainty must have .* has \(1, 2\)"),
        (lambda: risk_coverage([1.0], [math.nan]), "loss holds NaN or inf"),
        (lambda: risk_coverage([1.0], [1.0]).at(0), r"coverage must lie in \(0, 1\], but is 0"),
        (lambda: ood_auroc([], [1.0]), "inside must have shape"),
        (lambda: ood_auroc([1.0], [math.inf]), "outside holds NaN or inf"),
    ],
)
def test_bad_input_is_named(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()


def test_a_column_is_a_vector():
    u, loss = np.array([0.3, 0.1, 0.2]), np.array([1.0, 0.0, 0.5])
    column = risk_coverage(u[:, None], torch.as_tensor(loss)[:, None, None])
    np.testing.assert_array_equal(column.risk, risk_coverage(u, loss).risk)
    assert ood_auroc(u[:, None], loss[:, None]) == ood_auroc(u, loss)


def test_columns_of_pandas_go_by_place():
    u, loss = [0.3, 0.1, 0.2], [1.0, 0.0, 0.5]
    series = pd.Series(u, index=[2, 0, 7])
    np.testing.assert_array_equal(risk_coverage(series, loss).risk, risk_coverage(u, loss).risk)
    assert ood_auroc(series, pd.DataFrame({"loss": loss})) == ood_auroc(u, loss)


@pytest.mark.parametrize("wrong", [None, "abc", DataLoader([1.0])], ids=type)
def test_what_holds_no_numbers_is_refused_by_name(wrong):
    with pytest.raises(TypeError, match=f"uncertainty must be .* is a {type(wrong).__name__}"):
        risk_coverage(wrong, [1.0])
    with pytest.raises(TypeError, match=f"outside must be .* is a {type(wrong).__name__}"):
        ood_auroc([1.0], wrong)
