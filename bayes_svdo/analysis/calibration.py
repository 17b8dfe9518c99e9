"""Whether predictive distributions are right: reliability, scores, coverage, PIT.

Classifiers are judged by their probabilities, shape ``(N, ..., K)``, or by a
:class:`~bayes_svdo.analysis.ClassificationPredictive`, with labels ``(N, ...)``; regressions by a
:class:`~bayes_svdo.analysis.RegressionPredictive`. All are means over all labels or targets. Brier
score and log loss are scikit-learn's where it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_svdo.analysis.figures import Array, array
from bayes_svdo.analysis.predictives import (
    ClassificationPredictive,
    RegressionPredictive,
    check_labels,
    check_probability,
)
from bayes_svdo.inference.arguments import check_count
from bayes_svdo.inference.inputs import as_tensor

_SUM_TOLERANCE = 1e-4  # of probabilities that were made in float32 or in float16


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence and accuracy of a classifier, in bins of equal mass by confidence.

    Attributes:
        confidence: Mean probability of the predicted class in each bin, ascending, shape ``(B,)``.
        accuracy: Part of the predictions that are right, shape ``(B,)``.
        count: Predictions in each bin, shape ``(B,)``.
    """

    confidence: Array
    accuracy: Array
    count: NDArray[np.int64]

    def __repr__(self) -> str:
        predictions = f"{self.count.sum():,} predictions"
        return f"Reliability({len(self.count)} bins of {predictions}, ECE {self.ece:.3g})"

    @property
    def ece(self) -> float:
        """Expected calibration error, ``sum(count * |accuracy - confidence|) / N``."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.average(gaps, weights=self.count))

    @property
    def mce(self) -> float:
        """Maximum calibration error, the largest gap of a bin."""
        return float(np.abs(self.accuracy - self.confidence).max())


def reliability(probabilities: Any, y: Any, num_bins: int = 15) -> Reliability:
    """Confidence against accuracy of the predicted class.

    Bins are adaptive: each holds about ``N / num_bins`` predictions (Nguyen & O'Connor (2015),
    https://arxiv.org/abs/1508.05154; less biased than bins of equal width, Roelofs et al. (2022),
    https://arxiv.org/abs/2012.08668). Equal confidences share a bin, whatever the order of the
    data, so there may be fewer bins.

    Args:
        probabilities: Shape ``(N, ..., K)``.
        y: Labels, shape ``(N, ...)``.
        num_bins: At most so many bins.

    Raises:
        TypeError: Labels are not whole numbers.
        ValueError: ``probabilities`` are none, ``y`` does not go with them, or ``num_bins`` is
            below 1.
    """
    num_bins = check_count("num_bins", num_bins)
    p, labels = _classes(probabilities, y)
    confidence, right = p.max(1), p.argmax(1) == labels
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    # An edge moves back to where its value begins.
    edges = np.linspace(0, len(confidence), num_bins + 1).round().astype(np.int64)[1:-1]
    edges = edges[edges < len(confidence)]
    starts = np.unique(np.append(np.searchsorted(confidence, confidence[edges]), 0))
    count = np.diff(np.append(starts, len(confidence)))
    return Reliability(
        np.add.reduceat(confidence, starts) / count,
        np.add.reduceat(right.astype(np.float64), starts) / count,
        count,
    )


def expected_calibration_error(probabilities: Any, y: Any, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, in ``[0, 1]`` (Guo et al. (2017), eq. 3).

    In adaptive bins, see :func:`reliability`; https://arxiv.org/abs/1706.04599. Of a perfectly
    calibrated classifier it is not zero, but up to about ``0.4 sqrt(num_bins / N)``.

    Args:
        probabilities: Shape ``(N, ..., K)``.
        y: Labels, shape ``(N, ...)``.
        num_bins: At most so many bins.

    Raises:
        TypeError: As for :func:`reliability`.
        ValueError: As for :func:`reliability`.
    """
    return reliability(probabilities, y, num_bins).ece


def brier_score(probabilities: Any, y: Any) -> float:
    """Mean squared error of the probabilities (Brier, 1950).

    By scikit-learn's conventions: for two classes that of class 1, in ``[0, 1]``; for more the sum
    over classes, in ``[0, 2]``.

    Args:
        probabilities: Shape ``(N, ..., K)``.
        y: Labels, shape ``(N, ...)``.

    Raises:
        TypeError: As for :func:`reliability`.
        ValueError: As for :func:`reliability`.
    """
    p, labels = _classes(probabilities, y)
    if p.shape[1] == 2:
        from sklearn.metrics import brier_score_loss

        return float(brier_score_loss(labels, p[:, 1].clip(0, 1), pos_label=1))
    # scikit-learn takes more than two classes from version 1.7 on.
    errors = p.copy()
    errors[np.arange(len(p)), labels] -= 1.0
    return float(np.square(errors).sum(1).mean())


def negative_log_likelihood(probabilities: Any, y: Any) -> float:
    """Mean ``-log p(y)`` in nats, scikit-learn's ``log_loss``.

    It takes probabilities below 2e-16 for that. ``-predictive.log_density(y).mean()`` does not.

    Args:
        probabilities: Shape ``(N, ..., K)``.
        y: Labels, shape ``(N, ...)``.

    Raises:
        TypeError: As for :func:`reliability`.
        ValueError: As for :func:`reliability`.
    """
    from sklearn.metrics import log_loss

    p, labels = _classes(probabilities, y)
    p = p / p.sum(1, keepdims=True)
    return float(log_loss(labels, p, labels=np.arange(p.shape[1])))


@dataclass(frozen=True)
class ClassificationScores:
    """How good a predictive distribution of classes is.

    Attributes:
        accuracy: Part of the labels that were predicted.
        nll: Mean ``-log p(y)`` in nats.
        brier: See :func:`brier_score`.
        ece: See :func:`expected_calibration_error`.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2%}, NLL {self.nll:.4g} nats, Brier score {self.brier:.4g}, "
            f"ECE {self.ece:.2%}"
        )


def classification_scores(
    predictive: ClassificationPredictive | Any, y: Any, num_bins: int = 15
) -> ClassificationScores:
    """Accuracy, negative log-likelihood, Brier score and calibration error.

    Args:
        predictive: What was predicted: a predictive distribution, or any classifier's
            probabilities, shape ``(N, ..., K)``.
        y: Labels, shape ``(N, ...)``.
        num_bins: For the calibration error.

    Raises:
        TypeError: As for :func:`reliability`.
        ValueError: As for :func:`reliability`.
    """
    if isinstance(predictive, ClassificationPredictive):
        p = predictive.probabilities
        labels = check_labels(y, p)
        nll = float(-predictive.log_density(labels).mean())
    else:
        p = as_tensor(predictive, "predictive")
        nll = negative_log_likelihood(p, y)
        labels = check_labels(y, p)
    return ClassificationScores(
        float((p.argmax(-1) == labels).double().mean()),
        nll,
        brier_score(p, labels),
        expected_calibration_error(p, labels, num_bins),
    )


@dataclass(frozen=True)
class RegressionScores:
    """How good a predictive distribution of real targets is.

    Attributes:
        rmse: Root mean squared error of the mean, in the units of ``y``.
        nll: Mean negative log predictive density of a target, in nats. Several targets of a
            data point count each for itself; together: ``predictive.log_density(y, joint=True)``.
        levels: Nominal probability of the central intervals.
        coverage: Part of the targets in the interval of each level.
        width: Sharpness: mean width of the interval of each level, in the units of ``y``.
        pit_distance: Of the PIT from uniform, see :func:`pit_distance`.
    """

    rmse: float
    nll: float
    levels: tuple[float, ...]
    coverage: tuple[float, ...]
    width: tuple[float, ...]
    pit_distance: float

    def __str__(self) -> str:
        intervals = ", ".join(
            f"{coverage:.1%} in {level:.0%} (width {width:.3g})"
            for level, coverage, width in zip(self.levels, self.coverage, self.width, strict=True)
        )
        return (
            f"RMSE {self.rmse:.4g}, NLL {self.nll:.4g} nats, {intervals}, "
            f"PIT distance {self.pit_distance:.3f}"
        )


def regression_scores(
    predictive: RegressionPredictive, y: Any, levels: float | Sequence[float] = (0.5, 0.95)
) -> RegressionScores:
    """Error, log density, and coverage and sharpness of central intervals.

    Narrow intervals that miss are no merit: sharpness counts among predictions that are calibrated
    (Gneiting, Balabdaoui & Raftery (2007), https://doi.org/10.1111/j.1467-9868.2007.00587.x).

    Args:
        predictive: What was predicted.
        y: Targets, of the shape of ``predictive.mean``.
        levels: Nominal probabilities, each inside of (0, 1).

    Raises:
        TypeError: ``predictive`` is no :class:`RegressionPredictive`.
        ValueError: ``y`` does not go with ``predictive``, or ``levels`` is wrong.
    """
    if not isinstance(predictive, RegressionPredictive):
        raise TypeError(
            "predictive must be a RegressionPredictive, as posterior.predictive(x) returns it, but "
            f"is a {type(predictive).__name__}."
        )
    levels = tuple(
        check_probability("levels", level)
        for level in torch.as_tensor(levels, dtype=torch.float64).reshape(-1).tolist()
    )
    nll = float(-predictive.log_density(y).mean())  # first, for it checks the shape of y
    errors = as_tensor(y, "y").to(predictive.mean) - predictive.mean
    intervals = [predictive.interval(level) for level in levels]
    return RegressionScores(
        float(errors.square().mean().sqrt()),
        nll,
        levels,
        tuple(interval_coverage(*interval, y) for interval in intervals),
        tuple(float((upper - lower).mean()) for lower, upper in intervals),
        pit_distance(predictive.cdf(y)),
    )


def interval_coverage(lower: Any, upper: Any, y: Any) -> float:
    """Part of the targets in ``[lower, upper]``, all of one shape.

    Raises:
        TypeError: One of them is no tensor or array.
        ValueError: Shapes differ, there are no targets, or they are not finite.
    """
    lower = as_tensor(lower, "lower")
    upper, targets = as_tensor(upper, "upper").to(lower), as_tensor(y, "y").to(lower)
    if not targets.shape == lower.shape == upper.shape or targets.numel() == 0:
        raise ValueError(
            "lower, upper and y must have one shape and not be empty, but have "
            f"{tuple(lower.shape)}, {tuple(upper.shape)} and {tuple(targets.shape)}."
        )
    return float(((targets >= lower) & (targets <= upper)).double().mean())


def pit_distance(pit: Any) -> float:
    """Largest distance of the PIT's distribution from the uniform one, in ``[0, 1]``.

    The statistic of Kolmogorov and Smirnov; for ``N`` targets and the right predictive it is above
    ``1.36 / sqrt(N)`` once in 20 cases.

    Args:
        pit: ``predictive.cdf(y)``, any shape.

    Raises:
        ValueError: It is empty or outside of ``[0, 1]``.
    """
    values = np.sort(array(as_tensor(pit, "pit")).ravel())
    if not values.size or values[0] < 0 or values[-1] > 1:
        raise ValueError("pit must hold numbers in [0, 1], as predictive.cdf(y) gives them.")
    ranks = np.arange(len(values) + 1) / len(values)
    return float(max((ranks[1:] - values).max(), (values - ranks[:-1]).max()))


def _classes(probabilities: Any, y: Any) -> tuple[Array, NDArray[np.int64]]:
    """Probabilities, shape ``(M, K)``, and labels, shape ``(M,)``."""
    if isinstance(probabilities, ClassificationPredictive):
        probabilities = probabilities.probabilities
    p = as_tensor(probabilities, "probabilities")
    if p.dim() < 2 or p.shape[-1] < 2 or p.numel() == 0:
        raise ValueError(
            "probabilities must have shape (N, ..., K) with K of at least 2, but have shape "
            f"{tuple(p.shape)}."
        )
    labels = check_labels(y, p)
    flat = p.double().flatten(0, -2)
    sums = flat.sum(-1)
    if (flat < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=_SUM_TOLERANCE):
        raise ValueError(
            "probabilities must not be negative and sum to 1 in the last dimension, but reach from "
            f"{float(flat.min()):.3g}, with sums of {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}."
        )
    return array(flat), labels.flatten().cpu().numpy()
