"""Parts of a DataLoader: what they hold, and what they keep of it. Real ranks: test_devices.py."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from bayes_svdo.inference.batches import make_batches
from bayes_svdo.inference.sharing import Part, SharedLoader, _fingerprint, part_of

X = torch.arange(22.0).reshape(11, 2)
Y = torch.arange(11)
DATA = TensorDataset(X, Y)


def ranks(rank=0, count=2, equal=True):
    """One rank of several; all of them agree."""
    return SimpleNamespace(
        rank=rank,
        count=count,
        equal=lambda value: equal,
        where=lambda flag: list(range(count)) if flag else [],
        total=lambda value: count * value,
    )


def parts(loader, count=2, seed=0, epochs=1):
    """The targets of every batch, of every epoch, of every rank."""
    found = []
    for rank in range(count):
        shared = SharedLoader(loader, ranks(rank, count), seed, "train", 11)
        found.append([[y.tolist() for _, y in shared] for _ in range(epochs)])
    return found


@pytest.mark.parametrize("length", [1, 2, 10, 11, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_are_equally_long_and_hold_all(length, count):
    items = list(range(length))
    found = [part_of(items, rank, count) for rank in range(count)]
    assert {len(part) for part in found} == {-(-length // count)}
    assert {item for part in found for item in part} == set(items)


def test_a_part_of_nothing_is_nothing():
    assert part_of([], 1, 2) == []


def test_a_loader_has_its_batch_size_on_every_rank():
    for part in parts(DataLoader(DATA, 4, shuffle=True)):
        assert [len(batch) for batch in part[0]] == [4, 2]
    for part in parts(DataLoader(DATA, 4, shuffle=True, drop_last=True)):
        assert [len(batch) for batch in part[0]] == [4]


def test_a_dataset_that_gives_batches_is_shared_by_batch():
    class Batches(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return X[index : index + 2], Y[index : index + 2]

    found = parts(DataLoader(Batches(), batch_size=None))
    assert found == [[[[0, 1], [2, 3]]], [[[1, 2], [0, 1]]]]


def test_batches_of_tensors_of_indices_are_shared():
    batches = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 4])]
    found = parts(DataLoader(DATA, batch_sampler=batches))
    assert found == [[[[0, 1], [3, 4]]], [[[2], [0, 1]]]]


def test_the_order_is_that_of_seed_and_epoch():
    loader = DataLoader(DATA, 11, shuffle=True)
    (first, second), (other, _) = (parts(loader, 1, seed, 2)[0] for seed in (0, 1))
    assert first != second
    assert first != other
    assert parts(loader, 1, 0, 2)[0] == [first, second]


def test_global_random_numbers_are_not_taken():
    class Both:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([np.random.randint(11), random.randrange(11), int(torch.randint(11, ()))])  # noqa: NPY002

    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    orders = [list(Part(Both(), ranks(count=1), seed, "train")) for seed in range(20)]
    assert all(len({order[k] for order in orders}) > 1 for k in range(3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_a_users_generator_keeps_the_order():
    def loader():
        return DataLoader(DATA, 11, shuffle=True, generator=torch.Generator().manual_seed(3))

    assert parts(loader(), 1, seed=0) == parts(loader(), 1, seed=1)


class Loader(DataLoader):
    """A user's own, with another constructor."""

    def __init__(self, workers):
        super().__init__(
            DATA, 4, shuffle=True, collate_fn=len, worker_init_fn=print,
            generator=torch.Generator(),
            num_workers=workers, persistent_workers=workers > 0, timeout=workers,
        )  # fmt: skip


