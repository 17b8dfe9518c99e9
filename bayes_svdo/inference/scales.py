"""Scales that can be taken off numbers and put back without an error of rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_2(values: Tensor) -> Tensor:  # (*shape) -> (*shape)
    """The power of 2 at or below each of some sizes, 1 for 0.

    Division by it rounds nothing, and what is left can be squared.

    >>> power_of_2(torch.tensor([0.0, 0.3, 1.0, 1000.0]))
    tensor([1.0000e+00, 2.5000e-01, 1.0000e+00, 5.1200e+02])
    """
    mantissa, _ = torch.frexp(values)
    return torch.where(mantissa == 0, 1.0, values / (2 * mantissa))
