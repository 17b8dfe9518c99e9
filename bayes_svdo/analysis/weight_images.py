"""Weights as images, one per unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import NDArray
from torch import nn

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.figures import (
    GREY,
    SHADE,
    TICK_SIZE,
    Array,
    Canvas,
    array,
    check_posterior,
    label_of,
    styled,
)
from bayes_svdo.inference.arguments import check_count
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.models import BayesianNetwork

# Outliers would bleach everything else.
_COLOUR_QUANTILE = 0.95


def plot_weights(
    source: Posterior | nn.Module,
    site: str | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    count: int | None = 24,
    threshold: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Weights of a layer as images, one per unit: red positive, blue negative, white zero.

    Args:
        source: A posterior (its pruned means are drawn) or a module, such as a pruned one.
        site: Site or parameter name; the first if None.
        image_shape: ``(height, width)`` or ``(channels, height, width)`` of the layer's input;
            channels are drawn side by side. May be left out where the input is a square, and for
            convolutions, of which every kernel is an image.
        count: Draw as many units: those with most nonzero weights, then those of largest norm.
            None for all, in their own order.
        threshold: Where to prune a posterior: its own if None, ``math.inf`` to draw it unpruned.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes. The colour scale is symmetric about 0 and ends at the 95 % quantile of the
        nonzero weights' size.

    Raises:
        TypeError: ``source`` is neither, or ``threshold`` is given for a module.
        ValueError: ``site`` is unknown, ``image_shape`` does not fit, or ``count`` is below 1.
    """
    site, weights = _weights(source, site, threshold)
    tiles = tiles_of(weights, image_shape, site)
    chosen = busiest(tiles, count)
    with styled(None if ax is None else ax.figure, mosaic_size(tiles[chosen])) as figure:
        ax = figure.subplots() if ax is None else ax
        image = draw_mosaic(ax, tiles[chosen], colour_limit(tiles))
        draw_colorbar(image, [ax], tiles)
        shown = _shown(chosen, tiles, noun_of(weights.ndim))
        left = f"{np.count_nonzero(tiles):,} of {tiles.size:,} weights not zero"
        ax.set_title(f"{label_of(site)}: {shown}\n{left}")
    return ax


def plot_weights_before_after(
    posterior: Posterior,
    site: str | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    count: int | None = 24,
    threshold: float | None = None,
    figure: Canvas | None = None,
) -> Canvas:
    """Weights of a layer as images, before and after: same units, same colour scale.

    The panels are the weights that the network came with, the fitted means with nothing pruned
    (left out if weights were zeroed while training: there is no such state), and what is left.

    Args:
        posterior: A fitted posterior.
        site: As for :func:`plot_weights`.
        image_shape: As for :func:`plot_weights`.
        count: As for :func:`plot_weights`; the units are chosen by what is left after pruning.
        threshold: Where to prune; the posterior's own if None.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure, with two or three panels.

    Raises:
        TypeError: ``posterior`` is no Posterior.
        ValueError: As for :func:`plot_weights`; or there is nothing to compare with, because a
            hand-written model (which has no weights before training) was pruned while training.
    """
    check_posterior(posterior, "plot_weights_before_after")
    site, after = _weights(posterior, site, threshold)
    states = {**_states_before(posterior, site), "after pruning": after}
    if len(states) == 1:
        raise ValueError(
            f'there is nothing to compare "{site}" with: the model was written by hand, and its '
            "weights were zeroed while training.\n"
            "  Try plot_weights, or animate_sparsification."
        )
    tiles = {name: tiles_of(weights, image_shape, site) for name, weights in states.items()}
    left = tiles["after pruning"]
    chosen = busiest(left, count)
    with styled(figure, mosaic_size(left[chosen], len(tiles))) as figure:
        axes = cast("list[Axes]", figure.subplots(1, len(tiles), squeeze=False)[0].tolist())
        for ax, (name, state) in zip(axes, tiles.items(), strict=True):
            image = draw_mosaic(ax, state[chosen], colour_limit(left))
            ax.set_title(f"{name}: {np.count_nonzero(state):,} weights")
        draw_colorbar(image, axes, *tiles.values())
        shown = _shown(chosen, left, noun_of(after.ndim))
        figure.suptitle(f"{label_of(site)}: {shown}", x=0.01, ha="left")
    return figure


# Weights as images.


def _weights(
    source: Posterior | nn.Module, site: str | None, threshold: float | None
) -> tuple[str, Array]:
    """Name of the site and the weights to draw."""
    if isinstance(source, Posterior):
        known = source.guide.sites
        name = known[0] if site is None else site
        if name not in known:
            raise unknown_name("site", name, known)
        return name, array(source.means(threshold)[name])
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"source must be a Posterior or a torch.nn.Module, but is a {type(source).__name__}."
        )
    if threshold is not None:
        raise TypeError(
            "threshold goes with a posterior, but source is a module, whose weights are drawn as "
            "they are."
        )
    parameters = {name: p for name, p in source.named_parameters() if p.dim() > 1}
    if not parameters:
        raise ValueError(
            "source has no parameter of two or more dimensions.\n"
            "  Try the posterior itself, or posterior.prune()."
        )
    name = next(iter(parameters)) if site is None else site
    if name not in parameters:
        raise unknown_name("site", name, parameters)
    return name, array(parameters[name])


