"""What is refused before training, of models written by hand."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist

from bayes_svdo import LogUniform, fit

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
Y = X[:, 0]


def make(size=None):
    """A regression whose plate stands for ``size`` points; for those of the batch if None."""

    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        batch = torch.arange(len(x))
        with pyro.plate("data", size or len(x), subsample=batch):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return model


def test_a_batch_that_counts_as_all_of_the_data_is_refused():
    message = r"batch of 20 of the 60 data points counts as 20(.|\n)*3 times(.|\n)*subsample"
    with pytest.raises(ValueError, match=message):
        fit(make(), (X, Y), epochs=1, batch_size=20, progress=False)


@pytest.mark.parametrize(("size", "batch_size"), [(60, 20), (None, 60)])
def test_scaled_batches_and_whole_data_are_welcome(size, batch_size):
    posterior = fit(make(size), (X, Y), epochs=2, batch_size=batch_size, progress=False, seed=0)
    nll = posterior.history[0]["nll"]  # nats per data point, about those of N(0, 1) at scale 0.5
    assert 1 < nll < 4
