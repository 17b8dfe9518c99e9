from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bayes_svdo.models import build
from bayes_svdo.models.registry import NETWORKS


@pytest.mark.parametrize("name", [*NETWORKS, "64-7-5", "64-5"])
def test_every_name_builds_a_network_for_the_data(name: str) -> None:
    features = 64 if name[0].isdigit() else 784
    net = build(name, features, 5)
    side = math.isqrt(features)
    assert net(torch.randn(2, 1, side, side)).shape == (2, 5)


@pytest.mark.parametrize("name", [*NETWORKS, "784-7-5"])
def test_a_network_can_be_built_again_from_its_spec(name: str) -> None:
    net = build(name, 784, 5)
    spec = net.spec
    assert isinstance(spec, dict)
    again = build(**spec)
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 784)
    assert torch.equal(net(x), again(x))


@pytest.mark.parametrize("make", set(NETWORKS.values()))
def test_a_network_that_was_made_directly_can_be_built_again(make: Any) -> None:
    net = make(784, 5)
    assert repr(build(**net.spec)) == repr(net)


def test_sizes_are_all_layers() -> None:
    net = build("64-20-30-5", 64, 5)
    shapes = [tuple(parameter.shape) for parameter in net.parameters() if parameter.dim() == 2]
    assert shapes == [(20, 64), (30, 20), (5, 30)]


@pytest.mark.parametrize("name", ["784-256-10", "64-256-10", "784-256-5"])
def test_sizes_that_disagree_with_the_data_are_refused_with_the_right_ones(name: str) -> None:
    words = rf'network "{name}" takes .* 64 features and 5 classes\. Try 64-256-5\.'
    with pytest.raises(ValueError, match=words):
        build(name, 64, 5)


def test_a_hidden_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="positive integers"):
        build("64-0-5", 64, 5)


@pytest.mark.parametrize("name", ["lenet-300-10", "lenet300-100", "64", "-64-5", "64-5-", ""])
def test_an_unknown_name_is_refused_with_what_is_known(name: str) -> None:
    with pytest.raises(ValueError, match=f'unknown network "{name}"') as caught:
        build(name, 64, 5)
    for known in [*NETWORKS, "64-256-5"]:
        assert known in str(caught.value)


def test_the_closest_name_is_offered() -> None:
    with pytest.raises(ValueError, match=r'Did you mean "lenet-300-100"\?'):
        build("lenet-300-10", 64, 5)
