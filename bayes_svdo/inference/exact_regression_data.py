"""The data of VD-ARD regressions: checked, in natural units, and as small as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from bayes_svdo.inference.arguments import check_flag
from bayes_svdo.inference.exact_regression_ascent import Problems
from bayes_svdo.inference.exact_regression_curves import KL, tabulate
from bayes_svdo.inference.exact_regression_degenerate import (
    DegenerateObjectiveError,
    chi_square_threshold,
    which,
)

# Of a column of norm 1 from the span of those before it. Closer, the Gram matrix loses digits.
_LEAST_DISTANCE = 0.03

Method = Literal["joint", "alternating"]
Start = Literal["zero", "ols", "ridge"]


class ConstantTargetError(DegenerateObjectiveError):
    """The target is constant up to rounding, and its noise is to be learned."""


def checked_data(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` (..., N, D) and ``y`` (..., N) in ``dtype``, with the same leading dimensions."""
    _check_tensor("x", x)
    _check_tensor("y", y)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}.")
    if x.device != y.device:
        raise TypeError(f"x is on {x.device} but y is on {y.device}; move one of them.")
    if x.dim() < 2 or y.dim() < 1 or x.shape[-2] != y.shape[-1] or y.shape[-1] == 0:
        raise ValueError(
            "x must have shape (..., observations, features) and y (..., observations) with at "
            f"least one observation, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    x, y = x.detach().to(dtype), y.detach().to(dtype)
    for name, value in (("x", x), ("y", y)):
        # The sum is far cheaper.
        if not math.isfinite(float(value.sum())) and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"{name} contains NaN or infinity ({bad} of {value.numel()} values).\n"
                "  Impute or drop these observations before fitting."
            )
    batch = x.shape[:-2]
    if y.shape[:-1] != batch:
        try:
            batch = torch.broadcast_shapes(batch, y.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"the leading dimensions of x {tuple(x.shape)} and y {tuple(y.shape)} do not "
                "broadcast."
            ) from None
    if 0 in batch:
        raise ValueError(f"there is no problem to fit: x has shape {tuple(x.shape)}.")
    return x.expand(*batch, *x.shape[-2:])[None], y.expand(*batch, y.shape[-1])[None]


def checked_inputs(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:  # (..., M, D)
    """Inputs to predict at, in ``dtype``."""
    _check_tensor("x", x)
    if x.dim() < 2 or x.shape[-1] != dim:
        raise ValueError(
            f"x must have shape (..., observations, {dim}) as in the fit, got {tuple(x.shape)}."
        )
    if not x.isfinite().all():
        bad = int((~x.isfinite()).sum())
        raise ValueError(f"x contains NaN or infinity ({bad} of {x.numel()} values).")
    return x.to(dtype)


def check_beside(x: Tensor, weights: Tensor) -> None:  # (..., M, D), (..., D)
    """Refuse inputs that are elsewhere than the weights, or for other problems."""
    if x.device != weights.device:
        raise ValueError(
            f"x is on {x.device} but the fit is on {weights.device}.\n"
            f"  Try x.to({str(weights.device)!r})."
        )
    batch = tuple(weights.shape[:-1])
    try:
        torch.broadcast_shapes(x.shape[:-2], batch)
    except RuntimeError:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, whose leading dimensions {tuple(x.shape[:-2])} do not "
            f"broadcast with {batch}, those of the problems that were fitted."
        ) from None


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}.\n"
            f"  Try torch.as_tensor({name})."
        )
    if value.layout != torch.strided or value.is_complex():
        dense = value.layout == torch.strided
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, got {value.layout}, {value.dtype}.\n"
            f"  Try {name}.{'real' if dense else 'to_dense()'}."
        )


