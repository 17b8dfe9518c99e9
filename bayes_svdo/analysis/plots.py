"""Pictures of a run, with matplotlib: training curves and histograms of log alpha.

What fits one panel takes ``ax`` and returns it; what needs several takes ``figure``, a Figure or
a SubFigure, and returns that. Without either a new figure is made. Nothing global changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from bayes_svdo.analysis.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    SHADE,
    TICK_SIZE,
    Array,
    Canvas,
    array,
    check_posterior,
    compressed,
    label_of,
    layer_colours,
    styled,
)
from bayes_svdo.inference.arguments import check_threshold
from bayes_svdo.inference.history import History, Row
from bayes_svdo.inference.posterior import Posterior

_ZEROED: dict[str, Any] = {"fc": GREY, "ec": "white", "hatch": "////", "lw": 0}
_THRESHOLD: dict[str, Any] = {"color": "black", "lw": 1.0, "ls": "--"}
_MAX_NAMED_LAYERS = 16


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
    panels = 3 + (metric is not None)
    shape = (2, 2) if panels == 4 else (1, 3)
    with styled(figure, (7.0, 4.9) if panels == 4 else (8.6, 2.8)) as figure:
        axes = cast("list[Axes]", figure.subplots(*shape, sharex=True).ravel().tolist())
        _draw_nll(axes[0], table)
        _draw_kl(axes[1], table)
        if metric is not None:
            _draw_metric(axes[2], table, metric)
        _draw_sparsity(axes[-1], table)
        for index, ax in enumerate(axes):
            _mark_warmup(ax, table, named=index == 1)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.tick_params(labelsize=TICK_SIZE)
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
    check_posterior(posterior, "plot_log_alpha")
    threshold = posterior.threshold if threshold is None else check_threshold(threshold)
    layers = {name: array(value).ravel() for name, value in posterior.log_alpha().items()}
    for name, values in layers.items():
        bad = int((np.isnan(values) | np.isneginf(values)).sum())
        if bad:
            raise ValueError(f'at site "{name}", {bad} values of log alpha are NaN or -inf.')
    edges = _bins(np.concatenate(list(layers.values())), threshold)
    columns = min(len(layers), 3 if len(layers) <= 6 else 4)
    rows = -(-len(layers) // columns)
    with styled(figure, (1.2 + 2.3 * columns, 0.8 + 1.9 * rows)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        axes = cast("list[Axes]", grid.ravel().tolist())
        heights = [
            _draw_histogram(ax, label_of(site), values, edges, threshold)
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
        kept = posterior.sparsity(threshold).nonzero
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
    _draw_curve(ax, table, table.column("nll"), "training, noisy", BLUE)
    if "validation_nll" in table.columns:
        _draw_curve(ax, table, table.column("validation_nll"), "validation, pruned", ORANGE)
    ax.set(title="Misfit to the data", ylabel="NLL (nats per data point)")
    _log_scale(ax)
    ax.legend()


def _draw_kl(ax: Axes, table: History) -> None:
    _draw_curve(ax, table, table.column("kl"), None, GREEN)
    ax.set(title="Divergence from the prior", ylabel="KL (nats)")
    _log_scale(ax)


def _draw_metric(ax: Axes, table: History, metric: str) -> None:
    for name, label, colour in (
        (metric, "training, noisy", BLUE),
        (f"validation_{metric}", "validation, pruned", ORANGE),
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
    colours = layer_colours(len(columns))
    step = -(-len(columns) // _MAX_NAMED_LAYERS)  # of a deep network every so many are named
    for index, (name, colour) in enumerate(zip(columns, colours, strict=True)):
        values = table.column(name)
        label = f"{label_of(name.removeprefix('sparsity/'))}: {values[-1]:.1f} %"
        _draw_curve(ax, table, values, None if index % step else label, colour)
    ax.set(title="Weights pruned, per layer", ylabel="sparsity (%)")
    ax.set_yscale("function", functions=(_sparsity_scale, _sparsity_scale_inverse))
    highest = max((max(table.column(name)) for name in columns), default=0.0)
    ax.set_ylim(0.0, next(top for top in (90, 99, 99.9, 100) if top > highest or top == 100))
    ax.yaxis.set_major_locator(FixedLocator([0, 50, 90, 99, 99.9, 100]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(columns) > len(PALETTE):
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
        ax.axvspan(epochs[0], end, color=SHADE, zorder=0, lw=0)
        if named:
            ax.legend(handles=[Patch(fc=SHADE, ec=GREY, lw=0.8, label="KL warm-up")])
    ax.set_xlim(epochs[0], max(epochs[-1], epochs[0] + 1))


def _training_title(table: History, metric: str | None) -> str:
    last = table[-1]
    title = f"{compressed(last['compression']).capitalize()} after {last['epoch']:.0f} epochs"
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
    key: list[Artist] = [Patch(color=BLUE, label="kept")]
    if (values[np.isfinite(values)] >= threshold).any():
        key.append(Patch(color=GREY, label="pruned"))
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
    colours = [GREY if edge >= threshold else BLUE for edge in edges[:-1]]
    ax.bar(edges[:-1], counts, width, align="edge", color=colours)
    if math.isfinite(threshold):
        ax.axvline(threshold, **_THRESHOLD)
    infinite = values.size - finite.size
    kept = int((values < threshold).sum())
    ax.set_title(f"{label}: {kept:,} of {values.size:,} kept")
    ax.set_ylim(0.7, 7.0)  # a scale of its own for panels whose bars are all empty
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(labelsize=TICK_SIZE)
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
