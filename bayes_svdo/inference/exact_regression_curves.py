"""The one-weight problem of VD-ARD regression, solved once and tabulated.

Everything else fixed, a weight with relevance ``z²`` (its squared z-score against the residual that
leaves it out) is best off with ``loc = w_ls / (1 + alpha)``, and ``alpha`` maximises::

    z² / (2 (1 + alpha)) - kl_weight KL(alpha)

With ``h = -dKL / d log alpha`` it is stationary where ``z²/kl_weight = Psi(alpha)``, ``Psi(alpha) =
2 h (1 + alpha)² / alpha``. ``Psi`` falls strictly from inf to 1 for every KL offered here, hence
the pruning rule: ``z² <= kl_weight`` means ``alpha = inf`` and a weight of exactly 0; otherwise the
optimum is unique and finite. For the exact KL, ``alpha (Psi - 1)`` lies between 1 and 1.9286.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bayes_svdo.distributions import kl_empirical_bayes, kl_log_uniform
from bayes_svdo.inference.exact_regression_arrays import Array, Arrays, TorchArrays, arrays_on

KL = Literal["exact", "molchanov2017", "poster2016", "empirical_bayes"]

# Between them all curves are interpolated; beyond them they are straight lines to rounding.
_LOWEST, _HIGHEST = -40.0, 40.0
# Above it, Psi - 1 drowns in rounding; 1/Psi is then a power of alpha.
_HIGHEST_OF_PSI = 14.0
# Cubic Hermite interpolation on this grid is exact to 1e-13 for a KL, to 1e-11 for log_alpha.
_NUM_CELLS = 32768


def kl_function(kl: KL) -> Callable[[Tensor], Tensor]:
    """The KL per weight as a function of ``log_alpha``, by name.

    Raises:
        ValueError: Unknown name.
    """
    if kl == "empirical_bayes":
        return kl_empirical_bayes
    if kl in get_args(KL):
        return lambda log_alpha: kl_log_uniform(log_alpha, kl)
    hint = ' ("kingma2015" holds for alpha <= 1 only, so it cannot prune)' * (
        str(kl) == "kingma2015"
    )
    raise ValueError(f"kl must be one of {', '.join(map(repr, get_args(KL)))}, got {kl!r}{hint}.")


def optimal_log_alpha(relevance: Tensor, kl: KL = "exact") -> Tensor:  # (*shape) -> (*shape)
    """``log_alpha`` that a weight of the given relevance takes, inf where it is pruned.

    The weight is then shrunk to ``1 / (1 + alpha)`` of its least-squares value. Newton's method in
    ``log alpha``, kept between the neighbours of a tabulated start; for the exact KL to within a
    few units of rounding relative to ``alpha`` (below 1e6).

    Args:
        relevance: ``z² / kl_weight``, the squared z-score of the weight over the KL's weight; no
            gradients are propagated to it.
        kl: Which KL; see :func:`bayes_svdo.distributions.kl_log_uniform`.

    Raises:
        ValueError: Unknown ``kl``.

    >>> optimal_log_alpha(torch.tensor([0.5, 1.0, 2.0, 9.0], dtype=torch.float64))
    tensor([    inf,     inf,  0.6043, -1.5694], dtype=torch.float64)
    """
    relevance = relevance.detach()
    excess = (relevance.double() - 1).clamp_min(0).nan_to_num(0.0, torch.inf)
    curves = tabulate(kl, torch.float64, relevance.device)
    start = curves.xp.tensor(curves.optimal_log_alpha(curves.xp.array(excess)))
    start = start.masked_fill(excess == torch.inf, -torch.inf)
    kept = start.isfinite()  # neither pruned nor, with infinite relevance, without noise
    log_alpha = torch.where(kept, start, 0.0)
    low, high = log_alpha - 1e-3, log_alpha + 1e-3
    for _ in range(2):
        height, slope = _log_psi_minus_one(kl_function(kl), log_alpha)
        # Where alpha is so large that Psi - 1 is noise, the table is the better answer.
        step = (height - torch.where(kept, excess, 1.0).log()) / slope
        log_alpha = torch.where(
            log_alpha < _HIGHEST_OF_PSI, (log_alpha - step).clamp(low, high), log_alpha
        )
    result = torch.where(kept, log_alpha, start)
    return torch.where(relevance.isnan(), torch.nan, result).to(relevance.dtype)


class Piece(NamedTuple):
    """The cubics of a curve that some points are on."""

    position: Array  # (*shape), in units of the width of a cell, from its beginning
    coefficients: Array  # (*shape, 4), ascending powers

    def value(self) -> Array:  # (*shape)
        """The curve at the points."""
        u, c = self
        return c[..., 0] + u * (c[..., 1] + u * (c[..., 2] + u * c[..., 3]))

    def slope(self) -> Array:  # (*shape)
        """Its derivative there, by the position."""
        u, c = self
        return c[..., 1] + u * (2.0 * c[..., 2] + u * (3.0 * c[..., 3]))


class Curve(NamedTuple):
    """A function on the real line: cubic Hermite pieces of equal width, straight lines outside.

    Or several of them, side by side.
    """

    origin: float  # position of 0
    width: float
    coefficients: Array  # (cells + 2, 4); the line below, cells, the line above
    xp: Arrays

    def piece(self, x: Array) -> Piece:  # (*shape)
        """The cubics at points."""
        at_least, at_most = self.xp.at_least, self.xp.at_most
        largest = float(self.xp.finfo(x.dtype).max) / 4
        position = x * (1 / self.width) + self.origin
        position = at_most(at_least(position, -largest), largest)  # inf times a slope of 0 is NaN
        cell = self.xp.floor(at_most(at_least(position, 0.0), len(self.coefficients) - 1.0))
        return Piece(position - cell, self.coefficients[self.xp.whole(cell)])

    def __call__(self, x: Array) -> Array:  # (*shape) -> (*shape)
        """Its value."""
        return self.piece(x).value()


class Curves(NamedTuple):
    """What the optimiser asks about a KL, as tables: cheap, and as good as exact."""

    kl: Curve  # log_alpha -> KL
    kl_and_slope: Curve  # log_alpha -> KL and h = -dKL / d log_alpha, (cells + 2, 8)
    by_excess: Curve  # log(z²/kl_weight - 1) -> log_alpha, the joint optimum of loc and alpha
    by_energy: Curve  # log(c/kl_weight), c = beta s loc²/2 -> log_alpha, loc held fixed

    @property
    def xp(self) -> Arrays:
        """The arrays that they are of."""
        return self.kl.xp

    def kl_pieces(self, log_alpha: Array) -> tuple[Piece, Piece]:  # (*shape)
        """Of the KL and of its negative slope, which have the same cells."""
        position, both = self.kl_and_slope.piece(log_alpha)
        return Piece(position, both[..., :4]), Piece(position, both[..., 4:])

    def optimal_log_alpha(self, excess: Array) -> Array:  # (*shape) -> (*shape)
        """``log_alpha`` for ``z²/kl_weight = 1 + excess``; inf, pruned, unless excess > 0."""
        return self._where_positive(self.by_excess, excess)

    def log_alpha_given_loc(self, energy: Array) -> Array:  # (*shape) -> (*shape)
        """``log_alpha`` that maximises ``-energy alpha - KL(alpha)``; inf where energy is 0."""
        return self._where_positive(self.by_energy, energy)

    def _where_positive(self, curve: Curve, x: Array) -> Array:
        tiny = float(self.xp.finfo(x.dtype).tiny)
        return self.xp.where(x > 0.0, curve(self.xp.log(self.xp.at_least(x, tiny))), math.inf)


@lru_cache(maxsize=32)
def tabulate(kl: KL, dtype: torch.dtype, device: torch.device) -> Curves:
    """The curves of a KL, computed once in float64 for each device and dtype."""
    function = kl_function(kl)
    with torch.inference_mode(False):
        grid = torch.linspace(_LOWEST, _HIGHEST, _NUM_CELLS + 1, dtype=torch.float64)
        value, h, h_slope = _value_and_slopes(function, grid)
        psi_grid = torch.linspace(_LOWEST, _HIGHEST_OF_PSI, _NUM_CELLS + 1, dtype=torch.float64)
        log_excess, excess_slope = _log_psi_minus_one(function, psi_grid)
        below, above = grid == grid[0], grid == grid[-1]  # flat there: log_alpha may be infinite
        value_curve = _hermite(grid, value, -h.masked_fill(above, 0.0))
        slope_curve = _hermite(grid, h, h_slope.masked_fill(below | above, 0.0))
        both = torch.cat((value_curve.coefficients, slope_curve.coefficients), 1)
        curves = Curves(
            kl=value_curve,
            kl_and_slope=value_curve._replace(coefficients=both),
            by_excess=_inverse(psi_grid, log_excess, excess_slope),
            by_energy=_inverse(grid, h.log() - grid, h_slope / h - 1),
        )
        xp = arrays_on(device)
        return Curves(
            *(
                c._replace(coefficients=xp.array(c.coefficients.to(device, dtype)), xp=xp)
                for c in curves
            )
        )


def _value_and_slopes(
    kl: Callable[[Tensor], Tensor], log_alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, ``h = -dKL/d log_alpha`` and ``dh/d log_alpha``."""
    with torch.enable_grad():
        x = log_alpha.detach().requires_grad_()
        value = kl(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
    return value.detach(), -slope.detach(), -curvature


def _log_psi_minus_one(kl: Callable[[Tensor], Tensor], log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """``log(Psi - 1)`` and its derivative by ``log_alpha``."""
    _, h, h_slope = _value_and_slopes(kl, log_alpha)
    alpha = log_alpha.exp()
    # alpha (Psi - 1): of order one, where Psi - 1 spans 24 orders of magnitude.
    scaled = 2 * h * (1 + alpha).square() - alpha
    scaled_slope = 2 * h_slope * (1 + alpha).square() + 4 * h * alpha * (1 + alpha) - alpha
    return scaled.log() - log_alpha, scaled_slope / scaled - 1


def _hermite(grid: Tensor, value: Tensor, slope: Tensor) -> Curve:
    """The piecewise cubic with the given values and slopes at the nodes of an even grid."""
    width = float(grid[-1] - grid[0]) / (len(grid) - 1)
    rise, left, right = value.diff(), slope[:-1] * width, slope[1:] * width
    cells = torch.stack((value[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise), 1)
    line = torch.zeros_like(cells[:2])
    line[0, 0], line[0, 1] = value[0] - left[0], left[0]
    line[1, 0], line[1, 1] = value[-1], right[-1]
    return Curve(
        1 - float(grid[0]) / width, width, torch.cat((line[:1], cells, line[1:])), TorchArrays
    )


def _inverse(x: Tensor, y: Tensor, slope: Tensor) -> Curve:
    """The inverse of a strictly falling function given at nodes, on an even grid of its values."""
    y, x, slope = y.flip(0), x.flip(0), slope.flip(0)
    targets = torch.linspace(float(y[0]), float(y[-1]), _NUM_CELLS + 1, dtype=y.dtype)
    cell = (torch.searchsorted(y, targets, right=True) - 1).clamp(0, len(y) - 2)
    width = y[cell + 1] - y[cell]
    u = (targets - y[cell]) / width
    rise = x[cell + 1] - x[cell]
    left, right = width / slope[cell], width / slope[cell + 1]
    c2, c3 = 3 * rise - 2 * left - right, left + right - 2 * rise
    inverse = x[cell] + u * (left + u * (c2 + u * c3))
    return _hermite(targets, inverse, (left + u * (2 * c2 + 3 * u * c3)) / width)