def _states_before(posterior: Posterior, site: str) -> dict[str, Array]:
    """The site's weights before training and before pruning, as far as there are such."""
    states = {}
    if isinstance(posterior.model, BayesianNetwork):
        states["before training"] = array(posterior.model.own_weights()[site])
    if not posterior.log_alpha()[site].isinf().any():
        states["before pruning"] = array(posterior.means(math.inf)[site])
    return states


def tiles_of(weights: Array, image_shape: Sequence[int] | None, site: str) -> Array:
    """Weights as images, (units, height, width)."""
    bad = int((~np.isfinite(weights)).sum())
    if bad:
        raise ValueError(f'{bad} weights of "{site}" are NaN or infinite.')
    if weights.ndim > 2:  # convolutions: every kernel is an image, one of three dimensions a row
        kernel = weights.shape[2:] if weights.ndim > 3 else weights.shape[1:]
        if image_shape is not None and tuple(image_shape) != kernel:
            raise ValueError(
                f'image_shape must be left out or be {kernel}, the kernels of "{site}", but is '
                f"{tuple(image_shape)}."
            )
        return weights.reshape(-1, kernel[0], math.prod(kernel[1:]))
    weights = np.atleast_2d(weights)
    inputs = weights.shape[1]
    if image_shape is None:
        side = math.isqrt(inputs)
        if side * side != inputs:
            raise ValueError(
                f'the {inputs} inputs of "{site}" are no square image.\n'
                "  Try image_shape=(height, width) or (channels, height, width)."
            )
        image_shape = (side, side)
    shape = tuple(image_shape)
    if len(shape) not in (2, 3) or math.prod(shape) != inputs or min(shape) < 1:
        raise ValueError(
            f"image_shape must be (height, width) or (channels, height, width) of the {inputs} "
            f'inputs of "{site}", but is {shape}.'
        )
    channels, height, width = (1, *shape) if len(shape) == 2 else shape
    images = weights.reshape(-1, channels, height, width).transpose(0, 2, 1, 3)
    return images.reshape(-1, height, channels * width)


def busiest(tiles: Array, count: int | None) -> NDArray[np.intp]:
    """Indices of the units to draw."""
    if count is None:
        return np.arange(len(tiles))
    count = check_count("count", count)
    nonzero = np.count_nonzero(tiles, axis=(1, 2))
    norm = np.square(tiles).sum((1, 2))
    return np.lexsort((-norm, -nonzero))[:count]


def _shown(chosen: NDArray[np.intp], tiles: Array, noun: str) -> str:
    if len(chosen) == len(tiles):
        return f"all {len(tiles):,} {noun}"
    which = "with most weights left" if (tiles == 0).any() else "of largest norm"
    return f"the {len(chosen)} of {len(tiles):,} {noun} {which}"


def noun_of(dimensions: int) -> str:
    """What an image of weights of so many dimensions stands for."""
    return "kernels" if dimensions > 3 else "units"


def _grid(tiles: Array) -> tuple[int, int]:
    """Rows and columns of a mosaic that is a little wider than high."""
    number, height, width = tiles.shape
    columns = min(number, math.ceil(math.sqrt(1.4 * number * (height + 1) / (width + 1))))
    return -(-number // columns), columns


def mosaic_size(tiles: Array, panels: int = 1) -> tuple[float, float]:
    """Width and height in inches of a figure for mosaics side by side, with a colour bar."""
    rows, columns = _grid(tiles)
    ratio = rows * tiles.shape[1] / (columns * tiles.shape[2])
    width = 4.0 if panels == 1 else 3.1
    return panels * width + 0.7, min(8.0, max(1.3, width * ratio) + 0.55)


def mosaic(tiles: Array) -> Array:
    """One image of all tiles, NaN where the last row has none."""
    number, height, width = tiles.shape
    rows, columns = _grid(tiles)
    places = np.full((rows * columns, height, width), np.nan)
    places[:number] = tiles
    grid = places.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
    return grid.reshape(rows * height, columns * width)


def colour_limit(tiles: Array) -> float:
    """Where the colour scale ends, on both sides of zero."""
    sizes = np.abs(tiles[tiles != 0])
    return float(np.quantile(sizes, _COLOUR_QUANTILE)) if sizes.size else 1.0


def draw_mosaic(ax: Axes, tiles: Array, limit: float) -> AxesImage:
    """Draw all tiles, (units, height, width), with colours from ``-limit`` to ``limit``."""
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad=SHADE)
    image = ax.imshow(mosaic(tiles), cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    rows, columns = _grid(tiles)
    width = 1.2 if len(tiles) <= 60 else 0.5
    for draw, number, size in (
        (ax.axhline, rows, tiles.shape[1]),
        (ax.axvline, columns, tiles.shape[2]),
    ):
        for index in range(number + 1):
            draw(index * size - 0.5, color=GREY, lw=width, clip_on=False)
    ax.set_axis_off()
    return image


def draw_colorbar(image: AxesImage, axes: Sequence[Axes], *drawn: Array) -> None:
    """Draw the colour scale of all that is ``drawn``, beside ``axes``."""
    beyond = max(np.abs(tiles).max(initial=0.0) for tiles in drawn) > image.norm.vmax
    bar = axes[0].figure.colorbar(
        image,
        ax=list(axes),
        label="weight",
        aspect=25,
        pad=0.02,
        extend="both" if beyond else "neither",
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=TICK_SIZE)