def kl_weight_of(kl_weight: float | str, num_data: int) -> float:
    """The number behind a name; see :func:`fit_vdard_regression`."""
    if isinstance(kl_weight, str):
        weight = _named_kl_weight(kl_weight, num_data)
        if not 0 < weight < math.inf:  # "bic" of one observation, or an absurd percentage
            raise ValueError(
                f"kl_weight must be positive and finite, got {kl_weight!r}, which is {weight:g} "
                f"for n_samples = {num_data}.\n  Try a number, such as 2.0."
            )
        return weight
    if not _is_a(Real, kl_weight):
        raise TypeError(
            'kl_weight must be a positive number, "aic", "bic" or a percentage such as "5%", got '
            f"{kl_weight!r}."
        )
    if not (0 < kl_weight < math.inf):
        raise ValueError(f"kl_weight must be positive and finite, got {kl_weight}.")
    return float(kl_weight)


def _named_kl_weight(name: str, num_data: int) -> float:
    text = name.strip().lower()
    if text == "aic":
        return 2.0
    if text == "bic":
        return math.log(num_data)
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ValueError(
            f'kl_weight must be a positive number, "aic", "bic" or a percentage such as "5%", '
            f"got {name!r}."
        )
    return chi_square_threshold(share)


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_options(
    kl: object,
    method: str,
    fit_intercept: object,
    min_noise: float,
    max_iter: int,
    tol: float | None,
) -> bool:
    """Refuse options out of range; whether there is an intercept, as a ``bool``."""
    if not isinstance(kl, str):
        raise TypeError(f"kl must be the name of a KL, such as 'exact', got {kl!r}.")
    fit_intercept = check_flag("fit_intercept", fit_intercept)
    for name, value, kind, wanted in (
        ("min_noise", min_noise, Real, "a number"),
        ("max_iter", max_iter, Integral, "an integer"),
        ("tol", 1.0 if tol is None else tol, Real, "a number or None"),
    ):
        if not _is_a(kind, value):
            raise TypeError(f"{name} must be {wanted}, got {value!r}.")
    if not isinstance(method, str) or method not in get_args(Method):
        raise ValueError(f'method must be "joint" or "alternating", got {method!r}.')
    if not 0 <= min_noise < 1:
        raise ValueError(f"min_noise must be in [0, 1), got {min_noise}.")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}.")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    return fit_intercept


def start_names(
    starts: Sequence[Start] | None, method: Method, dim: int, degrees: int
) -> tuple[str, ...]:
    """The starts to try; see :func:`fit_vdard_regression`."""
    if starts is None:
        first = "zero" if method == "joint" else "ridge"
        if dim >= degrees:
            return (first,)
        return ("zero", "ols") if method == "joint" else ("ols",)
    if not isinstance(starts, Sequence):
        raise TypeError(f'starts must be a tuple of "zero", "ols" and "ridge", got {starts!r}.')
    names = tuple(starts)
    unknown = [name for name in names if not (isinstance(name, str) and name in get_args(Start))]
    if isinstance(starts, str) or not names or unknown:
        raise ValueError(f'starts must be a tuple of "zero", "ols" and "ridge", got {starts!r}.')
    if "ols" in names and dim >= degrees:
        raise ValueError(
            f'starts includes "ols", which fits {dim} features to {degrees} degrees of freedom '
            'without error.\n  Use ("zero",) or ("zero", "ridge").'
        )
    if "zero" in names and method == "alternating":
        raise ValueError(
            'starts includes "zero", which the alternation can never leave: alpha given loc = 0 is '
            'infinite, and loc given infinite alpha is 0.\n  Use ("ols",) or ("ridge",).'
        )
    return names


class NaturalUnits(NamedTuple):
    """Data in which columns and target have norm 1 (or are all 0), in M <= D + 1 rows."""

    x: Tensor  # (B, M, D)
    y: Tensor  # (B, M)
    x_mean: Tensor  # (B, D), what was taken off; 0 without an intercept
    y_mean: Tensor  # (B,)
    x_scale: Tensor  # (B, D), by what was divided; 1 where x is constant
    y_scale: Tensor  # (B,)
    constant: Tensor  # (B,), whether y is
    gram: Tensor | None  # (B, D + 1, D + 1), of x and y, where the rotation came from it
    least_squares: Tensor | None  # (B, D), of y on x, likewise


