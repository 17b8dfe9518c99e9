"""Basis functions of the relevance vector machine, and the products it needs of them.

A relevance vector machine is linear in its basis functions ``phi_m(x)``. With a kernel there is
one per training input, ``phi_m(x) = k(x, x_m)``; with ``kernel="linear"`` the features themselves
are the basis functions, so that relevance is a property of a feature.

:class:`BasisFunctions` evaluates a chosen few at new inputs; :class:`DesignMatrix` holds all of
them over the training data and gives matrix products, block by block where the whole matrix would
not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from scipy.linalg import blas
from torch import Tensor

from bayes_svdo.inference.arguments import check_count, check_flag, is_number

KernelFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``k(a, b)`` of inputs ``(n, d)`` and ``(m, d)``: a tensor ``(n, m)``."""

KernelName: TypeAlias = Literal["linear", "rbf", "poly", "precomputed"]
Kernel: TypeAlias = KernelName | KernelFunction
Gamma: TypeAlias = float | Literal["scale", "auto"]
Method: TypeAlias = Literal["fast", "mackay", "em"]

_NAMES = ("linear", "rbf", "poly", "precomputed")

# A block of this size stays in a CPU's cache between the product that fills it and the passes
# that read it; a GPU wants few, large launches instead.
_BLOCK_BYTES = {"cpu": 4 * 2**20}
_BLOCK_BYTES_ACCELERATOR = 256 * 2**20


def check_inputs(x: Tensor, y: Tensor) -> None:
    """Refuse what no relevance vector machine can be fitted to, by name.

    Raises:
        TypeError: ``x`` or ``y`` is not a tensor, or ``x`` is not float32 or float64.
        ValueError: The shapes do not agree, a value is not finite, or there are too few data.
    """
    check_features(x)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"y must be a torch.Tensor, got {type(y).__name__}.\n  Try torch.as_tensor(y)."
        )
    if y.layout != torch.strided or y.is_complex():
        raise TypeError(f"y must be a dense tensor of real numbers, got {y.layout}, {y.dtype}.")
    if y.dim() != 1 or len(y) != len(x):
        raise ValueError(
            f"y must have shape ({len(x)},), one value per row of x, got {tuple(y.shape)}."
        )
    if y.device != x.device:
        raise ValueError(f"x is on {x.device} but y is on {y.device}.\n  Try y.to(x.device).")
    if y.is_floating_point() and not bool(y.isfinite().all()):
        bad = int((~y.isfinite()).sum())
        raise ValueError(f"y has {bad} values that are NaN or infinite of {len(y)}.")
    if len(x) < 2:
        raise ValueError(
            f"x has n_samples = {len(x)}; at least 2 are needed, for one sample cannot tell signal "
            "from noise."
        )


