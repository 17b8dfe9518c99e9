"""The numbers and names that users pass, checked before they are used."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_svdo._names import unknown_name

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
_DEVICES = ("auto", "cpu", "cuda", "cuda:0")


def check_count(name: str, value: object, least: int = 1) -> int:
    """``value`` as an ``int``.

    Raises:
        ValueError: It is not an integer of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, but is {value!r}.")
    return int(value)


def check_flag(name: str, value: object) -> bool:
    """``value`` as a ``bool``; 0, 1 and NumPy's own are taken, too.

    Raises:
        TypeError: It is neither True nor False.
    """
    if not isinstance(value, np.bool_ | numbers.Integral) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def check_name(name: str, value: object) -> str:
    """``value`` as it is, a string; whether anything has that name is for others to say.

    Raises:
        TypeError: It is no string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name, but is {value!r}.")
    return value


def check_rate(name: str, value: object) -> float:
    """``value`` as a ``float``.

    Raises:
        ValueError: It is not a positive, finite number.
    """
    if not is_number(value) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a positive number, but is {value!r}.")
    return float(value)  # type: ignore[arg-type]


def check_weight(name: str, value: object) -> None:
    """Refuse a weight that is not a finite number of at least 0, or a scalar tensor of one.

    Raises:
        TypeError: It is no such thing.
        ValueError: It is negative, NaN or infinite.
    """
    if isinstance(value, Tensor):
        number = value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool
    else:
        number = is_number(value)
    if not number:
        raise TypeError(f"{name} must be a number or a scalar tensor, but is {value!r}.")
    if not 0 <= float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be finite and not negative, but is {value}.")


def check_threshold(threshold: object) -> float:
    """The threshold on log alpha as a ``float``; infinity prunes nothing.

    Raises:
        ValueError: It is NaN or not a number.
    """
    if not is_number(threshold) or math.isnan(threshold):  # type: ignore[arg-type]
        raise ValueError(f"threshold must be a number (log alpha), but is {threshold!r}.")
    return float(threshold)  # type: ignore[arg-type]


def check_seed(seed: object, name: str = "seed") -> int | None:
    """``seed`` as an ``int``, or None.

    Raises:
        ValueError: It is neither an integer that torch's generators take nor None.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise ValueError(f"{name} must be an integer or None, but is {seed!r}.")
    number = int(seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{name} must be an integer of 64 bits, but is {number}.")
    return number


def check_functions(name: str, value: object) -> tuple[Callable[..., Any], ...]:
    """A list of functions as a tuple.

    Raises:
        TypeError: It is no list, or holds something else.
    """
    if callable(value) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of functions, but is {value!r}.\n  Try [{name}].")
    functions = tuple(value)
    for function in functions:
        if not callable(function):
            raise TypeError(f"{name} must be a list of functions, but holds {function!r}.")
    return functions


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that is unknown, or that the device does not have.

    Raises:
        ValueError: As said.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == "16-mixed" and device.type == "cpu":
        raise ValueError(
            'precision "16-mixed" needs a CUDA device, but device is "cpu".\n'
            '  Try precision="bf16-mixed".'
        )


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; ``"auto"`` is the current CUDA device if there is one.

    Raises:
        ValueError: The name is unknown, or there is no such device.
    """
    available = torch.cuda.is_available()
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if available else _CPU
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise unknown_name("device", device, _DEVICES) from None
    if where.type == "cpu":
        return _CPU
    if where.type != "cuda":
        raise unknown_name("device", device, _DEVICES)
    count = torch.cuda.device_count() if available else 0
    if (where.index or 0) >= count:
        raise ValueError(
            f'device "{device}" is not available: this machine has {count} CUDA devices.'
        )
    return torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)


_CPU = torch.device("cpu")


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
