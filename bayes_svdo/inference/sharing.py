"""Data that come from a DataLoader, shared among the ranks of a run.

A sampler says in which order data points come. All ranks draw the same order, from random numbers
that they share, and each takes every R-th of it. A stream has no order that could be shared: each
rank reads what its own gives, as long as all ranks have a batch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import count
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.random import fork_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
)

from bayes_svdo.inference.devices import Ranks

_END = object()


class SharedLoader:
    """The batches of a DataLoader that are a rank's.

    Args:
        loader: As the user gave it; it stays as it is.
        ranks: All ranks, of which each makes one of these.
        seed: Of the order, the same on all ranks.
        name: What to call the data in error messages.
        num_data: Data points of all ranks in an epoch, if that is known.

    Attributes:
        loader: What is read: a copy with a sampler for this rank, or a stream as it was.

    Raises:
        ValueError: Its sampler shares the data already, but among others.
    """

    def __init__(
        self, loader: DataLoader[Any], ranks: Ranks, seed: int, name: str, num_data: int | None
    ) -> None:
        self._ranks, self._name, self._num_data = ranks, name, num_data
        self._epoch = 0
        self._samplers: list[Any] = []
        is_stream = isinstance(loader.dataset, IterableDataset)
        # A loader with an __iter__ of its own need not ask the sampler.
        self._is_certain = not is_stream and type(loader).__iter__ is DataLoader.__iter__
        self.loader = loader
        if is_stream:
            return
        batches: Any = loader.batch_sampler
        sampler = getattr(batches, "sampler", loader.sampler)
        self._samplers = [batches, sampler]
        if not _shares_already(sampler, ranks, name):
            self.loader = _with_part(loader, ranks, seed, name)

    def __iter__(self) -> Iterator[Any]:
        for sampler in self._samplers:
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self._epoch)
        self._epoch += 1
        return iter(self.loader) if self._is_certain else self._while_all_have_one()

    def _while_all_have_one(self) -> Iterator[Any]:
        """Batches, until some rank has no other: the gradients of a step are those of all ranks."""
        iterator, seen, may_warn = iter(self.loader), 0, self._epoch == 1
        for steps in count():
            batch = next(iterator, _END)
            ended = self._ranks.where(batch is _END)
            if ended:
                break
            if may_warn and steps == 0 and self._ranks.equal(_fingerprint(batch)):
                may_warn = False
                self._warn(f"the first batch of {self._name} is the same on all ranks")
            seen += len(batch[-1]) if isinstance(batch, (tuple, list)) else 0
            yield batch
        if not may_warn:
            return
        everywhere = int(self._ranks.total(torch.tensor(float(seen), dtype=torch.float64)))
        if self._num_data is not None and everywhere >= self._ranks.count * self._num_data:
            self._warn(
                f"{self._name} holds {self._num_data} data points, of which the ranks have read "
                f"{everywhere}"
            )
        if 0 < len(ended) < self._ranks.count and self._ranks.rank == 0:
            which = ", ".join(map(str, ended))
            warnings.warn(
                f"{self._name} ended after step {steps} of the epoch on rank {which} of "
                f"{self._ranks.count}, on others later: an epoch ends with the shortest, and what "
                "others have left is not used.\n"
                "  Try giving each rank as many batches.",
                stacklevel=2,
            )

    def _warn(self, what: str) -> None:
        if self._ranks.rank == 0:
            warnings.warn(
                f"{what}: it seems that each rank reads all data, and {self._ranks.count} devices "
                "do the work of one.\n"
                "  Try giving each rank its part in __iter__, by torch.distributed.get_rank() and "
                "get_world_size(), and torch.utils.data.get_worker_info() if there are workers.",
                stacklevel=2,
            )


class Part(Sampler[Any]):
    """Every R-th item of a sampler; the first come again where parts would differ in length.

    Args:
        source: Gives indices, or lists of such, in the same order on all ranks if torch's, NumPy's
            and Python's global random numbers are the same, and its own, if it has any.
        ranks: All ranks, of which each has one of these.
        seed: Of the order, the same on all ranks. Every epoch has another.
        name: What to call the data in error messages.
    """

    def __init__(self, source: Iterable[Any], ranks: Ranks, seed: int, name: str) -> None:
        self.source, self._ranks, self._name = source, ranks, name
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.source) // self._ranks.count)  # type: ignore[arg-type]  # may refuse

    def __iter__(self) -> Iterator[Any]:
        with _global_random_numbers(int(torch.randint(2**62, (), generator=self.generator))):
            order = list(self.source)
        if not self._ranks.equal(crc32(repr([_plain(item) for item in order]).encode())):
            raise ValueError(
                f"the sampler of {self._name} gives another order on each rank, so that no part "
                "of it can be a rank's.\n"
                "  Try seeding its own random numbers alike on all ranks; or, if it shares the "
                "data itself, a torch.utils.data.DistributedSampler."
            )
        return iter(part_of(order, self._ranks.rank, self._ranks.count))


def part_of(items: list[Any], rank: int, ranks: int) -> list[Any]:
    """A rank's items: every R-th, as many for each rank; the first come again for that."""
    length = -(-len(items) // ranks)
    return [items[(rank + step * ranks) % len(items)] for step in range(length)]


def _with_part(loader: DataLoader[Any], ranks: Ranks, seed: int, name: str) -> DataLoader[Any]:
    """A copy of a loader, all else alike, that reads a part of what its sampler gives."""
    batches: Any = loader.batch_sampler
    parts: dict[str, Any]
    if batches is None:  # what the dataset gives are batches
        parts = {"sampler": Part(loader.sampler, ranks, seed, name)}
    elif type(batches) is BatchSampler:  # by data points: a rank's last batch alone is smaller
        part = Part(batches.sampler, ranks, seed, name)
        sampler = BatchSampler(part, batches.batch_size, batches.drop_last)
        parts = {"sampler": part, "batch_sampler": sampler}
    else:  # who knows why these come together: whole batches
        parts = {"batch_sampler": Part(batches, ranks, seed, name)}
    shared = copy(loader)
    # Not by assignment, which a DataLoader refuses, nor by its constructor, which a subclass may
    # have changed. Workers that persist have the old sampler.
    vars(shared).update(parts, _iterator=None)
    return shared


def _shares_already(sampler: Any, ranks: Ranks, name: str) -> bool:
    """Whether each rank has a sampler for its part.

    Raises:
        ValueError: The part is another rank's.
    """
    if not isinstance(sampler, DistributedSampler) or sampler.num_replicas == 1:
        return False
    if (sampler.num_replicas, sampler.rank) != (ranks.count, ranks.rank):
        raise ValueError(
            f"the DistributedSampler of {name} is for rank {sampler.rank} of "
            f"{sampler.num_replicas}, but this is rank {ranks.rank} of {ranks.count}.\n"
            "  Try leaving it out: fit gives each rank its part of what any sampler gives."
        )
    return True


@contextmanager
def _global_random_numbers(seed: int) -> Iterator[None]:
    """What samplers draw from, seeded; and its state as it was afterwards."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


def _plain(item: Any) -> Any:
    """An index, or a list of such, that prints alike in all processes."""
    if isinstance(item, (list, tuple)):
        return [_plain(index) for index in item]
    return item.tolist() if isinstance(item, (Tensor, np.ndarray, np.generic)) else item


def _fingerprint(batch: Any) -> int:
    """A number that is the same for the same tensors."""
    number = 0
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            values = leaf.detach().cpu().flatten().contiguous().view(torch.uint8)
            number = crc32(values.numpy().tobytes(), number)
    return number
