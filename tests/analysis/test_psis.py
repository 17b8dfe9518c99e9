import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bayes_svdo import LogUniform
from bayes_svdo.analysis.psis import _khat, psis_khat
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Gaussian

NUM_DATA, NUM_WEIGHTS, SCALE = 64, 5, 0.5
PRIOR = dist.Normal(0.0, 1.0)


def conjugate(narrow=1.0, prior=PRIOR):
    """Inputs are orthogonal, so the exact posterior under ``PRIOR`` has independent weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(NUM_DATA, NUM_WEIGHTS, generator=generator))[0] * 4
    y = x @ torch.randn(NUM_WEIGHTS, 1, generator=generator)
    y += SCALE * torch.randn(y.shape, generator=generator)
    precision = x.square().sum(0) / SCALE**2 + 1
    model = BayesianNetwork(
        nn.Linear(NUM_WEIGHTS, 1, bias=False), Gaussian(SCALE), NUM_DATA, prior=prior
    )
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        guide.location_parameters()[0].copy_((x * y).sum(0) / SCALE**2 / precision)
        guide.sigma_parameters()[0].copy_(2 * math.log(narrow) - precision.log())
    return Posterior(model, guide), x, y


def test_khat_is_small_where_q_is_the_posterior():
    assert psis_khat(*conjugate(), 1000, prior=PRIOR, seed=0) < 0.5


def test_khat_is_small_where_q_is_somewhat_wider():
    assert psis_khat(*conjugate(1.2), 1000, prior=PRIOR, seed=0) < 0.5


def test_khat_warns_where_q_is_much_too_narrow():
    assert psis_khat(*conjugate(0.3), 1000, prior=PRIOR, seed=0) > 0.7


def test_a_log_density_serves_as_the_distribution_does():
    def log_density(weights):
        return -0.5 * weights["weight"].flatten(1).square().sum(1)  # unnormalised

    by_distribution = psis_khat(*conjugate(0.6), prior=PRIOR, seed=1)
    by_function = psis_khat(*conjugate(0.6), prior=log_density, seed=1, batch_size=17)
    assert by_function == pytest.approx(by_distribution, abs=1e-3)


def test_draws_outside_of_the_support_have_no_weight():
    posterior, x, y = conjugate()
    middle = float(posterior.means(math.inf)["weight"][0, 0])
    half = dist.Uniform(middle, 10.0)
    posterior.guide.location_parameters()[0].data[0, 1:] = middle + 5  # inside

    def inside(weights):
        w = weights["weight"][:, 0, 0]
        return torch.where(
            w > middle, PRIOR.log_prob(weights["weight"]).flatten(1).sum(1), -math.inf
        )

    assert psis_khat(*conjugate(), prior=inside, seed=0) < 0.5
    assert math.isfinite(psis_khat(posterior, x, y, prior=half, seed=0))
    assert psis_khat(posterior, x, y, prior=dist.Uniform(50.0, 60.0), seed=0) == math.inf


def test_equal_ratios_are_the_best_there_are():
    assert _khat(np.full(1000, -3.0)) == 0.0


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (LogUniform(), ValueError, "must be proper, but LogUniform is not"),
        (dist.Normal(torch.zeros(2), 1.0), ValueError, r"batch shape \(2,\)"),
        (3.0, TypeError, "but is 3.0"),
        (lambda weights: torch.zeros(3), ValueError, r"must give 1000 .* 3 of shape \(3,\)"),
        (lambda weights: torch.full((1000,), math.nan), ValueError, "1000 NaN"),
    ],
)
def test_a_prior_that_is_none_is_refused(prior, error, message):
    with pytest.raises(error, match=message):
        psis_khat(*conjugate(), prior=prior)


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="draws must be an integer of at least 100, but is 50"):
        psis_khat(*conjugate(), 50, prior=PRIOR)


def test_targets_are_needed():
    posterior, x, _ = conjugate()
    for wrong in (None, "abc", DataLoader([1.0])):
        name = type(wrong).__name__
        with pytest.raises(TypeError, match=f"y must be a tensor or an array.* is .*{name[:4]}"):
            psis_khat(posterior, x, wrong, prior=PRIOR)
        with pytest.raises(TypeError, match=f"x must be a tensor or an array, but is a {name}"):
            psis_khat(posterior, wrong, torch.zeros(NUM_DATA, 1), prior=PRIOR)


def test_targets_of_another_shape_are_shown_beside_all_outputs():
    posterior, x, y = conjugate()
    with pytest.raises(ValueError, match=r"shape \(64, 1\), but has shape \(64,\)"):
        psis_khat(posterior, x, y[:, 0], prior=PRIOR)


def test_tables_are_data():
    posterior, x, y = conjugate(0.6)
    table, column = (
        pd.DataFrame(x.numpy()),
        pd.DataFrame({"y": y[:, 0].numpy()}, index=range(5, 69)),
    )
    expected = psis_khat(posterior, x, y, 100, prior=PRIOR, seed=0)
    found = psis_khat(posterior, table, column, 100, prior=PRIOR, seed=0)
    assert found == pytest.approx(expected, abs=1e-3)


def test_point_masses_have_no_density():
    posterior, x, y = conjugate(prior=LogUniform())
    posterior.guide.sigma_parameters()[0].data[0, 0] = 20.0
    posterior.guide.prune_(3.0)
    with pytest.raises(ValueError, match='at site "weight", 1 weights were pruned'):
        psis_khat(posterior, x, y, prior=PRIOR)


def test_hand_written_models_are_refused(hand_written):
    with pytest.raises(TypeError, match="psis_khat needs a BayesianNetwork"):
        psis_khat(hand_written, torch.zeros(1), torch.zeros(1), prior=PRIOR)
