"""Pictures of the weights' posterior: marginals, relevances, and layers as images of uncertainty.

They show ``q``, the fitted Gaussian. As in :mod:`bayes_svdo.analysis.plots`, what fits one panel
takes ``ax`` and returns it; what needs several takes ``figure``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.draws import SiteDraws
from bayes_svdo.analysis.figures import (
    BLUE,
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
from bayes_svdo.analysis.weight_images import (
    busiest,
    colour_limit,
    draw_mosaic,
    mosaic_size,
    noun_of,
    tiles_of,
)
from bayes_svdo.inference.arguments import check_count, check_threshold
from bayes_svdo.inference.posterior import Posterior

_ROW = 0.8  # height of a density, of the distance between rows
_DECADES_BELOW = 2  # that are shown of the relevances under the threshold
_RELEVANCE = "relevance |mean| / sd"
_PRUNED = -1.0  # no value of a standard deviation, and white


def plot_marginals(
    posterior: Posterior,
    site: str | None = None,
    count: int = 12,
    *,
    threshold: float | None = None,
    input_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Posterior densities of the surviving weights that are most relevant.

    Args:
        posterior: A fitted posterior.
        site: Whose weights to draw; those of all sites if None.
        count: How many weights; those of largest ``|mean| / sd``.
        threshold: On log alpha: which weights survive; the posterior's own if None.
        input_names: Of the inputs of ``site`` (of the first one if None), for the labels.
        ax: Where to draw; a new figure if None. Text stands to the right of the axes, for which a
            figure of several panels needs ``layout="constrained"``.

    Returns:
        The axes, a row per weight, the most relevant on top: its Gaussian density (all scaled to
        one height), mean and one standard deviation to both sides, also as numbers.

    Raises:
        TypeError: ``posterior`` is no Posterior.
        ValueError: ``site`` is unknown, ``input_names`` does not fit, ``count`` is below 1, a
            log alpha is NaN, or no weight survives.
    """
    check_posterior(posterior, "plot_marginals")
    count = check_count("count", count)
    sites = _sites(posterior, site, threshold)
    names = _names(sites[0], input_names)
    total = sum(int(each.kept.sum()) for each in sites)
    if all(bool(each.log_alpha.isposinf().all()) for each in sites):
        raise ValueError(
            "there is nothing to draw: all weights were pruned while training, no threshold on log "
            "alpha brings them back."
        )
    if not total:
        raise ValueError(
            "there is nothing to draw: no weight survives the threshold on log alpha.\n"
            "  Try threshold=math.inf for the weights before pruning."
        )
    candidates = [
        weight
        for each in sites
        for weight in _most_relevant(each, count, names if each is sites[0] else None)
    ]
    chosen = sorted(candidates, key=lambda weight: -weight.relevance)[:count]
    with styled(None if ax is None else ax.figure, (5.6, 0.9 + 0.3 * len(chosen))) as figure:
        ax = figure.subplots() if ax is None else ax
        z = np.linspace(-4.0, 4.0, 161)
        for row, weight in enumerate(chosen):
            x, height = weight.mean + weight.sd * z, _ROW * np.exp(-0.5 * np.square(z))
            ax.fill_between(x, -row, height - row, color=BLUE, alpha=0.3, lw=0)
            ends = [weight.mean - weight.sd, weight.mean + weight.sd]
            ax.plot(ends, [-row, -row], color=BLUE, lw=2.0, solid_capstyle="butt")
            ax.plot(weight.mean, -row, "o", color=BLUE, ms=3)
            _beside(ax, -row, _with_error(weight.mean, weight.sd))
        ax.axvline(0.0, color=GREY, lw=1.0, zorder=0)
        _rows(ax, [weight.label for weight in chosen], top=1.0)
        ax.set_xlabel("weight (output per unit of input)")
        which = f"{'All' if len(chosen) == total else f'{len(chosen)} of'} {total:,}"
        ax.set_title(
            f"{which} surviving weights: mean ± sd of q\n"
            "most relevant on top; densities of one height"
        )
    return ax


