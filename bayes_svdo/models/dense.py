"""Fully connected networks: flat pixels in, logits out, ReLU between.

Layers are named ``fc1``, ``fc2``, ...; images of any shape are flattened first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from torch import nn


def dense(sizes: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron, He-initialised.

    Args:
        sizes: Width of each layer, input first, output last: ``(784, 300, 100, 10)``.

    Returns:
        A module from inputs of shape ``(M, ...)`` that flatten to ``sizes[0]`` numbers, to
        ``(M, sizes[-1])``. Its attribute ``spec`` holds the arguments of
        :func:`~bayes_svdo.models.build` that build it again.

    Raises:
        ValueError: Fewer than two sizes, or one that is not a positive integer.
    """
    if len(sizes) < 2 or not all(map(_is_size, sizes)):
        raise ValueError(
            f"sizes must be two or more positive integers, input first, but is {tuple(sizes)}."
        )
    sizes = [int(size) for size in sizes]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layers[f"fc{index}"] = layer
        if index < len(sizes) - 1:
            layers[f"relu{index}"] = nn.ReLU()
    net = nn.Sequential(layers)
    name = "-".join(map(str, sizes))
    net.spec = {"name": name, "in_features": sizes[0], "out_features": sizes[-1]}  # type: ignore[assignment]
    return net


def _is_size(size: object) -> bool:
    return not isinstance(size, bool) and isinstance(size, Integral) and int(size) >= 1


def lenet_300_100(in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """LeNet-300-100 of LeCun et al. (1998): 784-300-100-10."""
    return dense((in_features, 300, 100, num_classes))


def dense_300(in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """784-300-10, the minimal example of Ashukha's sparse-vd-pytorch."""
    return dense((in_features, 300, num_classes))


def dense_256(in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """784-256-10, the two-layer network of Luchnikov, Faizullin & Blumental (2018)."""
    return dense((in_features, 256, num_classes))


def dense_100_40(in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """784-100-40-10, the three-layer network of Luchnikov, Faizullin & Blumental (2018)."""
    return dense((in_features, 100, 40, num_classes))
