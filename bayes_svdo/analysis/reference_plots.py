"""Pictures of how good ``q`` is: its marginals over draws by NUTS, and ranks of simulated truths.

As in :mod:`bayes_svdo.analysis.plots`, what fits one panel takes ``ax`` and returns it; what needs
several takes ``figure``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.draws import SiteDraws
from bayes_svdo.analysis.figures import (
    BLUE,
    GREY,
    ORANGE,
    SHADE,
    TICK_SIZE,
    Array,
    Canvas,
    array,
    check_posterior,
    styled,
)
from bayes_svdo.analysis.nuts import NutsPosterior
from bayes_svdo.analysis.nuts_comparison import check_same_weights
from bayes_svdo.analysis.posterior_plots import _label, _names
from bayes_svdo.analysis.sbc import SimulatedCalibration
from bayes_svdo.inference.arguments import check_count
from bayes_svdo.inference.posterior import Posterior

_BINS = (10, 50)  # fewest and most of a marginal's histogram: the root of the number of draws
_SHOWN = (0.005, 0.995)  # quantiles of what is drawn of a marginal
_COLUMNS = 4  # at most
_HEADROOM = 4.0  # of the histogram's tallest bin, above which q is cut off
_BAND = 0.95


def plot_nuts_marginal(
    posterior: Posterior,
    nuts: NutsPosterior,
    site: str | None = None,
    place: Sequence[int] | None = None,
    *,
    input_names: Sequence[str] | None = None,
    truth: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Density of one weight under ``q``, over the histogram of the draws of the exact posterior.

    Args:
        posterior: The fitted one.
        nuts: What :func:`~bayes_svdo.analysis.nuts_posterior` drew for the same model.
        site: Whose weight; the first if None.
        place: Index of the weight in the site; the first weight if None.
        input_names: Of the inputs of the site, for the title.
        truth: A line at the true weight, in simulations.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes. A ``q`` too narrow to be drawn goes through the top, with its height in numbers;
        a point mass (a weight pruned while training) is an arrow.

    Raises:
        TypeError: ``posterior`` is no Posterior, or ``nuts`` no NutsPosterior.
        ValueError: They are of different models, or there is no such weight.
    """
    chosen, index, label = _weight(posterior, nuts, site, place, input_names)
    with styled(None if ax is None else ax.figure, (4.0, 2.8)) as figure:
        ax = figure.subplots() if ax is None else ax
        _draw(ax, chosen, index, nuts, truth)
        ax.set(xlabel="weight (output per unit of input)", ylabel="density", title=label)
        ax.legend(handles=_key(truth is not None), loc="best")
    return ax


