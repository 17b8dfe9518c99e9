"""Local reparameterization: a weight that is not drawn until it must be.

Where an operation is linear in a Gaussian weight, the noise may be drawn in its *output*
instead: ``y = op(x, w)`` with ``w ~ N(loc, sigma²)`` has mean ``op(x, loc)`` and variance
``op(x², sigma²)`` (Kingma, Salimans & Welling 2015, sec. 2.3, https://arxiv.org/abs/1506.02557).
An :class:`UndrawnSample` stands for the draw; it answers such operations with a draw of their
output, and turns into one ordinary draw of the weight at any other use of it.

Each output is drawn on its own. Its marginal distribution is that of weight sampling, for every
row of the batch and every position of a convolution; the dependence between outputs that share a
weight (rows of a batch, positions of a feature map, occurrences of a word) is dropped, as by
Molchanov, Ashukha & Vetrov (2017), https://arxiv.org/abs/1701.05369. A product of weights (with one
another, or with a parameter or buffer of the network) holds no data, and is computed from the drawn
weight. What a network *computes* from such tensors looks like data; a weight that is multiplied by
it (a low-rank factor, a hypernetwork) must be named: ``TraceAnalyticKL_ELBO(drawn={...})``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent
from torch.utils._pytree import tree_leaves, tree_map

from bayes_svdo.distributions.additive_noise import AdditiveNoiseNormal
from bayes_svdo.distributions.draw import Draw, Reuse, WeightReused, check_reuse
from bayes_svdo.distributions.pruned import PrunedAdditiveNoiseNormal

__all__ = ["LocalReparameterization", "Reuse", "UndrawnSample", "WeightReused", "drawn"]


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
        log_sigma2: Log variances, broadcastable to ``loc``. Above 40, noise is drawn as for 40.
        name: Site name, for messages.
        reuse: What a second linear use does: ``"draw"`` raises :class:`WeightReused`, so that the
            caller can draw the weight; ``"independent"`` gives each use noise of its own.

    Raises:
        ValueError: ``reuse`` is unknown.
    """

    _draw: Draw
    _view: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        loc: Tensor,
        log_sigma2: Tensor,
        name: str = "weight",
        reuse: Reuse = "draw",
    ) -> UndrawnSample:
        return cls.of(AdditiveNoiseNormal(loc, log_sigma2, validate_args=False), name, reuse)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def of(
        cls, q: AdditiveNoiseNormal, name: str = "weight", reuse: Reuse = "draw"
    ) -> UndrawnSample:
        """The draw from ``q`` that has not been made yet."""
        return cls._of(Draw(name, q, reuse), _identity)

    @classmethod
    def _of(cls, draw: Draw, view: Callable[[Tensor], Tensor]) -> UndrawnSample:
        with torch.no_grad():
            like = view(draw.q.like())
        make = cast(Any, Tensor._make_wrapper_subclass)
        self: UndrawnSample = make(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        self._draw, self._view = draw, view
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether the draw has been made."""
        return self._draw.value is not None

    def draw(self) -> Tensor:
        """The draw itself, made now if it was not yet; a plain tensor."""
        return self._view(self._draw.draw())

    def _claim_moments(self) -> tuple[Tensor, Tensor]:
        loc, variance = self._draw.claim_moments()
        return self._view(loc), self._view(variance)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        state = "drawn" if self.is_drawn else "not drawn yet"
        return f'UndrawnSample(site="{self._draw.name}", shape={tuple(self.shape)}, {state})'

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

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
        if func in _VIEWS and args and _is_undrawn(args[0]):
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
        # Reached by code that does not ask __torch_function__ (C++ internals), and below autograd.
        with torch.no_grad():
            return func(*tree_map(drawn, args), **tree_map(drawn, kwargs or {}))


def drawn(value: Any) -> Any:
    """``value``, or its draw if it is an :class:`UndrawnSample`."""
    return value.draw() if isinstance(value, UndrawnSample) else value


def again(value: Tensor) -> Tensor:
    """Another draw that has not been made yet, from the same distribution.

    Raises:
        ValueError: ``value`` has been drawn, or is no :class:`UndrawnSample` of a whole weight.
    """
    if not isinstance(value, UndrawnSample) or value.is_drawn or value._view is not _identity:
        raise ValueError("only a weight that has not been drawn yet can be drawn again.")
    return UndrawnSample.of(value._draw.q, value._draw.name, value._draw.reuse)


def _is_undrawn(value: Any) -> bool:
    return isinstance(value, UndrawnSample) and not value.is_drawn


# Storages of the parameters and buffers of the network that is running.
_CONSTANTS: ContextVar[frozenset[int | None]] = ContextVar("_CONSTANTS", default=frozenset())


@contextmanager
def constants(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within, these tensors and views of them are no data: a weight times one of them is a weight.

    The entries of such a product must share one draw, for what follows mixes them.
    """
    token = _CONSTANTS.set(frozenset(map(_storage, tensors)) - {None})
    try:
        yield
    finally:
        _CONSTANTS.reset(token)


def _storage(tensor: Tensor) -> int | None:
    """What tells views of one tensor from other tensors; None for those of sparse or vmap kinds."""
    try:
        address: int = tensor.untyped_storage()._cdata
        return address
    except (NotImplementedError, RuntimeError):
        return None


def _is_constant(value: Any) -> bool:
    return isinstance(value, (UndrawnSample, nn.Parameter)) or (
        isinstance(value, Tensor) and _storage(value) in _CONSTANTS.get()
    )


def _may_stay_undrawn(weight: Any, x: Any) -> bool:
    """Whether ``weight`` is undrawn and ``x`` is data."""
    return _is_undrawn(weight) and not any(map(_is_constant, tree_leaves(x)))


def _output(
    op: Callable[..., Tensor], x: Any, weight: Any, bias: Any, spatial_dims: int = 0
) -> Tensor:
    """A draw of ``op(x, weight, bias)``, which is linear in the weight and in the bias.

    ``x`` is a tensor or a tuple of tensors, ``bias`` a tensor, an undrawn one, or None;
    ``spatial_dims`` are those of a convolution.
    """
    if not _may_stay_undrawn(weight, x):
        return op(tree_map(drawn, x), drawn(weight), drawn(bias))
    loc, variance = weight._claim_moments()
    bias_variance = None
    if _is_undrawn(bias):
        bias, bias_variance = bias._claim_moments()
    mean = op(x, loc, drawn(bias))
    # Squares leave the range of float16 first: the variance stays out of autocast.
    with _without_autocast(loc.device.type):
        squared = tree_map(lambda value: value.to(variance.dtype).square(), x)
        output_variance = op(squared, variance, bias_variance)
    return _normal(mean, output_variance, spatial_dims)


def _normal(mean: Tensor, variance: Tensor, spatial_dims: int = 0) -> Tensor:
    """A draw from ``N(mean, variance)``.

    A variance of zero, as of a zero input, needs something added: the slope of its root is
    infinite. Next to nothing does for sums of products, which are zero exactly. Fast convolutions
    (Winograd, FFT) leave rounding errors of either sign, in proportion to the largest variance of
    the feature map, whose slope would swamp the gradient: that much is added to all of the map.
    """
    eps = torch.finfo(variance.dtype).eps
    variance = variance.clamp(min=0.0)
    floor: float | Tensor = eps**4
    if spatial_dims:
        positions = tuple(range(-spatial_dims, 0))
        floor = eps**4 + eps * variance.detach().amax(positions, keepdim=True)
    std = (variance + floor).sqrt()
    return torch.addcmul(mean, std.to(mean.dtype), torch.randn_like(mean))


def _without_autocast(device_type: str) -> Any:
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if (
        isinstance(weight, UndrawnSample)
        and isinstance(weight._draw.q, PrunedAdditiveNoiseNormal)
        and weight._view is _identity
        and _may_stay_undrawn(weight, input)
        and not isinstance(bias, UndrawnSample)
    ):
        return _pruned_linear(input, weight, weight._draw.q, bias)
    return _output(F.linear, input, weight, bias)


def _pruned_linear(
    x: Tensor, weight: UndrawnSample, q: PrunedAdditiveNoiseNormal, bias: Tensor | None
) -> Tensor:
    """``F.linear`` with the rows and columns that are left."""
    weight._draw.claim()
    inside = UndrawnSample(q.block_loc, q.block_log_sigma2)
    inside_bias = None if bias is None else bias.index_select(0, q.block.rows)
    alive = _output(F.linear, x.index_select(-1, q.block.columns), inside, inside_bias)
    shape = (*x.shape[:-1], len(weight))
    outside = alive.new_zeros(shape) if bias is None else bias.to(alive.dtype).expand(shape)
    return outside.index_copy(-1, q.block.rows, alive)


def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Tensor:
    def op(inputs: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.bilinear(*inputs, weight, bias)

    return _output(op, (input1, input2), weight, bias)


def _convolution(function: Callable[..., Tensor], spatial_dims: int) -> Callable[..., Tensor]:
    def convolve(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        def op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return function(x, weight, bias, *args, **kwargs)

        return _output(op, input, weight, bias, spatial_dims)

    return convolve


def _multiplication(
    function: Callable[..., Tensor], product: Callable[..., Tensor], *names: str
) -> Callable[..., Tensor]:
    """``function(left, right)``, or ``function(bias, left, right)``; the weight on either side.

    ``product`` is the function without a bias, and ``names`` what torch calls the operands.
    """

    def multiply(*operands: Any, **kwargs: Any) -> Tensor:
        missing = names[len(operands) :]
        if len(operands) > len(names) or set(kwargs) != set(missing):  # alpha, beta, out, ...
            return function(*tree_map(drawn, operands), **tree_map(drawn, kwargs))
        *biases, left, right = (*operands, *(kwargs[name] for name in missing))
        bias = biases[0] if biases else None

        def multiply_right(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return product(x, weight) if bias is None else function(bias, x, weight)

        def multiply_left(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return multiply_right(weight, x, bias)

        if _is_undrawn(right):
            return _output(multiply_right, left, right, bias)
        return _output(multiply_left, right, left, bias)

    return multiply


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

    if not _may_stay_undrawn(weight, input):
        return look_up(drawn(input), drawn(weight))
    loc, variance = weight._claim_moments()
    return _normal(look_up(input, loc), look_up(input, variance))


def _linear_operations() -> dict[Any, Callable[..., Tensor]]:
    matmul = _multiplication(torch.matmul, torch.matmul, "input", "other")
    operations: dict[Any, Callable[..., Tensor]] = {
        F.linear: _linear,
        F.bilinear: _bilinear,
        F.embedding: _embedding,
        torch.linalg.matmul: matmul,
        Tensor.__matmul__: matmul,
        Tensor.__rmatmul__: lambda right, left: matmul(left, right),
    }
    for dims in (1, 2, 3):
        for name in (f"conv{dims}d", f"conv_transpose{dims}d"):
            operations[getattr(torch, name)] = _convolution(getattr(torch, name), dims)
    products = {
        "matmul": ("matmul", "input", "other"),
        "mm": ("mm", "input", "mat2"),
        "bmm": ("bmm", "input", "mat2"),
        "mv": ("mv", "input", "vec"),
        "addmm": ("mm", "input", "mat1", "mat2"),
        "addmv": ("mv", "input", "mat", "vec"),
        "baddbmm": ("bmm", "input", "batch1", "batch2"),
    }
    for name, (product, *names) in products.items():
        multiply = _multiplication(getattr(torch, name), getattr(torch, product), *names)
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
    "is_inference", "is_conj", "is_neg", "__hash__", "__dir__",
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

    Raises:
        ValueError: ``reuse`` is unknown, or a ``pyro.plate`` is open around this handler: plates
            belong inside, where the shape of a site is known before its value is made.
    """

    def __init__(self, drawn: Collection[str] = (), reuse: Reuse = "draw") -> None:
        super().__init__()
        self.drawn = frozenset([drawn] if isinstance(drawn, str) else drawn)
        self.reuse = check_reuse(reuse)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if msg["name"] in self.drawn or msg["args"]:
            return
        fn = msg["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if isinstance(fn, AdditiveNoiseNormal):
            msg["value"] = UndrawnSample.of(fn, msg["name"], self.reuse)

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, UndrawnSample) and value.shape != msg["fn"].shape():
            raise ValueError(
                f'at site "{msg["name"]}", the sample has shape {tuple(value.shape)} but the site '
                f"{tuple(msg['fn'].shape())}: a plate is open around LocalReparameterization.\n"
                "  Try opening it inside."
            )