def natural_units(x: Tensor, y: Tensor, fit_intercept: bool) -> NaturalUnits:
    """Centre, rotate and scale; a problem without features is given one that is always 0."""
    rows, dim = x.shape[-2:]
    columns = torch.cat(
        (x, y[..., None]) if dim else (x.new_zeros(*x.shape[:-1], 1), y[..., None]), -1
    )
    mean = columns.mean(-2) if fit_intercept else columns.new_zeros(len(columns), columns.shape[-1])
    if fit_intercept:
        columns -= mean[..., None, :]
    rounding = 10 * torch.finfo(x.dtype).eps * math.sqrt(rows)
    # A rotation of the observations changes nothing that matters.
    rotated = _rotated(columns, mean, rounding) if rows > columns.shape[-1] else None
    if rotated is None:
        if rows > columns.shape[-1]:
            columns = torch.linalg.qr(columns, mode="r")[1]
        # By the largest value first, so that no square overflows or underflows.
        largest = columns.abs().amax(-2)
        largest = torch.where(largest == 0, 1.0, largest)
        columns = columns / largest[..., None, :]
        norm = columns.norm(dim=-2)
        constant = norm * largest <= rounding * torch.maximum(mean.abs(), largest * (norm == 0))
        columns = columns * (~constant / torch.where(constant, 1.0, norm))[..., None, :]
        scale = torch.where(constant, 1.0, norm * largest)
        gram = least_squares = None
    else:
        columns, gram, scale = rotated
        constant = torch.zeros_like(scale, dtype=torch.bool)
        moment = columns[..., :-1, -1:]
        least_squares = torch.linalg.solve_triangular(columns[..., :-1, :-1], moment, upper=True)
        least_squares = least_squares[..., 0]
    if not (scale.isfinite().all() and (scale[..., -1:] / scale).isfinite().all()):
        raise ValueError(
            "the values of x or y are so large, or those of x so small, that the weights overflow; "
            "rescale them first."
        )
    return NaturalUnits(
        columns[..., :-1], columns[..., -1], mean[..., :-1], mean[..., -1],
        scale[..., :-1], scale[..., -1], constant[..., -1], gram, least_squares,
    )  # fmt: skip


def _rotated(
    columns: Tensor, mean: Tensor, rounding: float
) -> tuple[Tensor, Tensor, Tensor] | None:  # (B, M, C) -> (B, C, C), (B, C, C), (B, C)
    """Columns of norm 1, upper triangular, their Gram matrix, which they come from, and the norms.

    Faster than QR, and as exact while no column is constant or close to the span of the others:
    else None.
    """
    gram = _gram(columns)
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    gram = gram / (norm[..., None] * norm[..., None, :])
    factor = torch.linalg.cholesky_ex(gram, upper=True)[0]
    no_square_underflows = torch.finfo(norm.dtype).tiny ** 0.25
    exact = (
        float(factor.diagonal(dim1=-2, dim2=-1).amin()) >= _LEAST_DISTANCE  # false for NaN
        and float((norm - rounding * mean.abs()).amin()) > no_square_underflows
    )
    return (factor, gram, norm) if exact else None


def _gram(columns: Tensor) -> Tensor:  # (B, M, C) -> (B, C, C)
    """``columns' columns``; on a CPU by NumPy, which computes half of it, the rest by symmetry."""
    if columns.device.type != "cpu":
        return columns.mT @ columns
    with np.errstate(all="ignore"):  # inf is seen to by the caller
        return torch.stack([torch.from_numpy(each.T @ each) for each in columns.numpy()])


