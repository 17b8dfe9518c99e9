"""What is refused of a model's sites, by what its data are."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from bayes_svdo import AdditiveNoiseGuide, LogUniform, fit
from bayes_svdo.inference.data_sites import check_scale

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


# --- the scale of a batch -----------------------------------------------------------------------


def refused(model, message, batch_size=20, y=Y, **kwargs):
    with pytest.raises(ValueError, match=message):
        fit(model, (X, y), epochs=1, batch_size=batch_size, progress=False, **kwargs)


def welcome(model, batch_size=20, y=Y):
    assert len(fit(model, (X, y), epochs=1, batch_size=batch_size, progress=False).history) == 1


@pytest.mark.parametrize("batch_size", [20, 60])
def test_a_plate_of_more_points_than_there_are_is_refused(batch_size):
    message = (
        f"(?s)batch of {batch_size} of the 60 data points counts as 600 points: the KL would count "
        r'10 times too little.*pyro.plate\("data", 60, subsample'
    )
    refused(make(600), message, batch_size)


def test_a_batch_without_a_plate_is_refused():
    def model(x, y, scale=1.0):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        with poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    refused(model, "(?s)batch of 20 of the 60 data points counts as 20 points.*3 times too much")
    welcome(model, 60)
    welcome(lambda x, y: model(x, y, 3.0))


def test_a_batch_that_is_scaled_twice_is_refused():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        with pyro.plate("data", 60, subsample=torch.arange(len(x))), poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    refused(model, r"(?s)counts as 180 points.*3 times too little.*kl_weight")


def test_points_one_after_the_other_are_refused():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        for i in range(len(x)):
            pyro.sample(f"y_{i}", dist.Normal(x[i] @ w, 0.5), obs=y[i])

    refused(model, "batch of 20 of the 60 data points counts as 20 points")
    welcome(model, 60)


@pytest.mark.parametrize("size", [60, 600])
def test_points_with_weights_of_their_own_go_by_their_plate(size):
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        with (
            pyro.plate("data", size, subsample=torch.arange(len(x))),
            poutine.scale(scale=1 + y.abs()),
        ):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    if size == 60:
        welcome(model)
    else:
        refused(model, "counts as 600 points")


def test_weights_that_scale_a_batch_themselves_are_welcome():
    def model(x, y):
        with poutine.scale(scale=3.0 + y.abs()):
            make()(x, y)

    welcome(model)


def test_what_is_no_data_point_is_not_scaled():
    """Observations of something else, deterministic values and targets that broadcast."""

    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([20]).to_event(1))
        pyro.sample("sum", dist.Normal(w, 1.0).to_event(1), obs=torch.zeros(20))
        mean = pyro.deterministic("mean", x[:, 0] * w[0])
        rows = torch.arange(len(x))
        with pyro.plate("outputs", 2, dim=-2), pyro.plate("data", 60, subsample=rows, dim=-1):
            pyro.sample("y", dist.Normal(mean.expand(2, -1), 0.5), obs=y)

    welcome(model)


def test_targets_of_another_shape_are_refused():
    message = r'at site "y", obs has shape \(60, 1\), but its distribution has \(60,\)'
    refused(make(), message, 60, Y[:, None])


# --- models that observe nothing ----------------------------------------------------------------


@pytest.mark.parametrize("event", [True, False])
@pytest.mark.parametrize("batch_size", [20, 60])
def test_a_forgotten_obs_is_refused(event, batch_size):
    """Else y is one variable more for each data point, fitted to nothing."""

    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        pyro.deterministic("twice", 2 * w)
        if event:
            pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1))
        else:
            with pyro.plate("data", 60, subsample=torch.arange(len(x))):
                pyro.sample("y", dist.Normal(x @ w, 0.5))

    refused(model, "(?s)the model observes nothing: .*sites w, y alone.*Try obs=y", batch_size)


def test_a_model_without_data_is_refused():
    def model(x, y):
        pyro.sample("w", LogUniform().expand([3]).to_event(1))

    refused(model, "(?s)the model observes nothing: .*sites w alone.*Try obs=y")


def test_a_forgotten_obs_of_one_of_two_targets_is_refused():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1))
        with pyro.plate("data", 60, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x @ w, 0.5), obs=y)

    refused(model, '(?s)at site "y", every data point has a variable of its own.*Try obs=y')


def test_a_forgotten_obs_of_labels_is_refused():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        with pyro.plate("data", 60, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Bernoulli(logits=x @ w))

    message = '(?s)site "y".*Bernoulli.*is discrete.*Try obs=y, if it is the data'
    refused(model, message, y=(Y > 0).float())


def test_looking_at_a_model_leaves_its_statistics_and_the_random_numbers():
    class Model(PyroModule):
        def __init__(self):
            super().__init__("model")
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, y):
            make(60)(self.norm(x), y)

    model = Model()
    guide = AdditiveNoiseGuide(model)
    guide(X, Y)
    before, numbers = model.norm.num_batches_tracked.clone(), torch.get_rng_state()
    check_scale(model, guide, (X[:20], Y[:20]), 60)
    assert torch.equal(model.norm.num_batches_tracked, before)
    assert torch.equal(torch.get_rng_state(), numbers)
