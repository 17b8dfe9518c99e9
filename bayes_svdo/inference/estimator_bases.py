"""What our scikit-learn estimators share: arrays in, tensors on a device, arrays out."""

from __future__ import annotations

import math
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_is_fitted,
    check_random_state,
    validate_data,
)
from torch import Tensor

from bayes_svdo.inference.arguments import choose_device
from bayes_svdo.inference.scales import power_of_2

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

    def _tensor(self, values: Array, device: torch.device | None = None) -> Tensor:
        # A copy where the array is read-only, as those of joblib's workers are.
        tensor = torch.as_tensor(np.require(values, requirements=("C", "W")))
        return tensor.to(choose_device(self.device) if device is None else device)


class KernelEstimator(TorchEstimator):
    """Over a relevance vector machine, which is where the fit was, and anywhere once unpickled."""

    kernel: Any
    _machine: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self._is_precomputed()
        return tags

    def _is_precomputed(self) -> bool:
        return isinstance(self.kernel, str) and self.kernel == "precomputed"

    def _new_inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        if self._is_precomputed():
            array = check_array(as_array(X), dtype=np.float64, estimator=self, input_name="X")
            if array.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"X has {array.shape[1]} features, but {type(self).__name__} is expecting "
                    f'{self.n_features_in_} features as input: with kernel="precomputed" X must '
                    f"have the shape (n_samples, n_samples_fit) = ({len(array)}, "
                    f"{self.n_features_in_}), but has {array.shape}.\n  Try the kernel between the "
                    "new data (rows) and all data of the fit (columns)."
                )
        return self._tensor(self._inputs(X, reset=False), self._machine.device)

    def __getstate__(self) -> dict[str, Any]:
        """On the CPU: who unpickles it may have no other device."""
        state: dict[str, Any] = super().__getstate__()
        if "_machine" in state:
            state = state | {"_machine": state["_machine"].to("cpu")}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On its own device again, where there is one."""
        super().__setstate__(state)
        if hasattr(self, "_machine"):
            with suppress(ValueError):
                self._machine = self._machine.to(choose_device(self.device))


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


def seed_of(random_state: Any) -> int:
    """A seed for torch, drawn as scikit-learn draws.

    Raises:
        ValueError: ``random_state`` is none of its kinds.
    """
    try:
        if isinstance(random_state, bool):
            raise ValueError
        source = check_random_state(random_state)
    except ValueError:
        raise ValueError(
            "random_state must be an integer from 0 to 2**32 - 1, a numpy.random.RandomState or "
            f"None, but is {random_state!r}."
        ) from None
    return int(source.randint(2**31 - 1))


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
    power = power_of_2(inputs.abs().amax(0))
    inputs = inputs / power
    mean, spread = inputs.mean(0), inputs.std(0, correction=0)
    constant = spread <= 10 * torch.finfo(inputs.dtype).eps * mean.abs()
    scale = torch.where(constant, 0.0, spread * power)
    if not each:
        largest = power_of_2(scale.amax())
        scale = largest * (scale / largest).square().mean().sqrt().expand_as(scale)
    scale = torch.where(constant, power, scale)
    if not scale.reciprocal().isfinite().all():
        raise ValueError(
            "the values of X vary so little that the weights overflow; rescale them first."
        )
    inputs = torch.where(constant, 0.0, (inputs - mean) / (scale / power))
    return inputs, mean * power, scale


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
