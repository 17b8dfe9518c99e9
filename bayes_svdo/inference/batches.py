"""Where minibatches come from: tensors that live on the device, or any DataLoader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from bayes_svdo.inference.arguments import check_count
from bayes_svdo.inference.devices import Ranks
from bayes_svdo.inference.sharing import SharedLoader

Data = tuple[Any, Any] | Dataset[Any] | DataLoader[Any]

_DEFAULT_BATCH_SIZE = 100
# Tensors stay on the accelerator if they fill no more than this part of its free memory.
_SHARE_OF_FREE_MEMORY = 0.5
# Samplers whose epoch draws on the whole data set.
_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


class Batches(ABC):
    """An epoch of minibatches, each a tuple of the model's arguments, on the device.

    Attributes:
        num_data: Number of data points; None if the source cannot tell.
        targets: All targets, if they are at hand.
    """

    num_data: int | None
    targets: Tensor | None

    @abstractmethod
    def share(self, ranks: Ranks, seed: int) -> None:
        """Give each rank its part of every epoch, all of one length: some data may come twice.

        Args:
            ranks: This one, and all others.
            seed: Of the order, the same on all ranks.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in an epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The batches of one epoch, shuffled anew."""

    @abstractmethod
    def first(self) -> tuple[Any, ...]:
        """A batch to look at; takes nothing from the streams of random numbers."""

    @property
    @abstractmethod
    def last_size(self) -> int | None:
        """Data points in the last batch of an epoch; None if that cannot be known."""

    @abstractmethod
    def can_be_all_of(self, num_data: int, seen: int) -> bool:
        """Whether an epoch of ``seen`` data points can be one over ``num_data``."""


class TensorBatches(Batches):
    """Tensors of equal length, shuffled and sliced where they are; the last may be smaller.

    Args:
        data: The model's arguments, each a tensor or a tuple of such; the targets last.
        batch_size: Data points in a batch.
        device: Where the batches go; the tensors go there at once, if they fit.
        shuffle: Whether each epoch has an order of its own.
    """

    def __init__(
        self, data: tuple[Any, ...], batch_size: int, device: torch.device, shuffle: bool
    ) -> None:
        fits = _fits(tree_leaves(data), device)
        self.data = tree_map(lambda t: t.detach().to(device) if fits else t.detach(), data)
        self.batch_size, self.device, self.shuffle = batch_size, device, shuffle
        self.num_data: int = len(tree_leaves(data)[0])
        self.targets: Tensor = self.data[-1]
        self._rank, self._ranks = 0, 1
        self._generator: torch.Generator | None = None

    def share(self, ranks: Ranks, seed: int) -> None:
        """Every R-th of a shuffled epoch is a rank's."""
        self._rank, self._ranks = ranks.rank, ranks.count
        self._generator = torch.Generator(self.targets.device)
        self._generator.manual_seed(seed)

    @property
    def _part(self) -> int:
        """Data points of an epoch."""
        return -(-self.num_data // self._ranks)

    def __len__(self) -> int:
        return -(-self._part // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        order: Tensor | None = None
        if self.shuffle:
            where = self.targets.device
            order = torch.randperm(self.num_data, device=where, generator=self._generator)
            places = torch.arange(self._rank, self._part * self._ranks, self._ranks, device=where)
            order = order[places % self.num_data]
        for start in range(0, self._part, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self._batch(rows if order is None else order[rows])

    def _batch(self, rows: Any) -> tuple[Any, ...]:
        batch: tuple[Any, ...] = tree_map(
            lambda t: t[rows].to(self.device, non_blocking=True), self.data
        )
        return batch

    def first(self) -> tuple[Any, ...]:
        """The first batch in the order of the data."""
        return self._batch(slice(self.batch_size))

    @property
    def last_size(self) -> int:
        """What is left for it."""
        return self._part % self.batch_size or self.batch_size

    def can_be_all_of(self, num_data: int, seen: int) -> bool:
        """Every data point comes."""
        return num_data == self.num_data


class LoaderBatches(Batches):
    """Batches of a DataLoader, moved to the device.

    Args:
        loader: Gives tuples or lists of the model's arguments.
        device: Where the batches go.
        dtype: What floating-point tensors are converted to; as they are if None.
        name: What to call the data in error messages.
        num_data: Number of data points, for a loader that cannot tell.
        pins: Whether what goes to a GPU is pinned, which a user's loader does if it is told to.

    Raises:
        ValueError: An epoch has no batch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device,
        dtype: torch.dtype | None,
        name: str,
        num_data: int | None = None,
        pins: bool = False,
    ) -> None:
        self.loader, self.device, self.dtype, self.name = loader, device, dtype, name
        self._read: Iterable[Any] = loader
        self._pins = pins and device.type == "cuda"
        self.num_data = _num_data(loader)
        self.targets = None
        dataset = loader.dataset
        if isinstance(dataset, TensorDataset) and loader.collate_fn is default_collate:
            self.targets = _dataset_tensors(dataset, name)[-1]
        self._known_num_data = self.num_data if num_data is None else num_data
        self._length = self._count(self._known_num_data)
        if self._length == 0:
            raise ValueError(
                f"{name} gives no batches: {self.num_data} data points, batch size "
                f"{loader.batch_size}, drop_last={loader.drop_last}."
            )

    def _count(self, num_data: int | None) -> int | None:
        try:
            return len(self.loader)
        except TypeError:  # an IterableDataset without __len__
            if num_data is None or self.loader.batch_size is None:
                return None
            return -(-num_data // self.loader.batch_size)

    def __len__(self) -> int:
        """Number of batches in an epoch.

        Raises:
            TypeError: The loader has no length, and none follows from ``num_data``.
        """
        if self._length is None:
            raise TypeError(
                f"{self.name} is a DataLoader without a length, from which no schedule can be "
                "made.\n  Try giving its dataset a __len__, the number of data points."
            )
        return self._length

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self._read:
            if not isinstance(batch, (tuple, list)):
                raise TypeError(
                    f"{self.name} must give pairs (x, y), but gives a {type(batch).__name__}."
                )
            # Collating turns a tuple of inputs into a list.
            arguments = (tuple(value) if isinstance(value, list) else value for value in batch)
            yield tuple(tree_map(self._move, value) for value in arguments)

    def _move(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self._pins and value.device.type == "cpu":  # else the copy would wait
            value = value.pin_memory()
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(self.device, dtype, non_blocking=True)

    def share(self, ranks: Ranks, seed: int) -> None:
        """See :class:`~bayes_svdo.inference.sharing.SharedLoader`.

        Raises:
            ValueError: A rank would have no batch, or the data are shared already, among others.
        """
        shared = SharedLoader(self.loader, ranks, seed, self.name, self._known_num_data)
        self._read, self.loader = shared, shared.loader
        if self._length is None:
            return
        # A stream tells the length of all of it, if any.
        self._length = -(-self._length // ranks.count)
        if not isinstance(self.loader.dataset, IterableDataset):
            with suppress(TypeError):
                self._length = len(self.loader)
        if self._length == 0:
            raise ValueError(
                f"{self.name} gives no batches on {ranks.count} devices: each has one part of "
                f"{ranks.count} of {self.num_data} data points, batch size "
                f"{self.loader.batch_size}, drop_last={self.loader.drop_last}."
            )

    def first(self) -> tuple[Any, ...]:
        """A batch of the loader.

        Raises:
            ValueError: It gives none.
        """
        loader = self.loader
        samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
        drawn_from = (loader.generator, *(getattr(s, "generator", None) for s in samplers))
        generators = list({id(g): g for g in drawn_from}.values())
        with torch.random.fork_rng(devices=[]), _restored(generators):
            for batch in self:
                return batch
        raise ValueError(f"{self.name} gives no batches.")

    @property
    def last_size(self) -> int | None:
        """None for streams, and for samplers that say too little."""
        size = self.loader.batch_size
        if size is None or isinstance(self.loader.dataset, IterableDataset):
            return None
        if self.loader.drop_last:
            return size
        try:
            return len(self.loader.sampler) % size or size  # type: ignore[arg-type]
        except TypeError:
            return None

    def can_be_all_of(self, num_data: int, seen: int) -> bool:
        """What an epoch drops, or draws again, is allowed for."""
        dataset, batches = self.loader.dataset, self.loader.batch_sampler
        stream = isinstance(dataset, IterableDataset)
        sampler = getattr(batches, "sampler", self.loader.sampler)
        if not stream and batches is not None and isinstance(dataset, Sized):
            # A sampler of the user's own may draw from all of them as it likes.
            if num_data == len(dataset):
                return True
            if getattr(sampler, "replacement", False) and num_data < len(dataset):
                return True
        dropped = 0
        if getattr(batches, "drop_last", self.loader.drop_last):
            workers = max(1, self.loader.num_workers) if stream else 1  # each drops its own
            size = getattr(batches, "batch_size", None) or self.loader.batch_size or 1
            dropped = workers * (size - 1)
        return seen <= num_data <= seen + dropped


def make_batches(
    data: Data,
    batch_size: int | None,
    device: torch.device,
    name: str,
    *,
    shuffle: bool = True,
    dtype: torch.dtype | None = None,
    num_data: int | None = None,
) -> Batches:
    """Batches of ``data``.

    Args:
        data: A pair of tensors or arrays ``(x, y)`` with the data points along the first
            dimension (``x`` may be a tuple of such), a map-style ``Dataset`` of such pairs, or a
            ``DataLoader``.
        batch_size: Data points in a batch (100 if None); must be None for a DataLoader, which has
            its own.
        device: Where the batches go.
        name: What to call the data in error messages.
        shuffle: Whether each epoch has an order of its own.
        dtype: What floating-point tensors are converted to; as they are if None.
        num_data: Number of data points, for a loader that cannot tell.

    Raises:
        TypeError: ``data`` is none of these.
        ValueError: Empty data, tensors of different lengths, values that are not finite, or a
            batch size that does not fit.
    """
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} was given, but {name} is a DataLoader, which has its own "
                f"({data.batch_size}).\n  Try leaving batch_size out."
            )
        if isinstance(data.dataset, Sized) and len(data.dataset) == 0:
            raise ValueError(f"{name} is empty.")
        return LoaderBatches(data, device, dtype, name, num_data)
    if isinstance(data, TensorDataset):
        tensors: tuple[Any, ...] = _dataset_tensors(data, name)
    elif isinstance(data, (tuple, list)):
        tensors = _pair(data, name)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        dataset: Any = data
        size = _check_batch_size(batch_size, len(dataset), name)
        loader: DataLoader[Any] = DataLoader(data, batch_size=size, shuffle=shuffle)
        return LoaderBatches(loader, device, dtype, name, num_data, pins=True)
    else:
        raise TypeError(
            f"{name} must be a pair of tensors (x, y), a map-style Dataset or a DataLoader, but is "
            f"a {type(data).__name__}."
        )
    size = _check_batch_size(batch_size, len(tree_leaves(tensors)[0]), name)
    if dtype is not None:
        tensors = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tensors)
    return TensorBatches(tensors, size, device, shuffle)


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse data with NaN or inf, or that has no values to look at.

    Raises:
        TypeError: It is sparse.
        ValueError: Says how many data points, and which is the first; or it is on ``"meta"``.
    """
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} must be dense, but its layout is {tensor.layout}.\n  Try its to_dense()."
        )
    if tensor.is_meta:
        raise ValueError(f'{name} is on device "meta", where tensors have no values.')
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return
    bad = ~tensor.isfinite()
    rows = bad.flatten(1).any(1) if tensor.dim() > 1 else bad
    raise ValueError(
        f"{name} holds NaN or inf, in {int(rows.sum())} of {len(tensor)} data points, the first "
        f"at index {int(rows.nonzero()[0])}."
    )


def _pair(data: Sequence[Any], name: str) -> tuple[Any, Tensor]:
    if len(data) != 2:
        raise TypeError(f"{name} must be a pair (x, y), but has {len(data)} elements.")
    x = data[0]
    if isinstance(x, tuple):
        inputs: Any = tuple(finite_tensor(value, f"{name} x[{i}]") for i, value in enumerate(x))
    else:
        inputs = finite_tensor(x, f"{name} x")
    pair = inputs, finite_tensor(data[1], f"{name} y")
    leaves = tree_leaves(pair)
    if len(leaves) == 1 or len({len(leaf) for leaf in leaves}) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves[:-1]) or "()"
        raise ValueError(
            f"{name} must hold as many inputs as targets, but x has shape {shapes} and y has "
            f"shape {tuple(leaves[-1].shape)}."
        )
    return pair


