"""The exact KL from a Gaussian to the log-uniform prior, with exact derivatives.

For ``q(w) = N(loc, alpha loc**2)`` and ``p(|w|) ∝ 1/|w|`` the divergence depends on ``alpha``
alone. With ``x = 1 / sqrt(2 alpha)`` and Dawson's function ``D``::

    KL(alpha)           = 2 ∫_0^x D(t) dt = x² ₂F₂(1, 1; 3/2, 2; -x²)     -> 0 as alpha -> inf
    dKL / d log alpha   = -x D(x)

(Hron, Matthews & Ghahramani, 2018, give the analytic form.) Neither is evaluated in that form:
with ``v = 1/(1 + alpha)`` and ``w = alpha/(1 + alpha)``::

    KL = softplus(-log alpha)/2 + v² Q(alpha)
    -dKL / d log alpha = v (1/2 + w v P(alpha))
    d²KL / d log alpha² = w v (1/2 - v T(alpha))

where ``Q``, ``P`` and ``T`` are bounded and smooth, so that rationals in ``alpha`` reach the
working precision over the whole axis and the tails keep their relative accuracy.

Everything here is elementwise, keeps shape and dtype, and maps -inf, inf and NaN to the limits
and to NaN. float16 and bfloat16 are computed in float32. Derivatives are reverse mode: for a
Hessian take ``torch.func.jacrev`` twice, as ``torch.func.jvp`` and ``hessian`` raise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Rational = tuple[tuple[float, ...], tuple[float, ...]]


def exact_kl(log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
    """KL(q || log-uniform) in nats, exact to rounding.

    Twice differentiable by autograd, and it works under ``torch.func`` and ``make_fx``. Relative
    error for ``log_alpha`` in [-30, 30]: below 5e-7 in float32 and below 1e-13 in float64.

    >>> exact_kl(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([1.5442, 0.4267, 0.0662])
    """
    return in_working_precision(_ExactKL.apply, log_alpha)


def exact_kl_slope(log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
    """The derivative of :func:`exact_kl`, ``-x D(x)`` with ``x = 1/sqrt(2 alpha)``.

    It lies in [-0.642375, 0), with its minimum at ``log_alpha = -1.5067``. Relative error for
    ``log_alpha`` in [-30, 30]: below 1e-6 in float32 and below 1e-13 in float64.
    """
    return in_working_precision(_ExactSlope.apply, log_alpha)


def exact_kl_curvature(log_alpha: Tensor) -> Tensor:  # (*shape) -> (*shape)
    """The second derivative of :func:`exact_kl`; negative below ``log_alpha = -1.5067``.

    The textbook form ``(h + (1 - 2h)/(2 alpha))/2`` with ``h = x D(x)`` loses every digit for
    small ``alpha``, where its two terms cancel; this one keeps them. Error relative to
    ``alpha/(1 + alpha)²``, below 2e-7 in float32 and below 1e-11 in float64.
    """
    return in_working_precision(_curvature, log_alpha)


def softplus(x: Tensor) -> Tensor:  # (*shape) -> (*shape)
    """``log(1 + exp(x))``, exact to rounding also in float64.

    PyTorch's default returns ``x`` itself above 20, which is wrong by 2e-9 there.
    """
    return F.softplus(x, threshold=50.0)


def check_floating_point(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless ``value`` is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {value!r}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}.")


def in_working_precision(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, with float16 and bfloat16 computed in float32 and cast back.

    Raises:
        TypeError: ``x`` is not a real floating-point tensor.
    """
    check_floating_point("log_alpha", x)
    if x.dtype in (torch.float32, torch.float64):
        return function(x)
    return function(x.float()).to(x.dtype)


_FUSED: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused() -> Iterator[None]:
    """What is computed here becomes one kernel: operations cost, temporaries do not."""
    token = _FUSED.set(True)
    try:
        yield
    finally:
        _FUSED.reset(token)


def is_fused() -> bool:
    """Whether this is within :func:`fused`, or a user's own ``torch.compile``."""
    return torch.compiler.is_compiling() or _FUSED.get()


FunctionType = TypeVar("FunctionType", bound=type[torch.autograd.Function])


class _GivenInFull(inspect.Signature):
    """Of a function whose arguments are all given, in their order: there is nothing to bind."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """As torch calls it, before every call of the function."""
        return super().bind(*args, **kwargs) if kwargs else _Bound(args, {})


class _Bound(NamedTuple):
    """What torch uses of ``inspect.BoundArguments``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


def signed(function: FunctionType) -> FunctionType:
    """Keep the signature of ``forward``, which torch works out and binds anew at every call."""
    own = inspect.signature(function.forward)
    kept = _GivenInFull(list(own.parameters.values()), return_annotation=own.return_annotation)
    function.forward.__signature__ = kept  # type: ignore[attr-defined]
    return function


@signed
class _ExactKL(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_alpha: Tensor) -> Tensor:
        v = torch.sigmoid(-log_alpha)
        alpha = _bounded_alpha(log_alpha)
        return 0.5 * softplus(-log_alpha) + v * v * _rational(alpha, _Q[log_alpha.dtype])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (log_alpha,) = ctx.saved_tensors
        return grad * exact_kl_slope(log_alpha)


@signed
class _ExactSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_alpha: Tensor) -> Tensor:
        v, w = torch.sigmoid(-log_alpha), torch.sigmoid(log_alpha)
        p = _rational(_bounded_alpha(log_alpha), _P[log_alpha.dtype])
        return -v * (0.5 + w * v * p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (log_alpha,) = ctx.saved_tensors
        return grad * exact_kl_curvature(log_alpha)


def _curvature(log_alpha: Tensor) -> Tensor:
    # In float64 for every dtype: second derivatives are rare, and one set of coefficients will do.
    x = log_alpha.double()
    v, w = torch.sigmoid(-x), torch.sigmoid(x)
    curvature = w * v * (0.5 - v * _rational(_bounded_alpha(x), _T))
    return curvature.to(log_alpha.dtype)


def _bounded_alpha(log_alpha: Tensor) -> Tensor:
    # Bounded inside the rationals alone: beyond it their share of the result is below the working
    # precision, while alpha**16 would overflow. No gradient passes through here.
    return log_alpha.clamp(max=_LARGEST_LOG_ALPHA[log_alpha.dtype]).exp()


def _rational(x: Tensor, coefficients: _Rational) -> Tensor:
    numerator, denominator = coefficients
    return _horner(x, numerator) / _horner(x, denominator)


def _horner(x: Tensor, ascending: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, ascending[-1])
    for coefficient in reversed(ascending[:-1]):
        if torch.is_grad_enabled():
            value = value * x + coefficient
        else:  # no graph needs the steps between: save the memory
            value.mul_(x).add_(coefficient)
    return value


_LARGEST_LOG_ALPHA = {torch.float32: 10.0, torch.float64: 18.0}

# Minimax rationals in alpha (numerator, denominator; ascending powers), found by a Remez exchange
# in 500-bit arithmetic for the relative error of the KL (Q) and of its slope (P).
_Q_FLOAT32 = (
    (
        6.35181172e-07,
        2.803825018e-06,
        0.0001453602849,
        0.001383217647,
        0.01382390182,
        0.09504630205,
        0.1568516188,
        0.07460275807,
    ),
    (
        1e-06,
        3.988057132e-06,
        0.0002302222753,
        0.002084574654,
        0.02231754521,
        0.1308550761,
        0.4637025326,
        0.4476134138,
    ),
)
_Q_FLOAT64 = (
    (
        6.351814227307633e-11,
        7.016715337131166e-10,
        1.1338591691839034e-07,
        3.723909360528027e-06,
        0.00013465811465148957,
        0.004379337896227969,
        0.11138957671960759,
        2.588658328147346,
        48.92891023756697,
        775.7416292437804,
        9939.315941611218,
        94388.8183796569,
        726061.2861245289,
        2752231.415733001,
        4939746.804091425,
        4118159.2370051127,
        1289523.4470167833,
    ),
    (
        1e-10,
        1.0621142638174014e-09,
        1.783510008707172e-07,
        5.790687703299967e-06,
        0.00021006900439360376,
        0.006823587190006662,
        0.17312402393679363,
        4.023976846575412,
        75.84481818038634,
        1205.0200919825745,
        15271.030918352111,
        150124.2629068455,
        1068531.063223223,
        5001425.196732764,
        13043340.156815587,
        16456005.36037386,
        7737140.682114627,
    ),
)
_P_FLOAT32 = (
    (
        1.000049209e-08,
        -4.42934577e-08,
        3.890583299e-06,
        2.520845165e-05,
        0.001059810146,
        -0.00208695142,
        0.2007630222,
        0.413939781,
        0.2095519099,
    ),
    (
        1e-08,
        -8.397838625e-08,
        4.018557821e-06,
        1.638398762e-05,
        0.0005743223112,
        0.005099007232,
        0.04534907415,
        0.2359300944,
        0.628658212,
    ),
)
_P_FLOAT64 = (
    (
        1.0000000000110522e-12,
        -6.878834428200113e-12,
        3.0244635775933734e-09,
        6.283526378287623e-08,
        4.8671795276164195e-06,
        0.00017136275845958582,
        0.006546391763448502,
        0.20695391672912847,
        5.9729448932630325,
        137.2958643528038,
        3621.788354336132,
        31267.207613287264,
        1664498.561227233,
        -6158026.46606354,
        275705341.8865564,
        576407239.6503115,
        292907149.20891124,
    ),
    (
        1e-12,
        -1.0878834372199377e-11,
        3.0539788154694416e-09,
        5.0691742057639876e-08,
        4.621824874218978e-06,
        0.00015193869758992813,
        0.00586379519870341,
        0.18164603374768526,
        5.061553855014183,
        121.8146670988002,
        2518.4284439410503,
        43841.078440811136,
        626118.8200513177,
        7052932.73887604,
        58824910.54680326,
        323267402.74427205,
        878721447.6268865,
    ),
)
_Q: dict[torch.dtype, _Rational] = {torch.float32: _Q_FLOAT32, torch.float64: _Q_FLOAT64}
_P: dict[torch.dtype, _Rational] = {torch.float32: _P_FLOAT32, torch.float64: _P_FLOAT64}

# The same for the curvature (T), by iteratively reweighted least squares: error below 1e-11
# in d²KL / (w v), which goes from -1/2 to 1/2.
_T = (
    (
        0.9999999999989315,
        -61.11860472691535,
        3962.3709816175383,
        -84028.99815172097,
        3476198.7282810495,
        -2163366.549476873,
        1775694922.5276613,
        34340919256.22484,
        910008517745.145,
        34539972362153.92,
        -201168034418121.8,
        3.5810703787810256e16,
        -5.633667113732307e17,
        1.0508289288678146e19,
        -5.378480020884312e18,
        -7.400204614390351e19,
        -5.751583761438774e19,
    ),
    (
        1.0,
        -66.11860474755254,
        4259.964071754614,
        -103433.98923320169,
        3868759.534864526,
        -19175630.784499366,
        1768488984.552589,
        24144892470.76577,
        856963170929.9209,
        17595231863502.523,
        348192607522951.94,
        5652853382925714.0,
        7.611068019978194e16,
        8.094281186685635e17,
        6.393793174628076e18,
        3.335668825177587e19,
        8.627375643060778e19,
    ),
)
