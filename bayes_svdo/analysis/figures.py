"""What all our pictures share: style, colours, figures and names."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from bayes_svdo.inference.posterior import Posterior

Array = NDArray[np.float64]
Canvas = Figure | SubFigure

# Okabe & Ito (2008), the hues that stay apart on white and for every kind of colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
GREY, SHADE = "0.72", "0.93"
TICK_SIZE = 8.0  # no part of the style: ticks are made when the figure is drawn, after it
_DPI = 150
_STYLE = {
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "figure.titlesize": 10.5,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.4,
}
# These draw into files or buffers; of a figure that pyplot keeps for them nobody would see a thing.
_BACKENDS_WITHOUT_SCREEN = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


@contextmanager
def styled(canvas: Canvas | None, size: tuple[float, float]) -> Iterator[Canvas]:
    """The canvas given, or a new figure of ``size`` inches, and our style as long as it is drawn.

    A new figure is made outside of the style: with the first one pyplot loads its backend, which
    makes settings that must outlast ours.
    """
    canvas = _new_figure(size) if canvas is None else canvas
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield canvas


def _new_figure(size: tuple[float, float]) -> Figure:
    """A figure that pyplot shows, or, where pyplot could not show it, one it never hears of.

    Notebooks and ``plt.show()`` display what pyplot keeps, and it keeps a figure until somebody
    closes it. A program that only writes files would pile them up, so there the figure lives as
    long as its last reference.
    """
    in_use = {"matplotlib.pyplot", "ipykernel"} & sys.modules.keys()
    if in_use and mpl.get_backend().lower() not in _BACKENDS_WITHOUT_SCREEN:
        from matplotlib import pyplot as plt

        return plt.figure(figsize=size, layout="constrained", dpi=_DPI)
    return Figure(figsize=size, layout="constrained", dpi=_DPI)


def label_of(site: str) -> str:
    """A site's name as it stands in a picture."""
    return site.removesuffix(".weight")


def layer_colours(number: int) -> list[object]:
    """Hues for a few layers; for many a scale from the first to the last."""
    if number <= len(PALETTE):
        return list(PALETTE[:number])
    return list(mpl.colormaps["viridis"](np.linspace(0.0, 0.9, number)))


def array(tensor: Tensor) -> Array:
    """A tensor of any device and floating dtype in float64."""
    return np.asarray(tensor.detach().double().cpu().numpy())


def compressed(compression: float) -> str:
    """A compression ratio in words."""
    if math.isinf(compression):
        return "no weight left"
    return f"compressed {compression:,.{1 if compression < 10 else 0}f}x"


def check_posterior(posterior: object, function: str) -> None:
    """Raise TypeError in the name of ``function`` if ``posterior`` is none."""
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"{function} needs a Posterior, as fit returns it, but posterior is a "
            f"{type(posterior).__name__}."
        )