def plot_relevance(
    posterior: Posterior,
    site: str | None = None,
    count: int | None = 20,
    *,
    threshold: float | None = None,
    input_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Forest of relevances ``|mean| / sd = exp(-log alpha / 2)``, with the threshold.

    Args:
        posterior: A fitted posterior.
        site: None for a row per site. A site's name for a row per input of that site (per token of
            an embedding), the most relevant on top.
        count: At most so many inputs; None for all. Sites are always drawn all.
        threshold: On log alpha; the posterior's own if None.
        input_names: Of the inputs of ``site``, which must be given, too.
        ax: Where to draw; a new figure if None. Text stands to the right of the axes, for which a
            figure of several panels needs ``layout="constrained"``.

    Returns:
        The axes. Of every row the weights that are kept and those that are pruned are drawn apart:
        the whole range (thin), the middle half (thick) and the median (dot). What lies left of the
        axis, zeroed weights among it, is an arrow at its end.

    Raises:
        TypeError: ``posterior`` is no Posterior.
        ValueError: ``site`` is unknown, ``input_names`` does not fit or comes without a site,
            ``count`` is below 1, or a log alpha is NaN.
    """
    check_posterior(posterior, "plot_relevance")
    count = None if count is None else check_count("count", count)
    threshold = posterior.threshold if threshold is None else check_threshold(threshold)
    if site is None and input_names is not None:
        raise ValueError("input_names goes with a site, but site is None: rows are sites.")
    sites = _sites(posterior, site, threshold)
    if site is None:
        rows = [_Row(label_of(each.name), *_relevances(each)) for each in sites]
    else:
        rows = _input_rows(sites[0], _names(sites[0], input_names))[:count]
    line = math.exp(-0.5 * threshold) if math.isfinite(threshold) else None
    values = np.concatenate([row.relevance.ravel() for row in rows])
    low, high = _limits(values, line)
    with styled(None if ax is None else ax.figure, (6.2, 1.2 + 0.26 * len(rows))) as figure:
        ax = figure.subplots() if ax is None else ax
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        for index, row in enumerate(rows):
            for part, colour in ((~row.kept, GREY), (row.kept, BLUE)):
                _draw_range(ax, -index, row.relevance[part], colour, low)
            kept, size = int(row.kept.sum()), row.kept.size
            only = f"{row.relevance.item():#.2g}" if size == 1 else None
            _beside(ax, -index, only or f"{kept:,} of {size:,} kept")
        key = ["blue: kept, grey: pruned"]
        if line is not None:
            ax.axvline(line, color="black", lw=1.0, ls="--")
            key.append(f"dashed: log α = {threshold:g}")
        if any(row.relevance.size > 1 for row in rows):
            key.append("\nthin: all, thick: middle half, dot: median")
        _rows(ax, [row.label for row in rows], top=0.6)
        ax.set_xlabel(f"{_RELEVANCE} (no unit)")
        whose = ", by layer" if site is None else f" of {label_of(site)}, by input"
        ax.set_title(f"Relevance of the weights{whose}\n" + "; ".join(key).replace("; \n", "\n"))
    return ax


def plot_weight_uncertainty(
    posterior: Posterior,
    site: str | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    count: int | None = 15,
    threshold: float | None = None,
    figure: Canvas | None = None,
) -> Canvas:
    """Weights of a layer as images, three times: mean, standard deviation, and their ratio.

    Args:
        posterior: A fitted posterior.
        site: Site name; the first if None.
        image_shape: As for :func:`~bayes_svdo.analysis.plot_weights`.
        count: Draw as many units, those with most weights left; None for all.
        threshold: Pruned weights are white; the posterior's own threshold if None, ``math.inf`` to
            draw all.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure, three panels of the same units. The scale of the means is symmetric about 0,
        the others begin at 0; all end at the 95 % quantile of what is drawn.

    Raises:
        TypeError: ``posterior`` is no Posterior.
        ValueError: ``site`` is unknown, ``image_shape`` does not fit, ``count`` is below 1, or a
            weight is NaN.
    """
    check_posterior(posterior, "plot_weight_uncertainty")
    name = posterior.guide.sites[0] if site is None else site
    (layer,) = _sites(posterior, name, threshold)
    kept = array(layer.weight(layer.kept)) > 0
    mean = np.where(kept, array(layer.weight(layer.loc)), 0.0)
    sd = np.where(kept, array(layer.weight(layer.sigma)), 0.0)
    ratio = np.divide(np.abs(mean), sd, out=np.zeros_like(mean), where=kept & (sd > 0))
    tiles = [tiles_of(values, image_shape, name) for values in (mean, sd, ratio)]
    left = tiles_of(kept.astype(np.float64), image_shape, name) > 0
    chosen = busiest(np.where(left, tiles[2], 0.0), count)
    panels = ("mean", "standard deviation", _RELEVANCE)
    width, height = mosaic_size(tiles[0][chosen], 3)
    with styled(figure, (width + 1.4, height)) as figure:
        axes = cast("list[Axes]", figure.subplots(1, 3).tolist())
        for ax, values, panel in zip(axes, tiles, panels, strict=True):
            limit = colour_limit(values)
            drawn = values if panel == "mean" else np.where(left, values, _PRUNED)
            image = draw_mosaic(ax, drawn[chosen], limit)
            if panel != "mean":
                image.set_cmap(mpl.colormaps["viridis_r"].with_extremes(bad=SHADE, under="white"))
                image.set_clim(0.0, limit)
            beyond = bool(np.abs(values[chosen]).max() > limit)
            ends = ("both" if panel == "mean" else "max") if beyond else "neither"
            label = "no unit" if panel == _RELEVANCE else "units of the weight"
            bar = figure.colorbar(image, ax=ax, label=label, aspect=25, pad=0.02, extend=ends)
            cast(Any, bar.outline).set_visible(False)
            bar.ax.tick_params(labelsize=TICK_SIZE)
            ax.set_title(panel)
        units = noun_of(mean.ndim)
        order = "of largest relevance" if left.all() else "with most weights left"
        which = f"the {len(chosen)} of {len(left):,} {units} {order}"
        which = which if len(chosen) < len(left) else f"all {len(left):,} {units}"
        kept_of = f"{int(left.sum()):,} of {left.size:,} weights kept"
        figure.suptitle(
            f"{label_of(name)}: {which}; {kept_of}" + ("" if left.all() else " (white: pruned)"),
            x=0.01,
            ha="left",
        )
    return figure


# Weights and their names.


class _Weight(NamedTuple):
    """One weight's posterior."""

    label: str
    mean: float
    sd: float
    relevance: float


