"""What is refused before training: priors and batches that a model cannot be trained with."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader

from bayes_svdo import BayesianNetwork, LogUniform, fit
from bayes_svdo.models import Categorical

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
Y = X[:, 0]


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


# --- later batches ------------------------------------------------------------------------------


def wider(number):
    """Six batches of ten, of which the ``number``-th has one feature more."""
    widths = [4 if i == number else 3 for i in range(1, 7)]
    batches = [(torch.randn(10, width), torch.arange(10) % 2) for width in widths]
    return DataLoader(batches, batch_size=None)


def test_a_later_batch_of_another_width_is_refused():
    message = (
        r"batch 3 of train has data points of x \(4,\), y \(\), those before of x \(3,\), y "
        r"\(\); the model cannot take it: the network cannot take train x of shape \(10, 4\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(classifier(None), wider(3), epochs=1, progress=False)


def test_a_later_batch_that_a_model_written_by_hand_cannot_take_is_refused():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        with pyro.plate("data", 60, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    message = r"batch 2 of train has data points of x \(4,\).* cannot take it: [^\n]*size[^\n]*$"
    with pytest.raises(ValueError, match=message):
        fit(model, wider(2), epochs=1, progress=False)


def test_a_batch_of_another_length_that_the_model_takes_is_welcome():
    """Sequences, with labels for each position."""
    batches = [(torch.randn(20, n, 3), torch.zeros(20, n, dtype=torch.long)) for n in (3, 5, 4)]
    loader = DataLoader(batches, batch_size=None)
    assert fit(classifier(None), loader, epochs=2, progress=False).history[-1]["step"] == 6
