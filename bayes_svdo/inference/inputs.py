"""What users hand over to be predicted or scored, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_svdo.inference.batches import finite_tensor


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor, an array, a column or table of pandas, or a list of finite numbers as a tensor.

    Raises:
        TypeError: It is something else, or does not hold numbers.
        ValueError: It holds NaN or inf, or is a scalar.
    """
    if isinstance(value, (list, tuple)):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be numbers in a tensor or an array: {error}") from None
    elif not isinstance(value, Tensor) and hasattr(value, "__array__"):
        value = np.asarray(value)
        if value.dtype.kind not in "biufc":
            raise TypeError(f"{name} must hold numbers, but is of dtype {value.dtype}.")
    return finite_tensor(value, name)


def inputs_of(x: Any) -> tuple[Tensor, ...]:
    """A network's inputs, each with as many data points as the first.

    Raises:
        TypeError: ``x`` is no tensor or array, nor a tuple of such.
        ValueError: It is empty, not finite, or its parts are not of one length.
    """
    parts = x if isinstance(x, tuple) else (x,)
    names = [f"x[{index}]" if len(parts) > 1 else "x" for index in range(len(parts))]
    inputs = tuple(map(as_tensor, parts, names))
    for name, value in zip(names, inputs, strict=True):
        if len(value) != len(inputs[0]):
            raise ValueError(f"{name} has {len(value)} data points, but x[0] {len(inputs[0])}.")
    if not inputs or len(inputs[0]) == 0:
        raise ValueError("x is empty.")
    return inputs