def finite_tensor(value: Any, name: str) -> Tensor:
    """A tensor or array of finite numbers, with at least one dimension, as a tensor."""
    if isinstance(value, np.ndarray):
        try:
            # Torch takes no negative strides, and warns of arrays that are read-only.
            value = torch.from_numpy(np.require(value, requirements=("C", "W")))
        except TypeError as error:
            raise TypeError(f"{name} has dtype {value.dtype}: {error}") from None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or an array, but is a {type(value).__name__}.")
    if value.dim() == 0:
        raise ValueError(
            f"{name} must have data points along its first dimension, but is a scalar."
        )
    check_finite(value, name)
    return value


def _dataset_tensors(dataset: TensorDataset, name: str) -> tuple[Tensor, ...]:
    letters = "xy" if len(dataset.tensors) == 2 else range(len(dataset.tensors))
    for letter, tensor in zip(letters, dataset.tensors, strict=True):
        check_finite(tensor, f"{name} {letter}")
    return dataset.tensors


def _check_batch_size(batch_size: int | None, num_data: int, name: str) -> int:
    if num_data == 0:
        raise ValueError(f"{name} is empty.")
    if batch_size is None:
        return min(_DEFAULT_BATCH_SIZE, num_data)
    batch_size = check_count("batch_size", batch_size)
    if batch_size > num_data:
        raise ValueError(
            f"batch_size={batch_size} is larger than {name}, which holds {num_data} data points."
        )
    return batch_size


def _num_data(loader: DataLoader[Any]) -> int | None:
    """Number of data points that a loader draws on, if that can be known."""
    dataset: Any = loader.dataset
    # Without a batch size there is a batch sampler of the user's own, or the dataset gives batches.
    if not isinstance(dataset, Sized) or loader.batch_size is None:
        return None
    if isinstance(dataset, IterableDataset):
        return len(dataset)
    if isinstance(loader.sampler, SubsetRandomSampler):
        return len(loader.sampler)
    return len(dataset) if isinstance(loader.sampler, _WHOLE) else None


def _fits(tensors: Sequence[Tensor], device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(t.numel() * t.element_size() for t in tensors if t.device != device)
    return needed <= _SHARE_OF_FREE_MEMORY * free


@contextmanager
def _restored(generators: Sequence[Any]) -> Iterator[None]:
    """Generators of random numbers as they were before."""
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
