"""What our scikit-learn estimators share: arrays in, tensors on a device, arrays out."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from bayes_svdo.inference.arguments import choose_device

Array = NDArray[Any]


class TorchEstimator(BaseEstimator):  # type: ignore[misc]
    """Arrays in, tensors on a device, arrays out."""

    device: str

    def _inputs(self, X: Any, **kwargs: Any) -> Array:
        """``X`` checked as scikit-learn does, float64; a tensor of any device is taken."""
        checked: Array = validate_data(self, as_array(X), dtype=np.float64, **kwargs)
        return checked

    def _training_data(self, X: Any, y: Any, **kwargs: Any) -> tuple[Array, Array]:
        checked = validate_data(self, as_array(X), as_array(y), dtype=np.float64, **kwargs)
        return checked[0], checked[1]

    def _tensor(self, values: Array) -> Tensor:
        # A copy where the array is read-only, as those of joblib's workers are.
        tensor = torch.as_tensor(np.require(values, requirements=("C", "W")))
        return tensor.to(choose_device(self.device))

    def _new_inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self._tensor(self._inputs(X, reset=False))


class TorchClassifier(ClassifierMixin, TorchEstimator):  # type: ignore[misc]
    """Labels of any kind in, class indices inside."""

    classes_: Array

    def _labelled_data(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        inputs, labels = self._training_data(X, y)
        check_classification_targets(labels)
        encoder = LabelEncoder().fit(labels)
        self.classes_ = encoder.classes_
        if len(self.classes_) < 2:
            raise ValueError(
                f"y holds one class only, {self.classes_[0]!r}; a classifier needs two or more."
            )
        return self._tensor(inputs), self._tensor(encoder.transform(labels).astype(np.int64))

    def predict_proba(self, X: Any) -> Array:
        """Probability of each class, shape ``(n_samples, n_classes)``, in order of ``classes_``."""
        raise NotImplementedError(f"{type(self).__name__} must define predict_proba(X).")

    def predict(self, X: Any) -> Array:
        """The most probable label, shape ``(n_samples,)``."""
        check_is_fitted(self)
        chosen: Array = self.classes_[self.predict_proba(X).argmax(1)]
        return chosen


class LinearClassifier(TorchClassifier):
    """Logits that are linear in the features, with one set of weights."""

    coef_: Array
    intercept_: Array

    def decision_function(self, X: Any) -> Array:
        """Logits: of ``classes_[1]``, shape ``(n_samples,)``, or of each class."""
        check_is_fitted(self)
        logits: Array = self._inputs(X, reset=False) @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Array:
        """Probability of each class under these weights."""
        return as_probabilities(self.decision_function(X))


def check_number(name: str, value: object, least: float = -math.inf) -> float:
    """``value`` as a ``float``.

    Raises:
        ValueError: It is not a finite number of at least ``least``.
    """
    number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    if not (math.isfinite(number) and number >= least):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, but is {value!r}.")
    return number


def standardized(
    inputs: Tensor, *, each: bool
) -> tuple[Tensor, Tensor, Tensor]:  # (n, p) -> (n, p), (p,), (p,)
    """``(inputs - mean) / scale``, ``mean`` and ``scale``; nothing in it has a unit.

    Args:
        inputs: Features, float64.
        each: Whether every feature has its own scale, its standard deviation; otherwise all have
            one, the root mean square of these. A feature that is constant up to rounding becomes 0.

    Raises:
        ValueError: A scale is so small that its reciprocal, and so a weight, overflows.
    """
    power = _power_of_2(inputs.abs().amax(0))
    inputs = inputs / power
    mean, spread = inputs.mean(0), inputs.std(0, correction=0)
    constant = spread <= 10 * torch.finfo(inputs.dtype).eps * mean.abs()
    scale = torch.where(constant, 0.0, spread * power)
    if not each:
        largest = _power_of_2(scale.amax())
        scale = largest * (scale / largest).square().mean().sqrt().expand_as(scale)
    scale = torch.where(constant, power, scale)
    if not scale.reciprocal().isfinite().all():
        raise ValueError(
            "the values of X vary so little that the weights overflow; rescale them first."
        )
    inputs = torch.where(constant, 0.0, (inputs - mean) / (scale / power))
    return inputs, mean * power, scale


def _power_of_2(values: Tensor) -> Tensor:
    """The power of 2 at or below each, 1 for 0.

    Division by it rounds nothing, and what is left can be squared.
    """
    mantissa, _ = torch.frexp(values)
    return torch.where(mantissa == 0, 1.0, values / (2 * mantissa))


def as_array(values: Any) -> Any:
    """A tensor of any device as an array; anything else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    # NumPy has no bfloat16.
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def as_probabilities(logits: Array) -> Array:
    """Logits, of the second class ``(n,)`` or of each ``(n, K)``, as probabilities ``(n, K)``."""
    tensor = torch.as_tensor(logits)
    if tensor.dim() == 1:
        tensor = torch.stack([torch.zeros_like(tensor), tensor], 1)
    return as_array(tensor.softmax(1))  # type: ignore[no-any-return]
