"""Where minibatches come from: tensors that live on the device, or any DataLoader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset

Data = tuple[Any, Tensor] | Dataset[Any] | DataLoader[Any]

# Tensors stay on the accelerator if they fill no more than this part of its free memory.
_SHARE_OF_FREE_MEMORY = 0.5


class Batches(ABC):
    """An epoch of minibatches, each a tuple of the model's arguments, on the device.

    Attributes:
        num_data: Number of data points in an epoch; None if the source cannot tell.
    """

    num_data: int | None

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in an epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The batches of one epoch, shuffled anew."""

    @abstractmethod
    def first(self) -> tuple[Any, ...]:
        """A batch to look at; takes nothing from the stream of random numbers."""


class TensorBatches(Batches):
    """Tensors of equal length, shuffled and sliced where they are; the last may be smaller."""

    def __init__(
        self, tensors: Sequence[Tensor], batch_size: int, device: torch.device, shuffle: bool
    ) -> None:
        fits = device.type == "cpu" or _fits(tensors, device)
        self.tensors = tuple(t.to(device) if fits else t for t in tensors)
        self.batch_size, self.device, self.shuffle = batch_size, device, shuffle
        self.num_data = len(tensors[0])

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        here = self.tensors[0].device
        order = torch.randperm(len(self.tensors[0]), device=here) if self.shuffle else None
        for start in range(0, len(self.tensors[0]), self.batch_size):
            span = slice(start, start + self.batch_size)
            rows = span if order is None else order[span]
            yield tuple(t[rows].to(self.device, non_blocking=True) for t in self.tensors)

    def first(self) -> tuple[Any, ...]:
        """The first batch in the order of the data."""
        return tuple(t[: self.batch_size].to(self.device) for t in self.tensors)


class LoaderBatches(Batches):
    """Batches of a DataLoader, moved to the device."""

    def __init__(
        self, loader: DataLoader[Any], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.loader, self.device, self.dtype = loader, device, dtype
        dataset: Any = loader.dataset
        self.num_data = len(dataset) if isinstance(dataset, Sized) else None
        if self.num_data is not None and loader.drop_last and loader.batch_size:
            self.num_data -= self.num_data % loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self.loader:
            yield tuple(self._move(batch))

    def _move(self, batch: Any) -> Any:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(self.device, self.dtype if value.is_floating_point() else None)

        return tree_map(move, batch)

    def first(self) -> tuple[Any, ...]:
        """A batch of the loader."""
        with torch.random.fork_rng(devices=[]):
            return next(iter(self))


def make_batches(
    data: Data,
    batch_size: int | None,
    device: torch.device,
    name: str,
    *,
    shuffle: bool = True,
    dtype: torch.dtype | None = None,
) -> Batches:
    """Batches of ``data``.

    Args:
        data: A pair of tensors or arrays ``(x, y)`` with the data points along the first
            dimension, a ``Dataset`` of such pairs, or a ``DataLoader``.
        batch_size: Data points in a batch (100 if None); must be None for a DataLoader, which has
            its own.
        device: Where the batches go.
        name: What to call the data in error messages.
        shuffle: Whether each epoch has an order of its own.
        dtype: What floating-point tensors are converted to; as they are if None.

    Raises:
        TypeError: ``data`` is none of these.
        ValueError: Empty data, tensors of different lengths, or a batch size that does not fit.
    """
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} was given, but {name} is a DataLoader, which has its own "
                f"({data.batch_size}).\n  Try leaving batch_size out."
            )
        if isinstance(data.dataset, Sized) and len(data.dataset) == 0:
            raise ValueError(f"{name} is empty.")
        return LoaderBatches(data, device, dtype)
    tensors = _tensors(data, name)
    if tensors is None:
        dataset: Any = data
        if not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
            raise TypeError(
                f"{name} must be a pair of tensors (x, y), a map-style Dataset or a DataLoader, "
                f"but is a {type(data).__name__}."
            )
        size = _check_batch_size(batch_size, len(dataset), name)
        loader: DataLoader[Any] = DataLoader(cast(Any, data), batch_size=size, shuffle=shuffle)
        return LoaderBatches(loader, device, dtype)
    tensors = tuple(t.to(dtype) if dtype and t.is_floating_point() else t for t in tensors)
    lengths = [len(t) for t in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{name} must hold as many inputs as targets, but x has shape "
            f"{tuple(tensors[0].shape)} and y has shape {tuple(tensors[-1].shape)}."
        )
    return TensorBatches(tensors, _check_batch_size(batch_size, lengths[0], name), device, shuffle)


def _tensors(data: Any, name: str) -> tuple[Tensor, ...] | None:
    if isinstance(data, TensorDataset):
        return data.tensors
    if not isinstance(data, (tuple, list)):
        return None
    if len(data) != 2:
        raise TypeError(f"{name} must be a pair (x, y), but has {len(data)} elements.")
    tensors = []
    for letter, value in zip("xy", data, strict=True):
        if not isinstance(value, (Tensor, np.ndarray)):
            raise TypeError(
                f"{name} {letter} must be a tensor or an array, but is a {type(value).__name__}."
            )
        tensor = torch.as_tensor(value)
        if tensor.dim() == 0:
            raise ValueError(f"{name} {letter} must have data points along its first dimension.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            rows = (
                (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
            )
            raise ValueError(
                f"{name} {letter} holds NaN or inf, in {int(rows.sum())} of {len(tensor)} data "
                f"points, the first at index {int(rows.nonzero()[0])}."
            )
        tensors.append(tensor)
    return tuple(tensors)


def _check_batch_size(batch_size: int | None, num_data: int, name: str) -> int:
    if num_data == 0:
        raise ValueError(f"{name} is empty.")
    if batch_size is None:
        return min(100, num_data)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, but is {batch_size!r}.")
    if batch_size > num_data:
        raise ValueError(
            f"batch_size={batch_size} is larger than {name}, which holds {num_data} data points."
        )
    return batch_size


def _fits(tensors: Sequence[Tensor], device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(t.numel() * t.element_size() for t in tensors if t.device != device)
    return needed <= _SHARE_OF_FREE_MEMORY * free
