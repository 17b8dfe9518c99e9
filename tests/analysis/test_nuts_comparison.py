from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bayes_svdo.analysis import NutsPosterior, compare_with_nuts
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Gaussian

MEAN, SD = np.array([1.0, -2.0, 0.1]), np.array([0.1, 0.5, 0.2])
DRAWS = 20_000


def fitted(mean=MEAN, sd=SD):
    model = BayesianNetwork(nn.Linear(3, 1), Gaussian(), 10)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        guide.location_parameters()[0].copy_(torch.from_numpy(mean)[None])
        guide.sigma_parameters()[0].copy_(2 * torch.from_numpy(sd).log()[None])
    return Posterior(model, guide)


def drawn(mean=MEAN, sd=SD, divergences=0, name="weight"):
    noise = np.random.default_rng(0).standard_normal((DRAWS, 1, 3))
    ones = {name: np.ones((1, 3))}
    return NutsPosterior({name: mean + sd * noise}, ones, ones, divergences, 2, None)


def test_where_q_is_the_posterior_they_agree():
    for each, mean, sd in zip(compare_with_nuts(fitted(), drawn()), MEAN, SD, strict=True):
        assert each.q_mean == pytest.approx(mean)
        assert each.q_sd == pytest.approx(sd)
        # Monte Carlo errors of 20,000 draws: 0.007 sd of a mean, 0.005 of an sd, 0.0015 of 0.95.
        assert each.nuts_mean == pytest.approx(mean, abs=5 * 0.007 * sd)
        assert each.nuts_sd == pytest.approx(sd, rel=5 * 0.005)
        assert each.shift == pytest.approx(0, abs=5 * 0.007)
        assert each.sd_ratio == pytest.approx(1, abs=5 * 0.005)
        assert each.distance < 0.03
        assert each.inside == pytest.approx(0.95, abs=5 * 0.0015)


def test_a_shifted_and_a_narrow_q_are_told_by_their_distances():
    """W1 of N(m, s²) from N(0, 1) is |m| for s = 1, and (1 - s) sqrt(2/pi) for m = 0."""
    shifted = compare_with_nuts(fitted(MEAN + 2 * SD), drawn())
    narrow = compare_with_nuts(fitted(sd=0.25 * SD), drawn())
    for each in shifted:
        assert each.distance == pytest.approx(2.0, abs=0.04)
        assert each.shift == pytest.approx(2.0, abs=0.06)
        assert each.inside == pytest.approx(0.484, abs=0.02)  # P(0.04 < z < 3.96)
    for each in narrow:
        assert each.distance == pytest.approx(0.75 * math.sqrt(2 / math.pi), abs=0.03)
        assert each.sd_ratio == pytest.approx(0.25, abs=0.01)
        assert each.inside == pytest.approx(0.376, abs=0.02)  # P(|z| < 0.49)


def test_a_point_mass_holds_nothing():
    posterior = fitted(np.array([1.0, -2.0, 1e-6]))
    posterior.guide.prune_(3.0)
    pruned = compare_with_nuts(posterior, drawn())[2]
    assert pruned.pruned
    assert (pruned.q_mean, pruned.q_sd, pruned.inside) == (0.0, 0.0, 0.0)
    assert pruned.distance > 0.5


def test_it_prints_as_a_table():
    comparison = compare_with_nuts(
        fitted(np.array([1.0, -2.0, 1e-6])), drawn(divergences=7), input_names=["a", "b", "c"]
    )
    text = str(comparison)
    assert "weight: c*" in text
    assert "weight: a " in text
    assert "1.000 ± 0.100" in text
    assert "beware: 7 of 20000 draws diverged" in text
    assert len(comparison) == 3
    assert [each.pruned for each in comparison] == [False, False, True]
    assert not any(e.pruned for e in compare_with_nuts(fitted(), drawn(), threshold=math.inf))
    assert "beware" not in str(compare_with_nuts(fitted(), drawn()))
    first = comparison.to_dict()[0]
    assert first["place"] == [0, 0]
    assert first["q_mean"] == 1.0
    assert first.keys() >= {"site", "label", "nuts_sd", "distance", "inside", "pruned"}


def test_what_does_not_go_together_is_refused():
    with pytest.raises(TypeError, match=r"nuts must be a NutsPosterior.*is a dict"):
        compare_with_nuts(fitted(), {})
    with pytest.raises(ValueError, match=r"weight \(1, 3\) and other \(1, 3\)"):
        compare_with_nuts(fitted(), drawn(name="other"))
    with pytest.raises(TypeError, match="compare_with_nuts needs a Posterior"):
        compare_with_nuts(None, drawn())
    with pytest.raises(ValueError, match="input_names must hold 3 names"):
        compare_with_nuts(fitted(), drawn(), input_names=["a"])


def test_draws_that_never_moved_are_no_reference():
    stuck = drawn(sd=np.array([0.1, 0.0, 0.2]))
    with pytest.raises(
        ValueError, match=r'"weight", all draws of weight \(0, 1\) are -2: the chain'
    ):
        compare_with_nuts(fitted(), stuck)