def check_features(x: Tensor, name: str = "x") -> None:
    """Refuse inputs that are not a finite floating-point matrix with at least one column."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(x).__name__}.\n"
            f"  Try torch.as_tensor({name}, dtype=torch.float64)."
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({x.layout}).\n  Try {name}.to_dense().")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float64 or float32, got {x.dtype}.\n  Try {name}.to(torch.float64)."
        )
    if x.dim() != 2:
        raise ValueError(
            f"{name} must have shape (n_samples, n_features), got {tuple(x.shape)}.\n"
            f"  Try {name}.reshape(-1, 1) if there is a single feature."
        )
    if x.shape[1] == 0:
        raise ValueError(f"{name} has 0 features, shape {tuple(x.shape)}; at least 1 is needed.")
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise ValueError(f"{name} has {bad} values that are NaN or infinite of {x.numel()}.")


def check_options(
    fit_intercept: object, method: str, tol: float, max_iter: int, max_kernel_bytes: int
) -> bool:
    """Refuse options out of range; whether there is an intercept, as a ``bool``.

    Raises:
        TypeError: ``fit_intercept`` is neither True nor False.
        ValueError: There is no such method, or no search can stop by ``tol`` and ``max_iter``.
    """
    fit_intercept = check_flag("fit_intercept", fit_intercept)
    if not isinstance(method, str) or method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if not is_number(tol) or not 0 < tol < math.inf:
        raise ValueError(f"tol must be positive and finite, in nats, got {tol!r}.")
    check_count("max_iter", max_iter)
    check_count("max_kernel_bytes", max_kernel_bytes, least=0)
    return fit_intercept


@dataclass(frozen=True)
class BasisFunctions:
    """Chosen basis functions, to be evaluated anywhere.

    Attributes:
        kernel: A name or a function; see :func:`resolve_kernel`.
        gamma: Inverse squared length of ``"rbf"``, scale of the product in ``"poly"``.
        degree: Degree of ``"poly"``.
        coef0: Constant of ``"poly"``.
        num_columns: Columns that an input must have: features, or training data when the kernel
            is precomputed.
        indices: ``(m,)`` which basis functions of the training set these are.
        centres: ``(m, d)`` the training inputs they belong to; for ``"linear"`` and
            ``"precomputed"``, which have none, ``(0, num_columns)``.
    """

    kernel: Kernel
    gamma: float
    degree: int
    coef0: float
    num_columns: int
    indices: Tensor
    centres: Tensor

    def __call__(self, x: Tensor) -> Tensor:  # (n, num_columns) -> (n, m)
        """Evaluate every basis function at every row of ``x``.

        Raises:
            TypeError: ``x`` is not a float32 or float64 tensor.
            ValueError: ``x`` has the wrong number of columns, or values that are not finite, or
                the kernel has.
        """
        check_features(x)
        if x.shape[1] != self.num_columns:
            if self.kernel == "precomputed":
                raise ValueError(
                    f"x has shape {tuple(x.shape)}, but a precomputed kernel needs "
                    f"(n_samples, {self.num_columns}): a column for each of the "
                    f"{self.num_columns} training data, relevant or not.\n"
                    "  Try the kernel between the new data (rows) and all training data (columns)."
                )
            raise ValueError(
                f"x has {x.shape[1]} features, shape {tuple(x.shape)}, but the machine was fitted "
                f"to {self.num_columns}."
            )
        if x.dtype != self.centres.dtype or x.device != self.centres.device:
            raise ValueError(
                f"x is {x.dtype} on {x.device}, but the machine was fitted to "
                f"{self.centres.dtype} on {self.centres.device}.\n"
                f"  Try x.to({str(self.centres.device)!r}, {self.centres.dtype})."
            )
        if self.kernel in ("linear", "precomputed"):
            return x[:, self.indices]
        phi = self.evaluate(x, self.centres)
        if not bool(phi.isfinite().all()):
            raise ValueError(
                f"kernel={self.kernel!r} overflows {x.dtype} at this x, whose largest value is "
                f"{float(x.abs().max()):g}.\n  Try inputs of the scale that the machine was fitted "
                "to."
            )
        return phi

    def evaluate(self, x: Tensor, centres: Tensor) -> Tensor:  # (n, d), (m, d) -> (n, m)
        """Kernel between ``x`` and ``centres``, for kernels that have centres."""
        if self.kernel == "rbf":
            return _rbf(x, centres, self.gamma)
        if self.kernel == "poly":
            return torch.mm(x, centres.T).mul_(self.gamma).add_(self.coef0).pow_(self.degree)
        assert callable(self.kernel)
        phi = self.kernel(x, centres)
        wanted = (len(x), len(centres))
        if not isinstance(phi, Tensor) or tuple(phi.shape) != wanted:
            got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
            raise ValueError(
                f"kernel(a, b) must return a tensor of shape {wanted} for a of shape "
                f"{tuple(x.shape)} and b of shape {tuple(centres.shape)}, got {got}."
            )
        if phi.dtype != x.dtype or phi.device != x.device:
            raise ValueError(
                f"kernel(a, b) must return {x.dtype} on {x.device}, like its arguments, got "
                f"{phi.dtype} on {phi.device}."
            )
        if not bool(phi.isfinite().all()):
            bad = int((~phi.isfinite()).sum())
            raise ValueError(
                f"kernel(a, b) must return finite numbers, got {bad} of {phi.numel()} that are NaN "
                f"or infinite, for a of shape {tuple(x.shape)} and b of shape "
                f"{tuple(centres.shape)}."
            )
        return phi

    def at(self, x: Tensor, indices: Tensor) -> BasisFunctions:
        """The basis functions ``indices`` of training inputs ``x``."""
        centres = x[:0] if self.kernel in ("linear", "precomputed") else x[indices]
        return replace(self, indices=indices, centres=centres.clone())

    def to(self, device: torch.device) -> BasisFunctions:
        """The same on another device."""
        return replace(self, indices=self.indices.to(device), centres=self.centres.to(device))


def resolve_kernel(
    x: Tensor, kernel: Kernel, gamma: Gamma, degree: int, coef0: float
) -> BasisFunctions:
    """The basis functions that a kernel spans over training inputs ``x``, none chosen yet.

    Args:
        x: ``(n, d)`` training inputs; ``(n, n)`` for ``"precomputed"``.
        kernel: ``"linear"``: the features themselves. ``"rbf"``: ``exp(-gamma |x - x_m|^2)``.
            ``"poly"``: ``(gamma x.x_m + coef0) ** degree``. ``"precomputed"``: column ``m`` of
            ``x`` is basis function ``m``. Or a function ``k(a, b)`` of ``(n, d)`` and ``(m, d)``
            returning ``(n, m)``; it need be neither symmetric nor positive definite.
        gamma: A positive number; ``"scale"``: ``1 / (d var(x))``; ``"auto"``: ``1 / d``.
        degree: Degree of ``"poly"``, at least 1.
        coef0: Constant of ``"poly"``.

    Raises:
        ValueError: An argument is out of its range, or a precomputed kernel is not square.
    """
    if not callable(kernel) and not (isinstance(kernel, str) and kernel in _NAMES):
        raise ValueError(f"kernel must be one of {_NAMES} or a function, got {kernel!r}.")
    if kernel == "precomputed" and x.shape[0] != x.shape[1]:
        raise ValueError(
            f'kernel="precomputed" needs the square kernel matrix of the training data, got shape '
            f'{tuple(x.shape)}.\n  Try kernel="linear", which takes any design matrix.'
        )
    degree = check_count("degree", degree)
    if not is_number(coef0) or not math.isfinite(coef0):
        raise ValueError(f"coef0 must be a finite number, got {coef0!r}.")
    return BasisFunctions(
        kernel=kernel,
        gamma=_resolve_gamma(x, gamma, needed=kernel in ("rbf", "poly")),
        degree=degree,
        coef0=float(coef0),
        num_columns=x.shape[1],
        indices=torch.empty(0, dtype=torch.long, device=x.device),
        centres=x[:0].clone(),
    )


def _resolve_gamma(x: Tensor, gamma: Gamma, needed: bool) -> float:
    if not isinstance(gamma, str):
        if not is_number(gamma) or not 0 < float(gamma) < math.inf:
            raise _wrong_gamma(gamma)
        return float(gamma)
    if gamma == "auto":
        return 1.0 / x.shape[1]
    if gamma == "scale" and not needed:
        return 1.0
    if gamma == "scale":
        variance = float(x.var(correction=0))
        # Constant inputs have no scale; every kernel column is then the same whatever gamma is.
        if variance == 0 and bool(x.max() == x.min()):
            return 1.0
        if not x.shape[1] * variance > torch.finfo(x.dtype).tiny or not math.isfinite(variance):
            raise ValueError(
                f'gamma="scale" needs the variance of x, which is {variance:g} in {x.dtype}.\n'
                "  Try scaled inputs."
            )
        return 1.0 / (x.shape[1] * variance)
    raise _wrong_gamma(gamma)


def _wrong_gamma(gamma: object) -> ValueError:
    return ValueError(f'gamma must be a positive number, "scale" or "auto", got {gamma!r}.')


def _rbf(x: Tensor, centres: Tensor, gamma: float, out: Tensor | None = None) -> Tensor:
    """``exp(-gamma |x - c|^2)``, ``(n, m)``, in one matrix product and one pass.

    The exponent ``2 gamma x.c - gamma |x|^2 - gamma |c|^2`` is itself a product of augmented
    inputs. They are taken from the mean of the centres, or the squares of a large common offset
    would swamp the differences.
    """
    origin = centres.mean(0) if len(centres) else 0.0
    left, right = x - origin, centres - origin
    left_square = left.square().sum(1, keepdim=True).mul_(-gamma)
    right_square = right.square().sum(1, keepdim=True).mul_(-gamma)
    left = torch.cat([left, left_square, torch.ones_like(left_square)], 1)
    right = torch.cat([2 * gamma * right, torch.ones_like(right_square), right_square], 1)
    return torch.mm(left, right.T, out=out).exp_()


class DesignMatrix:
    """All basis functions over the training data, ``(num_basis, num_data)``: one per row.

    The matrix is kept when it takes at most ``max_bytes``; a larger one is computed again, block
    by block, for each product, so that memory grows with ``num_data`` and not with its square.
    ``kernel="linear"`` and ``"precomputed"`` read the caller's tensor and copy nothing.

    Args:
        basis: What :func:`resolve_kernel` returned.
        x: Training inputs.
        centred: Whether an intercept takes up the mean of every basis function.
        max_bytes: Size in bytes up to which the matrix is kept.
    """

    def __init__(self, basis: BasisFunctions, x: Tensor, *, centred: bool, max_bytes: int) -> None:
        self.basis = basis
        self.x = x
        self.centred = centred
        own = basis.kernel in ("linear", "precomputed")
        self.num_data = len(x)
        self.num_basis = x.shape[1] if own else len(x)
        size = self.num_data * self.num_basis * x.element_size()
        self._kept: Tensor | None = x.T if own else None
        if not own and size <= max_bytes:
            self._kept = x.new_empty(self.num_basis, self.num_data)
        self._least_norm = torch.finfo(x.dtype).tiny ** 0.5 / torch.finfo(x.dtype).eps
        self._symmetric = basis.kernel == "rbf" and x.device.type == "cpu"
        self.mean, self.norm = self._moments(fill=not own)
        if not bool(self.norm.isfinite().all()):
            worst = int((~self.norm.isfinite()).nonzero()[0])
            raise ValueError(
                f"basis function {worst} is not finite at all training data: the kernel overflows "
                f"{x.dtype}.\n  Try scaled inputs, a smaller degree or a smaller gamma."
            )
        # What is left of a constant after its mean is taken off is rounding: it says nothing.
        rounding = 32 * torch.finfo(x.dtype).eps * self.mean.abs() * self.num_data**0.5
        self.is_null = (self.norm == 0) | (self.norm <= rounding) if centred else self.norm == 0
        self.scale = torch.where(self.is_null, 0.0, 1.0 / self.norm)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.num_basis, self._block_size):
            yield slice(start, min(start + self._block_size, self.num_basis))

    @property
    def _block_size(self) -> int:
        budget = _BLOCK_BYTES.get(self.x.device.type, _BLOCK_BYTES_ACCELERATOR)
        return min(self.num_basis, max(16, budget // (self.num_data * self.x.element_size())))

    def _work(self) -> Tensor:  # -> (block size, num_data)
        """Room for one block.

        Asked for block by block it would cost as much as the arithmetic, and as the allocator
        seldom finds the last block's place again, in the end as much memory as the whole matrix.
        """
        return self.x.new_empty(self._block_size, self.num_data)

    def _block(self, block: slice, room: Tensor | None) -> Tensor:
        """The rows ``block``, computed into ``room`` where they are not kept."""
        if self._kept is not None:
            return self._kept[block]
        assert room is not None
        return self._compute(block, room[: block.stop - block.start])

    def _compute(self, which: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """Rows ``which`` from the kernel, into ``out`` where one is given."""
        centres = self.x[which]
        if self.basis.kernel == "rbf":
            # The kernel is symmetric, so its rows can be written without a transpose.
            return _rbf(centres, self.x, self.basis.gamma, out)
        rows = self.basis.evaluate(self.x, centres).T
        return rows if out is None else out.copy_(rows)

    def _moments(self, *, fill: bool) -> tuple[Tensor, Tensor]:
        """Mean ``(num_basis,)`` and norm about it, or about 0 without an intercept."""
        mean = self.x.new_zeros(self.num_basis)
        norm = self.x.new_empty(self.num_basis)
        work = self._work()
        room = None if self._kept is not None else self._work()
        for block in self._blocks():
            if fill and self._kept is not None:
                self._compute(block, self._kept[block])
            rows = self._block(block, room)
            if self.centred:
                mean[block] = rows.mean(1)
            # Two passes: the difference of raw moments loses a nearly constant function.
            left = torch.sub(rows, mean[block].unsqueeze(1), out=work[: len(rows)])
            norm[block] = left.square_().sum(1).sqrt()
            if bool((norm[block] < self._least_norm).any()):
                self._check_underflow(rows, mean[block], block.start)
        return mean, norm

    def _check_underflow(self, rows: Tensor, mean: Tensor, first: int) -> None:
        """Refuse basis functions that are not constant, but whose norm has no digits."""
        largest = (rows - mean.unsqueeze(1)).abs().amax(1)
        rounding = 32 * torch.finfo(rows.dtype).eps * mean.abs()
        lost = (largest > rounding) & (largest * self.num_data**0.5 < self._least_norm)
        if bool(lost.any()):
            raise ValueError(
                f"basis function {first + int(lost.nonzero()[0])} varies by "
                f"{float(largest[lost][0]):g} only, too little to square in {rows.dtype}.\n"
                "  Try scaled inputs."
            )

    def rows(self, indices: Tensor) -> Tensor:  # (m,) -> (m, num_data)
        """The basis functions ``indices`` over the training data, scaled to unit norm."""
        rows = self._compute(indices) if self._kept is None else self._kept[indices]
        return (rows - self.mean[indices].unsqueeze(1)) * self.scale[indices].unsqueeze(1)

    def project(self, v: Tensor) -> Tensor:  # (num_data, k) -> (num_basis, k)
        """Inner products of all basis functions, centred and scaled, with the columns of ``v``."""
        if self._kept is not None and self._symmetric and v.shape[1] == 1:
            product = _symmetric_product(self._kept, v)
        elif self._kept is not None:
            product = self._kept @ v
        else:
            room = self._work()
            product = v.new_empty(self.num_basis, v.shape[1])
            for block in self._blocks():
                product[block] = self._block(block, room) @ v
        if self.centred:
            # Centring the product costs no copy of the matrix.
            product.addr_(self.mean, v.sum(0), alpha=-1)
        return product.mul_(self.scale.unsqueeze(1))

    def project_squares(self, v: Tensor) -> Tensor:  # (num_data,) -> (num_basis,)
        """Inner products of the squares of all basis functions, centred and scaled, with ``v``."""
        product = torch.empty_like(self.norm)
        work = self._work()
        room = None if self._kept is not None else self._work()
        for block in self._blocks():
            rows = self._block(block, room)
            left = torch.sub(rows, self.mean[block].unsqueeze(1), out=work[: len(rows)])
            product[block] = left.square_() @ v
        return product.mul_(self.scale.square())


def _symmetric_product(matrix: Tensor, v: Tensor) -> Tensor:  # (n, n), (n, 1) -> (n, 1)
    """``matrix @ v`` from one of the triangles: half the numbers to read, and that is the price."""
    symv = blas.dsymv if matrix.dtype == torch.float64 else blas.ssymv
    return torch.from_numpy(symv(1.0, matrix.numpy().T, v[:, 0].numpy(), lower=1)).unsqueeze(1)