class _Row(NamedTuple):
    """Weights that share a row of the forest."""

    label: str
    relevance: Array
    kept: NDArray[np.bool_]


def _sites(posterior: Posterior, site: str | None, threshold: float | None) -> list[SiteDraws]:
    """The site of that name, or all; a scalar as a row of one weight."""
    threshold = posterior.threshold if threshold is None else check_threshold(threshold)
    known = posterior.guide.sites
    if site is not None and site not in known:
        raise unknown_name("site", site, known)
    sites = SiteDraws.of(posterior, threshold, surviving_only=False)
    chosen = [
        each if each.shape else replace(each, shape=(1,), axes=("weight",))
        for each in sites
        if site in (None, each.name)
    ]
    for each in chosen:
        bad = int(each.log_alpha.isnan().sum())
        if bad:
            raise ValueError(f'at site "{each.name}", {bad} values of log alpha are NaN.')
    return chosen


def _relevances(site: SiteDraws) -> tuple[Array, NDArray[np.bool_]]:
    """``|mean| / sd``, zero of pruned weights, and which are kept, of the weight's shape."""
    relevance = array((-0.5 * site.log_alpha.double()).exp())
    return relevance.reshape(site.shape), array(site.kept).astype(bool).reshape(site.shape)


def _most_relevant(site: SiteDraws, count: int, names: Sequence[str] | None) -> list[_Weight]:
    """The ``count`` most relevant weights that are kept, or as many as there are."""
    relevances, kept = _relevances(site)
    relevance, places = relevances.ravel(), np.flatnonzero(kept)
    best = places[np.argsort(-relevance[places], kind="stable")[:count]].tolist()
    return [
        _Weight(
            _label(site, names, tuple(map(int, np.unravel_index(place, site.shape)))),
            float(site.loc[place].detach()),
            float(site.sigma[place].detach()),
            float(relevance[place]),
        )
        for place in best
    ]


