"""Pictures of a run and of the weights it left, with matplotlib.

What fits one panel takes ``ax`` and returns it; what needs several takes ``figure``, a Figure or
a SubFigure, and returns that. Without either a new figure is made. Nothing global changes.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.snapshots import Snapshot
from bayes_svdo.inference.arguments import check_count, check_rate, check_threshold
from bayes_svdo.inference.history import History, Row
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.models import BayesianNetwork

Array = NDArray[np.float64]
Canvas = Figure | SubFigure

# Okabe & Ito (2008), the hues that stay apart on white and for every kind of colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_PALETTE = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_GREY, _SHADE = "0.72", "0.93"
_ZEROED: dict[str, Any] = {"fc": _GREY, "ec": "white", "hatch": "////", "lw": 0}
_THRESHOLD: dict[str, Any] = {"color": "black", "lw": 1.0, "ls": "--"}
_MAX_NAMED_LAYERS = 16
_MAX_FPS = 50
_HOLD = 3000  # ms that the last frame of an animation stands
# Outliers would bleach everything else.
_COLOUR_QUANTILE = 0.95
_TICK_SIZE = 8.0  # no part of the style: ticks are made when the figure is drawn, after it
_STYLE = {
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "figure.dpi": 150,
    "figure.titlesize": 10.5,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.4,
}
# These draw into files or buffers; of a figure that pyplot keeps for them nobody would see a thing.
_BACKENDS_WITHOUT_SCREEN = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


def plot_training(history: Sequence[Row], *, figure: Canvas | None = None) -> Canvas:
    """Training curves: NLL, KL, error and sparsity per layer, against the epoch.

    The shaded epochs are those in which the KL has less than its full weight. Sparsity is drawn on
    a scale that is logarithmic in what is left, so that 99 % and 99.9 % are told apart.

    Args:
        history: ``posterior.history``.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure, with one panel each for NLL (nats per data point), KL (nats), error (%) or RMSE
        (none if the history has no such column) and sparsity (%).

    Raises:
        TypeError: ``history`` is no sequence of rows.
        ValueError: It is empty.
    """
    table = _history(history)
    metric = next((name for name in ("accuracy", "rmse") if name in table.columns), None)
    with _style():
        panels = 3 + (metric is not None)
        shape = (2, 2) if panels == 4 else (1, 3)
        size = (7.0, 4.9) if panels == 4 else (8.6, 2.8)
        figure = _new_figure(size) if figure is None else figure
        axes = cast("list[Axes]", figure.subplots(*shape, sharex=True).ravel().tolist())
        _draw_nll(axes[0], table)
        _draw_kl(axes[1], table)
        if metric is not None:
            _draw_metric(axes[2], table, metric)
        _draw_sparsity(axes[-1], table)
        for index, ax in enumerate(axes):
            _mark_warmup(ax, table, named=index == 1)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.tick_params(labelsize=_TICK_SIZE)
            if index >= panels - shape[1]:
                ax.set_xlabel("epoch")
        figure.suptitle(_training_title(table, metric), x=0.01, ha="left")
    return figure


def plot_log_alpha(
    posterior: Posterior, threshold: float | None = None, *, figure: Canvas | None = None
) -> Canvas:
    """Histograms of log α, a panel per layer, with the threshold.

    A weight that was zeroed while training has log α = ∞ and stands in a bar of its own.

    Args:
        posterior: A fitted posterior.
        threshold: Where the line stands; the posterior's own if None.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure. Each panel's bars add up to the layer's number of weights.

    Raises:
        TypeError: ``posterior`` is no Posterior.
        ValueError: A value is NaN or -inf, or ``threshold`` is NaN.
    """
    _check_posterior(posterior, "plot_log_alpha")
    threshold = posterior.threshold if threshold is None else check_threshold(threshold)
    layers = {name: _array(value).ravel() for name, value in posterior.log_alpha().items()}
    for name, values in layers.items():
        bad = int((np.isnan(values) | np.isneginf(values)).sum())
        if bad:
            raise ValueError(f'at site "{name}", {bad} values of log alpha are NaN or -inf.')
    edges = _bins(np.concatenate(list(layers.values())), threshold)
    columns = min(len(layers), 3 if len(layers) <= 6 else 4)
    rows = -(-len(layers) // columns)
    with _style():
        size = (1.2 + 2.3 * columns, 0.8 + 1.9 * rows)
        figure = _new_figure(size) if figure is None else figure
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        axes = cast("list[Axes]", grid.ravel().tolist())
        heights = [
            _draw_histogram(ax, _label(site), values, edges, threshold)
            for ax, (site, values) in zip(axes, layers.items(), strict=False)
        ]
        axes[0].set_ylim(0.7, 2 * max(heights))
        for ax in axes[len(layers) :]:
            ax.remove()
        for ax in grid[:, 0]:
            ax.set_ylabel("number of weights")
        for ax in axes[max(0, len(layers) - columns) : len(layers)]:
            ax.set_xlabel("log α")
            ax.tick_params(labelbottom=True)
        kept = sum(int((values < threshold).sum()) for values in layers.values())
        total = sum(values.size for values in layers.values())
        figure.suptitle(
            f"{kept:,} of {total:,} weights are kept: their log α is below {threshold:g}",
            x=0.01,
            ha="left",
        )
        figure.legend(
            handles=_histogram_key(layers, threshold),
            loc="outside lower center",
            ncols=4,
            handlelength=1.2,
        )
    return figure


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
    tiles = _tiles(weights, image_shape, site)
    chosen = _busiest(tiles, count)
    with _style():
        ax = _new_figure(_mosaic_size(tiles[chosen])).subplots() if ax is None else ax
        image = _draw_mosaic(ax, tiles[chosen], _limit(tiles))
        _draw_colorbar(image, [ax], tiles)
        shown = _shown(chosen, tiles, _noun(weights.ndim))
        left = f"{np.count_nonzero(tiles):,} of {tiles.size:,} weights not zero"
        ax.set_title(f"{_label(site)}: {shown}\n{left}")
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
    _check_posterior(posterior, "plot_weights_before_after")
    site, after = _weights(posterior, site, threshold)
    states = {**_states_before(posterior, site), "after pruning": after}
    if len(states) == 1:
        raise ValueError(
            f'there is nothing to compare "{site}" with: the model was written by hand, and its '
            "weights were zeroed while training.\n"
            "  Try plot_weights, or animate_sparsification."
        )
    tiles = {name: _tiles(weights, image_shape, site) for name, weights in states.items()}
    left = tiles["after pruning"]
    chosen = _busiest(left, count)
    with _style():
        figure = _new_figure(_mosaic_size(left[chosen], len(tiles))) if figure is None else figure
        axes = cast("list[Axes]", figure.subplots(1, len(tiles), squeeze=False)[0].tolist())
        for ax, (name, state) in zip(axes, tiles.items(), strict=True):
            image = _draw_mosaic(ax, state[chosen], _limit(left))
            ax.set_title(f"{name}: {np.count_nonzero(state):,} weights")
        _draw_colorbar(image, axes, *tiles.values())
        shown = _shown(chosen, left, _noun(after.ndim))
        figure.suptitle(f"{_label(site)}: {shown}", x=0.01, ha="left")
    return figure


def animate_sparsification(
    snapshots: Sequence[Snapshot],
    path: str | os.PathLike[str],
    image_shape: Sequence[int] | None = None,
    *,
    fps: float = 8.0,
    count: int | None = 60,
) -> Path:
    """Write a GIF of a layer's weights as they go: a frame per snapshot, the last one held.

    Args:
        snapshots: What ``Snapshots`` kept of a run.
        path: The file; one that is there is replaced when the new one is complete.
        image_shape: As for :func:`plot_weights`.
        fps: Frames per second, at most 50. GIF counts time in hundredths of a second.
        count: As for :func:`plot_weights`; the units are chosen by the last snapshot, and stand
            in their own order.

    Returns:
        The path.

    Raises:
        ValueError: There are no snapshots, or of several sites; ``path`` does not end in ``.gif``;
            ``fps``, ``count`` or ``image_shape`` is not as it should be.
    """
    target = Path(path)
    if target.suffix.lower() != ".gif":
        raise ValueError(f'path must end in ".gif", but is "{target}".')
    if check_rate("fps", fps) > _MAX_FPS:
        raise ValueError(f"fps must be at most {_MAX_FPS}, which browsers can show, but is {fps}.")
    frames = _frames(snapshots, image_shape, count)
    frame = 10 * round(100 / fps)
    durations = [*[frame] * (len(frames) - 1), max(frame, _HOLD)]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}-{secrets.token_hex(4)}.gif")
    try:
        frames[0].save(
            unfinished, save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


# Figures, style and names.


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def _new_figure(size: tuple[float, float]) -> Canvas:
    """A figure that pyplot shows, or, where pyplot could not show it, one it never hears of.

    Notebooks and ``plt.show()`` display what pyplot keeps, and it keeps a figure until somebody
    closes it. A program that only writes files would pile them up, so there the figure lives as
    long as its last reference.
    """
    in_use = {"matplotlib.pyplot", "ipykernel"} & sys.modules.keys()
    if in_use and mpl.get_backend().lower() not in _BACKENDS_WITHOUT_SCREEN:
        from matplotlib import pyplot as plt

        return plt.figure(figsize=size, layout="constrained")
    return Figure(figsize=size, layout="constrained")


def _label(site: str) -> str:
    return site.removesuffix(".weight")


def _layer_colours(number: int) -> list[object]:
    """Hues for a few layers; for many a scale from the first to the last."""
    if number <= len(_PALETTE):
        return list(_PALETTE[:number])
    return list(mpl.colormaps["viridis"](np.linspace(0.0, 0.9, number)))


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().cpu().numpy())


def _compressed(compression: float) -> str:
    if math.isinf(compression):
        return "no weight left"
    return f"compressed {compression:,.{1 if compression < 10 else 0}f}x"


# Training curves.


def _history(history: Sequence[Row]) -> History:
    if not isinstance(history, Sequence):
        raise TypeError(
            f"history must be a sequence of rows, but is a {type(history).__name__}.\n"
            "  Try posterior.history."
        )
    if not history:
        raise ValueError("history is empty: no epoch was done, so there is nothing to draw.")
    return history if isinstance(history, History) else History(history)


def _draw_curve(
    ax: Axes, table: History, values: Sequence[float], label: str | None, colour: object
) -> None:
    marker = "o" if len(table) == 1 else None  # one point makes no line
    ax.plot(
        table.column("epoch"), values, label=label, color=cast(str, colour), marker=marker, ms=4
    )


def _draw_nll(ax: Axes, table: History) -> None:
    _draw_curve(ax, table, table.column("nll"), "training, noisy", _BLUE)
    if "validation_nll" in table.columns:
        _draw_curve(ax, table, table.column("validation_nll"), "validation, pruned", _ORANGE)
    ax.set(title="Misfit to the data", ylabel="NLL (nats per data point)")
    _log_scale(ax)
    ax.legend()


def _draw_kl(ax: Axes, table: History) -> None:
    _draw_curve(ax, table, table.column("kl"), None, _GREEN)
    ax.set(title="Divergence from the prior", ylabel="KL (nats)")
    _log_scale(ax)


def _draw_metric(ax: Axes, table: History, metric: str) -> None:
    for name, label, colour in (
        (metric, "training, noisy", _BLUE),
        (f"validation_{metric}", "validation, pruned", _ORANGE),
    ):
        if name in table.columns:
            _draw_curve(ax, table, _error(table, name), label, colour)
    unit = "error (%)" if metric == "accuracy" else "RMSE (units of y)"
    ax.set(title="Error of prediction", ylabel=unit)
    _log_scale(ax)


def _error(table: History, name: str) -> list[float]:
    """A metric as an error: percent wrong for an accuracy, RMSE as it is."""
    values = table.column(name)
    return [100.0 * (1.0 - v) for v in values] if name.endswith("accuracy") else values


def _draw_sparsity(ax: Axes, table: History) -> None:
    columns = [name for name in table.columns if name.startswith("sparsity/")]
    colours = _layer_colours(len(columns))
    step = -(-len(columns) // _MAX_NAMED_LAYERS)  # of a deep network every so many are named
    for index, (name, colour) in enumerate(zip(columns, colours, strict=True)):
        values = table.column(name)
        label = f"{_label(name.removeprefix('sparsity/'))}: {values[-1]:.1f} %"
        _draw_curve(ax, table, values, None if index % step else label, colour)
    ax.set(title="Weights pruned, per layer", ylabel="sparsity (%)")
    ax.set_yscale("function", functions=(_sparsity_scale, _sparsity_scale_inverse))
    highest = max((max(table.column(name)) for name in columns), default=0.0)
    ax.set_ylim(0.0, next(top for top in (90, 99, 99.9, 100) if top > highest or top == 100))
    ax.yaxis.set_major_locator(FixedLocator([0, 50, 90, 99, 99.9, 100]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(columns) > len(_PALETTE):
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6.5)
    elif columns:
        ax.legend()


def _sparsity_scale(percent: Array) -> Array:
    # The hundredth keeps 100 % on the page, one decade above 99.9 %.
    return np.asarray(-np.log10(np.maximum(100.0 - percent, 0.0) + 0.01))


def _sparsity_scale_inverse(scaled: Array) -> Array:
    return np.asarray(100.0 - (10.0**-scaled - 0.01))


def _log_scale(ax: Axes) -> None:
    """A logarithmic axis with plain numbers, if all values are positive and it is worth it."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    values = values[np.isfinite(values)]
    if not values.size or values.min() <= 0 or values.max() < 3 * values.min():
        return
    ax.set_yscale("log")
    wide = values.max() > 300 * values.min()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _mark_warmup(ax: Axes, table: History, named: bool) -> None:
    """Shade the epochs before the KL has its full weight."""
    epochs = table.column("epoch")
    full = [e for e, w in zip(epochs, table.column("kl_weight"), strict=True) if w >= 1.0]
    end = full[0] if full else epochs[-1]
    if end > epochs[0]:
        ax.axvspan(epochs[0], end, color=_SHADE, zorder=0, lw=0)
        if named:
            ax.legend(handles=[Patch(fc=_SHADE, ec=_GREY, lw=0.8, label="KL warm-up")])
    ax.set_xlim(epochs[0], max(epochs[-1], epochs[0] + 1))


