"""Networks by name, as the command line and saved runs call them."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from bayes_svdo._names import unknown_name
from bayes_svdo.models.convolutional import lenet_5_caffe
from bayes_svdo.models.dense import dense, dense_100_40, dense_256, dense_300, lenet_300_100
from bayes_svdo.models.linear import linear_regression, logistic_regression

NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "lenet-5-caffe": lenet_5_caffe,
    "dense-300": dense_300,
    "dense-256": dense_256,
    "dense-100-40": dense_100_40,
    "logistic-regression": logistic_regression,
    "linear-regression": linear_regression,
}


def build(name: str, in_features: int, out_features: int) -> nn.Module:
    """A network by name.

    Args:
        name: One of ``NETWORKS``, or all layer sizes, input first: ``"784-256-10"``.
        in_features: Numbers in one input, flattened.
        out_features: Number of outputs (classes).

    Returns:
        The network, with these arguments in its attribute ``spec``, from which a saved posterior
        builds it again.

    Raises:
        ValueError: The name is unknown, or its sizes disagree with the data.
    """
    if re.fullmatch(r"\d+(-\d+)+", name):
        sizes = tuple(map(int, name.split("-")))
        if (sizes[0], sizes[-1]) != (in_features, out_features):
            hidden = "-".join(map(str, (in_features, *sizes[1:-1], out_features)))
            raise ValueError(
                f'network "{name}" takes {sizes[0]} inputs and gives {sizes[-1]} outputs, but the '
                f"data have {in_features} features and {out_features} classes. Try {hidden}."
            )
        net: nn.Module = dense(sizes)
    elif name in NETWORKS:
        net = NETWORKS[name](in_features, out_features)
    else:
        raise unknown_name("network", name, [*NETWORKS, f"{in_features}-256-{out_features}"])
    net.spec = {"name": name, "in_features": in_features, "out_features": out_features}  # type: ignore[assignment]
    return net
