"""Minibatches from tensors, Datasets and DataLoaders."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bayes_svdo.inference.batches import LoaderBatches, TensorBatches, make_batches

CPU = torch.device("cpu")
X = torch.arange(20.0).reshape(10, 2)
Y = torch.arange(10)


class Pairs(Dataset[Any]):
    """The data, one pair at a time."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Stream(IterableDataset[Any]):
    """The data as a stream of unknown length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(X, Y, strict=True)))


def make(data: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
    return make_batches(data, batch_size, CPU, "train", **kwargs)


SOURCES = {
    "tensors": ((X, Y), 4),
    "arrays": ((X.numpy(), Y.numpy()), 4),
    "list": ([X, Y], 4),
    "TensorDataset": (TensorDataset(X, Y), 4),
    "Dataset": (Pairs(), 4),
    "Subset": (Subset(Pairs(), range(10)), 4),
    "DataLoader": (DataLoader(Pairs(), batch_size=4, shuffle=True), None),
    "iterable": (DataLoader(Stream(), batch_size=4), None),
}


@pytest.mark.parametrize(("data", "batch_size"), SOURCES.values(), ids=SOURCES.keys())
def test_an_epoch_holds_every_point_once_with_its_target(data: Any, batch_size: Any) -> None:
    torch.manual_seed(0)
    batches = make(data, batch_size, num_data=10)
    assert len(batches) == 3
    for _ in range(2):
        epoch = list(batches)
        assert [len(y) for _, y in epoch] == [4, 4, 2]  # the last is smaller
        x, y = torch.cat([x for x, _ in epoch]), torch.cat([y for _, y in epoch])
        assert sorted(y.tolist()) == list(range(10))
        assert torch.equal(x, X[y])


@pytest.mark.parametrize("source", ["tensors", "Dataset", "DataLoader"])
def test_epochs_are_shuffled_anew(source: str) -> None:
    """Ten points come in their order by chance once in 3.6 million times."""
    torch.manual_seed(0)
    data, batch_size = SOURCES[source]
    batches = make(data, batch_size)
    orders = [torch.cat([y for _, y in batches]).tolist() for _ in range(2)]
    assert orders[0] != orders[1]
    assert list(range(10)) not in orders


def test_order_is_kept_on_request() -> None:
    batches = make((X, Y), 4, shuffle=False)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))


@pytest.mark.parametrize(("data", "batch_size"), SOURCES.values(), ids=SOURCES.keys())
def test_looking_at_the_first_batch_takes_no_random_numbers(data: Any, batch_size: Any) -> None:
    torch.manual_seed(1)
    batches = make(data, batch_size, num_data=10)
    state = torch.get_rng_state()
    x, y = batches.first()
    assert torch.equal(x, X[y])
    assert torch.equal(torch.get_rng_state(), state)


def test_looking_at_the_first_batch_leaves_the_loaders_generator_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    batches = make(DataLoader(Pairs(), batch_size=4, shuffle=True, generator=generator))
    state = generator.get_state()
    batches.first()
    assert torch.equal(generator.get_state(), state)


def test_looking_at_the_first_batch_leaves_the_generator_of_a_batch_sampler_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    sampler = RandomSampler(Pairs(), generator=generator)
    batches = make(DataLoader(Pairs(), batch_sampler=BatchSampler(sampler, 4, False)))
    state = generator.get_state()
    batches.first()
    assert torch.equal(generator.get_state(), state)


def test_batch_size_is_100_or_all_there_is() -> None:
    assert make((X, Y)).batch_size == 10
    assert make((torch.zeros(250, 2), torch.zeros(250))).batch_size == 100


def test_numpy_integers_are_integers() -> None:
    assert make((X, Y), np.int64(4)).batch_size == 4


def test_several_inputs_stay_together() -> None:
    torch.manual_seed(3)
    ((first, second), y), *_ = list(make(((X, -X), Y), 4))
    assert torch.equal(first, X[y])
    assert torch.equal(second, -X[y])


def test_several_inputs_of_a_dataset_come_as_a_tuple() -> None:
    class Triples(Pairs):
        def __getitem__(self, index: int) -> Any:
            return (X[index], -X[index]), Y[index]

    x, y = make(Triples(), 4).first()
    assert isinstance(x, tuple)
    assert torch.equal(x[1], -X[y])


def test_read_only_and_reversed_arrays_are_taken() -> None:
    array = X.numpy()[::-1]
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(make((array, Y)).first()[0], X.flip(0))
    assert torch.equal(make((frozen, Y)).first()[0], X)


def test_gradients_do_not_reach_the_data() -> None:
    x = X.clone().requires_grad_()
    assert not make((x, Y)).first()[0].requires_grad


@pytest.mark.parametrize("source", ["tensors", "DataLoader"])
def test_numbers_are_converted_and_labels_are_not(source: str) -> None:
    data, batch_size = SOURCES[source]
    x, y = make(data, batch_size, dtype=torch.float64).first()
    assert (x.dtype, y.dtype) == (torch.float64, torch.int64)


# --- how many data points there are -----------------------------------------------------------


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Pairs(), **kwargs)


@pytest.mark.parametrize(
    ("data", "num_data"),
    [
        ((X, Y), 10),
        (Pairs(), 10),
        (loader(batch_size=4), 10),
        (loader(batch_size=4, drop_last=True, shuffle=True), 10),  # all are used, over epochs
        (loader(batch_size=4, sampler=SubsetRandomSampler(range(6))), 6),
        (loader(batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 30)), 10),
        (loader(batch_size=4, sampler=[1, 2, 3]), None),  # who knows
        (loader(batch_sampler=BatchSampler(RandomSampler(Pairs()), 4, False)), None),
    ],
)
def test_number_of_data_points_is_told_if_it_can_be_known(data: Any, num_data: Any) -> None:
    assert make(data).num_data == num_data


def test_stream_needs_to_be_told_its_length() -> None:
    stream = DataLoader(Stream(), batch_size=4)
    assert make(stream, num_data=10).num_data is None
    assert len(make(stream, num_data=10)) == 3
    with pytest.raises(TypeError, match=r"(?s)train is a DataLoader without a length.*__len__"):
        len(make(stream))


def test_the_length_of_a_dataset_of_batches_is_no_number_of_data_points() -> None:
    class Batches(Stream):
        def __len__(self) -> int:
            return 3

    assert make(DataLoader(Batches(), batch_size=None)).num_data is None


def test_a_stream_of_nothing_is_refused() -> None:
    class Nothing(Stream):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(ValueError, match="train gives no batches"):
        make(DataLoader(Nothing()), num_data=10).first()


@pytest.mark.parametrize(
    ("data", "batch_size", "size"),
    [
        ((X, Y), 4, 2),
        ((X, Y), 5, 5),
        (Pairs(), 3, 1),
        (loader(batch_size=3), None, 1),
        (loader(batch_size=3, drop_last=True), None, 3),
        (loader(batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 31)), None, 3),
        (loader(batch_size=None), None, None),
        (DataLoader(Stream(), batch_size=3), None, None),
    ],
)
def test_size_of_the_last_batch(data: Any, batch_size: Any, size: Any) -> None:
    assert make(data, batch_size).last_size == size


def test_epochs_over_all_data_points() -> None:
    """Which numbers of data points go with what an epoch of 8 gives."""

    def fits(data: Any, seen: int = 8) -> list[int]:
        batches = make(data, num_data=10)
        return [n for n in range(1, 30) if batches.can_be_all_of(n, seen)]

    assert fits((X, Y), 10) == [10]
    assert fits(DataLoader(Stream(), batch_size=4)) == [8]
    assert fits(DataLoader(Stream(), batch_size=4, drop_last=True)) == [8, 9, 10, 11]
    own = BatchSampler(RandomSampler(Pairs()), 4, False)
    assert fits(loader(batch_sampler=own)) == [8, 10]
    own = BatchSampler(range(9), 4, True)
    assert fits(loader(batch_sampler=own)) == [8, 9, 10, 11]
    own = BatchSampler(RandomSampler(range(7), replacement=True, num_samples=8), 4, False)
    assert fits(loader(batch_sampler=own)) == list(range(1, 11))
    assert fits(loader(batch_size=4, sampler=range(8))) == [8, 10]


def test_all_targets_are_at_hand_where_they_are_tensors() -> None:
    assert torch.equal(make((X, Y)).targets, Y)
    assert torch.equal(make(DataLoader(TensorDataset(X, Y))).targets, Y)
    assert make(DataLoader(TensorDataset(X, Y), collate_fn=lambda batch: batch)).targets is None
    assert make(Pairs()).targets is None


# --- what is refused --------------------------------------------------------------------------

NAN = X.clone()
NAN[3, 1] = float("nan")
NAN[5] = float("inf")


@pytest.mark.parametrize(
    "data",
    [(NAN, Y), (NAN.numpy(), Y), TensorDataset(NAN, Y), DataLoader(TensorDataset(NAN, Y))],
    ids=["tensors", "arrays", "TensorDataset", "DataLoader"],
)
def test_values_that_are_not_finite_are_counted(data: Any) -> None:
    message = r"train x holds NaN or inf, in 2 of 10 data points, the first at index 3"
    with pytest.raises(ValueError, match=message):
        make(data)


def test_targets_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="train y holds NaN or inf, in 1 of 10"):
        make((X, torch.tensor([float("nan")] + [0.0] * 9)))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((X, Y[:9]), ValueError, r"as many inputs as targets.*\(10, 2\) and y has shape \(9,\)"),
        (((X, X[:9]), Y), ValueError, r"x has shape \(10, 2\), \(9, 2\) and y has shape \(10,\)"),
        (((), Y), ValueError, "as many inputs as targets"),
        ((X[:0], Y[:0]), ValueError, "train is empty"),
        (TensorDataset(X[:0], Y[:0]), ValueError, "train is empty"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), ValueError, "train is empty"),
        (Subset(Pairs(), []), ValueError, "train is empty"),
        ((torch.tensor(1.0), Y), ValueError, "train x must have data points along its first"),
        ((X,), TypeError, r"train must be a pair \(x, y\), but has 1 element"),
        ((X, Y, Y), TypeError, r"train must be a pair \(x, y\), but has 3 elements"),
        (([[1.0]], Y), TypeError, "train x must be a tensor or an array, but is a list"),
        ((np.array(["a"]), Y), TypeError, "train x has dtype <U1"),
        ((np.array([None]), Y), TypeError, "train x has dtype object"),
        ("mnist", TypeError, "train must be a pair of tensors.*but is a str"),
        ({"x": X, "y": Y}, TypeError, "train must be a pair of tensors.*but is a dict"),
        (X, TypeError, "train must be a pair of tensors.*but is a Tensor"),
        (None, TypeError, "train must be a pair of tensors.*but is a NoneType"),
        (Stream(), TypeError, "train must be.*a map-style Dataset.*but is a Stream"),
    ],
)
def test_data_that_are_no_data_are_refused(data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(data)


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (0, "batch_size must be an integer of at least 1, but is 0"),
        (-1, "batch_size must be an integer of at least 1, but is -1"),
        (4.0, r"batch_size must be an integer of at least 1, but is 4\.0"),
        (True, "batch_size must be an integer of at least 1, but is True"),
        (11, "batch_size=11 is larger than train, which holds 10 data points"),
    ],
)
@pytest.mark.parametrize("data", [(X, Y), Pairs()], ids=["tensors", "Dataset"])
def test_batch_size_that_does_not_fit_is_refused(data: Any, batch_size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(data, batch_size)


def test_a_loader_has_a_batch_size_of_its_own() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)batch_size=5.*its own \(4\).*leaving batch_size out"
    ):
        make(loader(batch_size=4), 5)


def test_a_loader_without_batches_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"train gives no batches: 10.*batch size 16.*drop_last=True"
    ):
        make(loader(batch_size=16, drop_last=True))


def test_a_loader_of_something_else_is_refused() -> None:
    class Records(Pairs):
        def __getitem__(self, index: int) -> Any:
            return {"x": X[index], "y": Y[index]}

    with pytest.raises(TypeError, match=r"train must give pairs \(x, y\), but gives a dict"):
        make(Records(), 4).first()


@pytest.mark.cuda
def test_tensors_that_fit_live_on_the_gpu() -> None:
    batches = make_batches((X, Y), 4, torch.device("cuda", 0), "train")
    assert isinstance(batches, TensorBatches)
    assert batches.targets.is_cuda
    x, y = next(iter(batches))
    assert torch.equal(x.cpu(), X[y.cpu()])


@pytest.mark.cuda
def test_tensors_that_do_not_fit_come_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    batches = make_batches((X, Y), 4, torch.device("cuda", 0), "train")
    assert not batches.targets.is_cuda  # type: ignore[union-attr]
    x, y = next(iter(batches))
    assert x.is_cuda
    assert torch.equal(x.cpu(), X[y.cpu()])


@pytest.mark.cuda
def test_batches_of_a_loader_go_to_the_gpu() -> None:
    batches = make_batches(loader(batch_size=4), None, torch.device("cuda", 0), "train")
    assert isinstance(batches, LoaderBatches)
    assert all(value.is_cuda for value in next(iter(batches)))


def test_what_a_dataset_gives_is_pinned_on_its_way_to_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    for data, batch_size, count in ((Pairs(), 4, 2), (loader(batch_size=4), None, 0)):
        batches = make_batches(data, batch_size, torch.device("cuda", 0), "train")
        batches.device = CPU  # type: ignore[attr-defined]  # there need not be a GPU
        batches.first()
        assert len(pinned) == count
        pinned.clear()


@pytest.mark.parametrize("ranks", [3, 25])
def test_ranks_share_the_data_in_parts_of_one_length(ranks):
    seen = []
    for rank in range(ranks):
        batches = make((X, Y), 2)
        batches.share(SimpleNamespace(rank=rank, count=ranks), seed=7)
        part = [y for _, y in batches]
        assert len(part) == len(batches)
        assert torch.cat(part).shape == (-(-len(X) // ranks),)
        assert len(part[-1]) == batches.last_size
        seen.append(torch.cat(part))
    counts = torch.cat(seen).bincount(minlength=len(X))
    assert counts.sum() == ranks * len(seen[0])
    assert counts.min() >= 1  # all of them come,
    assert counts.max() - counts.min() <= 1  # and as few as it takes again


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.eye(4).to_sparse(),
            TypeError,
            r"(?s)train x must be dense.*sparse_coo.*to_dense",
        ),
        (torch.zeros(4, 4, device="meta"), ValueError, 'train x is on device "meta"'),
    ],
    ids=["sparse", "meta"],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_tensors_without_values_to_look_at_are_refused(
    x: Tensor, error: Any, message: str, as_dataset: bool
) -> None:
    y = torch.arange(4)
    data = TensorDataset(x, y) if as_dataset else (x, y)
    with pytest.raises(error, match=message):
        make_batches(data, 2, torch.device("cpu"), "train")