def _training_title(table: History, metric: str | None) -> str:
    last = table[-1]
    title = f"{_compressed(last['compression']).capitalize()} after {last['epoch']:.0f} epochs"
    name = f"validation_{metric}"
    if metric is None or name not in last:
        return title
    error = _error(table, name)[-1]
    return f"{title}, validation " + (
        f"error {error:.1f} %" if metric == "accuracy" else f"RMSE {error:.3g}"
    )


# Histograms.


def _bins(values: Array, threshold: float) -> Array:
    """Edges of bins over all finite values; the threshold is one of them."""
    finite = values[np.isfinite(values)]
    anchor = threshold if math.isfinite(threshold) else 0.0
    low, high = (finite.min(), finite.max()) if finite.size else (anchor - 1, anchor + 1)
    low, high = min(low, anchor), max(high, anchor)
    width = max(high - low, 1.0) / 50
    return np.asarray(
        anchor
        + width
        * np.arange(math.floor((low - anchor) / width), math.floor((high - anchor) / width) + 2)
    )


def _histogram_key(layers: Mapping[str, Array], threshold: float) -> list[Artist]:
    values = np.concatenate(list(layers.values()))
    key: list[Artist] = [Patch(color=_BLUE, label="kept")]
    if (values[np.isfinite(values)] >= threshold).any():
        key.append(Patch(color=_GREY, label="pruned"))
    if np.isinf(values).any():
        key.append(Patch(**_ZEROED, label="pruned while training (log α = ∞)"))
    if math.isfinite(threshold):
        key.append(Line2D([], [], **_THRESHOLD, label=f"threshold {threshold:g}"))
    return key


