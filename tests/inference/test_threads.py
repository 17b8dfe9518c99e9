"""A run takes as many threads as it has work for, and leaves torch's number as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bayes_svdo import BayesianNetwork, fit
from bayes_svdo.inference.threads import (
    OPERATIONS_OF_A_THREAD,
    check_threads,
    threads,
    threads_for,
)
from bayes_svdo.models import Categorical, dense, lenet_5_caffe

CPU = torch.device("cpu")
MOST = 6


@pytest.fixture(autouse=True)
def six_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(MOST)
    yield
    torch.set_num_threads(before)


def product(operations: int) -> Callable[[], Any]:
    """A matrix product of about so many operations."""
    left, right = torch.zeros(64, 64), torch.zeros(64, operations // (2 * 64 * 64))
    return lambda: left @ right


@pytest.mark.parametrize(("size", "number"), [(0.3, 1), (1.9, 1), (2.1, 2), (4.1, 4), (50, MOST)])
def test_a_product_gets_a_thread_for_each_share_of_its_operations(size: float, number: int) -> None:
    assert threads_for(product(int(size * OPERATIONS_OF_A_THREAD))) == number


def test_large_products_count_for_more_than_many_small_ones() -> None:
    large, small = product(4 * OPERATIONS_OF_A_THREAD + 10_000), product(10_000)

    def step() -> None:
        large()
        for _ in range(5):
            small()

    assert threads_for(step) >= 3


def test_a_convolution_counts_each_position() -> None:
    net, x = lenet_5_caffe(), torch.zeros(200, 784)
    assert threads_for(lambda: net(x)) == MOST


def test_what_has_no_products_or_empty_ones_keeps_torchs_number() -> None:
    x = torch.zeros(3)
    assert threads_for(lambda: x + 1) == MOST
    assert threads_for(product(0)) == MOST


def test_threads_are_as_before_afterwards_and_after_an_error() -> None:
    small = product(10_000)
    with threads(2, CPU, small):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == MOST
    with pytest.raises(ZeroDivisionError), threads(None, CPU, small):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == MOST


def test_a_gpu_leaves_the_cpu_alone() -> None:
    def never() -> None:
        raise AssertionError

    with threads(2, torch.device("cuda"), never):
        assert torch.get_num_threads() == MOST


def seen_by_a_callback(**options: Any) -> list[int]:
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.randint(3, (60,))
    net = nn.Sequential(dense((8, 16, 3)), nn.Dropout(0.5))
    model = BayesianNetwork(net, Categorical(), num_data=60)
    seen: list[int] = []
    fit(
        model,
        (x, y),
        epochs=2,
        batch_size=20,
        progress=False,
        callbacks=[lambda _: seen.append(torch.get_num_threads())],
        **options,
    )
    assert torch.get_num_threads() == MOST
    return seen


def test_fit_takes_one_thread_for_a_small_network_and_so_many_as_it_is_told() -> None:
    assert seen_by_a_callback() == [1, 1]
    assert seen_by_a_callback(num_threads=3) == [3, 3]


def test_counting_takes_no_random_numbers() -> None:
    def weights(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        x, y = torch.randn(60, 8), torch.randint(3, (60,))
        net = nn.Sequential(dense((8, 16, 3)), nn.BatchNorm1d(3), nn.Dropout(0.5))
        model = BayesianNetwork(net, Categorical(), num_data=60)
        posterior = fit(model, (x, y), epochs=2, batch_size=20, seed=1, progress=False, **options)
        assert int(posterior.model.net[1].num_batches_tracked) == 6
        return posterior.means()["0.fc1.weight"]

    torch.testing.assert_close(weights(), weights(num_threads=1), rtol=0, atol=0)


@pytest.mark.parametrize("value", ["all", 0, 1.5, None, True])
def test_no_other_number(value: Any) -> None:
    with pytest.raises(ValueError, match=f'num_threads must be .* at least 1, but is "?{value}'):
        check_threads(value)


def test_auto_is_none_and_a_number_itself() -> None:
    assert check_threads("auto") is None
    assert check_threads(3) == 3