def _input_axis(site: SiteDraws) -> int:
    named = [axis for axis in ("input", "token") if axis in site.axes]
    return site.axes.index(named[0]) if named else len(site.shape) - 1


def _names(site: SiteDraws, names: Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    size = site.shape[_input_axis(site)]
    if isinstance(names, str) or len(names) != size:
        came = f"is {names!r}" if isinstance(names, str) else f"holds {len(names)}"
        raise ValueError(
            f'input_names must hold {size} names, one per input of "{site.name}", but {came}.'
        )
    return [str(name) for name in names]


def _label(site: SiteDraws, names: Sequence[str] | None, place: tuple[int, ...]) -> str:
    """Where a weight is, in words; an axis of one, as the unit of a regression, says nothing."""
    parts = []
    for axis, (kind, size, index) in enumerate(zip(site.axes, site.shape, place, strict=True)):
        if names is not None and axis == _input_axis(site):
            parts.append(names[index])
        elif size > 1:
            parts.append(f"{kind.replace('_', ' ')} {index}")
    named = label_of(site.name)
    return f"{named}: {', '.join(parts)}" if parts else named


def _input_rows(site: SiteDraws, names: Sequence[str] | None) -> list[_Row]:
    """A row per input, by descending relevance of its most relevant weight."""
    axis = _input_axis(site)
    relevance, kept = (np.moveaxis(each, axis, 0) for each in _relevances(site))
    labels = names or [f"{site.axes[axis].replace('_', ' ')} {i}" for i in range(len(kept))]
    rows = [
        _Row(label, values.ravel(), part.ravel())
        for label, values, part in zip(labels, relevance, kept, strict=True)
    ]
    return sorted(rows, key=lambda row: -float(row.relevance.max()))


# Rows.


def _limits(values: Array, line: float | None) -> tuple[float, float]:
    """Ends of a logarithmic axis for relevances."""
    positive = values[values > 0]
    middle = line if line is not None else (float(np.median(positive)) if positive.size else 1.0)
    floor = middle * 10.0**-_DECADES_BELOW
    low = max(floor, float(positive.min(initial=middle)) / 2)
    return low, 2 * max(float(positive.max(initial=middle)), middle)


def _draw_range(ax: Axes, y: float, values: Array, colour: str, low: float) -> None:
    """Range, middle half and median, as far as they lie right of ``low``."""
    if not values.size:
        return
    start, first, middle, third, end = np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0])
    for left, right, width in ((start, end, 1.0), (first, third, 3.0)):
        if right > low:
            ends = [max(left, low), right]
            ax.plot(ends, [y, y], color=colour, lw=width, solid_capstyle="butt")
    if middle > low:
        ax.plot(middle, y, "o", color=colour, ms=4)
    if start < low:
        ax.plot(low, y, "<", color=colour, ms=4, clip_on=False)


def _rows(ax: Axes, labels: Sequence[str], top: float) -> None:
    """Name the rows, the first on top."""
    ax.set_yticks([-row for row in range(len(labels))], labels)
    ax.set_ylim(0.4 - len(labels), top)
    ax.tick_params(labelsize=TICK_SIZE)
    ax.tick_params(axis="y", length=0)


def _with_error(mean: float, sd: float) -> str:
    """``0.361 ± 0.036``: both to the second digit of the error."""
    digits = max(0, 1 - int(f"{sd:.1e}".partition("e")[2]))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _beside(ax: Axes, y: float, text: str) -> None:
    ax.text(
        1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=TICK_SIZE
    )  # fmt: skip