def _draw_histogram(ax: Axes, label: str, values: Array, edges: Array, threshold: float) -> int:
    """Draw a layer's panel; the height of its highest bar."""
    finite = values[np.isfinite(values)]
    counts, _ = np.histogram(finite, edges)
    width = edges[1] - edges[0]
    colours = [_GREY if edge >= threshold else _BLUE for edge in edges[:-1]]
    ax.bar(edges[:-1], counts, width, align="edge", color=colours)
    if math.isfinite(threshold):
        ax.axvline(threshold, **_THRESHOLD)
    infinite = values.size - finite.size
    kept = int((values < threshold).sum())
    ax.set_title(f"{label}: {kept:,} of {values.size:,} kept")
    ax.set_ylim(0.7, 7.0)  # a scale of its own for panels whose bars are all empty
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(labelsize=_TICK_SIZE)
    ticks = [
        t
        for t in MaxNLocator(5, integer=True).tick_values(edges[0], edges[-1])
        if edges[0] <= t <= edges[-1]
    ]
    ax.set_xticks(ticks)
    if infinite:
        beside = edges[-1] + 5 * width
        ax.bar(beside, infinite, 4 * width, **_ZEROED)
        ax.set_xticks([*ticks, beside], [*(f"{t:g}" for t in ticks), "∞"])
    return max(int(counts.max()), infinite)


