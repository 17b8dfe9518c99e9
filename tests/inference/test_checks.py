"""What is refused before training, of models written by hand."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, LogUniform, fit
from bayes_svdo.models import Categorical

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


# --- variables of each data point ---------------------------------------------------------------


def local(size=None):
    """A variable of its own for every data point."""

    def model(x, y):
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model


@pytest.mark.parametrize(("size", "batch_size"), [(60, 20), (60, 60), (None, 60), (None, 59)])
def test_variables_of_each_data_point_are_refused(size, batch_size):
    """fit shuffles: each would be fitted to the data of others."""
    message = r"(?s)at site \"z\", plate \"data\".*fit shuffles.*pyro\.infer\.SVI"
    with pytest.raises(ValueError, match=message):
        fit(local(size), (X, Y), epochs=1, batch_size=batch_size, progress=False)


def test_variables_of_each_data_point_whose_plate_has_one_size_are_refused():
    def model(x, y):
        with pyro.plate("data", 60):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match='at site "z", plate "data"'):
        fit(model, (X, Y), epochs=1, batch_size=60, progress=False)


@pytest.mark.parametrize("batch_size", [5, 20, 60])
def test_a_plate_of_outputs_is_welcome(batch_size):
    """Also one that is as long as the batch."""

    def model(x, y):
        with pyro.plate("outputs", 5, dim=-2):
            w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
            with pyro.plate("data", 60, subsample=torch.arange(len(x)), dim=-1):
                mean = (w * x).sum(-1)
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y.expand(5, -1))

    posterior = fit(model, (X, Y), epochs=1, batch_size=batch_size, progress=False)
    assert posterior.means()["w"].shape == (5, 1, 3)


def test_plates_of_the_users_own_making_are_welcome():
    """They say which points a batch is of."""
    index = torch.arange(60)

    def model(x, y):
        with pyro.plate("data", 60, subsample=x[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AdditiveNoiseGuide(
        model, create_plates=lambda x, y: pyro.plate("data", 60, subsample=x[0])
    )
    settings = {"epochs": 300, "batch_size": 30, "lr": 0.03, "progress": False, "seed": 0}
    posterior = fit(model, ((index, X), Y), guide=guide, **settings)
    mean = posterior.guide.median()["z"]
    assert torch.corrcoef(torch.stack([mean, Y / 2]))[0, 1] > 0.99  # the exact posterior's mean


# --- priors that cannot be used so --------------------------------------------------------------


def classifier(prior):
    return BayesianNetwork(nn.Linear(3, 2), Categorical(), 60, prior=prior)


def test_pruning_while_training_needs_a_prior_that_prunes():
    labels = (Y > 0).long()
    with pytest.raises(ValueError, match=r"(?s)needs a site whose prior is scale-free.*weight"):
        fit(classifier(dist.Normal(0.0, 1.0)), (X, labels), prune_while_training=True)
    row = fit(classifier(dist.Normal(0.0, 1.0)), (X, labels), epochs=1, progress=False).history[0]
    assert (row["nonzero"], row["compression"], row["sparsity/weight"]) == (6, 1.0, 0.0)


def test_a_kl_that_holds_for_small_alpha_alone_is_refused():
    labels = (Y > 0).long()
    with pytest.raises(ValueError, match=r'(?s)"weight".*"kingma2015".*Try LogUniform\(\)'):
        fit(classifier(LogUniform("kingma2015")), (X, labels), progress=False)
    extrapolated = classifier(LogUniform("kingma2015", extrapolate=True))
    fit(extrapolated, (X, labels), epochs=1, progress=False)
