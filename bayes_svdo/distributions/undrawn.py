"""Local reparameterization: a weight that is not drawn until it must be.

Where an operation is linear in a Gaussian weight, the noise may be drawn in its *output*
instead: ``y = op(x, w)`` with ``w ~ N(loc, sigma²)`` has mean ``op(x, loc)`` and variance
``op(x², sigma²)`` (Kingma, Salimans & Welling 2015, sec. 2.3, https://arxiv.org/abs/1506.02557).
An :class:`UndrawnSample` stands for the draw; it answers such operations with a draw of their
output, and turns into one ordinary draw of the weight at any other use of it.

Each output is drawn on its own. Its marginal distribution is that of weight sampling, for every
row of the batch and every position of a convolution; the dependence between outputs that share a
weight (rows of a batch, positions of a feature map, occurrences of a word) is dropped, as by
Molchanov, Ashukha & Vetrov (2017), https://arxiv.org/abs/1701.05369.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent
from torch.utils._pytree import tree_map

from bayes_svdo.distributions.additive_noise import AdditiveNoiseNormal

# More would overflow a sum of float32 variances; the KL still sees the true value.
_MAX_VARIANCE = math.exp(40.0)
# Added to a variance under its square root, where the slope of the root is infinite. Products of
# a linear layer are exact zeros for a zero input, so the least number does; the transforms of fast
# convolutions leave rounding errors of either sign, which a larger floor keeps from being blown up.
_FLOOR_EXACT = 1e-30
_FLOOR_ROUNDED = 1e-14

Reuse = Literal["draw", "independent"]


class WeightReused(RuntimeError):
    """A weight whose noise went into one operation's output is needed a second time.

    The two uses share one weight, so they cannot have independent noise: the weight must be drawn.
    Our objectives catch this, draw the site ``name`` from then on, and start the pass again.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f'the weight of site "{name}" is used more than once in one forward pass, so its noise '
            "cannot be drawn in the output of one operation.\n"
            f'  Try LocalReparameterization(drawn={{"{name}"}}), which draws this weight once, or '
            'reuse="independent" if independent noise at each use is what you want.'
        )
        self.name = name


