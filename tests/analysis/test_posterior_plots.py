"""Marginals, relevances and images of uncertainty: what is drawn, checked against the posterior."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from bayes_svdo import LogUniform
from bayes_svdo.analysis import plot_marginals, plot_relevance, plot_weight_uncertainty
from bayes_svdo.analysis.figures import BLUE, GREY
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Gaussian


@pytest.fixture
def linear():
    """Three inputs, one output; relevances 10, 0.1 and 4, so that the second is pruned."""
    net = nn.Sequential()
    net.add_module("linear", nn.Linear(3, 1))
    model = BayesianNetwork(net, Gaussian(), 10)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        guide.location_parameters()[0].copy_(torch.tensor([[1.0, 0.02, -2.0]]))
        guide.sigma_parameters()[0].copy_(2 * torch.tensor([[0.1, 0.2, 0.5]]).log())
    return Posterior(model, guide)


def row_labels(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def relevances(posterior):
    return {site: (-0.5 * v.double()).exp().numpy() for site, v in posterior.log_alpha().items()}


def ranges(ax, colour, y):
    """Ends of the lines and places of the dots in a row."""
    mine = [
        line
        for line in ax.lines
        if to_hex(line.get_color()).upper() == to_hex(colour).upper()
        and np.asarray(line.get_ydata(), dtype=float).ravel()[0] == y
    ]
    return (
        [tuple(line.get_xdata()) for line in mine if line.get_marker() == "None"],
        [float(line.get_xdata()[0]) for line in mine if line.get_marker() == "o"],
        [float(line.get_xdata()[0]) for line in mine if line.get_marker() == "<"],
    )


# Marginals.


def test_rows_are_the_surviving_weights_by_relevance_with_mean_and_deviation(linear):
    ax = plot_marginals(linear)
    assert row_labels(ax) == ["linear: input 0", "linear: input 2"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    bars = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_lw() == 2.0]
    np.testing.assert_allclose([dot.get_xdata()[0] for dot in dots], [1.0, -2.0])
    np.testing.assert_allclose([b.get_xdata() for b in bars], [[0.9, 1.1], [-2.5, -1.5]], rtol=1e-6)
    assert [text.get_text() for text in ax.texts] == ["1.00 ± 0.10", "−2.00 ± 0.50"]
    assert ax.get_title(loc="left").startswith("All 2 surviving weights")


def test_densities_are_gaussian_and_of_one_height(linear):
    for mean, sd, row, density in zip(
        (1.0, -2.0), (0.1, 0.5), (0, 1), plot_marginals(linear).collections, strict=True
    ):
        x, y = density.get_paths()[0].vertices.T
        height = y + row
        assert height.max() == pytest.approx(0.8)
        np.testing.assert_allclose(
            height[np.isclose(x, mean + sd, rtol=1e-3)].max(), 0.8 / math.e**0.5
        )
        np.testing.assert_allclose([x.min(), x.max()], [mean - 4 * sd, mean + 4 * sd], rtol=1e-6)


def test_the_most_relevant_weights_of_all_sites_are_drawn(posterior):
    ax = plot_marginals(posterior, count=5)
    values = np.concatenate([v.ravel() for v in relevances(posterior).values()])
    best = np.argsort(-values)[:5]
    means = torch.cat([v.flatten() for v in posterior.guide.median().values()]).detach().numpy()
    drawn = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(drawn, means[best])
    left = posterior.sparsity().nonzero
    assert ax.get_title(loc="left").startswith(f"5 of {left} surviving weights")
    assert all(": unit " in label and ", input " in label for label in row_labels(ax))
    only = plot_marginals(posterior, "fc2.weight", count=100)
    assert {label.split(":")[0] for label in row_labels(only)} == {"fc2"}
    assert len(row_labels(only)) == posterior.sparsity()["fc2.weight"].nonzero


def test_inputs_have_the_names_that_are_given(linear):
    names = ["age", "sex", "bmi"]
    assert row_labels(plot_marginals(linear, input_names=names)) == ["linear: age", "linear: bmi"]
    assert row_labels(plot_relevance(linear, "linear.weight", input_names=names)) == [
        "age",
        "bmi",
        "sex",
    ]


def test_marginals_name_what_is_wrong(linear, posterior):
    with pytest.raises(ValueError, match=r"no weight survives.*\n  Try threshold=math.inf"):
        plot_marginals(linear, threshold=-20.0)
    linear.guide.prune_(-20.0)
    with pytest.raises(ValueError, match="all weights were pruned while training, no threshold on"):
        plot_marginals(linear, threshold=math.inf)
    with pytest.raises(ValueError, match=r'unknown site "fc3.weight"'):
        plot_marginals(posterior, "fc3.weight")
    with pytest.raises(ValueError, match="count must be an integer of at least 1"):
        plot_marginals(posterior, count=0)
    with pytest.raises(
        ValueError, match=r'hold 3 names, one per input of "linear.weight", but hol'
    ):
        plot_marginals(linear, input_names=["a", "b"])
    with pytest.raises(ValueError, match="but is 'abc'"):
        plot_marginals(linear, input_names="abc")
    with pytest.raises(TypeError, match=r"plot_marginals needs a Posterior.*is a Sequential"):
        plot_marginals(posterior.prune())
    with torch.no_grad():
        posterior.guide.sigma_parameters()[1][0, 0] = math.nan
    with pytest.raises(ValueError, match=r'at site "fc2.weight", 1 values of log alpha are NaN'):
        plot_marginals(posterior)


# Relevances.


def test_each_site_is_a_row_of_its_kept_and_its_pruned_weights(posterior):
    ax = plot_relevance(posterior)
    low, _ = ax.get_xlim()
    line = math.exp(-1.5)
    for row, (site, values) in enumerate(relevances(posterior).items()):
        assert row_labels(ax)[row] == site.removesuffix(".weight")
        for colour, part in ((BLUE, values[values > line]), (GREY, values[values <= line])):
            ends, dots, _ = ranges(ax, colour, -row)
            q = np.quantile(part, [0, 0.25, 0.5, 0.75, 1])
            np.testing.assert_allclose(ends[0], [max(q[0], low), q[4]])
            np.testing.assert_allclose(ends[1], [max(q[1], low), q[3]])
            np.testing.assert_allclose(dots, q[2])
        left = posterior.sparsity()[site].nonzero
        assert ax.texts[row].get_text() == f"{left} of {values.size} kept"


def test_the_line_is_the_threshold_on_log_alpha(posterior):
    for threshold in (None, 1.0):
        at = 3.0 if threshold is None else threshold
        ax = plot_relevance(posterior, threshold=threshold)
        (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert dashed.get_xdata()[0] == pytest.approx(math.exp(-0.5 * at))
        assert f"dashed: log α = {at:g}" in ax.get_title(loc="left")
    ax = plot_relevance(posterior, threshold=math.inf)
    assert not [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [text.get_text() for text in ax.texts] == ["96 of 96 kept", "18 of 18 kept"]
    assert ax.get_xlabel() == "relevance |mean| / sd (no unit)"
    assert ax.get_xscale() == "log"


def test_inputs_are_rows_by_their_most_relevant_weight(posterior):
    ax = plot_relevance(posterior, "fc1.weight", count=7)
    largest = relevances(posterior)["fc1.weight"].max(0)
    order = np.argsort(-largest)[:7]
    assert row_labels(ax) == [f"input {index}" for index in order]
    ends, _, _ = ranges(ax, BLUE, 0)
    assert ends[0][1] == pytest.approx(largest[order[0]])
    assert len(row_labels(plot_relevance(posterior, "fc1.weight", count=None))) == 16


def test_a_weight_alone_in_its_row_is_a_dot_with_its_number(linear):
    ax = plot_relevance(linear, "linear.weight")
    assert [text.get_text() for text in ax.texts] == ["10.", "4.0", "0.10"]
    assert ranges(ax, BLUE, 0)[1] == pytest.approx([10.0])
    assert ranges(ax, GREY, -2)[1] == pytest.approx([0.1])
    assert "median" not in ax.get_title(loc="left")


def test_zeroed_weights_are_an_arrow_at_the_end_of_the_axis(zeroed, render):
    ax = plot_relevance(zeroed)
    low, _ = ax.get_xlim()
    for row in range(2):
        ends, dots, arrows = ranges(ax, GREY, -row)
        assert (ends, dots, arrows) == ([], [], [low])
        assert ranges(ax, BLUE, -row)[2] == []
    with torch.no_grad():
        zeroed.guide.prune_(-math.inf)
    render(plot_relevance(zeroed).figure)


def test_a_hand_written_model_has_rows_for_its_last_dimension(hand_written):
    ax = plot_relevance(hand_written, "w")
    assert sorted(row_labels(ax)) == [f"dim 1 {index}" for index in range(4)]


def test_a_scalar_is_a_row_of_one_weight(render):
    def model():
        pyro.sample("net/w", LogUniform())

    guide = AdditiveNoiseGuide(model)
    guide()
    guide.location_parameters()[0].data.fill_(2.0)
    guide.sigma_parameters()[0].data.fill_(0.0)
    scalar = Posterior(model, guide)
    ax = plot_relevance(scalar, "net/w")
    assert [text.get_text() for text in ax.texts] == ["2.0"]
    assert row_labels(ax) == ["weight 0"]
    assert row_labels(plot_relevance(scalar, "net/w", input_names=["age"])) == ["age"]
    assert row_labels(plot_relevance(scalar)) == row_labels(plot_marginals(scalar)) == ["net/w"]
    render(plot_weight_uncertainty(scalar))


def test_relevances_name_what_is_wrong(posterior):
    with pytest.raises(ValueError, match="input_names goes with a site"):
        plot_relevance(posterior, input_names=["a"])
    with pytest.raises(ValueError, match="count must be an integer"):
        plot_relevance(posterior, "fc1.weight", count=0)
    with pytest.raises(ValueError, match="threshold must be a number"):
        plot_relevance(posterior, threshold=math.nan)
    with pytest.raises(TypeError, match="plot_relevance needs a Posterior"):
        plot_relevance(nn.Linear(1, 1))


def test_both_draw_where_they_are_told(posterior, render):
    from matplotlib.figure import Figure

    for plot in (plot_marginals, plot_relevance):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        assert plot(posterior, ax=left) is left
        render(figure)
        edge = max(text.get_window_extent().x1 for text in left.texts)
        assert edge < right.get_tightbbox().x0  # as the docstring says


# Images.


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def test_panels_are_mean_deviation_and_ratio_of_the_same_units(posterior, drawn_tiles, ranked):
    figure = plot_weight_uncertainty(posterior, count=4)
    loc, log_sigma2 = (v.detach().double() for v in posterior.guide.parameters_of("fc1.weight"))
    kept = (posterior.log_alpha()["fc1.weight"] < 3).numpy()
    sd = (0.5 * log_sigma2).exp().numpy()
    ratio = np.abs(loc.numpy()) / sd
    units = ranked(torch.as_tensor(np.where(kept, ratio, 0.0)))[:4]
    expected = (np.where(kept, loc, 0.0), np.where(kept, sd, -1.0), np.where(kept, ratio, -1.0))
    for ax, values in zip(panels(figure), expected, strict=True):
        tiles = drawn_tiles(ax)[:4]
        np.testing.assert_allclose(tiles.reshape(4, 16), values[units], rtol=1e-6)
    assert f"{kept.sum()} of 96 weights kept (white: pruned)" in figure.get_suptitle()


def test_scales_are_symmetric_for_means_and_begin_at_zero_for_the_others(posterior):
    mean, sd, ratio = (ax.images[0] for ax in panels(plot_weight_uncertainty(posterior)))
    assert mean.get_clim()[0] == -mean.get_clim()[1]
    for image in (sd, ratio):
        assert image.get_clim()[0] == 0.0
        assert to_hex(image.cmap(-0.1)) == "#ffffff"  # pruned
        assert to_hex(image.cmap(0.0)) != "#ffffff"
    labels = [ax.get_ylabel() for ax in mean.figure.axes if ax.get_label() == "<colorbar>"]
    assert labels == ["units of the weight", "units of the weight", "no unit"]


def test_an_infinite_threshold_draws_all_weights(posterior, zeroed, drawn_tiles, render):
    figure = plot_weight_uncertainty(posterior, count=None, threshold=math.inf)
    assert (drawn_tiles(panels(figure)[1])[:6] > 0).all()
    assert figure.get_suptitle() == "fc1: all 6 units; 96 of 96 weights kept"
    few = plot_weight_uncertainty(posterior, count=2, threshold=math.inf)
    assert "the 2 of 6 units of largest relevance" in few.get_suptitle()
    with torch.no_grad():
        zeroed.guide.prune_(-math.inf)
    render(plot_weight_uncertainty(zeroed))


def test_images_name_what_is_wrong(posterior):
    with pytest.raises(ValueError, match="image_shape"):
        plot_weight_uncertainty(posterior, image_shape=(3, 3))
    with pytest.raises(ValueError, match='unknown site "nothing"'):
        plot_weight_uncertainty(posterior, "nothing")
    with pytest.raises(TypeError, match="plot_weight_uncertainty needs a Posterior"):
        plot_weight_uncertainty(posterior.prune())