def given_precision(
    noise_precision: float | Tensor | None, batch: torch.Size, y_scale: Tensor
) -> Tensor | None:  # (B, 1), in natural units
    """A known precision of the noise, or None."""
    if noise_precision is None:
        return None
    exact = None if isinstance(noise_precision, Tensor) else torch.float64
    try:
        given = torch.as_tensor(noise_precision)
        if given.dtype != torch.bool and not given.is_complex():
            given = torch.as_tensor(noise_precision, dtype=exact)
    except (TypeError, ValueError, RuntimeError):
        given = torch.tensor(False)
    if given.dtype == torch.bool or given.is_complex():
        raise TypeError(
            "noise_precision must be a positive number, a tensor of such numbers or None, got "
            f"{noise_precision!r}."
        )
    if not ((given > 0) & given.isfinite()).all():
        raise ValueError(f"noise_precision must be positive and finite, got {noise_precision}.")
    given = given.to(y_scale.device)
    try:
        given = given.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"noise_precision has shape {tuple(given.shape)}, which does not broadcast to the "
            f"problems' {tuple(batch[1:])}."
        ) from None
    # One factor after the other: the square of a scale may overflow where the product does not.
    scale = y_scale[:, None]
    natural = (given.reshape(-1, 1) * scale * scale).to(scale)
    _check_range(natural, y_scale, "noise_precision times the sum of squares of y")
    return natural


def _check_range(values: Tensor, y_scale: Tensor, what: str) -> None:
    """Refuse units of ``y`` in which a square has left the range of floating point."""
    tiny = torch.finfo(values.dtype).tiny  # below it, digits are lost
    least, most = values.aminmax()
    if tiny <= float(least) and float(most) <= 1 / tiny:  # false for NaN
        return
    out = ~((values >= tiny) & (values <= 1 / tiny)).reshape(len(y_scale), -1).all(1)
    worst = int(out.nonzero()[0])
    raise ValueError(
        f"{what} is {float(values.reshape(len(y_scale), -1)[worst, 0]):g}{which(out)}, which "
        f"{values.dtype} cannot hold to all its digits: y, whose norm about its mean is "
        f"{float(y_scale[worst]):g}, is in units that are too large or too small.\n"
        "  Try rescaled y."
    )


def check_precision(beta: Tensor, y_scale: Tensor) -> None:
    """Refuse units of ``y`` in which the precision of its noise, ``beta``, cannot be held."""
    _check_range(beta, y_scale, "the precision of the noise")


def check_constant(data: NaturalUnits) -> None:
    """Refuse a constant ``y``, whose noise cannot be learned."""
    if data.constant.any():
        raise ConstantTargetError(
            f"y is constant{which(data.constant)}, so there is no noise to estimate and the ELBO "
            "is infinite.\n  Pass noise_precision if the noise is known; every weight is then "
            "pruned."
        )


def problems_of(
    data: NaturalUnits,
    degrees: int,
    weight: float,
    precision: Tensor | None,
    min_noise: float,
    kl: KL,
) -> Problems:
    """What the ascent works on."""
    x, y = data.x, data.y
    gram: Tensor | None
    if data.gram is not None:
        gram, moment = data.gram[:, :-1, :-1].contiguous(), data.gram[:, -1, :-1]
    else:
        gram = x.mT @ x if x.shape[-1] <= x.shape[-2] else None
        moment = (y[:, None] @ x)[:, 0]
    curves = tabulate(kl, x.dtype, x.device)
    array = curves.xp.array
    return Problems(
        x_rows=array(x.mT.contiguous()),
        target=array(y.contiguous()),
        gram=None if gram is None else array(gram),
        moment=array(moment),
        num_data=degrees,
        kl_weight=weight,
        noise_precision=None if precision is None else array(precision),
        largest_noise_precision=degrees / min_noise**2 if min_noise else math.inf,
        least_squares=None if data.least_squares is None else array(data.least_squares),
        curves=curves,
    )
