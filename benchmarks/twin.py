"""The dense deterministic twin of a sparse network: what it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bayes_svdo.inference.schedules import ConstantThenLinear
from bayes_svdo.models import dense

LEARNING_RATES = (4e-3, 1e-3, 3e-4)


def train_twin(config: dict[str, Any], x: Tensor, y: Tensor, lr: float, seed: int) -> Any:
    """The network of `config`, trained on the likelihood alone."""
    torch.manual_seed(seed)
    net = dense(tuple(config["sizes"]))
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    steps_per_epoch = -(-len(x) // config["batch_size"])
    schedule = ConstantThenLinear()
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step / (config["epochs"] * steps_per_epoch))
    )
    for _ in range(config["epochs"]):
        for rows in torch.randperm(len(x)).split(config["batch_size"]):
            optimizer.zero_grad()
            cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            scheduler.step()
    return net.eval()
