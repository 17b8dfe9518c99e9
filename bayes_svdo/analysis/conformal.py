"""Predictive intervals and sets with a guarantee, by split conformal prediction.

The library is MAPIE (``pip install bayes-svdo[conformal]``); it gets our predictions for a
calibration set and corrects those for new inputs. If both are exchangeable, and the network has not
seen the calibration set, a new target lies in the result with probability ``level`` at least,
over both sets, whatever the posterior is worth. Nothing is promised for single inputs.
"""

from __future__ import annotations

import math
import warnings
from decimal import Decimal
from importlib import import_module
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from torch import Tensor

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.figures import Array, array
from bayes_svdo.analysis.predictives import (
    ClassificationPredictive,
    RegressionPredictive,
    check_labels,
    check_probability,
)
from bayes_svdo.inference.arguments import check_seed
from bayes_svdo.inference.inputs import as_tensor

Score = Literal["lac", "aps"]


def conformal_interval(
    calibration: RegressionPredictive,
    y: Any,
    predictive: RegressionPredictive,
    level: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Central intervals, widened or narrowed until they cover a part ``level`` of the targets.

    Conformalized quantile regression (Romano, Patterson & Candès (2019),
    https://arxiv.org/abs/1905.03222) on the quantiles of the predictive distribution, by MAPIE's
    ``ConformalizedQuantileRegressor`` with one correction for both ends. Where that narrows an
    interval past nothing, its ends would cross: it is its middle then, with which no less is
    covered.

    Args:
        calibration: Predictions for inputs that the network has not been trained on.
        y: Their targets, one for each input: shape ``(N,)`` or ``(N, 1)``.
        predictive: Predictions for other inputs.
        level: Nominal coverage, from ``1 / N`` to ``1 - 1 / N``.

    Returns:
        Lower and upper ends, of the shape of ``predictive.mean``; no lower above its upper.

    Raises:
        ImportError: MAPIE is not installed.
        TypeError: The predictions are of another kind.
        ValueError: There are several targets for one input, ``y`` does not fit, ``level`` is not
            inside of (0, 1), or there are too few targets for it.
    """
    _check_kind(calibration, predictive, RegressionPredictive)
    check_probability("level", level)
    targets = as_tensor(y, "y")
    shape = calibration.mean.shape
    if targets.shape != shape or shape.numel() != len(calibration.mean):
        raise ValueError(
            "y must have one target for each of the predictions, which have shape "
            f"{tuple(shape)}, but has shape {tuple(targets.shape)}."
        )
    _check_enough(len(targets), level)
    regressor = _mapie("regression").ConformalizedQuantileRegressor(
        [_Column(index) for index in range(3)], confidence_level=level, prefit=True
    )
    regressor.conformalize(_quantiles(calibration, level), array(targets).ravel())
    _, ends = regressor.predict_interval(_quantiles(predictive, level), symmetric_correction=True)
    lower, upper = torch.as_tensor(ends[..., 0]).to(predictive.mean).unbind(1)
    middle = 0.5 * (lower + upper)
    lower, upper = torch.minimum(lower, middle), torch.maximum(upper, middle)
    return lower.reshape(predictive.mean.shape), upper.reshape(predictive.mean.shape)


def conformal_set(
    calibration: ClassificationPredictive,
    y: Any,
    predictive: ClassificationPredictive,
    level: float = 0.95,
    score: Score = "lac",
    seed: int | None = None,
) -> Tensor:
    """Sets of classes that hold the label with probability ``level`` at least.

    By MAPIE's ``SplitConformalClassifier``.

    Args:
        calibration: Predictions for inputs that the network has not been trained on.
        y: Their labels, shape ``(N,)``; or ``(N, 1)``, as a net of one output has them.
        predictive: Predictions for other inputs, of the same classes.
        level: Nominal coverage, from ``1 / N`` to ``1 - 1 / N``.
        score: ``"lac"``, the smallest sets on average, some of them empty (Sadinle, Lei &
            Wasserman (2019), https://arxiv.org/abs/1609.00451), or ``"aps"``, larger ones that
            adapt to the input (Romano, Sesia & Candès (2020), https://arxiv.org/abs/2006.02544),
            for three classes or more.
        seed: For ``"aps"``, which takes a random number for each label; None to go on with torch's
            global generators.

    Returns:
        Which classes are in the set, bool, shape ``(M, K)``.

    Raises:
        ImportError: MAPIE is not installed.
        TypeError: The predictions are of another kind.
        ValueError: Predictions are not of shape ``(N, K)`` or ``(N, 1, K)``, ``y`` does not fit,
            ``level`` is not inside of (0, 1), there are too few labels for it, ``score`` is
            unknown, or ``"aps"`` for labels of fewer than three classes, or ``seed`` is none.
    """
    _check_kind(calibration, predictive, ClassificationPredictive)
    seed = check_seed(seed)
    check_probability("level", level)
    if score not in get_args(Score):
        raise unknown_name("score", score, get_args(Score))
    shapes = [p.log_probabilities.shape for p in (calibration, predictive)]
    if any(math.prod(shape[1:-1]) != 1 for shape in shapes) or shapes[0][-1] != shapes[1][-1]:
        raise ValueError(
            "predictions must have shape (N, K) or (N, 1, K) with the same K, but have shapes "
            f"{tuple(shapes[0])} and {tuple(shapes[1])}."
        )
    labels = check_labels(y, calibration.log_probabilities).flatten()
    _check_enough(len(labels), level)
    if score == "aps" and len(labels.unique()) < 3:
        raise ValueError(
            f'score="aps" takes labels of at least 3 classes, but y holds {len(labels.unique())}.\n'
            '  Try score="lac".'
        )
    if score == "aps" and seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    classifier = _mapie("classification").SplitConformalClassifier(
        _Probabilities(shapes[0][-1]),
        confidence_level=level,
        conformity_score=score,
        random_state=None if seed is None else _generator(seed),
    )
    with warnings.catch_warnings():  # the guarantee does not need all classes
        warnings.filterwarnings("ignore", "WARNING: your conformalization dataset has less labels")
        classifier.conformalize(_normalised(calibration), labels.cpu().numpy())
    _, sets = classifier.predict_set(_normalised(predictive))
    return torch.as_tensor(sets[..., 0]).to(predictive.log_probabilities.device)


class _Fitted(BaseEstimator):  # type: ignore[misc]
    """What MAPIE takes for an estimator that has been fitted: a method and an attribute."""

    fitted_ = True

    def fit(self, x: Array, y: Array) -> Self:
        return self


class _Column(RegressorMixin, _Fitted):  # type: ignore[misc]
    """Predicts a column of its inputs."""

    def __init__(self, index: int) -> None:
        self.index = index

    def predict(self, x: Array) -> Array:
        return np.asarray(x)[:, self.index]


class _Probabilities(ClassifierMixin, _Fitted):  # type: ignore[misc]
    """Its inputs are its predictions."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classes_ = np.arange(num_classes)

    def predict_proba(self, x: Array) -> Array:
        return np.asarray(x)

    def predict(self, x: Array) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = np.argmax(x, axis=1)
        return labels


def _quantiles(predictive: RegressionPredictive, level: float) -> Array:
    """Lower end, upper end and median, in MAPIE's order, shape ``(N, 3)``."""
    median = predictive.quantile(0.5)
    return array(torch.stack([part.flatten() for part in (*predictive.interval(level), median)], 1))


def _normalised(predictive: ClassificationPredictive) -> Array:
    return array(predictive.log_probabilities.softmax(-1).flatten(0, -2))


def _generator(seed: int) -> np.random.RandomState:
    """NumPy's, of any 64 bits; on its own it takes 32."""
    return np.random.RandomState([seed % 2**32, (seed >> 32) % 2**32])


def _check_enough(number: int, level: float) -> None:
    alpha = float(1 - Decimal(str(level)))  # 0.1 for 0.9, as MAPIE has it
    needed = math.ceil(max(1 / alpha, 1 / (1 - alpha)))
    if number < needed:
        raise ValueError(
            f"level={level} takes at least {needed} targets to calibrate, but y holds {number}."
        )


def _check_kind(calibration: object, predictive: object, kind: type) -> None:
    for name, value in (("calibration", calibration), ("predictive", predictive)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, but is a {type(value).__name__}.")


def _mapie(module: str) -> Any:
    try:
        return import_module(f"mapie.{module}")
    except ImportError as error:
        raise ImportError(
            "conformal prediction needs MAPIE.\n  Try pip install 'bayes-svdo[conformal]'."
        ) from error
