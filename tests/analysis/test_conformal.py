"""Intervals and sets with a guarantee, by MAPIE."""

from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.utils import check_random_state
from torch.utils.data import DataLoader

from bayes_svdo.analysis import ClassificationPredictive, RegressionPredictive
from bayes_svdo.analysis.conformal import conformal_interval, conformal_set

N = 2000


def regression(scale: float = 0.3, shape: tuple[int, ...] = (2 * N,)):
    """Predictions with noise of ``scale`` where it is 1, in two halves, and their targets."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = means + torch.randn(shape, generator=generator, dtype=torch.float64)
    scales = torch.full((1,) * (1 + len(shape)), scale, dtype=torch.float64)
    halves = []
    for rows in (slice(None, N), slice(N, None)):
        part = means[rows]
        variance = torch.full_like(part, scale**2)
        halves.append(
            RegressionPredictive(part, variance, 0 * part, part[None], scales, "local", 1)
        )
    return *halves, y[:N], y[N:]


def classification(sharper: float = 3.0):
    """Overconfident predictions in two halves, and their labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2 * N, 5, generator=generator, dtype=torch.float64)
    y = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    log_p = (sharper * logits).log_softmax(1)
    zeros = torch.zeros(N, dtype=torch.float64)
    halves = [ClassificationPredictive(part, zeros, "local", 1) for part in (log_p[:N], log_p[N:])]
    return *halves, y[:N], y[N:]


@pytest.mark.parametrize("shape", [(2 * N,), (2 * N, 1)])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_intervals_cover_what_they_should(shape, scale):
    """Both halves add their error, sqrt(p(1-p)/N) each: 5 of them."""
    calibration, predictive, y, new = regression(scale, shape)
    lower, upper = conformal_interval(calibration, y, predictive, 0.9)
    assert lower.shape == upper.shape == predictive.mean.shape
    covered = float(((new >= lower) & (new <= upper)).double().mean())
    assert covered == pytest.approx(0.9, abs=5 * math.sqrt(2 * 0.09 / N))
    before, after = predictive.interval(0.9)
    assert abs(float(((new >= before) & (new <= after)).double().mean()) - 0.9) > 0.09


def test_the_correction_is_the_quantile_of_the_scores():
    """Romano et al. (2019): the ceil((N + 1) level)-th of max(lower - y, y - upper)."""
    calibration, predictive, y, _ = regression()
    lower, upper = calibration.interval(0.9)
    scores = torch.maximum(lower - y, y - upper).sort().values
    expected = float(scores[math.ceil((N + 1) * 0.9) - 1])
    corrected = conformal_interval(calibration, y, predictive, 0.9)[1]
    correction = corrected - predictive.interval(0.9)[1]
    assert float(correction.min()) == pytest.approx(float(correction.max()))
    assert float(correction.mean()) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_cover_what_they_should(score):
    calibration, predictive, y, new = classification()
    sets = conformal_set(calibration, y, predictive, 0.9, score, seed=0)
    assert sets.dtype == torch.bool
    assert sets.shape == (N, 5)
    covered = float(sets.gather(1, new[:, None]).double().mean())
    assert 0.9 - 5 * math.sqrt(2 * 0.09 / N) < covered < 0.96
    assert torch.equal(conformal_set(calibration, y, predictive, 0.9, score, seed=0), sets)


def test_ends_that_would_cross_meet_in_the_middle():
    """Much too wide where it was calibrated, narrow where it is asked: corrected past nothing."""
    wide, _, y, _ = regression(3.0)
    _, narrow, _, new = regression(0.3)
    lower, upper = conformal_interval(wide, y, narrow, 0.9)
    torch.testing.assert_close(lower, narrow.mean)
    assert torch.equal(lower, upper)
    assert (new != lower).all()  # and nothing but that point is covered


def few(number: int):
    regressions, classes = regression(), classification()
    mean = regressions[0].mean[:number]
    return (
        RegressionPredictive(mean, mean, 0 * mean, mean[None], torch.ones(1, 1), "local", 1),
        regressions[2][:number],
        ClassificationPredictive(classes[0].log_probabilities[:number], mean, "local", 1),
        classes[2][:number],
    )


@pytest.mark.parametrize(
    ("level", "least"), [(0.9, 10), (0.95, 20), (0.5, 2), (2 / 3, 3), (0.3, 4), (0.1, 11)]
)
def test_the_fewest_targets_that_will_do_are_those_of_mapie(level, least):
    for number in (least - 1, least):
        numbers, y, classes, labels = few(number)
        for ask in (
            lambda n=numbers, y=y: conformal_interval(n, y, n, level),
            lambda c=classes, y=labels: conformal_set(c, y, c, level),
        ):
            if number == least:
                assert len(ask()) in (2, least)
            else:
                with pytest.raises(ValueError, match=f"takes at least {least} targets"):
                    ask()


