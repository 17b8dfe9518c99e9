"""Posteriors to draw, and how to read a picture."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pyro
import pytest
import torch

from bayes_svdo import LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, History, Posterior
from bayes_svdo.models import BayesianNetwork, Categorical, dense

mpl.use("Agg")
EPOCHS = 10
SITES = ("fc1.weight", "fc2.weight")


def make_rows(metric="accuracy", warmup_end=4, validation=True, sites=SITES):
    table = []
    for epoch in range(1, EPOCHS + 1):
        row = {
            "epoch": epoch,
            "nll": 2.0 / epoch,
            "kl": 5000.0 / epoch**2,
            "kl_weight": min(1.0, epoch / warmup_end),
            "compression": 1.0 + epoch**2,
        }
        if metric:
            row[metric] = 1 - 0.5 / epoch
        if validation:
            row["validation_nll"] = 2.5 / epoch
            if metric:
                row[f"validation_{metric}"] = 1 - 0.6 / epoch
        for index, site in enumerate(sites):
            row[f"sparsity/{site}"] = 100 * (1 - 1 / (epoch + index))
        table.append(row)
    return table


def make_posterior(zeroed=False):
    """16 inputs (4 x 4 pixels), 6 units, 3 classes; about a third of the weights pruned."""
    torch.manual_seed(0)
    model = BayesianNetwork(dense((16, 6, 3)), Categorical(), 10)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        for loc in guide.location_parameters():
            loc.add_(0.1)  # fitted weights are not those before training
        for log_sigma2 in guide.sigma_parameters():
            log_sigma2.copy_(8 * torch.rand_like(log_sigma2) - 5)
    if zeroed:
        guide.prune_(3.0)
    return Posterior(model, guide, history=History(make_rows()))


@pytest.fixture
def rows():
    return make_rows


@pytest.fixture
def posterior():
    return make_posterior()


@pytest.fixture
def zeroed():
    return make_posterior(zeroed=True)


@pytest.fixture
def hand_written():
    def model(x):
        return pyro.sample("w", LogUniform().expand([3, 4]).to_event(2))

    guide = AdditiveNoiseGuide(model)
    guide(torch.zeros(1))
    return Posterior(model, guide)


@pytest.fixture
def drawn_tiles():
    def read(ax, shape=(4, 4)):
        """The mosaic cut up again, (tiles, height, width)."""
        image = ax.images[0].get_array().filled(np.nan)
        rows, columns = image.shape[0] // shape[0], image.shape[1] // shape[1]
        tiles = image.reshape(rows, shape[0], columns, shape[1]).transpose(0, 2, 1, 3)
        return tiles.reshape(-1, *shape)

    return read


@pytest.fixture
def render():
    def read(figure):
        file = io.BytesIO()
        figure.savefig(file, dpi=40)
        return file.getvalue()

    return read


@pytest.fixture
def ranked():
    def read(weights):
        """Units by number of nonzero weights, then by norm."""
        return sorted(
            range(len(weights)),
            key=lambda unit: (-int((weights[unit] != 0).sum()), -float(weights[unit].norm())),
        )

    return read
