import math

import numpy as np
import pyro
import pytest
import torch

from bayes_svdo import LogUniform
from bayes_svdo.analysis import draws as module
from bayes_svdo.analysis.draws import DrawnData, SiteDraws
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import Categorical, Gaussian


def test_survivors_are_drawn_and_put_in_their_places(posterior):
    for site in SiteDraws.of(posterior, 3.0, surviving_only=True):
        kept = posterior.log_alpha()[site.name] < 3.0
        assert len(site) == int(kept.sum())
        assert site.kept.all()
        weight = site.weight(site.loc)
        assert torch.equal(weight, posterior.means(3.0)[site.name])
        drawn = site.weight(site.draw(2)[1])
        assert torch.equal(drawn != 0, kept)


def test_all_are_drawn_where_none_is_left_out(posterior):
    for site in SiteDraws.of(posterior, 3.0, surviving_only=False):
        assert len(site) == math.prod(site.shape)
        assert torch.equal(site.weight(site.loc), posterior.guide.median()[site.name])
        assert torch.equal(site.kept.reshape(site.shape), posterior.means()[site.name] != 0)
        assert (site.weight(site.draw(1)[0]) != 0).all()


def test_point_masses_do_not_vary(zeroed):
    site = SiteDraws.of(zeroed, math.inf, surviving_only=False)[0]
    pruned = zeroed.log_alpha()[site.name].flatten() == math.inf
    assert pruned.any()
    assert (site.draw(5)[:, pruned] == 0).all()


def test_draws_come_in_blocks(posterior, monkeypatch):
    site = SiteDraws.of(posterior, 3.0, surviving_only=True)[0]
    monkeypatch.setattr(module, "_CHUNK", 3 * len(site) + 1)
    sizes, draw = [], SiteDraws.draw
    monkeypatch.setattr(
        SiteDraws, "draw", lambda self, number: (sizes.append(number), draw(self, number))[1]
    )
    drawn = site.draw_into_memory(8)
    assert sizes == [3, 3, 2]
    assert drawn.shape == (8, len(site))
    assert drawn.dtype == np.float32
    assert len(np.unique(drawn[:, 0])) == 8


@pytest.fixture
def data(posterior):
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    x, y = torch.randn(5, 16), torch.tensor([0, 1, 2, 1, 0])
    return sites, DrawnData.of(posterior, sites, x, y, "this")


def test_sites_that_were_not_drawn_before_are_drawn_anew(data):
    sites, drawn_data = data
    means = {site.name: site.loc.detach().expand(4, -1).numpy() for site in sites}
    fixed = drawn_data.predict(sites, means, 4, 10).log_likelihood
    assert (fixed[0] == fixed[1]).all()
    first = {sites[0].name: means[sites[0].name]}
    scores = drawn_data.predict(sites, first, 4, 10).log_likelihood
    assert (scores[0] != scores[1]).any()


def test_without_targets_there_is_no_likelihood(posterior):
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    data = DrawnData.of(posterior, sites, torch.randn(5, 16), None, "this")
    predictions = data.predict(sites, {}, 3, 2)
    assert predictions.log_likelihood is None
    assert predictions.y.shape == (3, 5)
    assert len(data) == 5


def test_targets_may_be_of_another_size_but_of_no_other_kind(posterior):
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    x = torch.randn(5, 16)
    small = DrawnData.of(posterior, sites, x, torch.zeros(5, dtype=torch.int8), "this")
    assert small.y.dtype == torch.int64
    with pytest.raises(TypeError, match="must be int64, but its dtype"):
        DrawnData.of(posterior, sites, x, torch.zeros(5), "this")


def test_checking_the_data_draws_nothing(data, posterior):
    state = torch.get_rng_state()
    sites, _ = data
    torch.set_rng_state(state)
    DrawnData.of(posterior, sites, torch.zeros(5, 16), torch.zeros(5, dtype=torch.int64), "this")
    assert torch.equal(torch.get_rng_state(), state)


class HalfPrecision(Categorical):
    """Sees what the network gives."""

    def distribution(self, output):
        assert output.dtype in (torch.float32, torch.float64)
        return super().distribution(output)


def test_half_precision_is_no_dtype_for_probabilities(posterior):
    posterior.model.likelihood = HalfPrecision()
    posterior.model.net.bfloat16()
    posterior.guide.bfloat16()
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    data = DrawnData.of(posterior, sites, x, torch.zeros(5, dtype=torch.int64), "this")
    drawn = {site.name: site.draw_into_memory(2) for site in sites}
    scores = data.predict(sites, drawn, 2, 10).log_likelihood
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Categorical()], ids=type)
@pytest.mark.parametrize("known", [0, 1, 2])
def test_nothing_depends_on_how_inputs_are_batched(posterior, likelihood, known):
    posterior.model.likelihood = likelihood
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    x = torch.randn(37, 16)
    y = likelihood.distribution(posterior.output(x)).sample()
    data = DrawnData.of(posterior, sites, x, y, "this")
    drawn = {site.name: site.draw_into_memory(5) for site in sites[:known]}
    state = torch.get_rng_state()
    expected = data.predict(sites, drawn, 5, 1000)
    after = torch.get_rng_state()
    for batch_size in (36, 5, 1):
        torch.set_rng_state(state)
        found = data.predict(sites, drawn, 5, batch_size)
        np.testing.assert_allclose(found.y, expected.y, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-4)
        assert torch.equal(torch.get_rng_state(), after)


def test_targets_come_some_rows_at_a_time(data, monkeypatch):
    sites, drawn_data = data
    means = {site.name: site.loc.detach().expand(2, -1).numpy() for site in sites}
    expected = drawn_data.predict(sites, means, 2, 10).log_likelihood
    monkeypatch.setattr(module, "_CHUNK", 7)  # two rows of three logits
    found = drawn_data.predict(sites, means, 2, 10)
    np.testing.assert_allclose(found.log_likelihood, expected)


def test_a_scalar_that_survives_has_no_places():
    def model():
        pyro.sample("a", LogUniform())
        pyro.sample("b", LogUniform())

    guide = AdditiveNoiseGuide(model)
    guide()
    for loc, value in zip(guide.location_parameters(), (1.0, 1e-6), strict=True):
        loc.data.fill_(value)
    kept, pruned = SiteDraws.of(Posterior(model, guide), 3.0, surviving_only=True)
    assert (len(kept), kept.index) == (1, None)
    assert kept.weight(kept.draw(1)[0]).shape == ()
    assert len(pruned) == 0
    assert pruned.weight(pruned.loc) == 0


def test_messages_show_the_shape_of_all_outputs(posterior):
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    with pytest.raises(ValueError, match=r"shape \(5, 3\)"):
        DrawnData.of(posterior, sites, torch.randn(5, 16), torch.zeros(5, 1).long(), "this")


def test_outputs_of_fewer_rows_than_inputs_are_refused(posterior):
    sites = SiteDraws.of(posterior, 3.0, surviving_only=True)
    posterior.model.net.register_forward_hook(lambda net, x, output: output.mean(0, keepdim=True))
    with pytest.raises(ValueError, match="must have one row for each of the 2 data points"):
        DrawnData.of(posterior, sites, torch.randn(5, 16), None, "this")
