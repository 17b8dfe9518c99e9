"""What L1 logistic regression refuses, and how it says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bayes_svdo.inference.arguments import check_count, check_rate, is_number

_DEFAULT_TOL = {torch.float64: 1e-6, torch.float32: 1e-4}


def check_data(x: Tensor, y: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, int]:
    """Refuse data that have no answer; return the weights of the samples and the class count."""
    if not isinstance(x, Tensor) or x.dtype not in _DEFAULT_TOL:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32 or float64 tensor; got {got}. Try x.double().")
    if x.layout != torch.strided:
        raise TypeError(f"x must be dense; got layout {x.layout}. Try x.to_dense().")
    if x.ndim != 2:
        raise ValueError(f"x must be (samples, features); got shape {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise ValueError(f"x must be finite; {count} of its {x.numel()} entries are NaN or inf.")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be an integer tensor of class indices; got {got}. Try y.long().")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"y must be ({len(x)},), one class index per row of x; got shape {tuple(y.shape)}."
        )
    if y.device != x.device:
        raise ValueError(f"y is on {y.device} but x is on {x.device}. Try y.to(x.device).")
    weights = _check_sample_weight(x, sample_weight)
    return weights, _check_classes(y.long(), weights)


def _check_sample_weight(x: Tensor, sample_weight: Tensor | None) -> Tensor:  # -> (n,)
    if sample_weight is None:
        return x.new_ones(len(x))
    if not isinstance(sample_weight, Tensor) or sample_weight.shape != x.shape[:1]:
        got = getattr(sample_weight, "shape", type(sample_weight).__name__)
        raise ValueError(f"sample_weight must be a tensor of shape ({len(x)},); got {got}.")
    if sample_weight.device != x.device:
        raise ValueError(
            f"sample_weight is on {sample_weight.device} but x is on {x.device}. "
            "Try sample_weight.to(x.device)."
        )
    weights = sample_weight.detach().to(x.dtype)
    if not bool((torch.isfinite(weights) & (weights >= 0.0)).all()):
        raise ValueError(
            "sample_weight must be finite and not negative; "
            f"got values from {float(weights.min())} to {float(weights.max())}."
        )
    return weights


def _check_classes(y: Tensor, weights: Tensor) -> int:
    if not len(y):
        raise ValueError("x and y must hold at least one sample; got none.")
    if int(y.min()) < 0:
        raise ValueError(f"y must be class indices 0 .. K - 1; got {int(y.min())}.")
    mass = torch.bincount(y, weights=weights.double())
    num_classes = int(torch.count_nonzero(mass))
    if num_classes == 1:
        raise ValueError(
            "y must hold at least two classes with positive weight; "
            f"got one, {int(mass.argmax())}, in {len(y)} samples."
        )
    if num_classes < len(mass):
        absent = int((mass == 0.0).nonzero()[0])
        raise ValueError(
            f"y must hold every class from 0 to {len(mass) - 1} with positive weight, but class "
            f"{absent} has none: its intercept would be -inf.\n"
            "  Try torch.unique(y, return_inverse=True)[1] to number the classes that occur."
        )
    return num_classes


def check_Cs(Cs: Iterable[float] | Tensor) -> list[float]:
    """The grid as floats, or an error that names the value that is no ``C``."""
    if not isinstance(Cs, Iterable) or getattr(Cs, "ndim", 1) != 1:
        raise TypeError(f"Cs must be a list of numbers; got {Cs!r}. For one value, try [C].")
    values: Sequence[object] = Cs.tolist() if isinstance(Cs, Tensor) else list(Cs)
    if not values:
        raise ValueError("Cs must hold at least one value; got none.")
    grid = []
    for value in values:
        if not is_number(value) or not 0.0 < float(value) < math.inf:  # type: ignore[arg-type]
            raise ValueError(
                f"C must be a positive, finite number; got {value!r}. "
                "For almost no penalty, try a large C, such as 1e4."
            )
        grid.append(float(value))  # type: ignore[arg-type]
    return grid


def check_options(max_iter: int, solver: str) -> None:
    """Refuse options that name nothing."""
    check_count("max_iter", max_iter)
    if not isinstance(solver, str) or solver not in ("auto", "newton", "fista"):
        raise ValueError(f'solver must be "auto", "newton" or "fista"; got {solver!r}.')


def check_tol(tol: float | None, dtype: torch.dtype) -> float:
    """The tolerance, or its default for the precision."""
    return _DEFAULT_TOL[dtype] if tol is None else check_rate("tol", tol)
