"""Marginals over draws, and rank histograms: what is drawn, checked against the numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from torch import nn

from bayes_svdo.analysis import (
    NutsPosterior,
    SimulatedCalibration,
    plot_nuts_marginal,
    plot_nuts_marginals,
    plot_sbc_ranks,
)
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Gaussian

MEAN, SD = np.array([1.0, -2.0, 1e-6]), np.array([0.1, 0.5, 1e-3])


@pytest.fixture
def fitted():
    model = BayesianNetwork(nn.Linear(3, 1), Gaussian(), 10)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        guide.location_parameters()[0].copy_(torch.from_numpy(MEAN)[None])
        guide.sigma_parameters()[0].copy_(2 * torch.from_numpy(SD).log()[None])
    return Posterior(model, guide)


@pytest.fixture
def drawn():
    noise = np.random.default_rng(0).standard_normal((5000, 1, 3))
    ones = {"weight": np.ones((1, 3))}
    return NutsPosterior({"weight": MEAN + [0.1, 0.5, 0.2] * noise}, ones, ones, 0, 1, None)


def histogram(ax):
    (stairs,) = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    return stairs.get_data()


def test_a_marginal_has_the_density_of_q_and_the_histogram_of_the_draws(fitted, drawn):
    ax = plot_nuts_marginal(fitted, drawn, "weight", (0, 1), input_names=["a", "b", "c"])
    x, y = ax.lines[0].get_data()
    assert x[np.argmax(y)] == pytest.approx(-2.0, abs=0.01)
    assert y.max() == pytest.approx(1 / (0.5 * math.sqrt(2 * math.pi)), rel=1e-3)
    heights, edges = histogram(ax)[:2]
    area = float(np.sum(heights * np.diff(edges)))
    assert 0.985 < area <= 1.0  # 0.5 % on both sides may lie outside
    middle = 0.5 * (edges[1:] + edges[:-1])
    assert np.sum(middle * heights) / np.sum(heights) == pytest.approx(-2.0, abs=0.05)
    assert ax.get_title(loc="left") == "weight: b"
    assert ax.get_xlabel() == "weight (output per unit of input)"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "NUTS, proper prior",
        "q, the fitted Gaussian",
    ]


def test_a_narrow_q_goes_through_the_top_and_says_how_far(fitted, drawn):
    ax = plot_nuts_marginal(fitted, drawn, place=(0, 2))
    peak = 1 / (1e-3 * math.sqrt(2 * math.pi))
    assert ax.get_ylim()[1] < 0.1 * peak
    assert ax.get_ylim()[1] >= histogram(ax)[0].max()
    assert [text.get_text() for text in ax.texts] == [f"peak {peak:.0f}"]
    assert ax.lines[0].get_ydata().max() == pytest.approx(peak)


def test_a_point_mass_is_an_arrow(fitted, drawn):
    fitted.guide.location_parameters()[0].data[0, 2] = 1e-9
    fitted.guide.prune_(3.0)
    ax = plot_nuts_marginal(fitted, drawn, place=(0, 2), truth=0.3)
    assert [text.get_text() for text in ax.texts] == ["", "point mass"]
    assert ax.texts[0].xy == (0.0, 1.0)
    (line,) = ax.lines
    assert list(line.get_xdata()) == [0.3, 0.3]
    assert ax.get_legend().get_texts()[-1].get_text() == "truth"


def test_all_marginals_are_panels_of_one_figure(fitted, drawn, render):
    figure = plot_nuts_marginals(fitted, drawn, truth=MEAN, figure=Figure(layout="constrained"))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["weight: input 0", "weight: input 1", "weight: input 2"]
    for ax, mean in zip(figure.axes, MEAN, strict=True):
        assert ax.lines[-1].get_xdata()[0] == pytest.approx(mean)
    assert len(render(figure)) > 1000
    assert len(plot_nuts_marginals(fitted, drawn, count=2).axes) == 2


def test_panels_that_are_left_over_are_empty(drawn):
    model = BayesianNetwork(nn.Linear(5, 1), Gaussian(), 10)
    ones = {"weight": np.ones((1, 5))}
    draws = {"weight": np.random.default_rng(0).standard_normal((100, 1, 5))}
    figure = plot_nuts_marginals(
        Posterior(model, AdditiveNoiseGuide(model)), NutsPosterior(draws, ones, ones, 0, 1, None)
    )
    assert [ax.axison for ax in figure.axes] == [True] * 5 + [False]


def test_ranks_are_frequencies_within_a_band():
    ranks = np.random.default_rng(0).integers(0, 100, (200, 3))
    found = SimulatedCalibration(ranks, 99)
    ax = plot_sbc_ranks(found, 20)
    heights, edges = histogram(ax)[:2]
    np.testing.assert_allclose(heights, found.histogram(20) * 20 / 600)
    np.testing.assert_allclose(edges, np.linspace(0, 1, 21))
    (band,) = ax.collections
    ends = band.get_paths()[0].vertices[:, 1]
    # Binomial(600, 1/20) has sd 5.3 about 30.
    assert ends.min() == pytest.approx(20 / 30, abs=0.05)
    assert ends.max() == pytest.approx(41 / 30, abs=0.05)
    assert ax.get_title(loc="left") == "Ranks of 600 true weights"
    assert plot_sbc_ranks(found, title="mine", ax=ax).get_title(loc="left") == "mine"


def test_what_does_not_fit_is_refused(fitted, drawn):
    with pytest.raises(TypeError, match="needs a Posterior"):
        plot_nuts_marginal(None, drawn)
    with pytest.raises(TypeError, match="nuts must be a NutsPosterior"):
        plot_nuts_marginals(fitted, None)
    with pytest.raises(ValueError, match=r'unknown site "bias"'):
        plot_nuts_marginal(fitted, drawn, "bias")
    for place in ((0,), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match=r'index into "weight" of shape \(1, 3\), but is'):
            plot_nuts_marginal(fitted, drawn, place=place)
    with pytest.raises(ValueError, match="truth must hold the 3 weights"):
        plot_nuts_marginals(fitted, drawn, truth=[1.0])
    with pytest.raises(ValueError, match="count must be an integer of at least 1"):
        plot_nuts_marginals(fitted, drawn, count=0)
    with pytest.raises(TypeError, match="must be a SimulatedCalibration, but is a list"):
        plot_sbc_ranks([])
