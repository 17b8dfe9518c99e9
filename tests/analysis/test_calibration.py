"""Whether predictive distributions are right."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from bayes_svdo.analysis import (
    ClassificationPredictive,
    RegressionPredictive,
    brier_score,
    classification_scores,
    expected_calibration_error,
    interval_coverage,
    negative_log_likelihood,
    pit_distance,
    regression_scores,
    reliability,
)


def simulated(size: int, sharper: float = 1.0, num_classes: int = 4):
    """Probabilities, and labels drawn from them before they were made sharper."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.8] * num_classes, size=size)
    y = (rng.random((size, 1)) > p.cumsum(1)).sum(1)
    sharp = p**sharper
    return sharp / sharp.sum(1, keepdims=True), y


def gaussian(size: int, scale: float = 1.0):
    """Predictions with a standard deviation that is ``scale`` times the true one, and targets."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(size, generator=generator, dtype=torch.float64)
    y = means + 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    variance = torch.full((size,), (2 * scale) ** 2, dtype=torch.float64)
    scales = variance.sqrt()[None]
    return RegressionPredictive(means, variance, 0 * means, means[None], scales, "local", 1), y


# By hand: confidences .6 .7 | .8 .9, right, wrong | right, right.
P = np.array([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [0.1, 0.9]])
Y = np.array([0, 0, 0, 1])


def test_reliability_by_hand():
    result = reliability(P, Y, num_bins=2)
    np.testing.assert_allclose(result.confidence, [0.65, 0.85])
    np.testing.assert_allclose(result.accuracy, [0.5, 1.0])
    assert result.count.tolist() == [2, 2]
    assert result.ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.15)
    assert result.mce == pytest.approx(0.15)
    assert expected_calibration_error(P, Y, 2) == result.ece


def test_one_bin_compares_the_means():
    assert expected_calibration_error(P, Y, 1) == pytest.approx(0.0)  # 0.75 and 3 of 4


def test_more_bins_than_data_are_one_each():
    assert reliability(P, Y, 100).count.tolist() == [1, 1, 1, 1]


def test_a_calibrated_classifier_has_next_to_no_error():
    """The docstring's 0.4 sqrt(bins / N) is the mean: double it."""
    p, y = simulated(20_000)
    assert expected_calibration_error(p, y) < 0.8 * math.sqrt(15 / 20_000)


def test_an_overconfident_classifier_has_its_gap():
    p, y = simulated(20_000, sharper=3.0)
    gap = p.max(1).mean() - (p.argmax(1) == y).mean()
    assert gap > 0.1
    # Each bin is overconfident, so their gaps add up to the whole.
    assert expected_calibration_error(p, y) == pytest.approx(gap, abs=0.01)


def test_bins_have_equal_mass():
    p, y = simulated(1000)
    assert set(reliability(p, y, 7).count.tolist()) <= {142, 143}


def test_equal_confidences_share_a_bin_in_any_order():
    p = np.repeat([[0.7, 0.3], [0.9, 0.1]], [6, 4], axis=0)
    y = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 1])
    result = reliability(p, y, 5)
    assert result.count.tolist() == [6, 4]
    order = np.random.default_rng(0).permutation(10)
    shuffled = reliability(p[order], y[order], 5)
    assert shuffled.accuracy.tolist() == result.accuracy.tolist()


def test_positions_count_like_data_points():
    p, y = simulated(60)
    folded = torch.as_tensor(p).reshape(20, 3, 4), torch.as_tensor(y).reshape(20, 3)
    assert reliability(*folded, 5).ece == reliability(p, y, 5).ece
    assert brier_score(*folded) == brier_score(p, y)


def test_brier_by_hand():
    assert brier_score(P, Y) == pytest.approx((0.16 + 0.49 + 0.04 + 0.01) / 4)
    p = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    assert brier_score(p, [0, 0]) == pytest.approx((0.25 + 2 * 0.0625 + 2.0) / 2)


def test_brier_of_one_class_seen():
    assert brier_score(P, [0, 0, 0, 0]) == pytest.approx((0.16 + 0.49 + 0.04 + 0.81) / 4)


def test_nll_by_hand():
    expected = -np.log([0.6, 0.3, 0.8, 0.9]).mean()
    assert negative_log_likelihood(P, Y) == pytest.approx(expected)
    assert negative_log_likelihood(P.astype(np.float32), Y) == pytest.approx(expected, rel=1e-6)


def test_probabilities_of_any_classifier_are_scored():
    p = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    predictive = ClassificationPredictive(p.log(), torch.zeros(2), "weights", 1)
    y = [0, 0]
    expected = classification_scores(predictive, y)
    found = classification_scores(p.numpy(), np.array(y))
    assert found.nll == pytest.approx(expected.nll, rel=1e-12)
    assert (found.accuracy, found.brier, found.ece) == (0.5, expected.brier, expected.ece)
    with pytest.raises(TypeError, match="predictive must be a tensor or an array, but is a str"):
        classification_scores("all", y)


def test_columns_of_pandas_are_targets():
    p = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    y = pd.Series([0, 1, 1], index=[7, 3, 9])
    assert brier_score(p, y) == brier_score(p, [0, 1, 1])
    assert brier_score(pd.DataFrame(p.numpy()), y) == brier_score(p, y)
    with pytest.raises(TypeError, match="y must hold numbers, but is of dtype"):
        brier_score(p, pd.Series(["a", "b", "b"]))
    with pytest.raises(TypeError, match="y must be numbers in a tensor or an array"):
        brier_score(p, ["a", "b", "b"])


