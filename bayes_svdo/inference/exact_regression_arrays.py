"""The arrays of the ascent of VD-ARD regression: NumPy's on a CPU, torch's on any other device.

A fit of moderate size is some 1,500 operations on a few hundred numbers each, for which NumPy takes
half of torch's time. So the ascent is written in the operators and methods that both have, and in
the functions here. Triangular factors are torch's in both cases, as NumPy raises where one of a
batch has none, and so is the search for the smallest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = Any  # NDArray or Tensor
Arrays: TypeAlias = Any  # NumPyArrays or TorchArrays


class TorchArrays:
    """Functions of tensors."""

    amax, amin, minimum, where = torch.amax, torch.amin, torch.minimum, torch.where
    at_least, at_most, floor = torch.clamp_min, torch.clamp_max, torch.floor
    exp, expm1, log, log1p = torch.exp, torch.expm1, torch.log, torch.log1p
    sqrt, square, eigh = torch.sqrt, torch.square, torch.linalg.eigh
    broadcast_to, concatenate, stack = torch.broadcast_to, torch.concatenate, torch.stack
    copy, empty_like, full_like, zeros_like = (
        torch.clone, torch.empty_like, torch.full_like, torch.zeros_like
    )  # fmt: skip
    finfo = torch.finfo

    @staticmethod
    def array(tensor: Tensor) -> Array:
        """What a tensor holds, as an array."""
        return tensor

    @staticmethod
    def tensor(array: Array) -> Any:  # a Tensor
        """What an array holds, as a tensor."""
        return array

    @staticmethod
    def count(num: int, like: Array, step: int = 1) -> Array:  # (num,)
        """0, 1, ..., num - 1, times a step."""
        return torch.arange(0, num * step, step, device=like.device)

    @staticmethod
    def whole(x: Array) -> Array:
        """Whole numbers as integers."""
        return x.long()

    @staticmethod
    def diagonal(square: Array) -> Array:  # (..., K, K) -> (..., K)
        """A view, to write to."""
        return square.diagonal(dim1=-2, dim2=-1)

    @staticmethod
    def replaced(x: Array, at: Array, values: Array) -> Array:  # (*shape), (*part), (*part)
        """A copy with other values at these positions, counted as ``take`` counts them."""
        # Not put, which torch.use_deterministic_algorithms refuses.
        return x.flatten().scatter(0, at.flatten(), values.flatten()).view(x.shape)

    @staticmethod
    def smallest(x: Array, num: int) -> Array:  # (..., K) -> (..., num), (..., num)
        """In ascending order, and where they are."""
        return x.topk(num, largest=False)

    @staticmethod
    def cholesky(a: Array) -> tuple[Array, Array]:  # (..., K, K) -> (..., K, K), (...)
        """The lower factor, and whether there is none."""
        factor, info = torch.linalg.cholesky_ex(a)
        return factor, info > 0

    @staticmethod
    def inverse_of_lower(factor: Array) -> Array:  # (..., K, K)
        """Of a lower triangular matrix."""
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False)

    @staticmethod
    def cholesky_solve(factor: Array, right: Array) -> Array:  # (..., K, K), (..., K) -> (..., K)
        """``(factor factor')⁻¹ right``."""
        return torch.cholesky_solve(right[..., None], factor)[..., 0]


def _by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one of arrays, which share their memory."""

    def of_arrays(*arguments: Any) -> Any:
        found = function(
            *(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments)
        )
        return found.numpy() if isinstance(found, Tensor) else tuple(f.numpy() for f in found)

    return of_arrays


class NumPyArrays:
    """The same functions of NumPy's arrays."""

    amax, amin, minimum, where = np.amax, np.amin, np.minimum, np.where
    at_least, at_most, floor = np.maximum, np.minimum, np.floor
    exp, expm1, log, log1p = np.exp, np.expm1, np.log, np.log1p
    sqrt, square, eigh = np.sqrt, np.square, np.linalg.eigh
    broadcast_to, concatenate, stack = np.broadcast_to, np.concatenate, np.stack
    copy, empty_like, full_like, zeros_like = np.copy, np.empty_like, np.full_like, np.zeros_like
    finfo = np.finfo

    array, tensor = Tensor.numpy, torch.from_numpy
    smallest = _by_torch(TorchArrays.smallest)
    cholesky = _by_torch(TorchArrays.cholesky)
    inverse_of_lower = _by_torch(TorchArrays.inverse_of_lower)
    cholesky_solve = _by_torch(TorchArrays.cholesky_solve)

    @staticmethod
    def count(num: int, like: Array, step: int = 1) -> Array:  # (num,)
        """0, 1, ..., num - 1, times a step."""
        return np.arange(0, num * step, step)

    @staticmethod
    def whole(x: Array) -> Array:
        """Whole numbers as integers."""
        return x.astype(np.int64)

    @staticmethod
    def diagonal(square: Array) -> Array:  # (..., K, K) -> (..., K)
        """A view, to write to."""
        return np.einsum("...ii->...i", square)

    @staticmethod
    def replaced(x: Array, at: Array, values: Array) -> Array:  # (*shape), (*part), (*part)
        """A copy with other values at these positions, counted as ``take`` counts them."""
        x = x.copy()
        x.put(at, values)
        return x


def arrays_on(device: torch.device) -> Arrays:
    """The functions to compute with on a device."""
    return NumPyArrays if device.type == "cpu" else TorchArrays