def test_columns_of_pandas_go_by_place():
    calibration, predictive, y, _ = regression()
    series = pd.Series(y.numpy(), index=np.arange(N)[::-1])
    for found, expected in zip(
        conformal_interval(calibration, series, predictive),
        conformal_interval(calibration, y, predictive),
        strict=True,
    ):
        assert torch.equal(found, expected)
    calibration, predictive, y, _ = classification()
    series = pd.Series(y.numpy(), index=np.arange(N)[::-1])
    found = conformal_set(calibration, series, predictive)
    assert torch.equal(found, conformal_set(calibration, y, predictive))


@pytest.mark.parametrize("wrong", [None, "abc", DataLoader([1.0])], ids=type)
def test_what_holds_no_numbers_is_refused_by_name(wrong):
    words = f"y must be a tensor or an array, but is a {type(wrong).__name__}"
    for function, (calibration, predictive, _, _) in (
        (conformal_interval, regression()),
        (conformal_set, classification()),
    ):
        with pytest.raises(TypeError, match=words):
            function(calibration, wrong, predictive)


def test_a_net_of_one_output_has_two_classes():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(N, 1, generator=generator, dtype=torch.float64)
    y = torch.bernoulli(p, generator=generator)
    log_p = torch.stack([1 - p, p], -1).log()
    calibration = ClassificationPredictive(log_p, 0 * p, "local", 1)
    sets = conformal_set(calibration, y, calibration, 0.9)
    assert sets.shape == (N, 2)
    flat = ClassificationPredictive(log_p[:, 0], 0 * p[:, 0], "local", 1)
    assert torch.equal(sets, conformal_set(flat, y[:, 0], flat, 0.9))
    with pytest.raises(
        ValueError, match=r'"aps" takes labels of at least 3 classes, but y holds 2'
    ):
        conformal_set(calibration, y, calibration, 0.9, "aps")
    several = ClassificationPredictive(log_p.reshape(-1, 2, 2), p.reshape(-1, 2), "local", 1)
    with pytest.raises(ValueError, match=r"\(N, K\) or \(N, 1, K\).*have shapes \(1000, 2, 2\)"):
        conformal_set(several, y.reshape(-1, 2), several, 0.9)


def test_seeds_are_those_of_torch():
    calibration, predictive, y, _ = classification()

    def sets(seed=None):
        return conformal_set(calibration, y, predictive, 0.9, "aps", seed)

    state = check_random_state(None).get_state()[1].copy()  # NumPy's global generator
    torch.manual_seed(1)
    first, second = sets(), sets()
    torch.manual_seed(1)
    assert torch.equal(sets(), first)
    assert not torch.equal(first, second)
    assert torch.equal(sets(2**63 + 5), sets(2**63 + 5))
    assert not torch.equal(sets(5), sets(2**63 + 5))
    assert torch.equal(sets(-1), sets(-1))
    assert (check_random_state(None).get_state()[1] == state).all()
    state = torch.get_rng_state()
    sets(0)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="seed must be an integer or None, but is 'a'"):
        conformal_set(calibration, y, predictive, seed="a")


def test_labels_of_few_classes_will_do():
    calibration, predictive, _, _ = classification()
    sets = conformal_set(calibration, np.zeros(N, dtype=np.int64), predictive, 0.9)
    assert sets.shape == (N, 5)


def test_mapie_may_be_missing(monkeypatch):
    calibration, predictive, y, _ = regression()
    monkeypatch.setitem(sys.modules, "mapie.regression", None)
    with pytest.raises(ImportError, match=r"pip install 'bayes-svdo\[conformal\]'"):
        conformal_interval(calibration, y, predictive)


def test_bad_regressions_are_named():
    calibration, predictive, y, _ = regression()
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        conformal_interval(calibration, y, predictive, 1.0)
    with pytest.raises(ValueError, match=r"shape \(2000,\), but has shape \(3,\)"):
        conformal_interval(calibration, y[:3], predictive)
    with pytest.raises(ValueError, match="takes at least 10000 targets to calibrate, but y holds"):
        conformal_interval(calibration, y, predictive, 0.9999)
    with pytest.raises(TypeError, match="predictive must be a RegressionPredictive, but is a Tens"):
        conformal_interval(calibration, y, y)
    several = regression(shape=(2 * N, 2))
    with pytest.raises(ValueError, match="one target for each"):
        conformal_interval(several[0], several[2], several[1])


def test_bad_classifications_are_named():
    calibration, predictive, y, _ = classification()
    with pytest.raises(ValueError, match=r'unknown score "aaps"\. Did you mean "aps"\?'):
        conformal_set(calibration, y, predictive, score="aaps")
    with pytest.raises(ValueError, match=r"labels outside 0\.\.4: 5"):
        conformal_set(calibration, y.clamp(min=5), predictive)
    with pytest.raises(TypeError, match="calibration must be a ClassificationPredictive"):
        conformal_set(regression()[0], y, predictive)
    other = ClassificationPredictive(predictive.log_probabilities[:, :4], y, "local", 1)
    with pytest.raises(ValueError, match=r"the same K, but have shapes \(2000, 5\) and \(2000, 4"):
        conformal_set(calibration, y, other)