def test_scores_of_a_classification():
    p, y = simulated(500)
    log_p = torch.as_tensor(p).log()
    predictive = ClassificationPredictive(log_p, torch.zeros(500), "local", 1)
    scores = classification_scores(predictive, y, num_bins=10)
    assert scores.accuracy == pytest.approx((p.argmax(1) == y).mean())
    assert scores.nll == pytest.approx(negative_log_likelihood(p, y))
    assert scores.brier == pytest.approx(brier_score(p, y))
    assert scores.ece == pytest.approx(expected_calibration_error(p, y, 10))


@pytest.mark.parametrize("function", [reliability, brier_score, negative_log_likelihood])
@pytest.mark.parametrize(
    ("p", "y", "words"),
    [
        (P, Y[:3], r"y must have shape \(4,\), but has shape \(3,\)"),
        (P, Y + 1, r"labels outside 0..1: 2"),
        (P[:, 0], Y, r"probabilities must have shape \(N, ..., K\)"),
        (P[:, :1], Y, "K of at least 2"),
        (P[:0], Y[:0], r"have shape \(0, 2\)"),
        (2 * P, Y, "sums of 2 to 2"),
        (P + np.array([-1, 1]), Y, "reach from -0.9"),
        (P * math.nan, Y, "probabilities holds NaN or inf"),
    ],
)
def test_bad_probabilities_and_labels_are_named(function, p, y, words):
    with pytest.raises(ValueError, match=words):
        function(p, y)


def test_bad_bins_are_named():
    with pytest.raises(ValueError, match="num_bins must be an integer of at least 1"):
        reliability(P, Y, 0)


# Regression.


def test_a_correct_gaussian_has_nominal_coverage():
    """5 standard errors of a binomial frequency: fails by chance once in 6e5 runs."""
    predictive, y = gaussian(4000)
    scores = regression_scores(predictive, y, levels=(0.5, 0.8, 0.95))
    for level, coverage, width in zip(scores.levels, scores.coverage, scores.width, strict=True):
        assert abs(coverage - level) < 5 * math.sqrt(level * (1 - level) / 4000)
        assert width == pytest.approx(2 * stats.norm(0, 2).ppf(0.5 + level / 2))
    assert scores.nll == pytest.approx(stats.norm(0, 2).entropy(), abs=5 * math.sqrt(0.5 / 4000))
    assert scores.rmse == pytest.approx(float((y - predictive.mean).square().mean().sqrt()))


def test_the_pit_of_a_correct_gaussian_is_uniform():
    predictive, y = gaussian(4000)
    pit = predictive.cdf(y)
    test = stats.kstest(pit.numpy(), "uniform")
    assert test.pvalue > 1e-3
    assert pit_distance(pit) == pytest.approx(test.statistic)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_wrong_width_shows(scale):
    predictive, y = gaussian(4000, scale)
    scores = regression_scores(predictive, y, levels=(0.5,))
    expected = 2 * stats.norm.cdf(stats.norm.ppf(0.75) * scale) - 1
    assert scores.coverage[0] == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(4000))
    assert scores.pit_distance > 0.08
    assert stats.kstest(predictive.cdf(y).numpy(), "uniform").pvalue < 1e-6


def test_scores_of_a_regression_need_a_predictive_and_take_one_level():
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    predictive = RegressionPredictive(*ones.expand(3, 4, 1), ones, ones, "weights", 1)
    y = torch.ones(4, 1)
    assert regression_scores(predictive, y, 0.9).levels == (0.9,)
    assert regression_scores(predictive, y, np.array([0.5])).coverage == (1.0,)
    with pytest.raises(TypeError, match=r"predictive must be a RegressionPredictive.*is a Tensor"):
        regression_scores(y, y)
    with pytest.raises(ValueError, match="levels must lie between 0 and 1"):
        regression_scores(predictive, y, [0.5, 1.0])


def test_coverage_takes_arrays():
    assert interval_coverage(np.zeros(2), np.ones(2), [0.5, 2.0]) == 0.5
    with pytest.raises(TypeError, match="upper must be a tensor or an array"):
        interval_coverage(np.zeros(2), None, [0.5, 2.0])


def test_coverage_by_hand():
    lower, upper = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 3.0])
    assert interval_coverage(lower, upper, [0.5, 1.0, 2.0, 2.0]) == 0.75


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda p, y: regression_scores(p, y[:2]), r"y must have shape \(5,\)"),
        (lambda p, y: regression_scores(p, y, levels=(0.5, 1.0)), "levels must lie between 0 and"),
        (lambda p, y: interval_coverage(y, y, y[:2]), "must have one shape"),
        (lambda p, y: interval_coverage(y[:0], y[:0], y[:0]), "not be empty"),
        (lambda p, y: pit_distance(y + 2), r"pit must hold numbers in \[0, 1\]"),
        (lambda p, y: pit_distance(y[:0]), "pit must hold numbers"),
    ],
)
def test_bad_targets_are_named(ask, words):
    with pytest.raises(ValueError, match=words):
        ask(*gaussian(5))


def test_scores_print_as_a_line():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    predictive = ClassificationPredictive(p.log(), torch.zeros(2), "weights", 1)
    assert str(classification_scores(predictive, [0, 0], num_bins=1)) == (
        "accuracy 50.00%, NLL 0.5697 nats, Brier score 0.2, ECE 20.00%"
    )
    found = reliability(predictive, [0, 0], num_bins=1)
    assert repr(found) == "Reliability(1 bins of 2 predictions, ECE 0.2)"
    assert found.ece == expected_calibration_error(p, [0, 0], 1)
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    regression = RegressionPredictive(*ones.expand(3, 4, 1), ones, ones, "weights", 1)
    assert str(regression_scores(regression, torch.ones(4, 1), 0.5)) == (
        "RMSE 0, NLL 0.9189 nats, 100.0% in 50% (width 1.35), PIT distance 0.500"
    )