# Weights as images.


def _check_posterior(posterior: object, function: str) -> None:
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"{function} needs a Posterior, as fit returns it, but posterior is a "
            f"{type(posterior).__name__}."
        )


def _weights(
    source: Posterior | nn.Module, site: str | None, threshold: float | None
) -> tuple[str, Array]:
    """Name of the site and the weights to draw."""
    if isinstance(source, Posterior):
        known = source.guide.sites
        name = known[0] if site is None else site
        if name not in known:
            raise unknown_name("site", name, known)
        return name, _array(source.means(threshold)[name])
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
    return name, _array(parameters[name])


def _states_before(posterior: Posterior, site: str) -> dict[str, Array]:
    """The site's weights before training and before pruning, as far as there are such."""
    states = {}
    if isinstance(posterior.model, BayesianNetwork):
        states["before training"] = _array(posterior.model.initial_weights()[site])
    if not posterior.log_alpha()[site].isinf().any():
        states["before pruning"] = _array(posterior.means(math.inf)[site])
    return states


def _tiles(weights: Array, image_shape: Sequence[int] | None, site: str) -> Array:
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


def _busiest(tiles: Array, count: int | None) -> NDArray[np.intp]:
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


def _noun(dimensions: int) -> str:
    return "kernels" if dimensions > 3 else "units"


