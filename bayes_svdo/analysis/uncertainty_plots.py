"""Pictures of what a posterior predicts and whether its uncertainty can be trusted.

Bands of a regression, images sorted by uncertainty, reliability diagram, risk against coverage.
Every function takes ``ax`` and returns it; without one a new figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import offset_copy
from numpy.typing import NDArray

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.calibration import Reliability
from bayes_svdo.analysis.figures import (
    BLUE,
    GREY,
    ORANGE,
    TICK_SIZE,
    Array,
    array,
    layer_colours,
    styled,
)
from bayes_svdo.analysis.predictives import (
    ClassificationPredictive,
    RegressionPredictive,
    check_labels,
)
from bayes_svdo.analysis.selective import RiskCoverage
from bayes_svdo.inference.arguments import check_count
from bayes_svdo.inference.inputs import as_tensor

Kind = Literal["entropy", "mutual_information"]
Which = Literal["most", "least", "spread"]
_T = TypeVar("_T")

_LEVELS = (0.95, 0.5)
_SHADES = {0.95: 0.18, 0.5: 0.35}
_DASHES = {0.95: "-", 0.5: "--"}
_CAPTION_SIZE = 7.0
_GAP = 0.35  # between columns, of the width of an image
_INCHES = 0.7  # width of an image
_MOST_COLUMNS = 8
_BELOW_LABEL = 34.0  # points from an axis to what stands below its label
# Of legends: beside the axes of a figure of our own, inside of axes that may have neighbours.
_RIGHT: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
_INSIDE: dict[str, Any] = {
    "loc": "best",
    "frameon": True,
    "framealpha": 0.8,
    "edgecolor": GREY,
    "fontsize": TICK_SIZE - 1,
}


def plot_predictive_bands(
    predictive: RegressionPredictive,
    x: Any,
    data: Sequence[Any] | None = None,
    *,
    xlabel: str = "x",
    ylabel: str = "y",
    ax: Axes | None = None,
) -> Axes:
    """Mean and central 50 % and 95 % intervals of a regression of one input.

    Two kinds of intervals are drawn: filled those of a new target (epistemic and noise), as lines
    those of the function alone (epistemic): what lies between is noise.

    Args:
        predictive: Of one target, for the inputs ``x``: shape ``(N,)`` or ``(N, 1)``.
        x: Inputs, shape ``(N,)`` or ``(N, 1)``, in any order; two or more.
        data: Observations ``(x, y)`` to draw as points, all of them, also beyond ``x``.
        xlabel: With its unit.
        ylabel: With its unit.
        ax: Where to draw, with the legend inside; a new figure if None.

    Raises:
        TypeError: ``predictive`` is no RegressionPredictive, or ``data`` no pair.
        ValueError: Shapes do not go together, or a value is not finite.
    """
    if not isinstance(predictive, RegressionPredictive):
        raise _no("predictive", "RegressionPredictive", predictive)
    if data is not None and (not isinstance(data, (tuple, list)) or len(data) != 2):
        raise TypeError(f"data must be a pair (x, y), but is a {type(data).__name__}.")
    inputs = _column(x, "x")
    mean = _column(predictive.mean, "predictive.mean")
    if len(inputs) != len(mean) or len(mean) < 2:
        raise ValueError(
            f"x must hold the {len(mean)} inputs of predictive, at least 2, but holds "
            f"{len(inputs)}."
        )
    points = None
    if data is not None:
        points = _column(data[0], "data[0]"), _column(data[1], "data[1]")
        if len(points[0]) != len(points[1]):
            raise ValueError(
                f"data must be x and y of one length, but they have {len(points[0])} and "
                f"{len(points[1])}."
            )
    order = np.argsort(inputs, kind="stable")
    inputs, mean = inputs[order], mean[order]
    inside = ax is not None
    with styled(None if ax is None else ax.figure, (6.4, 3.6)) as figure:
        ax = figure.subplots() if ax is None else ax
        key: list[Any] = []
        for level in _LEVELS:
            low, high = (array(end).ravel()[order] for end in predictive.interval(level))
            shade = _SHADES[level]
            ax.fill_between(inputs, low, high, color=BLUE, alpha=shade, lw=0)
            # The inner band lies on the outer one.
            opaque = (
                shade if level == _LEVELS[0] else 1 - math.prod(1 - s for s in _SHADES.values())
            )
            key.append(
                Patch(fc=BLUE, alpha=opaque, lw=0, label=f"{100 * level:.0f} % of new targets")
            )
        for level in _LEVELS:
            style: dict[str, Any] = {"color": ORANGE, "lw": 1.0, "ls": _DASHES[level]}
            for end in _function_interval(predictive, level):
                ax.plot(inputs, end[order], **style)
            key.append(
                Line2D([], [], **style, label=f"{100 * level:.0f} % of functions (epistemic)")
            )
        ax.plot(inputs, mean, color="black", lw=1.4)
        key.append(Line2D([], [], color="black", lw=1.4, label="mean"))
        if points is not None:
            ax.plot(*points, "o", color="black", ms=2.5, mew=0, alpha=0.7)
            key.append(Line2D([], [], ls="", marker="o", color="black", ms=3, label="data"))
        drawn = inputs if points is None else np.concatenate([inputs, points[0]])
        ax.set_xlim(drawn.min(), drawn.max())
        ax.set(xlabel=xlabel, ylabel=ylabel, title="What is predicted, and how surely")
        ax.tick_params(labelsize=TICK_SIZE)
        ax.legend(handles=key, **(_INSIDE if inside else _RIGHT))
    return ax


def plot_uncertain_images(
    predictive: ClassificationPredictive,
    images: Any,
    y: Any = None,
    *,
    by: Kind = "entropy",
    which: Which = "most",
    count: int = 24,
    class_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Images by descending uncertainty, with what was predicted, what is true, and how many nats.

    Args:
        predictive: Of one label per image, for all images: probabilities of shape ``(N, K)``, or
            ``(N, 1, K)``.
        images: Shape ``(N, height, width)`` or ``(N, channels, height, width)`` with 1 or 3
            channels, numbers from 0 to 1.
        y: True labels, one per image; a wrong prediction is in colour and has both names.
        by: ``"entropy"`` (total) or ``"mutual_information"`` (epistemic).
        which: The ``"most"`` or the ``"least"`` uncertain ones, or ``"spread"`` evenly over all
            ranks, from the most to the least uncertain.
        count: How many.
        class_names: One per class; its number if None.
        ax: Where to draw; a new figure if None.

    Raises:
        TypeError: ``predictive`` is no ClassificationPredictive, or labels are not whole numbers.
        ValueError: Shapes do not go together, ``by`` or ``which`` is unknown, ``count`` is below
            1, or pixels lie outside of 0 to 1.
    """
    if not isinstance(predictive, ClassificationPredictive):
        raise _no("predictive", "ClassificationPredictive", predictive)
    for name, value, known in (("by", by, get_args(Kind)), ("which", which, get_args(Which))):
        if value not in known:
            raise unknown_name(name, value, known)
    count = check_count("count", count)
    log_p = predictive.log_probabilities
    if math.prod(log_p.shape[1:-1]) != 1:
        raise ValueError(
            "predictive must have one label per image, probabilities of shape (N, K), but they "
            f"have shape {tuple(log_p.shape)}."
        )
    pixels = _pixels(images, len(log_p))
    names = _class_names(class_names, log_p.shape[-1])
    predicted = predictive.predict().flatten().cpu().numpy()
    truth = predicted if y is None else check_labels(y, log_p).flatten().cpu().numpy()
    uncertainty = array(getattr(predictive, by)).ravel()
    order = np.argsort(-uncertainty, kind="stable")
    chosen = _ranks(order, which, count)
    wrong = (truth != predicted)[chosen]
    captions = _captions(
        [names[index] for index in predicted[chosen]],
        [names[truth[index]] if truth[index] != predicted[index] else None for index in chosen],
        [_nats(value) for value in uncertainty[chosen]],
    )
    caption = 0.16 + 0.17 * max(text.count("\n") + 1 for text in captions)
    pitch = max(1 + _GAP, _width(captions) + 0.15)
    columns = min(len(chosen), max(1, int(_MOST_COLUMNS * (1 + _GAP) / pitch)))
    rows = -(-len(chosen) // columns)
    ratio = pixels.shape[1] / pixels.shape[2]
    side = 0.5 * (pitch - 1)  # of an image, for its caption
    wide, high = columns * pitch, rows * (ratio + caption) + 0.1
    size = (_INCHES * wide + 0.1, _INCHES * high + (0.3 if y is None else 0.46))
    with styled(None if ax is None else ax.figure, size) as figure:
        caption_size = _CAPTION_SIZE
        if ax is not None:  # captions go with the images
            box = ax.get_window_extent()
            inches = min(box.width / wide, box.height / high) / figure.dpi
            caption_size *= min(1.0, inches / _INCHES)
        ax = figure.subplots() if ax is None else ax
        for place, index in enumerate(chosen):
            row, column = divmod(place, columns)
            left, top = column * pitch, -row * (ratio + caption)
            ax.imshow(
                pixels[index],
                cmap="gray_r",
                vmin=0.0,
                vmax=1.0,
                extent=(left, left + 1, top - ratio, top),
                interpolation="nearest",
            )
            ax.text(
                left + 0.5,
                top - ratio - 0.06,
                captions[place],
                ha="center",
                va="top",
                fontsize=caption_size,
                color=ORANGE if wrong[place] else "black",
                linespacing=1.1,
            )
        ax.set_xlim(-side, wide - side)
        ax.set_ylim(0.08 - high, 0.08)
        ax.set_aspect("equal", anchor="N")  # the title stays where the layout made room for it
        ax.set_axis_off()
        shown = {
            "most": f"The {len(chosen)} most uncertain of {len(order):,} images",
            "least": f"The {len(chosen)} least uncertain of {len(order):,} images",
            "spread": f"{len(chosen)} of {len(order):,} images, from most to least uncertain",
        }[which]
        ax.set_title(
            f"{shown}, by {by.replace('_', ' ')}"
            + ("" if y is None else "\nbelow: the prediction, in colour where wrong")
        )
    return ax


def plot_reliability(
    reliability: Reliability | Mapping[str, Reliability], *, ax: Axes | None = None
) -> Axes:
    """Reliability diagram: accuracy against confidence, with the calibration error and the counts.

    Args:
        reliability: As :func:`~bayes_svdo.analysis.reliability` gives it, or several by name.
        ax: Where to draw, with the legend inside; a new figure if None.

    Returns:
        The axes. The area of a point is in proportion to its bin's count; the bar is the 95 %
        interval of the bin's accuracy (Wilson, 1927). Both axes have one scale, which begins
        where the lowest of them does.

    Raises:
        TypeError: ``reliability`` is neither.
        ValueError: It is an empty mapping.
    """
    curves = _by_name(reliability, "reliability", Reliability)
    several = len(curves) > 1 or isinstance(reliability, Mapping)
    bounds = {name: _accuracy_interval(each) for name, each in curves.items()}
    lowest = min(
        min(float(each.confidence.min()), float(bounds[name][0].min()))
        for name, each in curves.items()
    )
    low = max(0.0, math.floor(10 * lowest) / 10)
    inside = ax is not None
    with styled(None if ax is None else ax.figure, (4.4, 4.7)) as figure:
        ax = figure.subplots() if ax is None else ax
        ax.plot([low, 1.0], [low, 1.0], color=GREY, lw=1.0, zorder=0)
        colours = layer_colours(len(curves))
        for (name, each), colour in zip(curves.items(), cast("list[str]", colours), strict=True):
            lower, upper = bounds[name]
            ax.vlines(each.confidence, lower, upper, color=colour, lw=1.0, alpha=0.6)
            area = 40.0 * each.count / each.count.max()
            few, many = int(each.count.min()), int(each.count.max())
            held = f"{few:,}" if few == many else f"{few:,} to {many:,}"
            label = f"ECE {100 * each.ece:.1f} %, {len(each.count)} bins of {held}"
            label = f"{name}: {label}" if several else label
            ax.scatter(each.confidence, each.accuracy, s=area, color=colour, label=label)
        margin = 0.02 * (1 - low)
        ax.set_xlim(low, 1.0 + margin)
        ax.set_ylim(low, 1.0 + margin)
        ax.set_aspect("equal")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        ax.tick_params(labelsize=TICK_SIZE)
        ax.set(
            xlabel="confidence in the prediction (%)",
            ylabel="predictions that are right (%)",
        )
        ax.set_title("Reliability (below the line: too sure)")
        if inside:
            ax.legend(**_INSIDE)
            return ax
        below = offset_copy(ax.transAxes, fig=cast(Any, figure), y=-_BELOW_LABEL, units="points")
        ax.legend(
            loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=below, borderaxespad=0.0
        )
    return ax


def plot_risk_coverage(
    curves: RiskCoverage | Mapping[str, RiskCoverage],
    *,
    ylabel: str | None = None,
    percent: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Risk of the predictions that are kept, if the most uncertain are left out.

    Args:
        curves: As :func:`~bayes_svdo.analysis.risk_coverage` gives it, or several by name.
        ylabel: What the loss is, with its unit; None for mean loss, or errors if in percent.
        percent: Whether to show the risk in percent, for losses of 0 and 1.
        ax: Where to draw, with the legend inside; a new figure if None.

    Returns:
        The axes, with the area under each curve (AURC) in the legend. The dotted lines are what
        leaving out at random would give.

    Raises:
        TypeError: ``curves`` is neither.
        ValueError: It is an empty mapping.
    """
    given = _by_name(curves, "curves", RiskCoverage)
    several = len(given) > 1 or isinstance(curves, Mapping)
    if ylabel is None:
        ylabel = "errors among those kept (%)" if percent else "mean loss of those kept"
    inside = ax is not None
    with styled(None if ax is None else ax.figure, (6.4, 3.4)) as figure:
        ax = figure.subplots() if ax is None else ax
        colours = cast("list[str]", layer_colours(len(given)))
        for (name, curve), colour in zip(given.items(), colours, strict=True):
            area = f"{100 * curve.area:.2f} %" if percent else f"{curve.area:.3g}"
            label = f"{name}: AURC {area}" if several else f"AURC {area}"
            ax.plot(curve.coverage, curve.risk, color=colour, label=label)
            ax.axhline(float(curve.risk[-1]), color=colour, lw=0.8, ls=":", zorder=0)
        ax.set_xlim(0.0, 1.0)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0] if _negative(given) else 0.0))
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        if percent:
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        ax.tick_params(labelsize=TICK_SIZE)
        ax.set(xlabel="coverage: surest predictions kept (%)", ylabel=ylabel)
        ax.set_title("Risk of the predictions kept (dotted: at random)")
        ax.legend(**(_INSIDE if inside else _RIGHT))
    return ax


# Arguments.


def _no(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{name} must be a {expected}, but is a {type(value).__name__}.")


def _by_name(value: _T | Mapping[str, _T], name: str, kind: type[_T]) -> dict[str, _T]:
    """One thing, or several by name."""
    several = dict(value) if isinstance(value, Mapping) else {"": value}
    if not several:
        raise ValueError(f"{name} is empty.")
    for each in several.values():
        if not isinstance(each, kind):
            raise _no(name, f"{kind.__name__}, or a mapping of names to such", each)
    return cast("dict[str, _T]", several)


def _column(value: Any, name: str) -> Array:
    tensor = as_tensor(value, name)
    if tensor.dim() not in (1, 2) or (tensor.dim() == 2 and tensor.shape[1] != 1):
        raise ValueError(f"{name} must have shape (N,) or (N, 1), but has {tuple(tensor.shape)}.")
    return array(tensor).ravel()


def _pixels(images: Any, number: int) -> Array:
    """Images as matplotlib takes them: ``(N, height, width)``, or with 3 colours last."""
    pixels = array(as_tensor(images, "images"))
    shape = pixels.shape
    if pixels.ndim == 4 and shape[1] == 1:
        pixels = pixels[:, 0]
    elif pixels.ndim == 4 and shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    elif pixels.ndim != 3:
        raise ValueError(
            "images must have shape (N, height, width) or (N, channels, height, width) with 1 or 3 "
            f"channels, but have {shape}."
        )
    if len(pixels) != number:
        raise ValueError(f"images must be the {number} of predictive, but are {len(pixels)}.")
    if pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(
            "images must hold numbers from 0 to 1, but reach from "
            f"{pixels.min():.3g} to {pixels.max():.3g}."
        )
    return pixels


def _class_names(names: Sequence[str] | None, number: int) -> list[str]:
    if names is None:
        return [str(index) for index in range(number)]
    if isinstance(names, str) or len(names) != number:
        raise ValueError(f"class_names must be a list of {number} names, but is {names!r}.")
    return [str(name) for name in names]


# Numbers to draw.


def _function_interval(predictive: RegressionPredictive, level: float) -> tuple[Array, Array]:
    """Ends of the central interval of the network's output over draws, without noise."""
    if len(predictive.component_means) > 1:
        tails = [0.5 - 0.5 * level, 0.5 + 0.5 * level]
        low, high = np.quantile(array(predictive.component_means), tails, axis=0)
        return low.ravel(), high.ravel()
    mean, sd = array(predictive.mean).ravel(), array(predictive.epistemic_variance.sqrt()).ravel()
    z = math.sqrt(2) * float(as_tensor([level], "level").erfinv())
    return mean - z * sd, mean + z * sd


def _nats(value: float) -> str:
    return f"{value:#.2g} nats" if value >= 1e-3 else "< 0.001 nats"


def _captions(
    predicted: Sequence[str], actual: Sequence[str | None], nats: Sequence[str]
) -> list[str]:
    """Both names in one line, or in two if that is too long for an image."""
    for between in (", ", ",\n"):
        captions = [
            "".join((name, "" if other is None else f"{between}is {other}", "\n", number))
            for name, other, number in zip(predicted, actual, nats, strict=True)
        ]
        if _width(captions) <= 1 + 0.5 * _GAP:
            break
    return captions


def _width(captions: Sequence[str]) -> float:
    """Of the longest line, in widths of an image."""
    lines = {line for caption in captions for line in caption.split("\n")}
    points = (TextPath((0, 0), line, size=_CAPTION_SIZE).get_extents().width for line in lines)
    return 1.1 * max(points) / (72 * _INCHES)  # glyphs fitted to pixels take more room


def _ranks(order: NDArray[np.intp], which: Which, count: int) -> NDArray[np.intp]:
    if which == "least":
        return order[-count:]
    if which == "most" or count >= len(order):
        return order[:count]
    return order[np.linspace(0, len(order) - 1, count).round().astype(np.intp)]


def _accuracy_interval(reliability: Reliability) -> tuple[Array, Array]:
    """95 % interval of every bin's accuracy."""
    from scipy.stats import binomtest

    right = np.round(reliability.accuracy * reliability.count).astype(int)
    ends = [
        binomtest(k, n).proportion_ci(0.95, method="wilson")
        for k, n in zip(right.tolist(), reliability.count.tolist(), strict=True)
    ]
    return np.array([end.low for end in ends]), np.array([end.high for end in ends])


def _negative(curves: Mapping[str, RiskCoverage]) -> bool:
    return any(float(curve.risk.min()) < 0 for curve in curves.values())
