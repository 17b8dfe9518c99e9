"""Divergences from a Gaussian weight posterior to a prior that knows no scale.

For ``q(w) = N(loc, sigma²)`` they depend on ``alpha = sigma² / loc²`` alone, so every function
here takes ``log_alpha``, elementwise, and returns nats per weight, normalised so that KL -> 0 as
alpha -> inf. Nothing on the path of a gradient is clamped: a clamp stops every weight beyond it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bayes_svdo._names import unknown_name
from bayes_svdo.distributions.special import (
    check_floating_point,
    exact_kl,
    in_working_precision,
    is_fused,
    signed,
    softplus,
)

Approximation = Literal["exact", "molchanov2017", "poster2016", "kingma2015"]

# KL ≈ k1 (1 - sigmoid(k2 + k3 log alpha)) + softplus(-log alpha)/2
_SIGMOID_CONSTANTS: dict[str, tuple[float, float, float]] = {
    # Molchanov, Ashukha & Vetrov (2017), eq. 14. https://arxiv.org/abs/1701.05369
    "molchanov2017": (0.63576, 1.87320, 1.48695),
    # The 2016 workshop poster of the same authors: 0.64 sigmoid(1.5 (1.3 + log alpha)).
    "poster2016": (0.64, 1.95, 1.5),
}

# Kingma, Salimans & Welling (2015), eq. 14, valid for alpha <= 1. https://arxiv.org/abs/1506.02557
_KINGMA = (1.16145124, -1.50204118, 0.58629921)

# (Euler's constant + log 2)/2: the exact KL is -log(alpha)/2 + this for alpha -> 0.
_SMALL_ALPHA_CONSTANT = 0.63518142273073908501


def log_alpha(loc: Tensor, log_sigma2: Tensor) -> Tensor:  # broadcasts
    """``log(sigma² / loc²)``: how much noise a weight carries for its size.

    The one definition of ``log_alpha`` in this library: ``log_sigma2 - log(loc² + tiny)`` with
    ``tiny`` the smallest normal number of the dtype. So it is finite at ``loc = 0``, where the
    gradient of a KL stays ``loc / sigma²`` (an exact zero or an underflowing ``loc²`` would
    otherwise give 0 · inf = NaN after a long training), and it holds up to the largest ``loc``,
    whose square overflows. float16 and bfloat16 are computed in float32.

    Args:
        loc: Mean of the weight, any shape.
        log_sigma2: Log variance of the weight, of a shape that broadcasts with ``loc``.

    Raises:
        TypeError: One of the two is not a floating-point tensor.
    """
    check_floating_point("loc", loc)
    check_floating_point("log_sigma2", log_sigma2)
    dtype = torch.result_type(loc, log_sigma2)
    working = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    if loc.shape != log_sigma2.shape:
        loc, log_sigma2 = torch.broadcast_tensors(loc, log_sigma2)
    result: Tensor = _LogAlpha.apply(loc.to(working), log_sigma2.to(working))
    return result.to(dtype)


def kl_log_uniform(
    log_alpha: Tensor,
    approximation: Approximation = "molchanov2017",
    *,
    extrapolate: bool = False,
) -> Tensor:  # (*shape) -> (*shape)
    """KL(N(loc, alpha loc²) || log-uniform) per weight, elementwise.

    The log-uniform prior ``p(|w|) ∝ 1/|w|`` is improper, so the divergence is defined up to a
    constant; it is chosen so that KL -> 0 as alpha -> inf. The choices, with the largest absolute
    error of the KL and of its slope over ``log_alpha`` in [-30, 30]:

    ==================  ========  ========  =====================================================
    approximation       KL        slope     source
    ==================  ========  ========  =====================================================
    ``exact``           rounding  rounding  Dawson's function, see :mod:`.special`
    ``molchanov2017``   0.0094    0.0138    Molchanov, Ashukha & Vetrov (2017), eq. 14
    ``poster2016``      0.0129    0.0194    the same authors' poster (2016)
    ``kingma2015``      0.0404    0.0540    Kingma, Salimans & Welling (2015), for alpha <= 1 only
    ==================  ========  ========  =====================================================

    The cubic of ``kingma2015`` cannot tend to 0 for alpha -> inf; its constant makes it agree
    with the exact KL for alpha -> 0. Beyond alpha = 1 it falls without bound, so an optimiser that
    gets there runs away; it is therefore refused there.

    Args:
        log_alpha: See :func:`log_alpha`.
        approximation: Which KL, by name.
        extrapolate: Evaluate the cubic of ``kingma2015`` beyond alpha = 1 as it stands. The check
            reads a value back from the device, so tracing, compiling and ``vmap`` need this too.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.
        ValueError: Unknown ``approximation``, or ``kingma2015`` with some ``log_alpha > 0``.

    >>> kl_log_uniform(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([1.5405, 0.4312, 0.0684])
    """
    check_approximation(approximation)
    check_floating_point("log_alpha", log_alpha)
    if approximation == "exact":
        return exact_kl(log_alpha)
    if approximation == "kingma2015":
        if not extrapolate:
            _refuse_beyond_one(log_alpha)
        return in_working_precision(_kingma, log_alpha)
    constants = _SIGMOID_CONSTANTS[approximation]

    def sigmoid_kl(x: Tensor) -> Tensor:
        kl: Tensor = _SigmoidKL.apply(x, *constants)[0]
        return kl

    return in_working_precision(sigmoid_kl, log_alpha)


def kl_empirical_bayes(log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
    """KL to a zero-mean Gaussian whose variance is optimised out: ``log(1 + 1/alpha)/2``.

    The optimal prior variance of a weight is ``loc² + sigma²`` (Kharitonov, Molchanov & Vetrov,
    2018, https://arxiv.org/abs/1811.00596). Elementwise, in nats per weight.

    Raises:
        TypeError: ``log_alpha`` is not a floating-point tensor.
    """
    return in_working_precision(lambda x: 0.5 * softplus(-x), log_alpha)


def check_approximation(name: str) -> None:
    """Raise a ValueError with the closest match unless ``name`` is an :data:`Approximation`."""
    names = get_args(Approximation)
    if name not in names:
        raise unknown_name("approximation of the KL", name, names)


def _kingma(log_alpha: Tensor) -> Tensor:
    alpha = log_alpha.exp()
    c1, c2, c3 = _KINGMA
    cubic = alpha * (c1 + alpha * (c2 + alpha * c3))
    return _SMALL_ALPHA_CONSTANT - 0.5 * log_alpha - cubic


def _refuse_beyond_one(log_alpha: Tensor) -> None:
    beyond = int((log_alpha > 0).sum())
    if beyond:
        raise ValueError(
            f'approximation "kingma2015" holds for alpha <= 1 (log_alpha <= 0) alone, but {beyond} '
            f"of {log_alpha.numel()} values of log_alpha lie beyond; the largest is "
            f"{float(log_alpha.detach().nan_to_num(-math.inf).max()):.4g}.\n"
            '  Try "molchanov2017" or "exact", which hold everywhere, or extrapolate=True to '
            "evaluate the cubic as it stands."
        )


@signed
class _LogAlpha(torch.autograd.Function):
    """``log_sigma2 - 2 log hypot(loc, sqrt(tiny))``, working in place and saving ``loc`` alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor, log_sigma2: Tensor) -> Tensor:
        if is_fused():
            scaled = _Scaled.of(loc)
            result = log_sigma2 - scaled.square.log()
            return torch.where(scaled.large, result + 2 * math.log(scaled.factor), result)
        # torch.hypot takes three times as long. The square is bounded, so that it cannot overflow;
        # beyond the bound |loc| itself is the root to rounding, and the larger of the two. It is
        # taken in place: new memory costs as much as five passes over the old.
        limits = torch.finfo(loc.dtype)
        bound = limits.max**0.25
        root = loc.clamp(-bound, bound)
        root.mul_(root).add_(limits.tiny).sqrt_()
        root.clamp_min_(loc).neg_().clamp_max_(loc).neg_()
        return torch.sub(log_sigma2, root.log_(), alpha=2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.fused = is_fused()  # the backward pass of a GPU runs in a thread of its own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        (loc,) = ctx.saved_tensors
        return (grad * _slope_in_loc(loc, ctx.fused) if ctx.needs_input_grad[0] else None), grad


@signed
class _LogAlphaSlope(torch.autograd.Function):
    """``-2 loc / (loc² + tiny)``, with no square that could overflow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor, fused: bool) -> Tensor:
        if fused:
            scaled = _Scaled.of(loc)
            slope = -2 * scaled.value / scaled.square
            return torch.where(scaled.large, slope * scaled.factor, slope)
        return loc.reciprocal().mul_(torch.finfo(loc.dtype).tiny).add_(loc).reciprocal_().mul_(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        loc, ctx.fused = inputs
        ctx.save_for_backward(loc)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (loc,) = ctx.saved_tensors
        curvature: Tensor = _slope_in_loc(loc, ctx.fused).square() - 2 / (
            loc * loc + torch.finfo(loc.dtype).tiny
        )
        return grad * curvature, None


class _Scaled(NamedTuple):
    """``loc``, where its square would overflow times a small ``factor``."""

    large: Tensor  # whether it is
    factor: float
    value: Tensor
    square: Tensor  # of the value, plus tiny

    @classmethod
    def of(cls, loc: Tensor) -> _Scaled:
        limits = torch.finfo(loc.dtype)
        large = loc.abs() > limits.max**0.25
        factor = 2.0 ** -(5 * math.frexp(limits.max)[1] // 8)  # halfway down, to rounding exact
        value = torch.where(large, loc * factor, loc)
        return cls(large, factor, value, value * value + limits.tiny)


def _slope_in_loc(loc: Tensor, fused: bool) -> Tensor:
    if not torch.is_grad_enabled():  # no second derivative is wanted
        return _LogAlphaSlope.forward(loc, fused)
    slope: Tensor = _LogAlphaSlope.apply(loc, fused)
    return slope


@signed
class _SigmoidKL(torch.autograd.Function):
    """``k1 sigmoid(-k2 - k3 log_alpha) + softplus(-log_alpha)/2``, and its slope.

    The two share a sigmoid, and every weight passes here at every step of a training.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_alpha: Tensor, k1: float, k2: float, k3: float) -> tuple[Tensor, Tensor]:
        minus_log_alpha = -log_alpha
        step = (log_alpha * -k3).sub_(k2).sigmoid_()
        kl = softplus(minus_log_alpha).mul_(0.5).add_(step, alpha=k1)
        slope = minus_log_alpha.sigmoid_().mul_(-0.5).sub_(step, alpha=k1 * k3)
        slope.add_(step.mul_(step), alpha=k1 * k3)
        return kl, slope

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float, float, float], output: tuple[Tensor, Tensor]
    ) -> None:
        log_alpha, *ctx.constants = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else zeros are made for the slope's gradient
        ctx.save_for_backward(log_alpha, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        log_alpha, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may be wanted
            slope = _sigmoid_kl_slope(log_alpha, *ctx.constants)
        return grad * slope, None, None, None


def _sigmoid_kl_slope(log_alpha: Tensor, k1: float, k2: float, k3: float) -> Tensor:
    step = torch.sigmoid(-k3 * log_alpha - k2)
    return -0.5 * torch.sigmoid(-log_alpha) - k1 * k3 * step * (1 - step)