class _Variance(torch.autograd.Function):
    """``exp(log_sigma2)``, bounded above; its gradient is the bounded variance, never zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_sigma2: Tensor) -> Tensor:
        return log_sigma2.exp().clamp_(max=_MAX_VARIANCE)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (variance,) = ctx.saved_tensors
        slope: Tensor = grad * variance
        return slope


class _Draw:
    """The one draw that an undrawn weight and its transposes stand for."""

    def __init__(self, name: str, loc: Tensor, log_sigma2: Tensor, reuse: Reuse) -> None:
        self.name, self.loc, self.log_sigma2, self.reuse = name, loc, log_sigma2, reuse
        self.value: Tensor | None = None
        self.used = False

    @functools.cached_property
    def variance(self) -> Tensor:
        # In float16 the variance would underflow below log_sigma2 = -16.6.
        log_sigma2 = self.log_sigma2
        if log_sigma2.dtype in (torch.float16, torch.bfloat16):
            log_sigma2 = log_sigma2.float()
        variance: Tensor = _Variance.apply(log_sigma2)
        return variance.expand(self.loc.shape)

    def claim(self) -> None:
        """Take the weight for local reparameterization, which can be had once."""
        if self.used and self.reuse == "draw":
            raise WeightReused(self.name)
        self.used = True

    def draw(self) -> Tensor:
        """The draw, made at the first call."""
        if self.value is None:
            self.claim()
            noise = torch.randn_like(self.loc)
            sigma = self.variance.sqrt().to(self.loc.dtype)
            self.value = torch.addcmul(self.loc, sigma, noise)
        return self.value


def _identity(value: Tensor) -> Tensor:
    return value


class UndrawnSample(Tensor):
    """A draw from ``N(loc, exp(log_sigma2))`` that has not been made yet.

    A ``torch.Tensor`` of the shape, dtype and device of ``loc``. Linear operations (``F.linear``,
    ``F.conv1d/2d/3d``, ``F.conv_transpose1d/2d/3d``, ``F.bilinear``, ``F.embedding``, ``@`` and
    its relatives) return a draw of their output; any other operation draws the weight once, and
    every later use sees that draw. Reading shape, dtype or device draws nothing.

    Args:
        loc: Means, any shape.
        log_sigma2: Log variances, broadcastable to ``loc``.
        name: Site name, for messages.
        reuse: What a second linear use does: ``"draw"`` raises :class:`WeightReused`, so that the
            caller can draw the weight; ``"independent"`` gives each use noise of its own.
    """

    _draw: _Draw
    _view: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        loc: Tensor,
        log_sigma2: Tensor,
        name: str = "weight",
        reuse: Reuse = "draw",
    ) -> UndrawnSample:
        return cls._of(_Draw(name, loc, log_sigma2, reuse), _identity)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def _of(cls, draw: _Draw, view: Callable[[Tensor], Tensor]) -> UndrawnSample:
        with torch.no_grad():
            like = view(draw.loc)
        make = cast(Any, Tensor._make_wrapper_subclass)
        self: UndrawnSample = make(cls, like.shape, dtype=like.dtype, device=like.device)
        self._draw, self._view = draw, view
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether the draw has been made."""
        return self._draw.value is not None

    def draw(self) -> Tensor:
        """The draw itself, made now if it was not yet; a plain tensor."""
        return self._view(self._draw.draw())

    def _moments(self) -> tuple[Tensor, Tensor]:
        return self._view(self._draw.loc), self._view(self._draw.variance)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        state = "drawn" if self.is_drawn else "not drawn yet"
        return f'UndrawnSample(site="{self._draw.name}", shape={tuple(self.shape)}, {state})'

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy cannot share a draw to come: it is made, and the copy is a plain tensor."""
        copy = self.draw().detach().clone()
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.draw().detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _VIEWS and isinstance(args[0], UndrawnSample) and not args[0].is_drawn:
            first, rest = args[0], args[1:]
            view = first._view
            return cls._of(first._draw, lambda value: func(view(value), *rest, **kwargs))
        if func in _LINEAR_IN_WEIGHT:
            return _LINEAR_IN_WEIGHT[func](*args, **kwargs)
        return func(*tree_map(drawn, args), **tree_map(drawn, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Reached by code that switches __torch_function__ off (C++ internals): draw and go on.
        return func(*tree_map(drawn, args), **tree_map(drawn, kwargs or {}))


def drawn(value: Any) -> Any:
    """``value``, or its draw if it is an :class:`UndrawnSample`."""
    return value.draw() if isinstance(value, UndrawnSample) else value


def _output(
    op: Callable[..., Tensor], x: Any, weight: Any, bias: Any, floor: float = _FLOOR_EXACT
) -> Tensor:
    """A draw of ``op(x, weight, bias)``, which is linear in the weight and in the bias.

    ``x`` is a tensor or a tuple of tensors, ``bias`` a tensor, an undrawn one, or None.
    """
    x = tree_map(drawn, x)
    if not isinstance(weight, UndrawnSample) or weight.is_drawn:
        return op(x, drawn(weight), drawn(bias))
    weight._draw.claim()
    loc, variance = weight._moments()
    bias_variance = None
    if isinstance(bias, UndrawnSample) and not bias.is_drawn:
        bias._draw.claim()
        bias, bias_variance = bias._moments()
    mean = op(x, loc, drawn(bias))
    # Squares leave the range of float16 first: the variance stays out of autocast.
    with _without_autocast(loc.device.type):
        squared = tree_map(lambda value: value.to(variance.dtype).square(), x)
        output_variance = op(squared, variance, bias_variance)
    std = (output_variance.clamp(min=0.0) + floor).sqrt()
    return torch.addcmul(mean, std.to(mean.dtype), torch.randn_like(mean))


def _without_autocast(device_type: str) -> Any:
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    return _output(F.linear, input, weight, bias)


def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Tensor:
    def op(inputs: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.bilinear(*inputs, weight, bias)

    return _output(op, (input1, input2), weight, bias)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        def op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return function(x, weight, bias, *args, **kwargs)

        return _output(op, input, weight, bias, floor=_FLOOR_ROUNDED)

    return convolve


def _product(
    function: Callable[..., Tensor], left_name: str, right_name: str
) -> Callable[..., Tensor]:
    """``function(left, right)``, with the weight on either side of the product."""

    def multiply(*operands: Any, **kwargs: Any) -> Tensor:
        # torch names the second operand `other`, `mat2`, `vec` or `tensor2`.
        names = (left_name, right_name)[len(operands) :]
        left, right = (*operands, *(kwargs.pop(name) for name in names))[:2]
        if kwargs:
            return function(drawn(left), drawn(right), **tree_map(drawn, kwargs))
        if isinstance(right, UndrawnSample) and not right.is_drawn:
            return _output(lambda x, weight, _: function(x, weight), left, right, None)
        return _output(lambda x, weight, _: function(weight, x), right, left, None)

    return multiply


def _addmm(
    function: Callable[..., Tensor], left_name: str, right_name: str
) -> Callable[..., Tensor]:
    def multiply_add(input: Any, *operands: Any, **kwargs: Any) -> Tensor:
        if set(kwargs) - {left_name, right_name}:  # alpha, beta, out
            return function(*tree_map(drawn, (input, *operands)), **tree_map(drawn, kwargs))
        product = torch.mm if function is torch.addmm else torch.bmm
        drawn_product: Tensor = _product(product, left_name, right_name)(*operands, **kwargs)
        return drawn_product + input

    return multiply_add


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if max_norm is not None:  # normalises rows in place: not linear in the weight
        return F.embedding(drawn(input), drawn(weight), padding_idx, max_norm, *args, **kwargs)

    def look_up(index: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(index, weight, padding_idx, None, *args, **kwargs)

    if not isinstance(weight, UndrawnSample) or weight.is_drawn:
        return look_up(drawn(input), drawn(weight))
    weight._draw.claim()
    loc, variance = weight._moments()
    mean = look_up(input, loc)
    std = (look_up(input, variance) + _FLOOR_EXACT).sqrt()
    return torch.addcmul(mean, std.to(mean.dtype), torch.randn_like(mean))


def _linear_operations() -> dict[Any, Callable[..., Tensor]]:
    convolutions = (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    )
    matmul = _product(torch.matmul, "input", "other")
    operations: dict[Any, Callable[..., Tensor]] = {
        F.linear: _linear,
        F.bilinear: _bilinear,
        F.embedding: _embedding,
        torch.linalg.matmul: matmul,
        torch.Tensor.__rmatmul__: lambda right, left: matmul(left, right),
    }
    operations |= {function: _convolution(function) for function in convolutions}
    for name, second in {"matmul": "other", "mm": "mat2", "bmm": "mat2", "mv": "vec"}.items():
        multiply = _product(getattr(torch, name), "input", second)
        operations |= {getattr(torch, name): multiply, getattr(Tensor, name): multiply}
    operations[Tensor.__matmul__] = matmul
    for name, names in {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}.items():
        multiply = _addmm(getattr(torch, name), *names)
        operations |= {getattr(torch, name): multiply, getattr(Tensor, name): multiply}
    return operations


_LINEAR_IN_WEIGHT = _linear_operations()

_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "grad",
    "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested", "is_meta", "is_mkldnn",
    "is_mps", "is_xpu", "names", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "__len__",
    "__hash__",
)  # fmt: skip
# Reading these draws nothing. Some exist in some versions of torch only.
_METADATA: frozenset[Any] = frozenset(
    [
        *(
            cast(Any, getattr(Tensor, name)).__get__
            for name in _PROPERTIES
            if hasattr(Tensor, name)
        ),
        *(getattr(Tensor, name) for name in _METHODS),
        torch.numel,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_signed,
    ]
)

# Transposes only reorder the weight: `x @ w.T` stays a linear operation.
_VIEWS: frozenset[Any] = frozenset(
    [
        Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute,
        Tensor.swapaxes, torch.swapaxes, Tensor.movedim, torch.movedim,
        *(cast(Any, getattr(Tensor, name)).__get__ for name in ("T", "mT")),
    ]
)  # fmt: skip


class LocalReparameterization(Messenger):
    """Effect handler: Gaussian sites give an :class:`UndrawnSample` instead of a draw.

    It acts where a value would be drawn from an :class:`AdditiveNoiseNormal` (or ``Independent``
    of one), so it is wrapped around a *guide*; a value that is given (replayed, conditioned,
    observed) is left as it is::

        with LocalReparameterization():
            guide_trace = poutine.trace(guide).get_trace(x)
        poutine.replay(model, trace=guide_trace)(x)

    Args:
        drawn: Names of sites that are drawn all the same.
        reuse: As in :class:`UndrawnSample`.
    """

    def __init__(self, drawn: Collection[str] = (), reuse: Reuse = "draw") -> None:
        super().__init__()
        self.drawn, self.reuse = drawn, reuse

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if msg["name"] in self.drawn or msg["args"]:
            return
        fn = msg["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if isinstance(fn, AdditiveNoiseNormal):
            msg["value"] = UndrawnSample(fn.loc, fn.log_sigma2, msg["name"], self.reuse)