def _grid(tiles: Array) -> tuple[int, int]:
    """Rows and columns of a mosaic that is a little wider than high."""
    number, height, width = tiles.shape
    columns = min(number, math.ceil(math.sqrt(1.4 * number * (height + 1) / (width + 1))))
    return -(-number // columns), columns


def _mosaic_size(tiles: Array, panels: int = 1) -> tuple[float, float]:
    """Width and height in inches of a figure for mosaics side by side, with a colour bar."""
    rows, columns = _grid(tiles)
    ratio = rows * tiles.shape[1] / (columns * tiles.shape[2])
    width = 4.0 if panels == 1 else 3.1
    return panels * width + 0.7, min(8.0, max(1.3, width * ratio) + 0.55)


def _mosaic(tiles: Array) -> Array:
    """One image of all tiles, NaN where the last row has none."""
    number, height, width = tiles.shape
    rows, columns = _grid(tiles)
    places = np.full((rows * columns, height, width), np.nan)
    places[:number] = tiles
    grid = places.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
    return grid.reshape(rows * height, columns * width)


def _limit(tiles: Array) -> float:
    """Where the colour scale ends, on both sides of zero."""
    sizes = np.abs(tiles[tiles != 0])
    return float(np.quantile(sizes, _COLOUR_QUANTILE)) if sizes.size else 1.0


def _draw_mosaic(ax: Axes, tiles: Array, limit: float) -> AxesImage:
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad=_SHADE)
    image = ax.imshow(
        _mosaic(tiles), cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    rows, columns = _grid(tiles)
    width = 1.2 if len(tiles) <= 60 else 0.5
    for draw, number, size in (
        (ax.axhline, rows, tiles.shape[1]),
        (ax.axvline, columns, tiles.shape[2]),
    ):
        for index in range(number + 1):
            draw(index * size - 0.5, color=_GREY, lw=width, clip_on=False)
    ax.set_axis_off()
    return image


def _draw_colorbar(image: AxesImage, axes: Sequence[Axes], *drawn: Array) -> None:
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
    bar.ax.tick_params(labelsize=_TICK_SIZE)


# Animation.


def _frames(
    snapshots: Sequence[Snapshot], image_shape: Sequence[int] | None, count: int | None
) -> list[Image.Image]:
    if not len(snapshots):
        raise ValueError(
            "there are no snapshots, so there is nothing to animate.\n"
            "  Try snapshots = Snapshots(); fit(..., callbacks=[snapshots])."
        )
    sites = list(dict.fromkeys(snapshot.site for snapshot in snapshots))
    if len(sites) > 1:
        raise ValueError(f"snapshots must be of one site, but are of {', '.join(sites)}.")
    tiles = [_tiles(_array(snapshot.weights), image_shape, sites[0]) for snapshot in snapshots]
    chosen = np.sort(_busiest(tiles[-1], count))
    with _style():
        width, height = _mosaic_size(tiles[-1][chosen])
        figure = Figure(figsize=(width + 0.6, height + 0.3), layout="constrained", dpi=120)
        canvas = FigureCanvasAgg(figure)
        ax = figure.subplots()
        image = _draw_mosaic(ax, tiles[0][chosen], _limit(tiles[-1]))
        _draw_colorbar(image, [ax], *tiles)
        title = figure.suptitle(" \n ", x=0.01, ha="left")
        drawn = []
        for snapshot, weights in zip(snapshots, tiles, strict=True):
            image.set_data(_mosaic(weights[chosen]))
            title.set_text(_frame_title(snapshot, weights, chosen))
            canvas.draw()
            drawn.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return _with_one_palette(drawn)


def _frame_title(snapshot: Snapshot, tiles: Array, chosen: NDArray[np.intp]) -> str:
    noun = _noun(snapshot.weights.dim())
    shown = f"{len(chosen)} of {len(tiles):,}" if len(chosen) < len(tiles) else "all"
    title = (
        f"epoch {snapshot.epoch}: {np.count_nonzero(tiles):,} of {tiles.size:,} weights left in "
        f"{_label(snapshot.site)} ({shown} {noun} shown)\n"
        f"network {_compressed(snapshot.compression)}"
    )
    if snapshot.metric is None:
        return title
    name, value = snapshot.metric
    number = f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.3g}"
    return f"{title}, {name.replace('_', ' ')} {number}"


def _with_one_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames of 256 colours, the same in all: what does not move takes no room in the file."""
    samples = [frames[index] for index in {0, len(frames) // 2, len(frames) - 1}]
    strip = Image.new("RGB", (frames[0].width, sum(sample.height for sample in samples)))
    for index, sample in enumerate(samples):
        strip.paste(sample, (0, index * sample.height))
    palette = strip.quantize(256, dither=Image.Dither.NONE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