def plot_nuts_marginals(
    posterior: Posterior,
    nuts: NutsPosterior,
    site: str | None = None,
    *,
    count: int = 8,
    input_names: Sequence[str] | None = None,
    truth: Sequence[float] | Array | None = None,
    figure: Canvas | None = None,
) -> Canvas:
    """:func:`plot_nuts_marginal` of the first weights of a site, a panel each.

    Args:
        posterior: The fitted one.
        nuts: Draws for the same model.
        site: Whose weights; the first if None.
        count: At most so many.
        input_names: Of the inputs of the site.
        truth: True weights, in the order of the flattened site, to mark.
        figure: Where to draw; a new figure if None.

    Raises:
        TypeError: ``posterior`` is no Posterior, or ``nuts`` no NutsPosterior.
        ValueError: They are of different models, there is no such site, or ``count`` is below 1,
            or ``truth`` or ``input_names`` does not fit.
    """
    count = check_count("count", count)
    chosen, _, _ = _weight(posterior, nuts, site, None, input_names)
    if truth is not None and len(truth) != len(chosen):
        raise ValueError(
            f'truth must hold the {len(chosen)} weights of "{chosen.name}", but holds {len(truth)}.'
        )
    count = min(count, len(chosen))
    rows = -(-count // _COLUMNS)
    columns = -(-count // rows)
    with styled(figure, (0.6 + 2.1 * columns, 0.7 + 1.75 * rows)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for index, ax in enumerate(axes.flat):
            if index >= count:
                ax.set_axis_off()
                continue
            place = tuple(map(int, np.unravel_index(index, chosen.shape)))
            _, _, label = _weight(posterior, nuts, chosen.name, place, input_names)
            _draw(ax, chosen, index, nuts, None if truth is None else float(truth[index]))
            ax.set_title(label)
        figure.supxlabel("weight (output per unit of input)", fontsize="medium")
        figure.supylabel("density", fontsize="medium")
        key = _key(truth is not None)
        figure.legend(handles=key, loc="outside upper center", ncols=len(key))
    return figure


def plot_sbc_ranks(
    calibration: SimulatedCalibration,
    bins: int = 20,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Histogram of the ranks of simulated truths, all weights together, which should be flat.

    Args:
        calibration: Of :func:`~bayes_svdo.analysis.simulation_based_calibration`.
        bins: Of the histogram.
        title: Of the panel; None for one that says how many truths there are.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, with the band in which 95 % of the bars of uniform, independent ranks lie.
        Weights of one repetition are not quite independent, so a few more may leave it.

    Raises:
        TypeError: ``calibration`` is no SimulatedCalibration.
        ValueError: ``bins`` is out of range.
    """
    from scipy.stats import binom

    if not isinstance(calibration, SimulatedCalibration):
        raise TypeError(
            f"calibration must be a SimulatedCalibration, but is a {type(calibration).__name__}."
        )
    counts = calibration.histogram(bins)
    total, sizes = calibration.ranks.size, calibration._sizes(bins)
    part = sizes / (calibration.num_draws + 1)
    low, high = (binom.ppf(q, total, part) for q in (0.5 - _BAND / 2, 0.5 + _BAND / 2))
    edges = np.concatenate([[0.0], np.cumsum(part)])
    with styled(None if ax is None else ax.figure, (4.0, 2.8)) as figure:
        ax = figure.subplots() if ax is None else ax
        # Per truth and unit of rank: bins may differ by one rank.
        scale = 1 / (total * part)
        ends = [np.append(each * scale, (each * scale)[-1]) for each in (low, high)]
        ax.fill_between(edges, ends[0], ends[1], step="post", color=SHADE, lw=0)
        ax.axhline(1.0, color=GREY, lw=1.0)
        ax.stairs(counts * scale, edges, color=BLUE, lw=1.4, baseline=None)
        ax.set(
            xlim=(0, 1),
            xlabel="rank of the truth among draws (fraction)",
            ylabel="frequency (1: calibrated)",
            title=title or f"Ranks of {total:,} true weights",
        )
        ax.set_ylim(0, 1.1 * max(float((counts * scale).max()), float(ends[1].max())))
        ax.tick_params(labelsize=TICK_SIZE)
    return ax


def _weight(
    posterior: Posterior,
    nuts: NutsPosterior,
    site: str | None,
    place: Sequence[int] | None,
    input_names: Sequence[str] | None,
) -> tuple[SiteDraws, int, str]:
    """The site, the weight's index in it, flattened, and its label."""
    check_posterior(posterior, "plot_nuts_marginal")
    sites = {each.name: each for each in check_same_weights(posterior, nuts)}
    if site is not None and site not in sites:
        raise unknown_name("site", site, sites)
    chosen = next(iter(sites.values())) if site is None else sites[site]
    where = tuple(int(i) for i in (place if place is not None else [0] * len(chosen.shape)))
    fits = len(where) == len(chosen.shape) and all(
        0 <= i < size for i, size in zip(where, chosen.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f'place must be an index into "{chosen.name}" of shape {chosen.shape}, but is {where}.'
        )
    index = int(np.ravel_multi_index(where, chosen.shape))
    return chosen, index, _label(chosen, _names(chosen, input_names), where)


def _draw(ax: Axes, site: SiteDraws, index: int, nuts: NutsPosterior, truth: float | None) -> None:
    draws = nuts.weights[site.name].reshape(len(nuts), -1)[:, index]
    mean, sd = float(array(site.loc)[index]), float(array(site.sigma)[index])
    low, high = np.quantile(draws, _SHOWN)
    low, high = min(low, mean - 3 * sd), max(high, mean + 3 * sd)
    if truth is not None:
        low, high = min(low, truth), max(high, truth)
    margin = 0.04 * (high - low)
    bins = round(min(max(math.sqrt(len(draws)), _BINS[0]), _BINS[1]))
    edges = np.linspace(low - margin, high + margin, bins + 1)
    counts, _ = np.histogram(draws, edges)
    heights = counts / (len(draws) * (edges[1] - edges[0]))  # draws outside count, too
    ax.stairs(heights, edges, color=GREY, fill=True)
    top = _HEADROOM * float(heights.max())
    if sd > 0:
        peak = 1 / (sd * math.sqrt(2 * math.pi))
        x = np.union1d(np.linspace(edges[0], edges[-1], 400), mean + sd * np.linspace(-4, 4, 161))
        x = x[(x >= edges[0]) & (x <= edges[-1])]
        ax.plot(x, peak * np.exp(-0.5 * ((x - mean) / sd) ** 2), color=BLUE, lw=1.4)
        top = min(top, max(1.1 * peak, 1.1 * float(heights.max())))
        if peak > top:
            half_width = sd * math.sqrt(2 * math.log(peak / top))
            _beside_peak(ax, mean + half_width, f"peak {peak:.0f}")
    else:
        ax.annotate(
            "", (mean, 1.0), (mean, 0.0), xycoords=ax.get_xaxis_transform(),
            arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 1.4},
        )  # fmt: skip
        _beside_peak(ax, mean, "point mass")
    if truth is not None:
        ax.axvline(truth, color=ORANGE, lw=1.2, ls="--")
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(0, top)
    ax.tick_params(labelsize=TICK_SIZE)


def _beside_peak(ax: Axes, x: float, text: str) -> None:
    ax.annotate(
        text, (x, 0.97), xycoords=ax.get_xaxis_transform(), xytext=(4, 0),
        textcoords="offset points", va="top", fontsize=7, color=BLUE,
    )  # fmt: skip


def _key(truth: bool) -> list[Patch | Line2D]:
    key: list[Patch | Line2D] = [
        Patch(fc=GREY, label="NUTS, proper prior"),
        Line2D([], [], color=BLUE, lw=1.4, label="q, the fitted Gaussian"),
    ]
    if truth:
        key.append(Line2D([], [], color=ORANGE, lw=1.2, ls="--", label="truth"))
    return key
