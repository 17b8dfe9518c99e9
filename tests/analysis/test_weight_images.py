"""Weights as images: which are drawn, where and in which colour."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from bayes_svdo.analysis import plot_weights, plot_weights_before_after


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


# Weights as images.


def test_images_are_the_pruned_weights_of_the_units_that_kept_most(posterior, drawn_tiles, ranked):
    weights = posterior.means()["fc1.weight"]
    assert 0 < (weights == 0).sum() < weights.numel()
    tiles = drawn_tiles(plot_weights(posterior, count=4))
    expected = weights[ranked(weights)[:4]].view(4, 4, 4)
    np.testing.assert_array_equal(tiles[:4], expected.double().numpy())


def test_an_infinite_threshold_draws_the_weights_before_pruning(posterior, drawn_tiles):
    weights = posterior.guide.median()["fc1.weight"]
    tiles = drawn_tiles(plot_weights(posterior, threshold=math.inf, count=None))
    np.testing.assert_array_equal(tiles[:6], weights.view(6, 4, 4).double().numpy())


def test_a_module_is_drawn_as_it_is(posterior, drawn_tiles):
    net = posterior.prune()
    for site, shape in ((None, None), ("fc2.weight", (2, 3))):
        drawn = drawn_tiles(plot_weights(net, site, shape), shape or (4, 4))
        expected = drawn_tiles(plot_weights(posterior, site, shape), shape or (4, 4))
        np.testing.assert_array_equal(drawn, expected)


def test_places_without_a_unit_are_not_zero_weights(drawn_tiles):
    net = nn.Linear(4, 5)
    tiles = drawn_tiles(plot_weights(net), (2, 2))
    assert len(tiles) == 6
    assert np.isnan(tiles[5]).all()
    assert np.isfinite(tiles[:5]).all()


def test_colours_are_symmetric_about_zero_and_end_at_the_95_percent_quantile(posterior):
    ax = plot_weights(posterior)
    low, high = ax.images[0].get_clim()
    weights = posterior.means()["fc1.weight"]
    sizes = weights[weights != 0].abs().double().numpy()
    assert -low == high == pytest.approx(np.quantile(sizes, 0.95))
    centre = ax.images[0].cmap(0.5)[:3]
    assert min(centre) > 0.95  # zero is white


def test_a_layer_without_weights_has_a_colour_scale(render):
    net = nn.Linear(4, 3)
    nn.init.zeros_(net.weight)
    ax = plot_weights(net)
    assert ax.images[0].get_clim() == (-1.0, 1.0)
    render(ax.figure)


def test_channels_stand_side_by_side(drawn_tiles):
    net = nn.Linear(12, 1)
    image = drawn_tiles(plot_weights(net, image_shape=(3, 2, 2)), (2, 6))[0]
    channels = net.weight.detach().double().view(3, 2, 2).numpy()
    np.testing.assert_array_equal(image, np.concatenate(list(channels), axis=1))


@pytest.mark.parametrize(
    ("layer", "tile", "noun"),
    [
        (nn.Conv2d(2, 3, (3, 4)), (3, 4), "kernels"),
        (nn.Conv1d(2, 3, 5), (2, 5), "units"),
        (nn.Conv3d(1, 2, (2, 3, 4)), (2, 12), "kernels"),
    ],
)
def test_every_kernel_of_a_convolution_is_an_image(layer, tile, noun, drawn_tiles):
    ax = plot_weights(layer, count=None)
    tiles = drawn_tiles(ax, tile)
    expected = layer.weight.detach().double().numpy().reshape(-1, *tile)
    np.testing.assert_array_equal(tiles[: len(expected)], expected)
    assert f"all {len(expected)} {noun}" in ax.get_title(loc="left")


def test_the_title_says_which_units_and_how_many_weights(posterior):
    left = int((posterior.means()["fc1.weight"] != 0).sum())
    ax = plot_weights(posterior, count=2)
    assert ax.get_title(loc="left") == (
        f"fc1: the 2 of 6 units with most weights left\n{left} of 96 weights not zero"
    )
    ax = plot_weights(posterior, count=2, threshold=math.inf)
    assert ax.get_title(loc="left").startswith("fc1: the 2 of 6 units of largest norm")
    colourbar = next(a for a in ax.figure.axes if a is not ax)
    assert colourbar.get_ylabel() == "weight"


def test_weights_are_drawn_into_the_axes_given(posterior):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_weights(posterior, ax=right) is right
    assert right.images
    assert not left.images


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"site": "fc1.wieght"}, ValueError, 'unknown site.*Did you mean "fc1.weight"'),
        ({"image_shape": (4, 5)}, ValueError, r'16 inputs of "fc1.weight", but is \(4, 5\)'),
        ({"image_shape": (16,)}, ValueError, r"image_shape must be .*but is \(16,\)"),
        ({"image_shape": (-4, -4)}, ValueError, r"image_shape must be"),
        ({"site": "fc2.weight"}, ValueError, r'6 inputs of "fc2.weight" are no square(.|\n)*Try'),
        ({"count": 0}, ValueError, "count must be an integer of at least 1"),
        ({"threshold": "3"}, ValueError, "threshold must be a number"),
    ],
)
def test_bad_arguments_of_plot_weights_are_named(posterior, arguments, error, message):
    with pytest.raises(error, match=message):
        plot_weights(posterior, **arguments)


def test_bad_sources_are_named(posterior):
    with pytest.raises(TypeError, match=r"source must be a Posterior or a torch.nn.Module.*Tensor"):
        plot_weights(torch.zeros(3, 3))
    with pytest.raises(TypeError, match="threshold goes with a posterior"):
        plot_weights(posterior.prune(), threshold=3.0)
    with pytest.raises(ValueError, match="no parameter of two or more dimensions"):
        plot_weights(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r'unknown site.*Did you mean "fc2.weight"'):
        plot_weights(posterior.prune(), "fc2.weigh")
    with pytest.raises(ValueError, match=r"must be left out or be \(3, 3\)"):
        plot_weights(nn.Conv2d(1, 1, 3), image_shape=(9, 1))
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(ValueError, match='16 weights of "weight" are NaN'):
        plot_weights(broken)


def test_panels_are_before_training_before_pruning_and_after(posterior, drawn_tiles):
    figure = plot_weights_before_after(posterior, count=None)
    states = (
        posterior.model.initial_weights()["fc1.weight"],
        posterior.guide.median()["fc1.weight"],
        posterior.means()["fc1.weight"],
    )
    axes = panels(figure)
    assert len(axes) == 3
    for ax, weights, name in zip(
        axes, states, ("before training", "before pruning", "after"), strict=True
    ):
        np.testing.assert_array_equal(drawn_tiles(ax)[:6], weights.view(6, 4, 4).double().numpy())
        title = ax.get_title(loc="left")
        assert title.startswith(name)
        assert title.endswith(f": {int((weights != 0).sum())} weights")
    assert len({ax.images[0].get_clim() for ax in axes}) == 1


def test_units_are_the_same_in_every_panel(posterior, drawn_tiles, ranked):
    chosen = ranked(posterior.means()["fc1.weight"])[:2]
    first = panels(plot_weights_before_after(posterior, count=2))[0]
    expected = posterior.model.initial_weights()["fc1.weight"][chosen].view(2, 4, 4)
    np.testing.assert_array_equal(drawn_tiles(first)[:2], expected.double().numpy())


def test_weights_zeroed_while_training_have_no_state_before_pruning(zeroed):
    titles = [ax.get_title(loc="left") for ax in panels(plot_weights_before_after(zeroed))]
    assert [title.split(":")[0] for title in titles] == ["before training", "after pruning"]


def test_a_hand_written_model_has_no_weights_before_training(hand_written):
    panes = panels(plot_weights_before_after(hand_written))
    titles = [ax.get_title(loc="left") for ax in panes]
    assert [title.split(":")[0] for title in titles] == ["before pruning", "after pruning"]
    hand_written.guide.prune_(-math.inf)
    with pytest.raises(ValueError, match=r"nothing to compare \"w\" with(.|\n)*Try plot_weights"):
        plot_weights_before_after(hand_written)


def test_before_and_after_needs_a_posterior(posterior):
    with pytest.raises(TypeError, match="plot_weights_before_after needs a Posterior"):
        plot_weights_before_after(posterior.prune())
