"""What our scikit-learn estimators share: arrays in, tensors on a device, arrays out."""

from __future__ import annotations

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