def test_a_loader_stays_as_it_was_and_its_settings_hold():
    assert [list(SharedLoader(Loader(0), ranks(), 0, "train", 11)) for _ in "12"] == [[4, 2]] * 2

    loader = Loader(1)
    loader._iterator = "workers that persist, and have the loader's sampler"
    before = dict(vars(loader))
    shared = SharedLoader(loader, ranks(), 0, "train", 11).loader
    assert vars(loader) == before
    assert isinstance(shared, Loader)
    changed = {"sampler", "batch_sampler", "_iterator"}
    assert {name for name, value in vars(shared).items() if value is not before[name]} == changed
    assert shared._iterator is None


def test_samplers_hear_of_the_epoch():
    class Sampler:
        epochs = ()

        def __len__(self):
            return 2

        def __iter__(self):
            return iter([0, 1])

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

    sampler = Sampler()
    parts(DataLoader(DATA, 2, sampler=sampler), 1, epochs=3)
    assert sampler.epochs == (0, 1, 2)


def test_orders_that_differ_are_refused():
    shared = SharedLoader(DataLoader(DATA, 4), ranks(equal=False), 0, "train", 11)
    with pytest.raises(ValueError, match=r"(?s)sampler of train gives another order.*Try seeding"):
        next(iter(shared))


def test_a_sampler_for_other_ranks_is_refused_and_one_for_one_is_none():
    loader = DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 4, 1))
    with pytest.raises(ValueError, match=r"for rank 1 of 4, but this is rank 0 of 2"):
        SharedLoader(loader, ranks(), 0, "train", 11)
    found = parts(DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 1, 0, shuffle=False)))
    assert found[0] == [[[0, 2, 4, 6], [8, 10]]]


def test_a_loader_with_a_way_of_its_own_is_watched():
    class Own(DataLoader):
        def __iter__(self):
            return iter([(X, Y)])

    with pytest.warns(UserWarning, match=r"(?s)first batch of train is the same.*Try giving each"):
        list(SharedLoader(Own(DATA, 4), ranks(), 0, "train", 11))
    with pytest.warns(UserWarning, match=r"holds 11 data points.*have read 22"):
        list(SharedLoader(Own(DATA, 4), ranks(equal=False), 0, "train", 11))
    list(SharedLoader(Own(DATA, 4), ranks(rank=1), 0, "train", 11))  # it warns of nothing


def test_fingerprints_tell_tensors_apart():
    batch = (X, (Y, torch.tensor(True)))
    assert _fingerprint(batch) == _fingerprint((X.clone(), (Y, torch.tensor(True))))
    others = [(X, (Y, torch.tensor(False))), (X + 1, batch[1]), (X.bfloat16(), batch[1])]
    assert len({_fingerprint(other) for other in (batch, *others)}) == 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(zip(X, Y, strict=True)))


class SizedStream(Stream):
    def __len__(self):
        return 11


@pytest.mark.parametrize(
    ("data", "steps", "last"),
    [
        (DataLoader(DATA, 4), 2, 2),
        (DataLoader(DATA, 4, drop_last=True), 1, 4),
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)), 2, None),
        (DataLoader(DATA, 4, sampler=(n for n in range(11))), 2, None),  # nothing tells its length
        (DataLoader(Stream(), 4), 2, None),
        (DataLoader(SizedStream(), 4), 2, None),
    ],
)
def test_steps_and_the_size_of_the_last_batch_are_a_ranks(data, steps, last):
    batches = make_batches(data, None, torch.device("cpu"), "train", num_data=11)
    batches.share(ranks(), 0)
    assert (len(batches), batches.last_size) == (steps, last)


def test_a_stream_without_a_length_has_none_on_several_ranks():
    batches = make_batches(DataLoader(Stream(), 4), None, torch.device("cpu"), "train")
    batches.share(ranks(), 0)
    with pytest.raises(TypeError, match="without a length"):
        len(batches)


def test_parts_without_a_batch_are_refused():
    data = DataLoader(DATA, 8, drop_last=True)
    batches = make_batches(data, None, torch.device("cpu"), "train")
    with pytest.raises(ValueError, match=r"no batches on 2 devices.*11 data points, batch size 8"):
        batches.share(ranks(), 0)
