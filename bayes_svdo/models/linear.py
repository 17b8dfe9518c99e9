"""Linear and logistic regression: one linear layer from features to outputs.

Weights start at zero: the objective is that of a generalised linear model, where nothing breaks
the symmetry and nothing needs to.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def linear_regression(in_features: int, out_features: int = 1) -> nn.Sequential:
    """A linear map, shape ``(M, ...)`` to ``(M, out_features)``; goes with ``Gaussian``."""
    return _linear("linear-regression", in_features, out_features)


def logistic_regression(in_features: int, num_classes: int = 10) -> nn.Sequential:
    """Multinomial logistic regression: logits of shape ``(M, num_classes)``.

    One output goes with ``Bernoulli``, several with ``Categorical``.
    """
    return _linear("logistic-regression", in_features, num_classes)


def _linear(name: str, in_features: int, out_features: int) -> nn.Sequential:
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    net = nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=layer))
    net.spec = {"name": name, "in_features": in_features, "out_features": out_features}  # type: ignore[assignment]
    return net
