from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayes_svdo.models import (
    BayesianNetwork,
    Categorical,
    dense,
    dense_100_40,
    dense_256,
    dense_300,
    lenet_300_100,
)


@pytest.mark.parametrize(
    ("make", "widths"),
    [
        (lenet_300_100, (784, 300, 100, 10)),
        (dense_300, (784, 300, 10)),
        (dense_256, (784, 256, 10)),
        (dense_100_40, (784, 100, 40, 10)),
    ],
)
def test_named_networks_have_their_published_widths(
    make: Callable[..., nn.Sequential], widths: tuple[int, ...]
) -> None:
    net = make()
    layers = [module for module in net if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == list(pairwise(widths))
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert make(64, 3)(torch.randn(2, 8, 8)).shape == (2, 3)


def test_lenet_300_100_has_the_266200_weights_that_compression_counts() -> None:
    model = BayesianNetwork(lenet_300_100(), Categorical(), num_data=60_000)
    assert model.sites == ("fc1.weight", "fc2.weight", "fc3.weight")
    assert sum(weight.numel() for weight in model.initial_weights().values()) == 266_200
    assert sum(parameter.numel() for parameter in model.net.parameters()) == 410


def test_a_relu_stands_between_layers_and_none_at_the_end() -> None:
    net = dense((4, 3, 2))
    x = torch.randn(5, 4)
    hidden = F.relu(F.linear(x, net.fc1.weight, net.fc1.bias))
    torch.testing.assert_close(net(x), F.linear(hidden, net.fc2.weight, net.fc2.bias))
    assert [name for name, _ in net.named_children()] == ["flatten", "fc1", "relu1", "fc2"]


def test_two_sizes_are_one_layer() -> None:
    assert [name for name, _ in dense((4, 3)).named_children()] == ["flatten", "fc1"]


def test_numpys_integers_are_sizes() -> None:
    net = dense(np.array([4, 3, 2]))
    assert net.spec == {"name": "4-3-2", "in_features": 4, "out_features": 2}
    assert type(net.fc1.in_features) is int


def test_weights_are_he_initialised_and_biases_zero() -> None:
    """Standard deviation sqrt(2 / fan_in); 6 standard errors: fails by chance once in 5e8 runs."""
    torch.manual_seed(0)
    net = lenet_300_100()
    for layer in (net.fc1, net.fc2, net.fc3):
        weight = layer.weight.detach()
        error = 6 * (0.5 / weight.numel()) ** 0.5
        assert abs(float(weight.std()) / (2 / layer.in_features) ** 0.5 - 1) < error
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2), (3, 2.0), ("3", 2), (3, True)])
def test_sizes_that_are_no_network_are_refused(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"sizes must be two or more positive integers.*but is \("):
        dense(sizes)
